"""Counts of a batch's rows and sums over its tokens, which micro-batches and ranks may add up before dividing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.gate import GateDecision, gate_totals


def rollout_totals(
    verifier_labels: Tensor, from_teacher: Tensor, slot: Tensor, uniform: Tensor | None = None, **others: Tensor
) -> dict[str, Tensor]:
    """Counts of one generation's rows, which ranks and generations may add up before `shares`.

    All are (B,): `verifier_labels` 1.0 correct, 0.0 incorrect, NaN abstained; `from_teacher` whether a teacher rollout
    took the row; `slot` whether it was a teacher slot; `uniform` whether its group has one verdict, `None` without
    groups. What else a row has is not counted.
    """
    student = ~from_teacher.bool()
    counted = {
        "student_rollouts": student,
        "verdict/correct": student & (verifier_labels == 1),
        "verdict/incorrect": student & (verifier_labels == 0),
        "verdict/abstained": student & verifier_labels.isnan(),
        "rollouts": torch.ones_like(student),
        "teacher/slot_share": slot.bool(),
        "teacher/endorsed": ~student,
    }
    if uniform is not None:
        counted["gate/uniform_groups"] = uniform
    return {name: rows.sum() for name, rows in counted.items()}


def rollouts_by_teacher(
    names: Sequence[str], whose: Sequence[str], verifier_labels: Tensor, from_teacher: Tensor, **others: Tensor
) -> dict[str, Tensor]:
    """As `rollout_totals`, by teacher; `whose` has the name of each row's."""
    counted = {}
    for name in names:
        its = torch.tensor([teacher == name for teacher in whose], device=verifier_labels.device)
        student = its & ~from_teacher.bool()
        counted[f"teachers/{name}/share"] = its.sum()
        counted[f"teachers/{name}/rollouts"] = student.sum()
        counted[f"teachers/{name}/correct"] = (student & (verifier_labels == 1)).sum()
    return counted


def tokens_by_teacher(names: Sequence[str], number: Tensor, decision: GateDecision, gated: Tensor) -> dict[str, Tensor]:
    """As `gate_totals`, by teacher; `number`, (B,), is the place among `names` of each row's, `gated` is (B, T)."""
    counted = {}
    for place, name in enumerate(names):
        its = gated.bool() & (number == place).unsqueeze(1)
        totals = gate_totals(decision, its)
        counted[f"teachers/{name}/tokens"] = totals["tokens"]
        counted[f"teachers/{name}/consensus"] = totals["gate/consensus"]
        counted[f"teachers/{name}/conflict"] = totals["gate/conflict"]
        counted[f"teachers/{name}/delta"] = totals["delta/sum"]
    return counted
