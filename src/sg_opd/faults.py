"""When a teacher's server fails one rank: every rank stops together, and nothing already trained is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from .endpoints import TeacherServerError


@contextmanager
def agreed(trainer: Any) -> Iterator[None]:
    """Raises on every rank what a teacher's server did to one of them, after a checkpoint of the last good step.

    Every rank must enter it; one that stopped alone would leave the others waiting for it.
    """
    failure = None
    try:
        yield
    except TeacherServerError as error:
        failure = error
    failures = [message for message in gather_object([failure and str(failure)]) if message]
    if failures:
        raise TeacherServerError(f"{failures[0]}. {save_last_good_step(trainer)}") from None  # it repeats its words


def save_last_good_step(trainer: Any) -> str:
    """Save a checkpoint of the last finished optimizer step unless it has one; answers where it is, in words."""
    step = trainer.state.global_step
    if step == 0:
        return "No step was finished, so there is nothing to save."
    if trainer.saved_step != step:
        set_random_states(trainer.random_states)  # of before the step that failed: a resumed run repeats it
        trainer._save_checkpoint(trainer.model, trial=None)
    return (
        f"The last good step is {step}, saved in {trainer.args.output_dir}/checkpoint-{step}; go on from there with "
        "`resume_from_checkpoint` once the server is back."
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
