"""When a teacher fails one rank: every rank stops together, and nothing already trained is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object


class TeacherError(RuntimeError):
    """A teacher cannot answer; a teacher of your own may raise it too. On one rank it ends all, after a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, as on a full disk; what is there of it is never taken for a whole one."""


class LastGoodStep:
    """Can save the last finished optimizer step from within the next one.

    Args:
        trainer: the trainer, on every rank.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.saved: int | None = None
        """The last step with a checkpoint."""
        self._step: int | None = None
        self._states: tuple[Any, ...] = ()
        self._run_state: dict[str, Any] = {}

    def begin(self) -> None:
        """Note the states that a step begins with, at its first generation or before: a resumed run begins so too."""
        step = self.trainer.state.global_step
        if self._step is None:  # what a run begins with is its first step, or has the checkpoint it resumed from
            self.saved = step
        if self._step != step:
            self._step, self._states, self._run_state = step, random_states(), self.trainer.run_state()

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raises on every rank a `TeacherError` of one of them, after a checkpoint of the last good step.

        Every rank must enter it; one that stopped alone would leave the others waiting for it. Other errors end their
        rank, and with it the launch.
        """
        failure = None
        try:
            yield
        except TeacherError as error:
            failure = error
        failures = [message for message in gather_object([failure and str(failure)]) if message]
        if failures:
            raise TeacherError(f"{failures[0]}. {self.save()}") from None  # it repeats its words

    def save(self) -> str:
        """Save a checkpoint of the last finished step unless it has one; answers where it is, in words."""
        step = self.trainer.state.global_step
        if step == 0:
            return "No step was finished, so there is nothing to save."
        folder = Path(self.trainer.args.output_dir) / f"checkpoint-{step}"
        if self.saved != step or not folder.is_dir():
            set_random_states(self._states)
            self.trainer.state.num_input_tokens_seen = self._run_state["tokens"]
            self.trainer.write_checkpoint(self.trainer.model, None, self._run_state)
        return (
            f"The last good step is {step}, saved in {folder}; go on from there with `resume_from_checkpoint` once the "
            "cause is mended."
        )


def random_states() -> tuple[Any, ...]:
    """States of the generators that a checkpoint keeps: Python's, NumPy's, torch's on the CPU and on CUDA devices."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states: tuple[Any, ...]) -> None:
    """Set the generators back to what `random_states` answered."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
