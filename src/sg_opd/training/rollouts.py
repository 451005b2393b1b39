"""The rollouts of one generation: which are the teacher's, and what the verifier said of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from ..data import COLLECTED
from ..method.teacher_phase import Proposal
from ..teachers.protocol import eos_set, up_to_eos
from ..verifiers.verdicts import as_completion, checked_verdicts, columns_of

VERDICT_WORDS = {1.0: "correct", 0.0: "incorrect", None: "abstained"}


class Rollouts:
    """Mixes endorsed teacher rollouts into a rank's batch and keeps the verdicts, from one generation to the next.

    Args:
        trainer: whose teacher proposes, whose verifier judges, and whose batch it is.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.begin([])

    def begin(self, rows: Sequence[dict[str, Any]]) -> None:
        """Start on a new generation, for these rows of the dataset."""
        self.rows = rows
        self.slots: list[int] = []
        self.taken: dict[int, Proposal] = {}
        self.verdicts: list[float | None] = []

    def mix(self, prompts: list, output: tuple) -> None:
        """Put endorsed teacher rollouts into the slots of this rank's rows, in place.

        Args:
            prompts: of this rank's rows.
            output: what the parent trainer's `_generate` returned for them.
        """
        trainer, local = self.trainer, len(prompts)
        prompt_ids, completion_ids, _, completions, logprobs, *_ = output
        phase, step, group = trainer.teacher_phase, trainer.state.global_step, trainer.num_generations
        everywhere = local * trainer.accelerator.num_processes
        # an optimizer step may take several generations, one after another: their prompts have different places
        earlier = trainer._step % trainer.args.gradient_accumulation_steps // trainer.args.steps_per_generation
        num_prompts = everywhere * (earlier + 1) // group
        counts = phase.slots(step, num_prompts, group).tolist()
        if not any(counts[everywhere * earlier // group :]):
            return
        first = everywhere * earlier + trainer.accelerator.process_index * local
        self.slots = phase.slot_rows(step, num_prompts, group, range(first, first + local))

        def stored(rows: Sequence[int], candidates: int) -> list[list[Proposal]]:
            """Each slot's part of its row's collected completions: no two slots of a prompt take the same."""
            proposed = []
            for row in rows:
                slots, place = counts[(first + row) // group], (first + row) % group
                collected = (self.rows[row].get(COLLECTED) or [])[place - (group - slots) :: slots]
                proposed.append([self._proposal(prompts[row], self._as_ids(text)) for text in collected])
            return proposed

        def propose(rows: Sequence[int], candidates: int) -> list[list[Proposal]]:
            proposed = trainer.teacher.propose([prompt_ids[row] for row in rows], candidates)
            return [
                [self._proposal(prompts[row], ids) for ids in some] for row, some in zip(rows, proposed, strict=True)
            ]

        def endorse(rows: Sequence[int], proposals: Sequence[Proposal]) -> list[float | None]:
            judged, ids = [p.completion for p in proposals], [p.token_ids for p in proposals]
            return self._judge(rows, prompts, judged, ids, log_extra=_discard, log_metric=_discard)

        self.taken = phase.fill(self.slots, stored, endorse)
        unfilled = [row for row in self.slots if row not in self.taken]
        if self._teacher_is_asked(unfilled, prompt_ids):
            with trainer.last_good_step.agreed():
                self.taken |= phase.fill(unfilled, propose, endorse)
        for row, proposal in self.taken.items():
            completion_ids[row], completions[row] = proposal.token_ids, proposal.completion
            if logprobs is not None:  # NaN: an engine ratio of exactly 1, in all of the parent's modes
                logprobs[row] = [math.nan] * len(proposal.token_ids)

    def _teacher_is_asked(self, unfilled: list[int], prompt_ids: list[list[int]]) -> bool:
        """Whether this rank asks for proposals now; under a sharded teacher it takes part wherever any rank asks."""
        trainer = self.trainer
        if not trainer.teacher.sharded:
            return True
        anywhere = gather(torch.tensor([len(unfilled)], device=trainer.accelerator.device)).sum() > 0
        if anywhere and not unfilled:
            trainer.teacher.propose(prompt_ids[:1])  # every rank holds a part of the weights: take part, keep nothing
        return bool(anywhere)

    def _proposal(self, prompt: Any, ids: list[int]) -> Proposal:
        """Token ids as a proposal; it counts as ended with an EOS, in time, and within the student's vocabulary."""
        trainer = self.trainer
        text = trainer.processing_class.batch_decode([ids], skip_special_tokens=True)[0]
        ended = ids[-1] in trainer.eos_token_ids and max(ids) < trainer.shared_vocabulary
        return Proposal(ids, as_completion(prompt, text), ended and len(ids) <= trainer.args.max_completion_length)

    def _as_ids(self, completion: str | list[int]) -> list[int]:
        """A collected completion as token ids; to text, which has no end, the tokenizer's EOS is added."""
        if isinstance(completion, str):
            tokenizer = self.trainer._tokenizer
            completion = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return up_to_eos(completion, eos_set(self.trainer.eos_token_ids))

    def _judge(
        self, rows: Sequence[int], prompts: list, completions: list, ids: list, **extras: Callable
    ) -> list[float | None]:
        """The verifier's answer to completions of some rows, with those rows' columns and TRL's extras."""
        columns = {**columns_of([self.rows[row] for row in rows]), "trainer_state": self.trainer.state, **extras}
        prompts = [prompts[row] for row in rows]
        return checked_verdicts(self.trainer.verifier, prompts, completions, completion_ids=ids, **columns)

    def reward(self, prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float]:
        """The reward function given to the parent: keeps the verdicts, and answers a number for each row."""
        if not self.taken:
            self.verdicts = checked_verdicts(
                self.trainer.verifier, prompts, completions, completion_ids=completion_ids, **columns
            )
        else:
            self.verdicts = [1.0] * len(prompts)  # an endorsement stands, it is not graded again
            rows = [row for row in range(len(prompts)) if row not in self.taken]
            own, ids = [completions[row] for row in rows], [completion_ids[row] for row in rows]

            def log_extra(column: str, values: list) -> None:
                by_row = dict(zip(rows, values, strict=True))
                self.trainer._log_completion_extra(column, [by_row.get(row) for row in range(len(prompts))])

            extras = {"log_extra": log_extra, "log_metric": self.trainer._log_metric}
            graded = self._judge(rows, prompts, own, ids, **extras) if rows else []
            for row, verdict in zip(rows, graded, strict=True):
                self.verdicts[row] = verdict
        return [0.0 if verdict is None else verdict for verdict in self.verdicts]

    def tensors(self) -> dict[str, Tensor]:
        """By row of this rank, (B,): `verifier_labels` (NaN: abstained), `from_teacher` and `slot` (booleans)."""
        rows = range(len(self.verdicts))
        labels = [math.nan if verdict is None else verdict for verdict in self.verdicts]
        return {
            "verifier_labels": torch.tensor(labels),
            "from_teacher": torch.tensor([row in self.taken for row in rows]),
            "slot": torch.tensor([row in self.slots for row in rows]),
        }

    def golds(self) -> list[str | None]:
        """Each row's expected answer, to be shown; `None` where the dataset has no column `solution`."""
        return [None if row.get("solution") is None else str(row["solution"]) for row in self.rows]

    def columns(self) -> dict[str, list[str]]:
        """The columns of the completions table: each row's verdict and source."""
        return {
            "verdict": [VERDICT_WORDS[verdict] for verdict in self.verdicts],
            "source": ["teacher" if row in self.taken else "student" for row in range(len(self.verdicts))],
        }


def suppress(trainer: Any, ids: list[int] | None) -> None:
    """Have the student never sample some ids, whichever engine generates."""
    if not ids:
        return
    if trainer.use_vllm:
        kwargs = trainer.vllm_generation.generation_kwargs
        kwargs["logit_bias"] = {**(kwargs.get("logit_bias") or {}), **dict.fromkeys(ids, -100.0)}
    else:
        suppressed = [*(trainer.generation_config.suppress_tokens or []), *ids]
        trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"] = suppressed


def _discard(name: str, value: Any) -> None:
    """Takes what a verifier logs of proposals, which are no rows of the batch."""
