"""The sign-consistency gate: how far the teacher is trusted on each token, decided without gradient.

The gate compares the teacher's preference for a token with the outcome of the whole completion. A rule (`rules.py`)
turns both into a case and a factor; the factor scales the token's advantage.

Sources, as in the documentation's page on the method: [P] the SG-OPD abstract (arXiv 2606.09304), [N] notes by readers
of its full text, [R] its reproductions, [G] G-OPD (arXiv 2602.12125), [O] our own reading. All logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .rules import CONFLICT, CONSENSUS, GATE_RULES, NEUTRAL

DIVERGENCES = ("full", "top_k")  # of whole distributions, or of what is known of them; no policy gradients
ESTIMATORS = ("sampled", *DIVERGENCES)
REFERENCES = ("current", "initial")
SIGNALS = ("verdict", "group")
LOG_RATIO_FORMS = ("log", "power")
QUANTILES = {"delta/p01": 0.01, "delta/p05": 0.05, "delta/p50": 0.50, "delta/p95": 0.95, "delta/p99": 0.99}
HUGE = 1e30  # nats, in place of an infinite delta in a sum


@dataclass(frozen=True)
class GateSettings:
    """All that decides a token's factor, advantage and loss.

    Raises:
        ValueError: a value out of its range, or two that do not go together, by name.
    """

    extrapolation: float = 1.8  #: Factor where teacher and outcome agree, finite and >= 0 [R]; rule "sign".
    interpolation: float = 1.0  #: Factor where they disagree, finite and >= 0 [R]; > 0 with the initial reference.
    estimator: str = "sampled"
    """"sampled": policy gradient on the sampled token. "full": divergence of the whole distribution. "top_k": of the
    teacher's `top_k` likeliest ids and one bucket for the rest."""
    dead_zone: float = 0.0  #: `abs(delta)` up to this many nats is neutral, >= 0 [O].
    log_ratio_clip: float | None = None
    """c > 0 clips each log-ratio of the sampled estimator to [-c, c] nats; `None` clips nothing."""
    temperature: float = 1.0  #: Divides all logits, > 0.
    rule: str = "sign"  #: A key of `GATE_RULES`.
    reference: str = "current"  #: Policy that the reward is measured against: "current" or "initial".
    signal: str = "verdict"
    """What the gate's sign is of: "verdict" [P], or "group", the outcome less the mean of its prompt's group [N]."""
    neutral: float = 1.0  #: Factor where one of both takes no side, finite and >= 0 [O]; rules "sign" and "row".
    beta: float = 1e-3  #: Sharpness of the rule "sigmoid", finite and >= 0; 0 is plain OPD (arXiv 2609.35517).
    row_threshold: float = 0.0  #: Nats by which a row's delta must agree in the rule "row", >= 0 (arXiv 2607.04037).
    advantage_weight: float = 0.0  #: w >= 0 adds w times GRPO's group advantage to `A_t`; sampled estimator.
    log_ratio_form: str = "log"
    """"log": differences of log-probabilities. "power": of probabilities to the power `log_ratio_power` (PowerOPD)."""
    log_ratio_power: float = 0.5  #: PowerOPD's exponent, > 0 and at most 1 [O].
    top_k: int = 64  #: The teacher's likeliest ids of a position in the estimator "top_k", >= 1 [O].
    names: InitVar[Mapping[str, str] | None] = None
    """What errors call the fields, where the caller has other names for them."""

    def __post_init__(self, names: Mapping[str, str] | None) -> None:
        def named(field: str) -> str:
            return f"`{(names or {}).get(field, field)}`"

        self._check_ranges(named)
        self._check_pairs(named)

    def _check_ranges(self, named: Callable[[str], str]) -> None:
        numbers = ("extrapolation", "interpolation", "neutral", "dead_zone", "beta", "row_threshold")
        for field in (*numbers, "advantage_weight"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{named(field)} must be a number, finite and >= 0; got {value!r}.")
        choices: dict[str, tuple[str, ...]] = {"rule": tuple(GATE_RULES), "estimator": ESTIMATORS}
        choices |= {"reference": REFERENCES, "signal": SIGNALS, "log_ratio_form": LOG_RATIO_FORMS}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                either = " or ".join(map(repr, allowed))
                raise ValueError(f"{named(field)} must be {either}, got {getattr(self, field)!r}.")
        clip, power, temperature = self.log_ratio_clip, self.log_ratio_power, self.temperature
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise ValueError(f"{named('log_ratio_clip')} must be finite and > 0, or None for no clip; got {clip!r}.")
        if not 0 < power <= 1:
            raise ValueError(f"{named('log_ratio_power')} must be in (0, 1], got {power!r}.")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"{named('temperature')} must be finite and > 0, got {temperature!r}.")
        if not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"{named('top_k')} must be a whole number >= 1, got {self.top_k!r}.")

    def _check_pairs(self, named: Callable[[str], str]) -> None:
        """Refuse settings that do not go together."""
        if is_divergence(self.estimator):
            of_token = {"log_ratio_clip": None, "advantage_weight": 0.0, "log_ratio_form": "log"}
            for field, idle in of_token.items():
                if getattr(self, field) != idle:
                    raise ValueError(
                        f"{named(field)}={getattr(self, field)!r} belongs to estimator='sampled': it shapes the "
                        "advantage of a token, and a divergence takes factors of positions only. Leave it at "
                        f"{idle!r}, or choose estimator='sampled'."
                    )
        if self.log_ratio_form == "power" and self.log_ratio_clip is not None:
            raise ValueError(
                f"{named('log_ratio_clip')} clips log-ratios, and {named('log_ratio_form')}='power' has none: it is "
                "bounded by 1. Leave the clip at None."
            )
        if self.log_ratio_form == "power" and self.rule == "sigmoid":
            raise ValueError(
                f"{named('rule')}='sigmoid' keeps the mass of log-ratios, and {named('log_ratio_form')}='power' has "
                "none: use 'log'."
            )
        if self.reference != "initial":
            return
        if self.rule in ("sigmoid", "row"):
            raise ValueError(
                f"{named('rule')}={self.rule!r} weighs the log-ratio to the current policy: set {named('reference')} "
                "to 'current', as the presets 'r2-opd' and 'rg-opd' do."
            )
        for field, what in (("interpolation", "conflict"), ("neutral", "neutral")):
            if getattr(self, field) == 0:
                raise ValueError(
                    f"{named(field)} must be > 0 with the initial reference: 0 would pull {what} tokens to the "
                    "reference, not drop them. Use the current reference to drop them."
                )


