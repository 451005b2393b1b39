"""The rollouts of one generation on one rank: which rows the teacher takes, and the verifier's verdict on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState
from trl.generation.vllm_generation import VLLMGeneration

from ..config import SGOPDConfig
from ..data import COLLECTED
from ..method.gate import group_sign, uniform_groups, verdict_sign
from ..method.teacher_phase import Proposal, TeacherPhaseSampler
from ..teachers.protocol import Teacher, TeacherError, up_to_eos
from ..teachers.sampling import OF_RUN, SERVED, WHOLE_DISTRIBUTION, stated, tell_unused
from ..teachers.several import Teachers, named, rows_of
from ..verifiers.thinking import Openings
from ..verifiers.verdicts import MathVerifier, as_completion, checked_verdicts, columns_of, in_thread
from .prompts import Tokenize, teacher_prompt_ids

logger = get_logger(__name__)  # of the main process only

# what a multimodal batch carries beside token ids, as GRPOTrainer's forward takes it
MULTIMODAL_KEYS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
# settings that vLLM samples by, and that GRPOTrainer does not send it
VLLM_ONLY = {name: value for name, value in SERVED.items() if name not in WHOLE_DISTRIBUTION}


def _discard(name: str, value: Any) -> None:
    """Takes what a verifier logs of proposals, which are no rows of the batch."""


UNLOGGED = {"log_extra": _discard, "log_metric": _discard}
VERDICT_WORDS = {1.0: "correct", 0.0: "incorrect", None: "abstained"}


class Slot(NamedTuple):
    """A row that the teacher may take."""

    row: int  #: among this rank's rows of the generation
    place: int  #: among the slots of its prompt, from 0
    slots: int  #: how many slots its prompt has


def teacher_slots(
    phase: TeacherPhaseSampler, step: int, group: int, rows: int, rank: int, ranks: int, earlier: int
) -> tuple[list[Slot], bool]:
    """This rank's slots among its `rows` of a generation, `group` rollouts a prompt, and whether any rank has one.

    `earlier` generations of the same optimizer step had the places in the global batch before these.
    """
    everywhere = rows * ranks
    num_prompts = everywhere * (earlier + 1) // group
    counts = phase.slots(step, num_prompts, group).tolist()
    first = everywhere * earlier + rank * rows
    slots = []
    for row in phase.slot_rows(step, num_prompts, group, range(first, first + rows)):
        count, place = counts[(first + row) // group], (first + row) % group
        slots.append(Slot(row, place - (group - count), count))
    return slots, any(counts[everywhere * earlier // group :])


class Generated(NamedTuple):
    """What GRPOTrainer generated for this rank's rows; prompts and completions are text or messages."""

    prompts: list
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list
    logprobs: list[list[float]] | None  #: the engine's, of the completions' tokens


@dataclass(frozen=True)
class Proposer:
    """The teachers, and what reads their completions, or those collected earlier, as proposals for the student."""

    teachers: Teachers
    agreed: Callable[[type[TeacherError]], AbstractContextManager]  #: its context raises an error on every rank
    processing_class: Any
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    vocabulary: int  #: ids that student and teacher share
    max_completion_length: int

    def proposal(self, prompt: Any, ids: list[int]) -> Proposal:
        """Token ids as a proposal; it counts as ended with an EOS, in time, and within the shared vocabulary."""
        text = self.processing_class.batch_decode([ids], skip_special_tokens=True)[0]
        ended = len(ids) > 0 and ids[-1] in self.eos_token_ids and max(ids) < self.vocabulary
        return Proposal(ids, as_completion(prompt, text), ended and len(ids) <= self.max_completion_length)

    def ids(self, completion: str | list[int]) -> list[int]:
        """A collected completion as token ids; to text, which has no end, the tokenizer's EOS is added."""
        if isinstance(completion, str):
            eos = self.tokenizer.eos_token_id
            completion = [*self.tokenizer(completion, add_special_tokens=False)["input_ids"], eos]
        return up_to_eos(completion, self.eos_token_ids)


