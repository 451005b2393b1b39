"""The loss on plain logits: what the trainer computes, in a form that can be read and used in a loop of one's own.

First decide, without gradient (`gate.decide`); then differentiate (`policy_gradient`, `gated_divergence`). Sources are
tagged as in `gate.py`. All logarithms are natural.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor, nn

from .buckets import bucketed_logps, floored, likeliest_ids
from .gate import GateDecision, GateSettings, at_least_float32, decide, gate_metrics, gate_totals, verdict_sign


class LossOutput(NamedTuple):
    """`loss`: the scalar to differentiate; `metrics`: detached scalar tensors by name."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


def policy_gradient(
    logps: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], old_logps: Float[Tensor, "B T"] | None = None
) -> Float[Tensor, "B T"]:
    """`-rho_t * A_t` for each token, `rho_t = exp(log pi_S - log pi_S_old)`; `old_logps=None` is `logps`, detached.

    Gradient to `logps` only. In the trainer GRPOTrainer clips and corrects the ratio.
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    return -torch.exp(logps - old_logps) * advantage.detach()


def sequence_old_logps(
    logps: Float[Tensor, "B T"], old_logps: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The old log-probabilities with which each token's ratio is its sequence's, as in GSPO's token form.

    `s_t = sg(s) * pi_S / sg(pi_S)` with `s = exp(mean_t log rho_t)` over the trained tokens (arXiv 2507.18071, section
    4.3): the value of the sequence's ratio, and the gradient of the token's own, so that each keeps its advantage. The
    mean over the sequence stays, so they can take the old ones' place for later passes too.
    """
    logps = logps.detach()
    trained = mask.to(logps.dtype)
    ratios = torch.where(mask.bool(), logps - old_logps, 0.0)  # not a product: what is masked may be infinite
    mean = ratios.sum(1, keepdim=True) / trained.sum(1, keepdim=True).clamp(min=1.0)
    return logps - mean


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


def bucketed_divergence(
    student: Float[Tensor, "B T K"],
    target: Float[Tensor, "B T K"],
    factor: Float[Tensor, "B T"],
    reference: Float[Tensor, "B T K"] | None = None,
) -> Float[Tensor, "B T"]:
    """The top-k estimator for each position: `gated_divergence` of distributions over K and the rest [O].

    All are log-probabilities as in `sg_opd.method.buckets`, of one K; to the rest of target and reference `REST_FLOOR`
    is added. Joining ids makes no divergence larger: it is a lower bound of the full one, which rises
    with K. Gradient to `student` only.
    """
    reference = None if reference is None else floored(reference, student)
    return gated_divergence(student, floored(target, student), factor, reference)