def is_divergence(estimator: str) -> bool:
    """Whether an estimator trains a divergence of distributions, and not the log-probability of the sampled token."""
    return estimator in DIVERGENCES


class GateDecision(NamedTuple):
    """What the gate decided for each token; no field carries a gradient, each has shape (B, T)."""

    delta: Float[Tensor, "B T"]  #: log pi_T(y_t) - log pi_S(y_t), unclipped, in nats: the teacher's preference [P].
    case: Int[Tensor, "B T"]  #: 1 consensus, -1 conflict, 0 neutral.
    factor: Float[Tensor, "B T"]  #: lambda_t, the reward-scaling factor.
    advantage: Float[Tensor, "B T"]  #: A_t, clipped where a clip is set.
    clipped: Float[Tensor, "B T"]  #: 1.0 where the clip changed a log-ratio that entered the advantage, else 0.0.


def verdict_sign(verifier_labels: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sign of a verdict [P]: 1.0 (correct) -> +1, 0.0 (incorrect) -> -1, NaN (abstained) -> 0."""
    return torch.nan_to_num(2 * verifier_labels - 1, nan=0.0)


def group_sign(
    verifier_labels: Float[Tensor, " N"], num_generations: int, from_teacher: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, " N"]:
    """The sign of the outcome less the mean outcome of its prompt's group [N].

    It is 0 in uniform groups, where all judged rollouts have one verdict, and where the verifier abstained [O].

    Args:
        verifier_labels: (N,), 1.0 correct, 0.0 incorrect, NaN abstained; a prompt's rollouts one after another.
        num_generations: rollouts a prompt.
        from_teacher: (N,), teacher rollouts: part of no mean, and of their verdict's sign [O]; `None`: there is none.

    Raises:
        ValueError: rows that are no whole groups.
    """
    if len(verifier_labels) % num_generations:
        raise ValueError(
            f"`verifier_labels` has {len(verifier_labels)} rows, which are no whole groups of {num_generations}."
        )
    own = verifier_labels if from_teacher is None else verifier_labels.masked_fill(from_teacher, math.nan)
    groups = own.view(-1, num_generations)
    sign = torch.sign(torch.nan_to_num(groups - groups.nanmean(1, keepdim=True), nan=0.0)).flatten()
    return sign if from_teacher is None else torch.where(from_teacher, verdict_sign(verifier_labels), sign)


def uniform_groups(
    verifier_labels: Float[Tensor, " N"], num_generations: int, from_teacher: Bool[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """(N,), whether the student's judged rollouts of a row's group have one verdict; arguments as of `group_sign`."""
    groups = verifier_labels.masked_fill(from_teacher, math.nan).view(-1, num_generations)
    mixed = (groups == 1).any(1) & (groups == 0).any(1)
    return ~mixed.repeat_interleave(num_generations)


@torch.no_grad()
def decide(
    student_logps: Float[Tensor, "B T"],
    teacher_logps: Float[Tensor, "B T"],
    signs: Float[Tensor, " B"],
    mask: Shaped[Tensor, "B T"],
    settings: GateSettings,
    reference_logps: Float[Tensor, "B T"] | None = None,
    group_advantages: Float[Tensor, " B"] | None = None,
) -> GateDecision:
    """The gate [P] and the advantage [G] of every sampled token.

    `s * delta_t > 0` is consensus, `s * delta_t < 0` is conflict; sign 0 or `abs(delta_t) <= dead_zone` is neutral [O].
    The rule gives each token its factor `lambda_t`. The advantage is

        A_t = clip(delta_t) + (lambda_t - 1) * clip(log pi_T(y_t) - log pi_R(y_t)) + w * group advantage

    and with `log_ratio_form="power"` each difference of log-probabilities in it is one of `pi(y_t)^a`.

    Args:
        student_logps: log pi_S(y_t) before the first update on the rollout, (B, T).
        teacher_logps: log pi_T(y_t), (B, T).
        signs: (B,), +1, -1 or 0: `verdict_sign` or `group_sign`, as `settings.signal` says.
        mask: (B, T), nonzero where a token is trained; for rules that look at a whole row.
        settings: the rule with its factors, the form, the clip, and w.
        reference_logps: log pi_R(y_t), (B, T); `None` is the current policy, where A_t = lambda_t * clip(delta_t).
        group_advantages: (B,), GRPO's; only read where w > 0.
    """
    student_logps, teacher_logps = at_least_float32(student_logps), at_least_float32(teacher_logps)
    delta = teacher_logps - student_logps
    case, factor = GATE_RULES[settings.rule](delta, signs.to(delta).unsqueeze(1), mask != 0, settings)
    reference_logps = student_logps if reference_logps is None else at_least_float32(reference_logps)
    if settings.log_ratio_form == "power":
        student, teacher, reference = (
            torch.exp(settings.log_ratio_power * x) for x in (student_logps, teacher_logps, reference_logps)
        )
        preference, reward = teacher - student, teacher - reference
    else:
        preference, reward = delta, teacher_logps - reference_logps
    clip = math.inf if settings.log_ratio_clip is None else settings.log_ratio_clip
    advantage = preference.clamp(-clip, clip) + (factor - 1) * reward.clamp(-clip, clip)
    if settings.advantage_weight > 0:
        if group_advantages is None:
            raise ValueError("`advantage_weight` > 0 needs the `group_advantages` of the rows.")
        advantage = advantage + settings.advantage_weight * group_advantages.to(advantage).unsqueeze(1)
    clipped = (preference.abs() > clip) | ((reward.abs() > clip) & (factor != 1))
    return GateDecision(delta, case, factor, advantage, clipped.to(delta.dtype))


def gate_totals(decision: GateDecision, mask: Shaped[Tensor, "B T"]) -> dict[str, Tensor]:
    """Sums over the trained tokens, which micro-batches and ranks may add up before `gate_metrics` divides them."""
    mask = mask.to(decision.delta.dtype)
    sizes, consensus, conflict = magnitudes(decision.delta), decision.case == CONSENSUS, decision.case == CONFLICT
    values = {
        "tokens": torch.ones_like(mask),
        "gate/consensus": consensus,
        "gate/conflict": conflict,
        "gate/neutral": decision.case == NEUTRAL,
        "gate/consensus_delta": consensus * sizes,
        "gate/conflict_delta": conflict * sizes,
        "gate/factor": decision.factor,
        "delta/clipped": decision.clipped,
        "delta/sum": sizes,
    }
    return {name: (value * mask).sum() for name, value in values.items()}


def gate_metrics(totals: dict[str, Tensor], deltas: Float[Tensor, " N"]) -> dict[str, Tensor]:
    """Shares and means from `gate_totals`; quantiles and top share of `deltas` but NaN (NaN without any).

    Those that end with `_delta` are shares of `delta/sum`, 0 where that is 0; the others are by token.
    """
    tokens = totals["tokens"].clamp(min=1.0)
    means = {name: total / tokens for name, total in totals.items() if name not in ("tokens", "delta/sum")}
    if "delta/sum" in totals:
        whole = totals["delta/sum"].clamp(min=torch.finfo(totals["delta/sum"].dtype).tiny)
        means |= {name: totals[name] / whole for name in means if name.endswith("_delta")}
    known = deltas.float() if deltas.numel() else deltas.new_full((1,), math.nan, dtype=torch.float32)
    quantiles = {name: torch.nanquantile(known, q) for name, q in QUANTILES.items()}
    return means | quantiles | {"delta/top_share": top_share(known)}


def top_share(deltas: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The share, in [0, 1], of the sum of `abs(deltas)` that the largest 1 % of them carry, one at least.

    NaN is no delta. The share is 0 where all are 0, and NaN without any. No synchronisation with the device.
    """
    largest = magnitudes(deltas).sort(descending=True).values
    count = (deltas.isnan().logical_not().sum() + 99) // 100
    top = torch.where(torch.arange(len(largest), device=deltas.device) < count, largest, 0.0)
    share = top.sum() / largest.sum().clamp(min=torch.finfo(largest.dtype).tiny)
    return share.masked_fill(count == 0, math.nan)


def magnitudes(deltas: Tensor) -> Tensor:
    """`abs(deltas)` for a sum: `HUGE` where it is infinite, and 0 for NaN, which is no delta."""
    return deltas.abs().nan_to_num(nan=0.0, posinf=HUGE)


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
