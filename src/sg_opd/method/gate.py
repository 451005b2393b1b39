"""The sign-consistency gate: how far the teacher is trusted on each token, decided without gradient.

The gate compares the teacher's preference for a token with the verdict on the whole completion. A rule turns both into
a case and a factor; the factor scales the token's advantage.

Sources, as in the documentation's page on the method: [P] the SG-OPD abstract (arXiv 2606.09304), [R] its
reproductions, [G] G-OPD (arXiv 2602.12125), [O] our own reading. All logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

CONSENSUS, NEUTRAL, CONFLICT = 1, 0, -1  # the sign of s * delta
ESTIMATORS = ("sampled", "full")
REFERENCES = ("current", "initial")
QUANTILES = {"delta/p05": 0.05, "delta/p50": 0.50, "delta/p95": 0.95}


@dataclass(frozen=True)
class GateSettings:
    """All that decides a token's factor, advantage and loss.

    Raises:
        ValueError: a value out of its range, by name.
    """

    extrapolation: float = 1.8  #: Factor where teacher and verdict agree, finite and >= 0 [R].
    interpolation: float = 1.0  #: Factor where they disagree, finite and >= 0 [R]; > 0 with the initial reference.
    estimator: str = "sampled"
    """"sampled": policy gradient on the sampled token. "full": divergence of the whole distribution."""
    dead_zone: float = 0.0  #: `abs(delta)` up to this many nats is neutral, >= 0 [O].
    log_ratio_clip: float | None = None
    """c > 0 clips each log-ratio of the sampled estimator to [-c, c] nats; `None` clips nothing."""
    temperature: float = 1.0  #: Divides all logits, > 0.
    rule: str = "sign"  #: A key of `GATE_RULES`.
    reference: str = "current"  #: Policy that the reward is measured against: "current" or "initial".
    names: InitVar[Mapping[str, str] | None] = None
    """What errors call the fields, where the caller has other names for them."""

    def __post_init__(self, names: Mapping[str, str] | None) -> None:
        def named(field: str) -> str:
            return f"`{(names or {}).get(field, field)}`"

        for field in ("extrapolation", "interpolation", "dead_zone"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{named(field)} must be a number, finite and >= 0; got {value!r}.")
        for field, allowed in (("rule", tuple(GATE_RULES)), ("estimator", ESTIMATORS), ("reference", REFERENCES)):
            if getattr(self, field) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"{named(field)} must be {choices}, got {getattr(self, field)!r}.")
        clip, temperature = self.log_ratio_clip, self.temperature
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise ValueError(f"{named('log_ratio_clip')} must be finite and > 0, or None for no clip; got {clip!r}.")
        if clip is not None and self.estimator == "full":
            raise ValueError(
                f"{named('log_ratio_clip')} belongs to estimator='sampled': the full divergence has no log-ratio of a "
                "token to clip. Leave it at None, or choose estimator='sampled'."
            )
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"{named('temperature')} must be finite and > 0, got {temperature!r}.")
        if self.reference == "initial" and self.interpolation == 0:
            raise ValueError(
                f"{named('interpolation')} must be > 0 with the initial reference: 0 would pull conflict tokens to the "
                "reference, not drop them. Use the current reference to drop them."
            )


class GateDecision(NamedTuple):
    """What the gate decided for each token; no field carries a gradient, each has shape (B, T)."""

    delta: Float[Tensor, "B T"]  #: log pi_T(y_t) - log pi_S(y_t), unclipped, in nats: the teacher's preference [P].
    case: Int[Tensor, "B T"]  #: 1 consensus, -1 conflict, 0 neutral.
    factor: Float[Tensor, "B T"]  #: lambda_t, the reward-scaling factor.
    advantage: Float[Tensor, "B T"]  #: A_t, clipped where a clip is set.
    clipped: Float[Tensor, "B T"]  #: 1.0 where the clip changed a log-ratio that entered the advantage, else 0.0.


class Rule(Protocol):
    """A pure function that gives each token its case and its factor, without gradient."""

    def __call__(
        self,
        delta: Float[Tensor, "B T"],
        sign: Float[Tensor, "B 1"],
        mask: Bool[Tensor, "B T"],
        settings: GateSettings,
    ) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Case and factor (B, T) of whole completions.

        Args:
            delta: (B, T), the teacher's preference in nats; anything where masked.
            sign: (B, 1), of the verdict: +1, -1 or 0.
            mask: (B, T), true where a token is trained; a row may have none.
            settings: of the gate.
        """


