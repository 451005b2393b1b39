"""The sign-consistency gate, the gated advantages, and `SignGatedLoss`. Torch only.

First decide, without gradient (`decide`): compare the teacher's preference for each token with the verdict on the whole
completion, and fix a factor and an advantage a token. Then differentiate (`policy_gradient`, `gated_divergence`).

Sources, as in the documentation's page on the method: [P] the SG-OPD abstract (arXiv 2606.09304), [R] its
reproductions, [G] G-OPD (arXiv 2602.12125), [O] our own reading. All logarithms are natural.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor, nn

CONSENSUS, NEUTRAL, CONFLICT = 1, 0, -1  # the sign of s * delta
QUANTILES = {"delta/p05": 0.05, "delta/p50": 0.50, "delta/p95": 0.95}


class GateDecision(NamedTuple):
    """What the gate decided for each token; no field carries a gradient, each has shape (B, T)."""

    delta: Float[Tensor, "B T"]
    """log pi_T(y_t) - log pi_S(y_t), unclipped, in nats: the teacher's preference [P]."""
    case: Int[Tensor, "B T"]
    """1 consensus, -1 conflict, 0 neutral."""
    factor: Float[Tensor, "B T"]
    """lambda_t, the reward-scaling factor."""
    advantage: Float[Tensor, "B T"]
    """A_t, clipped where a clip is set."""
    clipped: Float[Tensor, "B T"]
    """1.0 where the clip changed a log-ratio that entered the advantage, else 0.0."""


class LossOutput(NamedTuple):
    """`loss`: the scalar to differentiate; `metrics`: detached scalar tensors by name."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


def verdict_sign(verifier_labels: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sign of a verdict: 1.0 (correct) -> +1, 0.0 (incorrect) -> -1, NaN (abstained) -> 0."""
    return torch.nan_to_num(2 * verifier_labels - 1, nan=0.0)


@torch.no_grad()
def decide(
    student_logps: Float[Tensor, "B T"],
    teacher_logps: Float[Tensor, "B T"],
    verifier_labels: Float[Tensor, " B"],
    *,
    extrapolation: float,
    interpolation: float,
    dead_zone: float = 0.0,
    log_ratio_clip: float | None = None,
    reference_logps: Float[Tensor, "B T"] | None = None,
) -> GateDecision:
    """The gate [P] and the advantage [G] of every sampled token.

    `s * delta_t > 0` is consensus and gets `extrapolation`, `s * delta_t < 0` is conflict and gets `interpolation`;
    an abstained verdict or `|delta_t| <= dead_zone` is neutral and gets 1 [O]. Where both factors are equal there is no
    gate and every token gets that value. The advantage is

        A_t = clip(delta_t) + (lambda_t - 1) * clip(log pi_T(y_t) - log pi_R(y_t))

    Args:
        student_logps: log pi_S(y_t) before the first update on the rollout, (B, T).
        teacher_logps: log pi_T(y_t), (B, T).
        verifier_labels: (B,), 1.0 correct, 0.0 incorrect, NaN abstained.
        extrapolation: factor on consensus tokens, finite and >= 0.
        interpolation: factor on conflict tokens, finite and >= 0.
        dead_zone: nats, >= 0.
        log_ratio_clip: c > 0 in nats, each log-ratio is clipped to [-c, c]; `None` clips nothing.
        reference_logps: log pi_R(y_t), (B, T); `None` is the current policy, where A_t = lambda_t * clip(delta_t).
    """
    student_logps, teacher_logps = _at_least_float32(student_logps), _at_least_float32(teacher_logps)
    delta = teacher_logps - student_logps
    sign = verdict_sign(verifier_labels.to(delta))
    case = torch.sign(sign.unsqueeze(1) * delta)
    case = case.masked_fill(delta.abs() <= dead_zone, NEUTRAL).to(torch.int8)
    if extrapolation == interpolation:
        factor = torch.full_like(delta, extrapolation)
    else:
        factor = torch.ones_like(delta)
        factor = factor.masked_fill(case == CONSENSUS, extrapolation).masked_fill(case == CONFLICT, interpolation)
    reward = delta if reference_logps is None else teacher_logps - _at_least_float32(reference_logps)
    clip = math.inf if log_ratio_clip is None else log_ratio_clip
    advantage = delta.clamp(-clip, clip) + (factor - 1) * reward.clamp(-clip, clip)
    clipped = (delta.abs() > clip) | ((reward.abs() > clip) & (factor != 1))
    return GateDecision(delta, case, factor, advantage, clipped.to(delta.dtype))


