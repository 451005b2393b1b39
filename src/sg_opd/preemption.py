"""SIGTERM, as a preempted node gets it: the step in progress is finished and saved, then the process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

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
