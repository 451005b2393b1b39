"""What a teacher is, how a batch is put to it and its answer checked, and the token-id helpers that teachers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..method.divergence import spread

TEACHER_MEMBERS = ("score", "propose", "sharded", "context", "name")
NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity, which JSON does not have


class TeacherError(RuntimeError):
    """A teacher cannot answer. Raised on one rank, it ends the run on all of them after a checkpoint."""


@runtime_checkable
class Teacher(Protocol):
    """What the trainer asks of a teacher; any object with these can be its `teacher_model` (sampled estimator)."""

    sharded: bool  #: Whether every rank must enter `score` and `propose` equally often, each with at least one row.

    context: int | None
    """Longest sequence of prompt and completion it can take, in tokens; `None` where it is not known."""

    name: str  #: What a model card calls it.

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities in nats of each completion's tokens after its prompt, float32, (T_i,) each.

        At the training temperature. A completion may be empty.

        Raises:
            TeacherError: it cannot answer, and training is to stop on every rank.
        """

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """`candidates` sampled completions of each prompt as token ids, each up to and with its first EOS."""


def ask(teacher: Teacher, batch: dict[str, Any], log_ratio_clip: float | None, skips: bool = False) -> Tensor:
    """The teacher's log-probabilities of a batch's completion tokens, (B, T), zero where masked.

    `log_ratio_clip` bounds what a token without probability does to training; `None` refuses one. With `skips` values
    that are no numbers are not refused here, since the caller skips their step.

    Raises:
        TeacherError: an answer that does not fit the batch, or holds a value that is refused.
    """
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    completions = as_lists(ids, mask)
    rows = teacher.score(as_lists(batch["prompt_ids"], batch["prompt_mask"]), completions)
    if [len(row) for row in rows] != [len(row) for row in completions]:
        raise TeacherError(
            f"{teacher.name} scored rows of {[len(row) for row in rows]} tokens, but the batch has "
            f"{[len(row) for row in completions]}"
        )
    logps = spread(torch.cat([row.to(ids.device) for row in rows]), mask)
    improbable = logps <= NO_PROBABILITY
    if skips:
        return logps.masked_fill(improbable, -math.inf)
    refused = logps.isnan() | (improbable if log_ratio_clip is None else False)
    if refused.any():
        raise TeacherError(
            f"{teacher.name} gives token {ids[refused][0]} the log-probability {logps[refused][0]:g}, on which no "
            "delta can be trained. Set `log_ratio_clip`, which bounds it, or look at the teacher"
        )
    return logps


def eos_set(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The ids that end a completion, from a generation config's `eos_token_id` in any of its forms."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def up_to_eos(ids: Sequence[int], eos: frozenset[int]) -> list[int]:
    """`ids` up to and with the first EOS; all of them where there is none."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids) - 1)
    return list(ids[: end + 1])


def as_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids of each row where `mask` is set; both (B, L)."""
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def padded(rows: Sequence[Sequence[int]], pad_token_id: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both (B, L), from rows of unequal length, padded at `side`."""
    from trl.trainer.utils import pad

    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad([torch.ones_like(row) for row in ids], 0, side)
    return pad(ids, pad_token_id, side).to(device), mask.to(device)