def policy_gradient(
    logps: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """`-rho_t * A_t` for each token, `rho_t = exp(log pi_S - log pi_S_old)`; `old_logps=None` is `logps`, detached.

    Gradient to `logps` only. The trainer leaves clipping and engine correction of the ratio to its parent.
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    return -torch.exp(logps - old_logps) * advantage.detach()


def gated_divergence(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    factor: Float[Tensor, "B T"],
    reference_logits: Float[Tensor, "B T V"] | None = None,
) -> Float[Tensor, "B T"]:
    """The full estimator for each position, on logits already divided by the temperature and cut to shared ids.

    Current reference: `lambda_t * KL(pi_S || pi_T)`. Initial reference: `KL(pi_S || q_t)` with
    `q_t = pi_R^(1 - lambda_t) * pi_T^lambda_t / Z` [G]. Gradient to `student_logits` only.
    """
    student = torch.log_softmax(student_logits, dim=-1)
    gone = torch.isneginf(student)  # an id of no probability adds nothing: p log p -> 0
    target = torch.log_softmax(teacher_logits.detach(), dim=-1)
    weight = factor.detach()
    if reference_logits is not None:
        reference = torch.log_softmax(reference_logits.detach(), dim=-1)
        tilt = weight.unsqueeze(-1)
        product = (tilt * target + (1 - tilt) * reference).masked_fill(gone, -math.inf)
        target = torch.log_softmax(product, dim=-1)
        weight = torch.ones_like(weight)
    student, target = student.masked_fill(gone, 0.0), target.masked_fill(gone, 0.0)
    return weight * torch.where(gone, 0.0, student.exp() * (student - target)).sum(-1)


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
    metrics = {name: total / tokens for name, total in totals.items() if name != "tokens"}
    empty = deltas.new_full((), math.nan, dtype=torch.float32)
    for name, q in QUANTILES.items():
        metrics[name] = torch.quantile(deltas.float(), q) if deltas.numel() else empty
    return metrics


def check_settings(
    extrapolation: float,
    interpolation: float,
    estimator: str,
    dead_zone: float,
    log_ratio_clip: float | None,
    temperature: float,
    initial_reference: bool = False,
    names: tuple[str, str, str] = ("extrapolation", "interpolation", "dead_zone"),
) -> None:
    """Raise `ValueError` naming the first setting out of range; `names` are what the caller calls the gate's three."""
    for name, value in zip(names, (extrapolation, interpolation, dead_zone), strict=True):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be a number, finite and >= 0; got {value!r}.")
    if estimator not in ("sampled", "full"):
        raise ValueError(f"`estimator` must be 'sampled' or 'full', got {estimator!r}.")
    if log_ratio_clip is not None and not (math.isfinite(log_ratio_clip) and log_ratio_clip > 0):
        raise ValueError(f"`log_ratio_clip` must be finite and > 0, or None for no clip; got {log_ratio_clip!r}.")
    if log_ratio_clip is not None and estimator == "full":
        raise ValueError(
            "`log_ratio_clip` belongs to estimator='sampled': the full divergence has no log-ratio of a token to clip. "
            "Leave it at None, or choose estimator='sampled'."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be finite and > 0, got {temperature!r}.")
    if initial_reference and interpolation == 0:
        raise ValueError(
            f"`{names[1]}` must be > 0 with the initial reference: 0 would pull conflict tokens to the reference, "
            "not drop them. Use the current reference to drop them."
        )


class SignGatedLoss(nn.Module):
    """The SG-OPD loss on plain logits: a readable reference, and a building block for loops of one's own.

    The trainer decides with the same functions but never holds whole logits.

    Args:
        extrapolation: factor where teacher and verdict agree, finite and >= 0 (1.8 [R]).
        interpolation: factor where they disagree, finite and >= 0 (1.0 [R]); > 0 with `reference_logits`.
        estimator: "sampled" (policy gradient on the sampled token) or "full" (the whole distribution at each position).
        dead_zone: `|delta|` up to this many nats is neutral [O].
        log_ratio_clip: clips each log-ratio of the sampled estimator to [-c, c] nats; `None` is off.
        temperature: divides all logits, > 0.

    Raises:
        ValueError: a setting out of its range, or inputs whose shapes or labels do not fit.

    Example:

    ```python
    import torch
    from sg_opd import SignGatedLoss

    student_logits = torch.randn(2, 5, 11, requires_grad=True)
    teacher_logits = torch.randn(2, 5, 11)
    ids, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5)
    out = SignGatedLoss()(student_logits, teacher_logits, ids, torch.tensor([1.0, 0.0]), mask)
    out.loss.backward()
    out.metrics["gate/consensus"]
    ```
    """

    def __init__(
        self,
        extrapolation: float = 1.8,
        interpolation: float = 1.0,
        estimator: str = "sampled",
        dead_zone: float = 0.0,
        log_ratio_clip: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_settings(extrapolation, interpolation, estimator, dead_zone, log_ratio_clip, temperature)
        self.extrapolation = extrapolation
        self.interpolation = interpolation
        self.estimator = estimator
        self.dead_zone = dead_zone
        self.log_ratio_clip = log_ratio_clip
        self.temperature = temperature

    def extra_repr(self) -> str:
        names = ("extrapolation", "interpolation", "estimator", "dead_zone", "log_ratio_clip", "temperature")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def decide(
        self,
        student_logps: Float[Tensor, "B T"],
        teacher_logps: Float[Tensor, "B T"],
        verifier_labels: Float[Tensor, " B"],
        reference_logps: Float[Tensor, "B T"] | None = None,
    ) -> GateDecision:
        """`decide` with this module's settings, on per-token log-probabilities; no gradient."""
        return decide(
            student_logps,
            teacher_logps,
            verifier_labels,
            extrapolation=self.extrapolation,
            interpolation=self.interpolation,
            dead_zone=self.dead_zone,
            log_ratio_clip=self.log_ratio_clip,
            reference_logps=reference_logps,
        )

    def forward(
        self,
        student_logits: Float[Tensor, "B T V"],
        teacher_logits: Float[Tensor, "B T W"],
        completion_ids: Int[Tensor, "B T"],
        verifier_labels: Float[Tensor, " B"],
        completion_mask: Shaped[Tensor, "B T"],
        reference_logits: Float[Tensor, "B T V"] | None = None,
        num_items_in_batch: Num[Tensor, ""] | int | float | None = None,
    ) -> LossOutput:
        """`LossOutput(loss, metrics)`: the loss over the trained tokens, and the gate's metrics.

        Args:
            student_logits: (B, T, V), position t predicts `completion_ids[:, t]`; the only input to get a gradient.
            teacher_logits: (B, T, W); ids below min(V, W) are shared. The sampled estimator normalises each model over
                its own head, the full one over the shared ids.
            completion_ids: (B, T), each trained id below min(V, W).
            verifier_labels: (B,), 1.0 correct, 0.0 incorrect, NaN abstained.
            completion_mask: (B, T), 1 where a token is trained.
            reference_logits: (B, T, V) of the initial policy; `None` is the current policy.
            num_items_in_batch: the divisor, the global number of trained tokens; `None` counts those at hand.
        """
        self._check_inputs(verifier_labels, completion_ids, completion_mask, student_logits, teacher_logits)
        if reference_logits is not None and self.interpolation == 0:
            raise ValueError("`reference_logits` needs `interpolation` > 0; see the class's documentation.")
        ids = completion_ids * (completion_mask != 0)  # padding may hold any id
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        cut = shared if self.estimator == "full" else None
        mask = completion_mask != 0
        student, teacher = self._scaled(student_logits, mask, cut), self._scaled(teacher_logits, mask, cut)
        reference = None if reference_logits is None else self._scaled(reference_logits, mask, cut)
        student_logps = _token_logps(student, ids)
        decision = self.decide(
            student_logps.detach(),
            _token_logps(teacher, ids).detach(),
            verifier_labels,
            None if reference is None else _token_logps(reference, ids),
        )
        if self.estimator == "full":
            per_token = gated_divergence(student, teacher, decision.factor, reference)
        else:
            per_token = policy_gradient(student_logps, decision.advantage)
        divisor = torch.as_tensor(mask.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss = torch.where(mask, per_token, 0.0).sum() / divisor.to(per_token.device)
        return LossOutput(loss, gate_metrics(gate_totals(decision, mask), decision.delta[mask]))

    def _scaled(self, logits: Tensor, mask: Tensor, cut: int | None) -> Tensor:
        # zeros where masked: what stands there may be infinite, and would make the gradient NaN
        logits = torch.where(mask.unsqueeze(-1), logits[..., :cut], 0.0)
        return _at_least_float32(logits) / self.temperature

    @staticmethod
    def _check_inputs(
        labels: Tensor, ids: Tensor, mask: Tensor, student_logits: Tensor, teacher_logits: Tensor
    ) -> None:
        shape = tuple(student_logits.shape[:2])
        for name, value in (("teacher_logits", teacher_logits), ("completion_ids", ids), ("completion_mask", mask)):
            if tuple(value.shape[:2]) != shape:
                raise ValueError(f"`{name}` must begin with the student's (B, T) = {shape}, got {tuple(value.shape)}.")
        if tuple(labels.shape) != shape[:1]:
            raise ValueError(f"`verifier_labels` must have shape ({shape[0]},), got {tuple(labels.shape)}.")
        bad = ~(labels.isnan() | (labels == 0) | (labels == 1))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"`verifier_labels[{row}]` is {labels[row].item()}; 1.0 is correct, 0.0 incorrect, NaN abstained."
            )
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        if ((ids >= shared) & (mask != 0)).any():
            raise ValueError(f"`completion_ids` holds a trained id that is not below {shared}, the shared vocabulary.")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
