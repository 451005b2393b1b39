"""SIGTERM, as a preempted node gets it: the step in progress is finished and saved, then the process ends."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from ..teachers.protocol import TeacherError

logger = get_logger(__name__)  # of the main process only

EXIT_CODE = 128 + signal.SIGTERM  # 143, as a shell has it for a process that SIGTERM ended


def listening(args: Any) -> bool:
    """Whether signals can be handled; transformers' own handler raises where they cannot, outside the main thread."""
    if args.enable_jit_checkpoint and threading.current_thread() is not threading.main_thread():
        logger.warning("SIGTERM cannot be handled outside the main thread: it ends this run without a checkpoint.")
        return False
    return args.enable_jit_checkpoint


class StopAtStepEnd(TrainerCallback):
    """What `enable_jit_checkpoint=True` does under this trainer, with transformers' own handler of the signal.

    transformers' callback saves in the middle of a step, each rank when it sees the signal, and lets `train` return as
    if all steps had been made. This one lets the step end, has the ranks agree, saves as at any other step, and ends
    the process with `EXIT_CODE`. The handler is in place only while training.

    Args:
        trainer: whose parent has set `enable_jit_checkpoint` up already.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.manager: CheckpointManager | None = None
        self.stopped = False
        """Whether this run ends because SIGTERM asked for it."""
        if trainer.args.enable_jit_checkpoint:
            given = trainer.pop_callback(JITCheckpointCallback).jit_manager
            signal.signal(signal.SIGTERM, given._original_sigterm_handler or signal.SIG_DFL)
            self.manager = CheckpointManager(trainer, kill_wait=0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """SIGTERM asks for the end of the run after the step in progress, within this context.

        Raises:
            SystemExit: with `EXIT_CODE`, when the run ended so.
        """
        self.stopped = False
        if self.manager is None or not listening(self.trainer.args):
            yield
            return
        self.manager.is_checkpoint_requested = False
        self.manager.setup_signal_handler()
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self.manager._original_sigterm_handler or signal.SIG_DFL)
        if self.stopped:
            raise SystemExit(EXIT_CODE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop where any rank was asked to."""
        if self.manager is None or not self._asked_anywhere():
            return
        self.stopped = control.should_save = control.should_training_stop = True
        logger.warning("SIGTERM: saving step %d, then ending with code %d.", state.global_step, EXIT_CODE)

    def _asked_anywhere(self) -> bool:
        accelerator, asked = self.trainer.accelerator, self.manager is not None and self.manager.is_checkpoint_requested
        if accelerator.num_processes == 1:
            return asked
        flag = torch.tensor([float(asked)], device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item() > 0)


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
