"""What a run asks its frozen models about a batch: its teacher and, where it is the reference, the initial policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import SGOPDConfig
from ..method.buckets import Buckets
from ..method.divergence import Head, head_of, last_hidden_state, sequence
from ..teachers.local import Forward, LocalTeacher
from ..teachers.protocol import TeacherError, ask, ask_top
from .frozen import InitialPolicy
from .prompts import as_teacher_reads


class TopTargets(NamedTuple):
    """`Buckets` by the names that they have in a batch."""

    teacher_top_ids: Tensor
    teacher_top_logps: Tensor


@dataclass(frozen=True)
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

    def of_generation(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What is asked once about a generation, to be split into micro-batches with it: each (B, T, ...)."""
        read = as_teacher_reads(batch)
        if self.args.estimator == "full":
            # offloaded, for all micro-batches at once, or each would bring every block
            return {"teacher_states": self.teacher.states(read)} if self.args.teacher_offload else {}
        if self.args.estimator == "top_k":
            with self.agreed(TeacherError):
                return self._top(read)._asdict()
        with self.agreed(TeacherError):
            if isinstance(self.teacher, LocalTeacher):  # takes the batch as it is, with what it has beside ids
                logps = self.teacher.score_batch(read)
            else:
                logps = ask(self.teacher, read, self.args.log_ratio_clip, self.skips)
        scores = {"teacher_per_token_logps": logps}
        if self.initial is not None:  # not GRPOTrainer's reference: that one it reloads from the path
            with self.initial.lend() as model:
                scores["initial_per_token_logps"] = self.forward.completion_logps(model, batch)
        return scores

    def _top(self, batch: dict[str, Any]) -> TopTargets:
        """The teacher's distributions over its likeliest ids, from any kind of teacher."""
        asked = batch, self.args.teacher_top_k, self.vocabulary
        if isinstance(self.teacher, LocalTeacher):
            return TopTargets(*self.teacher.top_batch(*asked))
        return TopTargets(*ask_top(self.teacher, *asked, self.skips))

    def top_targets(self, batch: dict[str, Any]) -> Buckets:
        """What `of_generation` keeps for the top-k estimator, of a micro-batch."""
        return Buckets(*(batch[name] for name in TopTargets._fields))

    def teacher_states(self, batch: dict[str, Any]) -> Tensor:
        """The teacher's last hidden states of a micro-batch, (B, T, H), for the full estimator."""
        return batch["teacher_states"] if self.args.teacher_offload else self.teacher.states(as_teacher_reads(batch))

    def teacher_head(self) -> Head:
        """The teacher's head as it is now: to be asked for within the forward that uses it."""
        return self.teacher.head()

    @torch.no_grad()
    def reference(self, batch: dict[str, Any]) -> tuple[Tensor, Head] | None:
        """The same of the initial policy, states and head; `None` where the reference is the current one."""
        if self.initial is None:
            return None
        with self.initial.lend() as policy:
            tokens = *sequence(batch), batch["completion_ids"].size(1)
            states = self.forward.run_within(policy, last_hidden_state, *tokens)
            return states, head_of(self.initial.unwrapped)
