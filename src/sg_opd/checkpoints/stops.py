"""What ends a run or a step early: SIGTERM, an error that one rank meets within a step, and log-probabilities that are
no numbers. What was trained before is kept.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

if TYPE_CHECKING:
    from .resume import ResumableTrainer

logger = get_logger(__name__)  # of the main process only

EXIT_CODE = 128 + signal.SIGTERM  # 143, as a shell has it for a process that SIGTERM ended
# by whose log-probabilities are checked; "updated" is the student after updates on the rollout
MODELS = {"student": "student", "teacher": "teacher", "initial": "initial policy", "updated": "student"}
# of the random generators whose states a checkpoint keeps: how to get a state, and how to set it
GENERATORS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),  # of no device without CUDA
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, as on a full disk. What is there of it is no whole one, and is passed over."""


def listening(args: TrainingArguments) -> bool:
    """Whether SIGTERM is handled; outside the main thread it cannot be, and transformers' own handler would raise."""
    in_main = threading.current_thread() is threading.main_thread()
    if args.enable_jit_checkpoint and not in_main:
        logger.warning("SIGTERM cannot be handled outside the main thread: it ends this run without a checkpoint.")
    return args.enable_jit_checkpoint and in_main


class StopAtStepEnd(TrainerCallback):
    """What `enable_jit_checkpoint=True` does under this trainer, with transformers' own handler of the signal.

    transformers' callback saves in the middle of a step, each rank when it sees the signal, and lets `train` return as
    if all steps had been made. This one lets the step end, has the ranks agree, saves as at any other step, and ends
    the process with `EXIT_CODE`. The handler is in place only while training.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.accelerator = trainer.accelerator
        self.args = trainer.args
        self.manager: CheckpointManager | None = None
        self.stopped = False  #: whether this run ends because SIGTERM asked for it
        if trainer.args.enable_jit_checkpoint:
            callback: Any = trainer.pop_callback(JITCheckpointCallback)
            given = callback.jit_manager
            signal.signal(signal.SIGTERM, given._original_sigterm_handler or signal.SIG_DFL)
            self.manager = CheckpointManager(trainer, kill_wait=0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context SIGTERM ends the run after the step in progress; leaving it then ends the process."""
        self.stopped = False
        if self.manager is None or not listening(self.args):
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
        if self.manager is None or not anywhere(self.manager.is_checkpoint_requested, self.accelerator):
            return
        self.stopped = control.should_save = control.should_training_stop = True
        logger.warning("SIGTERM: saving step %d, then ending with code %d.", state.global_step, EXIT_CODE)