@dataclass
class Rollouts:
    """The rollouts of one generation: mixed with endorsed teacher rollouts, and judged."""

    rows: Sequence[dict[str, Any]]  #: of the dataset, one for each rollout of this rank
    verifier: Callable  #: in TRL's reward-function form
    state: TrainerState  #: the trainer's, given to the verifier as GRPOTrainer does
    ends: frozenset[int] | None = None  #: rollouts that end with none of these were cut: abstained on; `None`: judged
    whose: list[str] | None = None  #: the name of each row's teacher, of several
    openings: Openings | None = None  #: the think delimiters that the rows' prompts end with; `None`: not looked for
    slots: set[int] = field(default_factory=set)
    taken: dict[int, Proposal] = field(default_factory=dict)
    verdicts: list[float | None] = field(default_factory=list)
    by_row: dict[str, Tensor] = field(default_factory=dict)  #: what `tensors` made
    ahead: Future[list[float | None]] | None = None  #: verdicts on the rows that the teacher did not take
    teacher_prompt_ids: list[list[int]] | None = None  #: what the teacher reads of each row; `None`: the prompts

    def read_prompts(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[list[int]], tokenize: Tokenize | None
    ) -> None:
        """Take in the prompts, as they were tokenised, before any completion is judged; and the teacher's own.

        Those are not read where `tokenize` is `None`: evaluation asks no teacher.
        """
        self.openings = Openings(tokenizer, prompt_ids)
        if tokenize is not None:
            self.teacher_prompt_ids = teacher_prompt_ids(self.rows, prompt_ids, tokenize)

    def mix(self, phase: TeacherPhaseSampler, slots: Sequence[Slot], proposer: Proposer, generated: Generated) -> None:
        """Fill this rank's slots with endorsed teacher rollouts, in `generated`; every rank enters it.

        Completions of the column `teacher_completions` come first, then what the teacher proposes.
        """
        prompts, by_row = generated.prompts, {slot.row: slot for slot in slots}
        asked = self.teacher_prompt_ids or generated.prompt_ids
        self.slots = set(by_row)

        def read(rows: Sequence[int], completions: Iterable[list[list[int]]]) -> list[list[Proposal]]:
            of_rows = zip(rows, completions, strict=True)
            return [[proposer.proposal(prompts[row], ids) for ids in some] for row, some in of_rows]

        def collected(rows: Sequence[int], candidates: int) -> list[list[Proposal]]:
            # no two slots of a prompt get the same
            texts = [(self.rows[row].get(COLLECTED) or [])[by_row[row].place :: by_row[row].slots] for row in rows]
            return read(rows, [[proposer.ids(text) for text in some] for some in texts])

        def proposed(teacher: Teacher, rows: Sequence[int], candidates: int) -> list[list[Proposal]]:
            return read(rows, teacher.propose([asked[row] for row in rows], candidates))

        def endorse(rows: Sequence[int], proposals: Sequence[Proposal]) -> list[float | None]:
            ids = [p.token_ids for p in proposals]
            judged = self._opened(rows, [p.completion for p in proposals], ids)
            return self._judge(rows, prompts, judged, ids, **UNLOGGED)

        self.taken = phase.fill([*by_row], collected, endorse)
        for name, teacher in proposer.teachers.by_name.items():
            its = rows_of(name, self.whose, (row for row in by_row if row not in self.taken))
            if asks(teacher, len(its), asked):
                with proposer.agreed(TeacherError), named(name):
                    self.taken |= phase.fill(its, partial(proposed, teacher), endorse)
        for row, proposal in self.taken.items():
            generated.completion_ids[row], generated.completions[row] = proposal.token_ids, proposal.completion
            if generated.logprobs is not None:  # NaN: an engine ratio of exactly 1, in all of GRPOTrainer's modes
                generated.logprobs[row] = [math.nan] * len(proposal.token_ids)

    def grade_ahead(self, generated: Generated) -> None:
        """Begin to grade beside what is computed until `reward` asks for the verdicts.

        `MathVerifier` alone, whose work is done by processes: another verifier stays in the main thread, where it can
        be interrupted and may log.
        """
        if type(self.verifier) is MathVerifier:
            rows = self._own_rows()
            ids = [generated.completion_ids[row] for row in rows]
            texts = self._opened(rows, [generated.completions[row] for row in rows], ids)
            self.ahead = in_thread(lambda: self._judge(rows, generated.prompts, texts, ids, **UNLOGGED))

    def _own_rows(self) -> list[int]:
        """The rows that the teacher did not take: its own are endorsed, and not graded again."""
        return [row for row in range(len(self.rows)) if row not in self.taken]

    def _judge(self, rows: Sequence[int], prompts: list, completions: list, ids: list, **extras: Callable) -> list:
        """The verdicts on completions of some rows; the verifier gets those rows' columns and TRL's extras."""
        if not rows:
            return []
        columns = {**columns_of([self.rows[row] for row in rows]), "trainer_state": self.state, **extras}
        prompts = [prompts[row] for row in rows]
        return checked_verdicts(self.verifier, prompts, completions, completion_ids=ids, **columns)

    def _opened(self, rows: Sequence[int], completions: list, ids: list) -> list:
        """Completions of some rows as the verifier is to see them, with the think delimiters of their prompts."""
        return completions if self.openings is None else self.openings.before(rows, completions, ids)

    def reward(self, prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float]:
        """The reward function of GRPOTrainer: keeps the verdicts, and returns a number for each row."""
        every = range(len(prompts))
        by_row: dict[int, float | None] = dict.fromkeys(self.taken, 1.0)
        rows = self._own_rows()

        def log_extra(column: str, values: list) -> None:
            logged = dict(zip(rows, values, strict=True))
            columns["log_extra"](column, [logged.get(row) for row in every])

        if self.ahead is not None:
            graded = self.ahead.result()
        elif not self.taken:
            texts = self._opened(rows, completions, completion_ids)
            graded = checked_verdicts(self.verifier, prompts, texts, completion_ids=completion_ids, **columns)
        else:
            ids = [completion_ids[row] for row in rows]
            own = self._opened(rows, [completions[row] for row in rows], ids)
            graded = self._judge(rows, prompts, own, ids, log_extra=log_extra, log_metric=columns["log_metric"])
        by_row |= dict(zip(rows, graded, strict=True))
        if self.ends is not None:
            by_row |= {row: None for row in rows if completion_ids[row][-1] not in self.ends}
        self.verdicts = [by_row[row] for row in every]
        return [0.0 if verdict is None else verdict for verdict in self.verdicts]

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """By row of this rank, (B,): `verifier_labels` (NaN: abstained), `from_teacher` and `slot` (booleans).

        Once compared also `gate_signs`, and `uniform` where there are groups. They are made once, when all are judged.
        """
        if not self.by_row:
            rows = range(len(self.verdicts))
            labels = [math.nan if verdict is None else verdict for verdict in self.verdicts]
            values = [labels, [row in self.taken for row in rows], [row in self.slots for row in rows]]
            # one copy, for which the host does not wait
            labels, taken, slots = torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
            self.by_row = {"verifier_labels": labels, "from_teacher": taken.bool(), "slot": slots.bool()}
        return self.by_row

    def compare(self, labels: Tensor, from_teacher: Tensor, generations: int, by_group: bool, rank: int) -> None:
        """Take in the verdicts of all ranks, (N,): a prompt's group may lie on several."""
        own = slice(rank * len(self.rows), (rank + 1) * len(self.rows))
        signs = group_sign(labels, generations, from_teacher) if by_group else verdict_sign(labels)
        self.by_row["gate_signs"] = signs[own]
        if generations > 1:
            self.by_row["uniform"] = uniform_groups(labels, generations, from_teacher)[own]

    def reference_answers(self) -> list[str | None]:
        """Each row's reference answer, to be shown; `None` where the dataset has no column `solution`."""
        return [None if row.get("solution") is None else str(row["solution"]) for row in self.rows]

    def columns(self) -> dict[str, list[str]]:
        """The columns of the completions table: each row's verdict and source, and of several teachers whose it is."""
        shown = {
            "verdict": [VERDICT_WORDS[verdict] for verdict in self.verdicts],
            "source": ["teacher" if row in self.taken else "student" for row in range(len(self.verdicts))],
        }
        return shown if self.whose is None else {**shown, "teacher": self.whose}


