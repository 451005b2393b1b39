"""When a teacher's server fails one rank: every rank stops together, and nothing already trained is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        trainer._save_checkpoint(trainer.model, trial=None)
    return (
        f"The last good step is {step}, saved in {trainer.args.output_dir}/checkpoint-{step}; go on from there with "
        "`resume_from_checkpoint` once the server is back."
    )