class LastGoodStep:
    """Can save the last finished optimizer step from within the next one, on every rank."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.saved: int | None = None  #: the last step with a checkpoint
        self._step: int | None = None
        self._states: list[Any] = []
        self._run_state: dict[str, Any] = {}

    def forget(self) -> None:
        """Of an earlier `train()` no step is this one's."""
        self.saved = self._step = None

    def begin(self) -> None:
        """Note the states that a step begins with, at its first generation or before: a resumed run begins so too."""
        step = self.trainer.state.global_step
        if self._step is None:  # what a run begins with is its first step, or has the checkpoint it resumed from
            self.saved = step
        if self._step != step:
            self._step, self._run_state = step, self.trainer.run_state()
            self._states = [get() for get, _ in GENERATORS]

    @contextmanager
    def agreed(self, error: type[RuntimeError]) -> Iterator[None]:
        """Raise on every rank an `error` of one of them, after a checkpoint of the last good step.

        Every rank must enter it; one that stopped alone would leave the others waiting for it. Other errors end their
        rank, and with it the launch.
        """
        failure = None
        try:
            yield
        except error as raised:
            failure = raised
        failures = [message for message in gather_object([failure and str(failure)]) if message]
        if failures:
            raise error(f"{failures[0]}. {self.save()}") from None  # it repeats its words

    def save(self) -> str:
        """Save a checkpoint of the last finished step unless it has one; returns where it is, in words."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if step == 0:
            return "No step was finished, so there is nothing to save."
        folder = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
        # the main process decides: ranks may see different folders, and all must enter the writing or none
        (needed,) = broadcast_object_list([self.saved != step or not folder.is_dir()])
        if needed:
            for (_, set_back), state in zip(GENERATORS, self._states, strict=True):
                set_back(state)
            trainer.state.num_input_tokens_seen = self._run_state["tokens"]
            trainer._save_checkpoint(trainer.model, None, self._run_state)
        return (
            f"The last good step is {step}, saved in {folder}; resume from it with `resume_from_checkpoint` once the "
            "cause is mended."
        )


class NonFiniteError(RuntimeError):
    """A model gave a sampled token a log-probability that is NaN or infinite, on which no delta can be trained."""


def anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """Whether it is true on any rank; every rank enters it."""
    if accelerator.num_processes == 1:
        return flag
    count = accelerator.reduce(torch.tensor([float(flag)], device=accelerator.device), reduction="sum")
    return bool(count.item() > 0)


@dataclass(eq=False, repr=False)
class FiniteGuard(TrainerCallback):
    """Stops at log-probabilities that are NaN or infinite, or has their optimizer step skipped on every rank."""

    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    skips: bool  #: whether such a step is skipped instead of ending the run (`non_finite_log_probs="skip"`)
    #: whether `log_ratio_clip` bounds the teacher's and the reference's infinite ones, which may then pass
    clipped: bool
    save: Callable[[], str]  #: saves the last good step, which every rank must enter; returns where it is, in words
    found: bool = False  #: whether this rank met one in the step in progress, which will be skipped
    _step: int = 0

    def checked(self, inputs: dict[str, Any], mask: Tensor, **logps: Tensor | None) -> dict[str, Any]:
        """The log-probabilities (B, T) as given, or with zeros for what is no number where the step is to be skipped.

        `inputs` are the micro-batch, `mask` (B, T) its trained tokens; the names of `logps` are keys of `MODELS`.

        Raises:
            NonFiniteError: at the first such token, unless the step is to be skipped.
        """
        bad = {
            whose: mask & (values.isnan() if self.clipped and MODELS[whose] != "student" else ~values.isfinite())
            for whose, values in logps.items()
            if values is not None
        }
        if not torch.stack([*bad.values()]).any():  # the host waits for the device here, once a micro-batch
            return logps
        for whose, places in bad.items():
            values = logps[whose]
            if values is not None and places.any():
                self._report(inputs, places, whose, values)
                logps[whose] = values.masked_fill(places, 0.0)
        return logps

    def _report(self, inputs: dict[str, Any], bad: Tensor, whose: str, values: Tensor) -> None:
        row, place = (int(index) for index in bad.nonzero()[0])
        token = int(inputs["completion_ids"][row, place])
        prompt = self.tokenizer.decode(inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()])
        message = (
            f"Step {self._step}, rank {self.accelerator.process_index}: the {MODELS[whose]}'s log-probability of "
            f"token {place} ({token}, {self.tokenizer.decode([token])!r}) of the rollout in row {row} of "
            f"its micro-batch is {values[row, place].item():g}, and {int(bad.sum())} in all are no numbers. Its prompt "
            f"ends with {prompt[-80:]!r}."
        )
        if not self.skips:
            # another rank does not hear of it; and a student that is no number is no good step
            kept = self.accelerator.num_processes == 1 and MODELS[whose] != "student"
            raise NonFiniteError(
                f"{message} Nothing was trained on it; non_finite_log_probs='skip' leaves such steps out."
                + (f" {self.save()}" if kept else "")
            )
        if not self.found:
            logger.warning("%s This optimizer step is skipped.", message, main_process_only=False)
        self.found = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step, for the error's words."""
        self._step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients where any rank found one, so that no optimizer moves a weight."""
        if self.skips and anywhere(self.found, self.accelerator):
            kwargs["model"].zero_grad(set_to_none=True)
        self.found = False
