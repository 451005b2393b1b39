"""Phased teacher sampling: in a cold-start phase, part of each prompt's rollouts is the teacher's, if endorsed.

Sources: the SG-OPD abstract (arXiv 2606.09304) for the phase and the endorsement; [N], notes by readers of its full
text, for "three-phase". The other schedules, the slots and their place are this project's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Schedule = Literal["constant", "linear", "cosine", "three-phase"]


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    # the share left of the first fraction at progress 0 <= p < 1, of which `hold` is held
    "constant": lambda p, hold: 1.0,
    "linear": lambda p, hold: 1.0 - p,
    "cosine": lambda p, hold: _cosine(p),
    "three-phase": lambda p, hold: 1.0 if p < hold else _cosine((p - hold) / (1.0 - hold)),
}


class Proposal(NamedTuple):
    """A teacher's rollout for one slot."""

    token_ids: list[int]  #: The completion's ids, its EOS included.
    completion: Any  #: The same as text or messages: what a verifier judges.
    terminated: bool  #: Whether it ended with EOS; a truncated one never takes a row.


Propose = Callable[[Sequence[int], int], Sequence[Sequence[Proposal]]]
Endorse = Callable[[Sequence[int], Sequence[Proposal]], Sequence[float | None]]


@dataclass(eq=False)
class TeacherPhaseSampler:
    """Decides which rollouts of a batch are teacher slots, and fills them with endorsed teacher rollouts.

    This is not a `torch.utils.data.Sampler`: it draws no indices of a dataset. It answers, for an optimizer step, how
    many rollouts of each prompt the teacher may take.

    Args:
        fraction: share of each prompt's rollouts at step 0, in [0, 1].
        steps: length K of the phase in optimizer steps, >= 0; from step K on there are no slots. 0 is off.
        schedule: "constant", "linear" or "cosine" decay of the share from `fraction` towards 0 at K; "three-phase"
            holds it first, then decays by a cosine, and from K on there is none [N].
        candidates: completions the teacher proposes for each slot, >= 1.
        seed: of the stochastic rounding.
        hold: share of the phase that "three-phase" holds, in [0, 1).

    Raises:
        ValueError: an argument out of its range, by name.
    """

    fraction: float
    steps: int
    schedule: Schedule = "linear"
    candidates: int = 1
    seed: int = 0
    hold: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.hold < 1.0:
            raise ValueError(f"`hold` must be in [0, 1), got {self.hold!r}.")
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"`fraction` must be in [0, 1], got {self.fraction!r}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}.")
        for name, least in (("steps", 0), ("candidates", 1)):
            value = getattr(self, name)
            if value != int(value) or value < least:
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
            setattr(self, name, int(value))

    def fraction_at(self, step: int) -> float:
        """The share of teacher slots at optimizer step `step` >= 0; 0.0 from step `steps` on."""
        if step >= self.steps:
            return 0.0
        return self.fraction * SCHEDULES[self.schedule](step / self.steps, self.hold)

    def slots(self, step: int, num_prompts: int, num_generations: int) -> Tensor:
        """Teacher slots of each prompt of the global batch: a LongTensor of shape (num_prompts,), on the CPU.

        Each count is `fraction_at(step) * num_generations`, rounded down or up at random so that its expectation is
        exact. A pure function of (seed, step, place of the prompt in the global batch): the same on every rank, for any
        number of ranks, and after a resume.
        """
        expected = self.fraction_at(step) * num_generations
        whole, rest = int(expected), expected - int(expected)
        # seeded by text: one independent draw a place, the same on every platform and Python version
        draws = (random.Random(f"{self.seed}/{step}/{place}").random() for place in range(num_prompts))
        return torch.tensor([whole + (draw < rest) for draw in draws], dtype=torch.long)

    def slot_rows(self, step: int, num_prompts: int, num_generations: int, rows: range) -> list[int]:
        """Which of `rows`, given as places in the global batch of rollouts, are slots; as offsets into `rows`.

        Slots are the last of a prompt's group, by position, never by verdict: what is left of the group is then an
        unbiased sample of the student.
        """
        first_slots = (num_generations - self.slots(step, num_prompts, num_generations)).tolist()
        places = (divmod(row, num_generations) for row in rows)
        return [offset for offset, (prompt, place) in enumerate(places) if place >= first_slots[prompt]]

    def fill(self, rows: Sequence[int], propose: Propose, endorse: Endorse) -> dict[int, Proposal]:
        """The endorsed teacher rollout of each row that has one; a row without keeps the student's own rollout.

        `propose` and `endorse` are called once at most, for all rows together.

        Args:
            rows: the slots, as the caller numbers them.
            propose: `(rows, candidates)` -> for each row its proposals, as `sg_opd.method.Proposal`.
            endorse: `(rows, proposals)`, one row a proposal -> 1.0, 0.0 or `None` each; only 1.0 endorses.

        Returns:
            row -> the first of its proposals that ended with EOS and was endorsed.

        Example:

        ```python
        from sg_opd import TeacherPhaseSampler
        from sg_opd.method import Proposal

        phase = TeacherPhaseSampler(fraction=0.5, steps=10)
        rows = phase.slot_rows(step=0, num_prompts=2, num_generations=4, rows=range(8))  # [2, 3, 6, 7]
        answer = Proposal(token_ids=[5, 1], completion="4", terminated=True)
        phase.fill(rows, lambda rows, n: [[answer]] * len(rows), lambda rows, proposals: [1.0] * len(rows))
        ```
        """
        proposals = propose(rows, self.candidates) if rows else []
        if len(proposals) != len(rows):
            raise ValueError(f"`propose` answered for {len(proposals)} rows, but {len(rows)} were asked for.")
        ended = [(row, p) for row, some in zip(rows, proposals, strict=True) for p in some if p.terminated]
        verdicts = endorse([row for row, _ in ended], [proposal for _, proposal in ended]) if ended else []
        taken: dict[int, Proposal] = {}
        for (row, proposal), verdict in zip(ended, verdicts, strict=True):
            if verdict == 1.0:
                taken.setdefault(row, proposal)
        return taken