def cases(delta: Float[Tensor, "B T"], sign: Float[Tensor, "B 1"], dead_zone: float) -> Int[Tensor, "B T"]:
    """1 where teacher and verdict agree, -1 where they disagree, 0 where one of them takes no side."""
    return torch.sign(sign * delta).masked_fill(delta.abs() <= dead_zone, NEUTRAL).to(torch.int8)


def sign_rule(
    delta: Float[Tensor, "B T"], sign: Float[Tensor, "B 1"], mask: Bool[Tensor, "B T"], settings: GateSettings
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
    """SG-OPD's gate [P]: `extrapolation` on consensus, `interpolation` on conflict, 1 where the token is neutral.

    Where both factors are equal this rule has no gate, and every token gets that value.
    """
    case = cases(delta, sign, settings.dead_zone)
    if settings.extrapolation == settings.interpolation:
        return case, torch.full_like(delta, settings.extrapolation)
    factor = torch.ones_like(delta).masked_fill(case == CONSENSUS, settings.extrapolation)
    return case, factor.masked_fill(case == CONFLICT, settings.interpolation)


GATE_RULES: dict[str, Rule] = {"sign": sign_rule}


def verdict_sign(verifier_labels: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sign of a verdict: 1.0 (correct) -> +1, 0.0 (incorrect) -> -1, NaN (abstained) -> 0."""
    return torch.nan_to_num(2 * verifier_labels - 1, nan=0.0)


@torch.no_grad()
def decide(
    student_logps: Float[Tensor, "B T"],
    teacher_logps: Float[Tensor, "B T"],
    verifier_labels: Float[Tensor, " B"],
    mask: Shaped[Tensor, "B T"],
    settings: GateSettings,
    reference_logps: Float[Tensor, "B T"] | None = None,
) -> GateDecision:
    """The gate [P] and the advantage [G] of every sampled token.

    `s * delta_t > 0` is consensus, `s * delta_t < 0` is conflict; an abstained verdict or `abs(delta_t) <= dead_zone`
    is neutral [O]. The rule gives each case its factor `lambda_t`. The advantage is

        A_t = clip(delta_t) + (lambda_t - 1) * clip(log pi_T(y_t) - log pi_R(y_t))

    Args:
        student_logps: log pi_S(y_t) before the first update on the rollout, (B, T).
        teacher_logps: log pi_T(y_t), (B, T).
        verifier_labels: (B,), 1.0 correct, 0.0 incorrect, NaN abstained.
        mask: (B, T), nonzero where a token is trained; for rules that look at a whole row.
        settings: the rule with its factors, and the clip.
        reference_logps: log pi_R(y_t), (B, T); `None` is the current policy, where A_t = lambda_t * clip(delta_t).
    """
    student_logps, teacher_logps = at_least_float32(student_logps), at_least_float32(teacher_logps)
    delta = teacher_logps - student_logps
    sign = verdict_sign(verifier_labels.to(delta)).unsqueeze(1)
    case, factor = GATE_RULES[settings.rule](delta, sign, mask != 0, settings)
    reward = delta if reference_logps is None else teacher_logps - at_least_float32(reference_logps)
    clip = math.inf if settings.log_ratio_clip is None else settings.log_ratio_clip
    advantage = delta.clamp(-clip, clip) + (factor - 1) * reward.clamp(-clip, clip)
    clipped = (delta.abs() > clip) | ((reward.abs() > clip) & (factor != 1))
    return GateDecision(delta, case, factor, advantage, clipped.to(delta.dtype))


def gate_totals(decision: GateDecision, mask: Shaped[Tensor, "B T"]) -> dict[str, Tensor]:
    """Sums over the trained tokens, which micro-batches and ranks may add up before dividing by `tokens`."""
    mask = mask.to(decision.delta.dtype)
    values = {
        "tokens": torch.ones_like(mask),
        "gate/consensus": decision.case == CONSENSUS,
        "gate/conflict": decision.case == CONFLICT,
        "gate/neutral": decision.case == NEUTRAL,
        "gate/factor": decision.factor,
        "delta/clipped": decision.clipped,
    }
    return {name: (value * mask).sum() for name, value in values.items()}


def gate_metrics(totals: dict[str, Tensor], deltas: Float[Tensor, " N"]) -> dict[str, Tensor]:
    """Shares and means from `gate_totals`, and the quantiles of `deltas` (NaN without any)."""
    tokens = totals["tokens"].clamp(min=1.0)
    means = {name: total / tokens for name, total in totals.items() if name != "tokens"}
    known = deltas.float() if deltas.numel() else deltas.new_full((1,), math.nan, dtype=torch.float32)
    return means | {name: torch.quantile(known, q) for name, q in QUANTILES.items()}


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
