"""What a run asks its frozen models about a batch: its teacher and, where it is the reference, the initial policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import SGOPDConfig
from ..method.buckets import Buckets
from ..method.divergence import Head, head_of, last_hidden_state, sequence
from ..teachers.local import Forward, LocalTeacher
from ..teachers.protocol import TeacherError, TopScores, ask, ask_top
from ..teachers.server import ServerTeacher
from ..verifiers.verdicts import in_thread
from .frozen import InitialPolicy


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


@dataclass
class Scoring:
    """Puts batches of rollouts to a run's frozen models, in the form that its estimator needs."""

    args: SGOPDConfig
    teacher: Any  #: a `Teacher`; with estimator="full" a `LocalTeacher`, with "top_k" that or a `TopKTeacher`
    vocabulary: int  #: the ids that student and teacher share
    initial: InitialPolicy | None  #: with reference_policy="initial"
    forward: Forward  #: runs frozen models
    #: its context raises a teacher's error on every rank
    agreed: Callable[[type[TeacherError]], AbstractContextManager]
    skips: bool  #: whether the step of a value that is no number is skipped
    asked: Asked | None = None  #: the teacher, where it works on the generation at hand already

    def begin(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Put a generation to a teacher's server, which works on it while this process does what comes before.

        A teacher in this process would take its time from that, and one of a user's own may not bear another thread.
        """
        if isinstance(self.teacher, ServerTeacher):
            top_k = self.args.teacher_top_k if self.args.estimator == "top_k" else None
            self.asked = Asked(self.teacher, (prompt_ids, completion_ids), top_k)

    def of_generation(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What is asked once about a generation, to be split into micro-batches with it: each (B, T, ...)."""
        if self.args.estimator == "full":
            # offloaded, for all micro-batches at once, or each would bring every block
            return {"teacher_states": self.teacher.states(batch)} if self.args.teacher_offload else {}
        if self.args.estimator == "top_k":
            with self.agreed(TeacherError):
                return self._top(batch)._asdict()
        with self.agreed(TeacherError):
            if isinstance(self.teacher, LocalTeacher):  # takes the batch as it is, with what it has beside ids
                logps = self.teacher.score_batch(batch)
            else:
                logps = ask(self._answering(), batch, self.args.log_ratio_clip, self.skips)
        scores = {"teacher_per_token_logps": logps}
        if self.initial is not None:  # not GRPOTrainer's reference: that one it reloads from the path
            with self.initial.lend() as model:
                scores["initial_per_token_logps"] = self.forward.completion_logps(model, batch)
        return scores

    def _answering(self) -> Any:
        """The teacher, or its answer that is on the way, once."""
        asked, self.asked = self.asked, None
        return asked or self.teacher

    def _top(self, batch: dict[str, Any]) -> TopTargets:
        """The teacher's distributions over its likeliest ids, from any kind of teacher."""
        asked = batch, self.args.teacher_top_k, self.vocabulary
        if isinstance(self.teacher, LocalTeacher):
            return TopTargets(*self.teacher.top_batch(*asked))
        return TopTargets(*ask_top(self._answering(), *asked, self.skips))

    def top_targets(self, batch: dict[str, Any]) -> Buckets:
        """What `of_generation` keeps for the top-k estimator, of a micro-batch."""
        return Buckets(*(batch[name] for name in TopTargets._fields))

    def teacher_states(self, batch: dict[str, Any]) -> Tensor:
        """The teacher's last hidden states of a micro-batch, (B, T, H), for the full estimator."""
        return batch["teacher_states"] if self.args.teacher_offload else self.teacher.states(batch)

    def teacher_head(self) -> Head:
        """The teacher's head as it is now: to be asked for within the forward that uses it."""
        return head_of(self.teacher.unwrapped)

    @torch.no_grad()
    def reference(self, batch: dict[str, Any]) -> tuple[Tensor, Head] | None:
        """The same of the initial policy, states and head; `None` where the reference is the current one."""
        if self.initial is None:
            return None
        with self.initial.lend() as policy:
            tokens = *sequence(batch), batch["completion_ids"].size(1)
            states = self.forward.run_within(policy, last_hidden_state, *tokens)
            return states, head_of(self.initial.accelerator.unwrap_model(policy))
