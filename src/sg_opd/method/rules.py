"""The rules of the gate: what turns the teacher's preference and the verdict's sign into each token's factor.

A further rule is one function here and one line of `GATE_RULES`. Sources are tagged as in `gate.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from .gate import GateSettings

CONSENSUS, NEUTRAL, CONFLICT = 1, 0, -1  # the sign of s * delta
LEAST_SCALE = 1e-8  # nats, of a row in the rule "sigmoid" (arXiv 2609.35517)


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
            sign: (B, 1), of the outcome: +1, -1 or 0.
            mask: (B, T), true where a token is trained; a row may have none.
            settings: of the gate.
        """


def cases(delta: Float[Tensor, "B T"], sign: Float[Tensor, "B 1"], dead_zone: float) -> Int[Tensor, "B T"]:
    """1 where teacher and outcome agree, -1 where they disagree, 0 where one of them takes no side."""
    return torch.sign(sign * delta).masked_fill(delta.abs() <= dead_zone, NEUTRAL).to(torch.int8)


def sign_rule(
    delta: Float[Tensor, "B T"], sign: Float[Tensor, "B 1"], mask: Bool[Tensor, "B T"], settings: GateSettings
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
    """SG-OPD's gate [P]: `extrapolation` on consensus, `interpolation` on conflict, `neutral` on neutral tokens.

    Where `extrapolation` and `interpolation` are equal this rule has no gate, and every token gets that value.
    """
    case = cases(delta, sign, settings.dead_zone)
    if settings.extrapolation == settings.interpolation:
        return case, torch.full_like(delta, settings.extrapolation)
    factor = torch.full_like(delta, settings.neutral).masked_fill(case == CONSENSUS, settings.extrapolation)
    return case, factor.masked_fill(case == CONFLICT, settings.interpolation)


def bounded(delta: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], clip: float | None) -> Float[Tensor, "B T"]:
    """The preference as it enters the advantage, clipped, and 0 where nothing is trained."""
    return torch.where(mask, delta if clip is None else delta.clamp(-clip, clip), 0.0)


def sigmoid_rule(
    delta: Float[Tensor, "B T"], sign: Float[Tensor, "B 1"], mask: Bool[Tensor, "B T"], settings: GateSettings
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
    """R2-OPD's weights (arXiv 2609.35517), `Z * sigmoid(beta * s * delta_t / nu)`, of the clipped delta.

    `nu` is the row's median of `abs(delta)`, of an even number the lower one, 1e-8 nats at least. `Z` keeps the row's
    mass, `sum_t factor_t * abs(delta_t) = sum_t abs(delta_t)`. A row of sign 0 has factor 1 throughout, and so has one
    without mass; with `beta` 0 all have: plain OPD.
    """
    preference = bounded(delta, mask, settings.log_ratio_clip)
    size = preference.abs()
    scale = torch.nan_to_num(size.masked_fill(~mask, torch.nan).nanmedian(dim=1, keepdim=True).values)
    weight = torch.nn.functional.logsigmoid(settings.beta * sign * preference / scale.clamp(min=LEAST_SCALE))
    # in logarithms: every weight of a row may be too small for a number
    mass = size.log()
    log_z = torch.logsumexp(mass, 1, keepdim=True) - torch.logsumexp(weight + mass, 1, keepdim=True)
    factor = (weight + log_z).exp().clamp(max=torch.finfo(delta.dtype).max)
    moved = mask & (sign != 0) & (size.sum(1, keepdim=True) > 0)
    return cases(delta, sign, 0.0), torch.where(moved, factor, 1.0)


def row_rule(
    delta: Float[Tensor, "B T"], sign: Float[Tensor, "B 1"], mask: Bool[Tensor, "B T"], settings: GateSettings
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
    """RG-OPD's choice of whole rows (arXiv 2607.04037): factor 1 where the teacher agrees with the outcome, else 0.

    It agrees where `s * sum_t delta_t > row_threshold`, over the trained tokens, of the clipped delta. The case is the
    row's too: consensus where it is kept, conflict where it is dropped. A row of sign 0 gets `neutral` [O].
    """
    total = bounded(delta, mask, settings.log_ratio_clip).sum(1, keepdim=True)
    case = torch.where(sign * total > settings.row_threshold, CONSENSUS, CONFLICT).masked_fill(sign == 0, NEUTRAL)
    factor = (case == CONSENSUS).to(delta.dtype).masked_fill(sign == 0, settings.neutral)
    return case.to(torch.int8).expand_as(delta), factor.expand_as(delta)


GATE_RULES: dict[str, Rule] = {"sign": sign_rule, "sigmoid": sigmoid_rule, "row": row_rule}