class SignGatedLoss(nn.Module):
    """The SG-OPD loss on plain logits: a readable reference, and a building block for loops of one's own.

    The trainer decides with the same functions but never holds whole logits.

    Args:
        settings: default: `GateSettings()`.
        **changes: fields of `GateSettings` that differ from `settings`, such as `extrapolation=1.5`.

    Raises:
        ValueError: a setting out of its range, or inputs whose shapes or labels do not fit.
        TypeError: a setting that `GateSettings` does not have.

    Example:

    ```python
    import torch
    from sg_opd import SignGatedLoss

    student_logits = torch.randn(2, 5, 11, requires_grad=True)
    teacher_logits = torch.randn(2, 5, 11)
    ids, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5)
    out = SignGatedLoss(extrapolation=1.5)(student_logits, teacher_logits, ids, torch.tensor([1.0, 0.0]), mask)
    out.loss.backward()
    out.metrics["gate/consensus"]
    ```
    """

    def __init__(self, settings: GateSettings | None = None, **changes: Any) -> None:
        super().__init__()
        self.settings = replace(settings or GateSettings(), **changes)

    def extra_repr(self) -> str:
        return repr(self.settings)

    def decide(
        self,
        student_logps: Float[Tensor, "B T"],
        teacher_logps: Float[Tensor, "B T"],
        verifier_labels: Float[Tensor, " B"],
        completion_mask: Shaped[Tensor, "B T"],
        reference_logps: Float[Tensor, "B T"] | None = None,
        signs: Float[Tensor, " B"] | None = None,
        group_advantages: Float[Tensor, " B"] | None = None,
    ) -> GateDecision:
        """`gate.decide` with this module's settings, on per-token log-probabilities; no gradient. See `forward`."""
        if signs is None and self.settings.signal == "group":
            raise ValueError(
                "`signal='group'` needs `signs`: `sg_opd.method.group_sign(verifier_labels, num_generations)` of the "
                "whole batch, before it is split into micro-batches."
            )
        signs = verdict_sign(verifier_labels) if signs is None else signs
        given = student_logps, teacher_logps, signs, completion_mask
        return decide(*given, self.settings, reference_logps, group_advantages)

    def forward(
        self,
        student_logits: Float[Tensor, "B T V"],
        teacher_logits: Float[Tensor, "B T W"],
        completion_ids: Int[Tensor, "B T"],
        verifier_labels: Float[Tensor, " B"],
        completion_mask: Shaped[Tensor, "B T"],
        reference_logits: Float[Tensor, "B T V"] | None = None,
        num_items_in_batch: Num[Tensor, ""] | int | float | None = None,
        signs: Float[Tensor, " B"] | None = None,
        group_advantages: Float[Tensor, " B"] | None = None,
    ) -> LossOutput:
        """`LossOutput(loss, metrics)`: the loss over the trained tokens, and the gate's metrics.

        Args:
            student_logits: (B, T, V), position t predicts `completion_ids[:, t]`; the only input to get a gradient.
            teacher_logits: (B, T, W); ids below min(V, W) are shared. The sampled and the top-k estimator normalise
                each model over its own head, the full one over the shared ids.
            completion_ids: (B, T), each trained id below min(V, W).
            verifier_labels: (B,), 1.0 correct, 0.0 incorrect, NaN abstained.
            completion_mask: (B, T), nonzero where a token is trained.
            reference_logits: (B, T, V) of the initial policy; `None` is the current policy.
            num_items_in_batch: the divisor, the global number of trained tokens; `None` counts those at hand.
            signs: (B,), +1, -1 or 0, of the rows' outcomes; `None`: of the verdicts. With `signal="group"` it is
                `group_sign` of the whole batch, before any split.
            group_advantages: (B,), GRPO's, where `advantage_weight` > 0.
        """
        self._check_inputs(verifier_labels, completion_ids, completion_mask, student_logits, teacher_logits)
        if reference_logits is not None:
            replace(self.settings, reference="initial")  # raises where the settings need the current one
        estimator = self.settings.estimator
        mask = completion_mask != 0
        ids = completion_ids * mask  # padding may hold any id
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        cut = shared if estimator == "full" else None
        student, teacher = self._scaled(student_logits, mask, cut), self._scaled(teacher_logits, mask, cut)
        reference = None if reference_logits is None else self._scaled(reference_logits, mask, cut)
        student_logps = _token_logps(student, ids)
        decision = self.decide(
            student_logps.detach(),
            _token_logps(teacher, ids).detach(),
            verifier_labels,
            mask,
            None if reference is None else _token_logps(reference, ids),
            signs,
            group_advantages,
        )
        if estimator == "full":
            per_token = gated_divergence(student, teacher, decision.factor, reference)
        elif estimator == "top_k":
            kept = likeliest_ids(teacher.detach()[..., :shared], ids, self.settings.top_k)
            own, target = bucketed_logps(student, kept), bucketed_logps(teacher, kept)
            initial = None if reference is None else bucketed_logps(reference, kept)
            per_token = bucketed_divergence(own, target, decision.factor, initial)
        else:
            per_token = policy_gradient(student_logps, decision.advantage)
        divisor = torch.as_tensor(mask.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss = torch.where(mask, per_token, 0.0).sum() / divisor.to(per_token.device)
        return LossOutput(loss, gate_metrics(gate_totals(decision, mask), decision.delta[mask]))

    def _scaled(self, logits: Tensor, mask: Tensor, cut: int | None) -> Tensor:
        # zeros where masked: what stands there may be infinite, and would make the gradient NaN
        logits = torch.where(mask.unsqueeze(-1), logits[..., :cut], 0.0)
        return at_least_float32(logits) / self.settings.temperature

    def _check_inputs(
        self, labels: Tensor, ids: Tensor, mask: Tensor, student_logits: Tensor, teacher_logits: Tensor
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
        if self.settings.estimator == "top_k" and self.settings.top_k > shared:
            raise ValueError(f"`top_k` is {self.settings.top_k}, but the shared vocabulary has {shared} ids.")


def _token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
