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
from jaxtyping import Float, Int, Shaped
from torch import Tensor

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


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