def asks(teacher: Teacher, unfilled: int, prompt_ids: list[list[int]]) -> bool:
    """Whether this rank asks for proposals now; under a sharded teacher it takes part wherever any rank asks."""
    if not teacher.sharded:
        return True
    anywhere = bool(gather(torch.tensor([unfilled], device=PartialState().device)).sum() > 0)
    if anywhere and not unfilled:
        teacher.propose(prompt_ids[:1])  # every rank holds a part of the weights: take part, keep nothing
    return anywhere


def state_sampling(args: SGOPDConfig, student: Any, never: list[int], generator: Any) -> None:
    """Have the run state all that shapes the student's rollouts, and warn of what its checkpoint has otherwise.

    `never` are ids that are not to be sampled; `generator` is TRL's `VLLMGeneration`, or the trainer that generates.
    """
    tell_unused(logger, "student", student.generation_config.to_dict(), stated(args), OF_RUN)
    if isinstance(generator, VLLMGeneration):  # a server fills in from the checkpoint's file what is not sent to it
        generator.generation_kwargs = {**VLLM_ONLY, **generator.generation_kwargs}
        if never:
            bias = generator.generation_kwargs.get("logit_bias") or {}
            generator.generation_kwargs["logit_bias"] = {**bias, **dict.fromkeys(never, -100.0)}
    elif never:
        kept = [*(generator.generation_config.suppress_tokens or []), *never]
        generator.generation_config.suppress_tokens = generator.generation_kwargs["suppress_tokens"] = kept
