"""What a teacher is, how a batch is put to it and its answer checked, and the token-id helpers that teachers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..method.buckets import Buckets, bucketed_answer
from ..method.divergence import put, spread

TEACHER_MEMBERS = ("score", "propose", "sharded", "context", "name")
NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity, which JSON does not have
MASS_TOLERANCE = 1e-2  # by which the probabilities of different ids may sum to more than 1


class TeacherError(RuntimeError):
    """A teacher cannot answer. Raised on one rank, it ends the run on all of them after a checkpoint."""


@runtime_checkable
class Teacher(Protocol):
    """What the trainer asks of a teacher; any object with these can be its `teacher_model` (estimator "sampled")."""

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


class TopScores(NamedTuple):
    """What a teacher says of a completion of T tokens, all in nats at the training temperature."""

    logps: Tensor  #: (T,), float32, of the completion's tokens: as `Teacher.score`
    top_ids: Tensor  #: (T, k), integers: the teacher's k likeliest ids before each token, in any order, each once
    top_logps: Tensor  #: (T, k), float32, of those ids


@runtime_checkable
class TopKTeacher(Teacher, Protocol):
    """A `Teacher` that also says which ids it finds likeliest: what estimator "top_k" needs of one of a user's own."""

    def score_top(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], k: int
    ) -> list[TopScores]:
        """The scores of each completion's tokens after its prompt, as `score`, and of the `k` likeliest ids there.

        Raises:
            TeacherError: it cannot answer, and training is to stop on every rank.
        """


def ask(teacher: Teacher, batch: dict[str, Any], log_ratio_clip: float | None, skips: bool = False) -> Tensor:
    """The teacher's log-probabilities of a batch's completion tokens, (B, T), zero where not trained.

    `log_ratio_clip` bounds what a token without probability does to training; `None` refuses one. With `skips` values
    that are no numbers are not refused here, since the caller skips their step.

    Raises:
        TeacherError: an answer that does not fit the batch, or holds a value that is refused.
    """
    ids, mask, of_scored, prompts, completions = _question(batch)
    rows = teacher.score(prompts, completions)
    _check_types(teacher, "score", rows, Tensor)
    _check_lengths(teacher, rows, completions)
    scored = torch.cat([row.to(ids.device) for row in rows])[of_scored]
    remedy = "Set `log_ratio_clip`, which bounds it, or look at the teacher"
    return spread(_checked(teacher, ids[mask], scored, skips, log_ratio_clip is not None, remedy), mask)


def ask_top(teacher: TopKTeacher, batch: dict[str, Any], k: int, vocabulary: int, skips: bool = False) -> Buckets:
    """The teacher's distributions over its `k` likeliest ids, the sampled one and the rest, (B, T, ...).

    Zero where not trained. Ids of `vocabulary` and above, which the student lacks, join the rest, and so do ids without
    probability. `skips` is as in `ask`: what is no number then shows at the sampled id, where the caller looks for it.

    Raises:
        TeacherError: an answer that does not fit the batch, or holds a value that is refused.
    """
    ids, mask, of_scored, prompts, completions = _question(batch)
    rows = teacher.score_top(prompts, completions, k)
    _check_types(teacher, "score_top", rows, TopScores)
    _check_types(teacher, "score_top", [part for row in rows for part in row], Tensor)
    _check_lengths(teacher, [row.logps for row in rows], completions)
    for row, completion in zip(rows, completions, strict=True):
        if not row.top_ids.shape == row.top_logps.shape == (len(completion), k):
            raise TeacherError(
                f"{teacher.name} gives likeliest ids of shape {tuple(row.top_ids.shape)}, with log-probabilities of "
                f"shape {tuple(row.top_logps.shape)}, but was asked for {(len(completion), k)}"
            )
    scored, top_ids, top_logps = (torch.cat([row[i].to(ids.device) for row in rows])[of_scored] for i in range(3))
    sampled, top_logps = ids[mask], top_logps.float().masked_fill(top_logps <= NO_PROBABILITY, -math.inf)
    # any that is no number, where one is looked for
    scored = scored.float().masked_fill(~(top_logps < math.inf).all(1), math.nan)
    remedy = "Set `non_finite_log_probs='skip'`, which drops its step, or look at the teacher"
    scored = _checked(teacher, sampled, scored, skips, False, remedy)
    answer = bucketed_answer(sampled, scored, top_ids, top_logps, vocabulary)
    _check_masses(teacher, answer)
    return Buckets(*(put(part, mask) for part in answer))


def _question(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, list[list[int]], list[list[int]]]:
    """Ids and trained tokens of a batch's completions, (B, T), which of all tokens those are, (N,), and what to ask.

    Tokens of tools and environments are read, but not trained: what the teacher says of them does not count.
    """
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    trained = mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask
    return ids, trained, trained[mask], as_lists(batch["prompt_ids"], batch["prompt_mask"]), as_lists(ids, mask)


def _check_types(teacher: Teacher, method: str, answer: Any, expected: type) -> None:
    wrong = next((part for part in answer if not isinstance(part, expected)), None)
    if wrong is not None:
        raise TeacherError(
            f"{teacher.name} answers `{method}` with {wrong!r:.80}, a {type(wrong).__name__}, where a "
            f"{expected.__name__} is due: see `sg_opd.teachers.TopKTeacher.{method}`"
        )


def _check_lengths(teacher: Teacher, rows: Sequence[Tensor], completions: Sequence[Sequence[int]]) -> None:
    if [len(row) for row in rows] != [len(row) for row in completions]:
        raise TeacherError(
            f"{teacher.name} scored rows of {[len(row) for row in rows]} tokens, but the batch has "
            f"{[len(row) for row in completions]}"
        )


def _checked(teacher: Teacher, ids: Tensor, logps: Tensor, skips: bool, bounded: bool, remedy: str) -> Tensor:
    """Log-probabilities (N,) of tokens, none of which is refused; ones without probability may pass where `bounded`."""
    improbable = logps <= NO_PROBABILITY
    if skips:
        return logps.masked_fill(improbable, -math.inf)
    refused = logps.isnan() | (False if bounded else improbable)
    if refused.any():
        raise TeacherError(
            f"{teacher.name} gives token {ids[refused][0]} the log-probability {logps[refused][0]:g}, on which no "
            f"delta can be trained. {remedy}"
        )
    return logps


def _check_masses(teacher: Teacher, answer: Buckets) -> None:
    """Refuse ids that are named twice at a position, and probabilities that sum to more than 1."""
    named = answer.ids.sort(dim=1).values
    twice = ((named[:, 1:] == named[:, :-1]) & (named[:, 1:] >= 0)).any(1)
    if twice.any():
        raise TeacherError(f"{teacher.name} names an id twice among its likeliest {answer.ids[twice][0, 1:].tolist()}")
    masses = torch.logsumexp(answer.logps[:, :-1], dim=1)
    if (masses > MASS_TOLERANCE).any():
        raise TeacherError(
            f"{teacher.name} gives the ids of one position a probability of {masses.exp().nan_to_num(0.0).max():g} in "
            "all: what `score_top` returns are no log-probabilities of one distribution"
        )


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
