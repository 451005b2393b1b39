"""What a run asks its frozen models about a batch: its teachers and, where it is the reference, the initial policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import SGOPDConfig
from ..method.buckets import Buckets
from ..method.divergence import Head, Target, head_of, last_hidden_state, sequence
from ..teachers.local import Forward, LocalTeacher
from ..teachers.protocol import TeacherError, TopScores, ask, ask_top
from ..teachers.server import ServerTeacher
from ..teachers.several import Part, Teachers, named, rows_of
from ..verifiers.verdicts import in_thread
from .frozen import InitialPolicy
from .prompts import as_teacher_reads


class TopTargets(NamedTuple):
    """`Buckets` by the names that they have in a batch."""

    teacher_top_ids: Tensor
    teacher_top_logps: Tensor


class Asked:
    """A teacher that was asked about a generation's rollouts, and answers once its answer is needed."""

    def __init__(self, teacher: ServerTeacher, question: tuple[list, list], top_k: int | None) -> None:
        self.name = teacher.name

        def answer() -> list[Any]:
            return teacher.score(*question) if top_k is None else teacher.score_top(*question, top_k)

        self._answer = in_thread(answer)

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `Teacher.score`, of the same rollouts, of which some completions may have become empty: masked."""
        return [row[: len(ids)] for row, ids in zip(self._answer.result(), completion_ids, strict=True)]

    def score_top(self, prompt_ids: Sequence, completion_ids: Sequence[Sequence[int]], k: int) -> list[TopScores]:
        """As `TopKTeacher.score_top`; see `score`."""
        rows = zip(self._answer.result(), completion_ids, strict=True)
        return [TopScores(*(part[: len(ids)] for part in row)) for row, ids in rows]


@dataclass(frozen=True)
class Scoring:
    """Puts batches of rollouts to a run's frozen models, in the form that its estimator needs."""

    args: SGOPDConfig
    teachers: Teachers  #: with estimator="full" each a `LocalTeacher`, with "top_k" that or a `TopKTeacher`
    vocabulary: int  #: the ids that student and teacher share
    initial: InitialPolicy | None  #: with reference_policy="initial"
    forward: Forward  #: runs frozen models
    #: its context raises a teacher's error on every rank
    agreed: Callable[[type[TeacherError]], AbstractContextManager]
    skips: bool  #: whether the step of a value that is no number is skipped
    #: by name, the teachers that work on the generation at hand already
    asked: dict[str | None, Asked] = field(default_factory=dict)

    def begin(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], whose: Sequence[str] | None
    ) -> None:
        """Put a generation to the teachers' servers, which work on it while this process does what comes before.

        A teacher in this process would take its time from that, and one of a user's own may not bear another thread.
        """
        top_k = self.args.teacher_top_k if self.args.estimator == "top_k" else None
        for name, teacher in self.teachers.by_name.items():
            rows = rows_of(name, whose, range(len(prompt_ids)))
            if rows and isinstance(teacher, ServerTeacher):
                question = [prompt_ids[row] for row in rows], [completion_ids[row] for row in rows]
                self.asked[name] = Asked(teacher, question, top_k)

    def of_generation(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What is asked once about a generation, to be split into micro-batches with it: each (B, T, ...)."""
        if self.args.estimator == "full":
            # offloaded, for all micro-batches at once, or each would bring every block
            return {"teacher_states": self._kept_states(batch)} if self.args.teacher_offload else {}
        if self.args.estimator == "top_k":
            return TopTargets(*self._asked(batch, self._top))._asdict()
        (logps,) = self._asked(batch, self._logps)
        scores = {"teacher_per_token_logps": logps}
        if self.initial is not None:  # not GRPOTrainer's reference: that one it reloads from the path
            with self.initial.lend() as model:
                scores["initial_per_token_logps"] = self.forward.completion_logps(model, batch)
        return scores

    def _asked(self, batch: dict[str, Any], ask: Callable[[Any, dict[str, Any]], Sequence[Tensor]]) -> Sequence[Tensor]:
        """What `ask` finds of each teacher about its rows, in the batch's order: each (B, T, ...)."""
        whole: list[Tensor] = []
        for part in self.teachers.parts(as_teacher_reads(batch)):
            with self.agreed(TeacherError), named(part.name):
                found = [] if part.batch is None else ask(self.asked.pop(part.name, part.teacher), part.batch)
            if part.rows is None:
                return found
            whole = whole or [value.new_zeros(len(batch["completion_ids"]), *value.shape[1:]) for value in found]
            for into, value in zip(whole, found, strict=False):
                into[part.rows] = value[: len(part.rows)].to(into.dtype)
        return whole

    def _logps(self, teacher: Any, batch: dict[str, Any]) -> Sequence[Tensor]:
        """A teacher's log-probabilities of a batch's completion tokens."""
        if isinstance(teacher, LocalTeacher):  # takes the batch as it is, with what it has beside ids
            return [teacher.score_batch(batch)]
        return [ask(teacher, batch, self.args.log_ratio_clip, self.skips)]

    def _top(self, teacher: Any, batch: dict[str, Any]) -> Sequence[Tensor]:
        """A teacher's distributions over its likeliest ids, from any kind of teacher."""
        asked = batch, self.args.teacher_top_k, self.vocabulary
        if isinstance(teacher, LocalTeacher):
            return teacher.top_batch(*asked)
        return ask_top(teacher, *asked, self.skips)

    def top_targets(self, batch: dict[str, Any]) -> Buckets:
        """What `of_generation` keeps for the top-k estimator, of a micro-batch."""
        return Buckets(*(batch[name] for name in TopTargets._fields))

    def _states(self, batch: dict[str, Any]) -> Iterator[tuple[Part, Tensor]]:
        """Each teacher's last hidden states of its rows, (B', T, H), where it has any or is sharded."""
        for part in self.teachers.parts(as_teacher_reads(batch)):
            if part.batch is not None:
                states = part.teacher.states(part.batch)
                yield part, states if part.rows is None else states[: len(part.rows)]

    def _kept_states(self, batch: dict[str, Any]) -> Any:
        """The same by row, to be split with the batch: (B, T, H), or of several teachers, whose H differ, a list."""
        by_row: dict[int, Tensor] = {}
        for part, states in self._states(batch):
            if part.rows is None:
                return states
            by_row |= zip(part.rows, states, strict=True)
        return [by_row[row] for row in range(len(by_row))]

    def teacher_states(self, batch: dict[str, Any]) -> list[tuple[Part, Tensor]]:
        """The teachers' last hidden states of a micro-batch, for the full estimator."""
        if not self.args.teacher_offload:
            return [*self._states(batch)]
        kept, parts = batch["teacher_states"], self.teachers.parts(batch)
        if self.teachers.only is not None:
            return [(part, kept) for part in parts]
        return [(part, torch.stack([kept[row] for row in part.rows])) for part in parts if part.rows]

    def targets(self, states: list[tuple[Part, Tensor]]) -> list[Target]:
        """These states with the heads as they are now: to be asked for within the forward that uses them."""
        return [Target(of_part, part.teacher.head(), part.rows) for part, of_part in states]

    @torch.no_grad()
    def reference(self, batch: dict[str, Any]) -> tuple[Tensor, Head] | None:
        """States and head of the initial policy; `None` where the reference is the current one."""
        if self.initial is None:
            return None
        with self.initial.lend() as policy:
            tokens = *sequence(batch), batch["completion_ids"].size(1)
            states = self.forward.run_within(policy, last_hidden_state, *tokens)
            return states, head_of(self.initial.unwrapped)
