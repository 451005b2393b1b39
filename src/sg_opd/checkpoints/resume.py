"""Exact resume: a run that was killed continues as if it had not been, from the last checkpoint that is whole."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from trl import GRPOConfig, GRPOTrainer

from . import folders
from .stops import CheckpointError, LastGoodStep, StopAtStepEnd, listening

logger = get_logger(__name__)  # of the main process only

TORCH_WRITER = "inline_container"  # where torch's RuntimeError comes from when it cannot write a file


class ResumableTrainer(GRPOTrainer):
    """A GRPOTrainer that resumes after a kill with the same weights, metrics and order of the data.

    GRPOTrainer's checkpoints keep weights, optimizer, scheduler, random states and the log. Added here: rollouts that
    are not trained on yet, sums and metrics since the last log, GRPOTrainer's count of micro-batches, and the order of
    the data in later epochs; a seal that is written last; and the settings, to be compared on resuming. A subclass adds
    its own with `own_state`, `set_own_state` and `own_settings`.
    """

    args: GRPOConfig
    model: Any  # the student, of whatever class

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.last_good_step = LastGoodStep(self)
        self._resumed: Path | None = None
        self._epochs_done = 0
        self._tr_loss, self._globalstep_last_logged = torch.zeros(()), 0  # GRPOTrainer's, which sets them in `train`
        kwargs["args"].enable_jit_checkpoint = listening(kwargs["args"])
        super().__init__(*args, **kwargs)
        self._data = folders.fingerprint(self.train_dataset)
        self.stop = StopAtStepEnd(self)
        self.callback_handler.callbacks[:0] = [Resumption(self), self.stop]  # before those that look at the state

    def own_state(self) -> dict[str, Any]:
        """What a subclass keeps of this rank in a checkpoint, in tensors and plain values."""
        return {}

    def set_own_state(self, saved: dict[str, Any]) -> None:
        """Set back to what `own_state` returned."""

    def own_settings(self) -> dict[str, Any]:
        """The settings of a subclass that alter what a run computes."""
        return {}

    def run_settings(self) -> dict[str, Any]:
        """The settings that alter what a run computes, as JSON has them; without tokens and addresses."""
        values, config = self.args.to_dict(), self.model.config
        found = {name: values[name] for name in folders.GRPO_SETTINGS if name in values} | {
            "model": getattr(config, "_name_or_path", ""),
            "model_init_kwargs": folders.loading(self.args.model_init_kwargs),
            "quantization": folders.digest(getattr(config, "quantization_config", None)),
            "peft": folders.digest(getattr(self.model, "peft_config", None)),
            "train_dataset": self._data,
            "processes": self.accelerator.num_processes,
        }
        return json.loads(json.dumps(found | self.own_settings(), default=str))

    def written_args(self) -> Any:
        """The arguments as `training_args.bin` has them."""
        return copy.copy(self.args)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Same as GRPOTrainer; `training_args.bin` has what `written_args` returns."""
        with lent(self, args=self.written_args()):
            super()._save(output_dir, state_dict)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Same as GRPOTrainer; `True` takes the last whole checkpoint, and the beginning where there is none.

        Raises:
            ValueError: a checkpoint given by its path that is not whole; ranks that find different ones.
            SystemExit: after SIGTERM, with a checkpoint of the step that was in progress (see `StopAtStepEnd`).
        """
        self._resumed = self._whole(resume_from_checkpoint)
        self._epochs_done = 0
        if self._resumed is not None:
            self._epochs_done = int(json.loads((self._resumed / "trainer_state.json").read_text())["epoch"])
            changed = folders.differences(folders.settings_of(self._resumed), self.run_settings())
            if changed:
                logger.warning(
                    "%s was written by a run with other settings: %s. This run keeps its own, and is not the one that "
                    "was interrupted.",
                    *(self._resumed, "; ".join(changed)),
                )
            if not list(self._resumed.glob("rng_state*")):
                logger.warning(
                    "%s was written with `save_only_model=True`: it lacks the states of the optimizer and of the "
                    "learning rate's schedule, and the random states. They begin anew; this run is not the one that "
                    "was interrupted.",
                    self._resumed,
                )
        with self.stop.watching():
            return super().train(None if self._resumed is None else str(self._resumed), *args, **kwargs)

    def _whole(self, wanted: str | bool | None) -> Path | None:
        """The checkpoint to resume from, the same on every rank; a later one that is not whole is warned of."""
        if not wanted:
            return None
        output_dir, folder = Path(str(self.args.output_dir)), None if wanted is True else Path(wanted)
        if folder is None:
            folder, skipped = folders.last_whole(output_dir)
            for path, reason in skipped.items():
                logger.warning("%s is passed over: %s.", path, reason)
            if folder is None:
                logger.warning("There is no whole checkpoint in %s: the run begins with its first step.", output_dir)
            else:
                logger.info("Resuming from %s.", folder)
        elif flaw := folders.flaw(folder):
            raise ValueError(
                f"{wanted} is no whole checkpoint: {flaw}. `resume_from_checkpoint=True` takes the last whole one."
            )
        found = gather_object([folder.name if folder else "none"])
        if len(set(found)) > 1:
            named = ", ".join(f"{name} (rank {rank})" for rank, name in enumerate(found))
            raise ValueError(
                f"The ranks find different checkpoints to resume from: {named}. `output_dir` must be a folder that all "
                "nodes share, or hold the same checkpoints on each of them."
            )
        if wanted is True and folder is not None and folder.name.endswith(folders.FORMER):
            kept, folder = folder, folder.with_name(folder.name.removesuffix(folders.FORMER))
            if self.args.should_save:  # what was written in its place was never whole
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(kept, folder)
            self.accelerator.wait_for_everyone()
        return folder

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Same as GRPOTrainer, whose sampler draws an order an epoch: a resumed one has drawn the earlier ones."""
        sampler: Any = super()._get_train_sampler(dataset)
        if sampler.shuffle:
            for _ in range(self._epochs_done):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple:
        """Same as GRPOTrainer, but no step beyond the last one, where the run was killed after that."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank between two optimizer steps, in tensors and plain values."""
        generation = (self.args.steps_per_generation or 1) * self.num_iterations
        buffered = self._buffered_inputs if self._step % generation else None  # else the next step generates anew
        return {
            "micro_batches": self._step,
            "buffered": buffered,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss": self._tr_loss.clone(),
            "last_logged": self._globalstep_last_logged,
            "tokens": self.state.num_input_tokens_seen,
            "completions": as_plain(self._logs) if self.log_completions else {},
            **self.own_state(),
        }

    def set_run_state(self, saved: dict[str, Any]) -> None:
        """Set this rank back to what `run_state` returned, once GRPOTrainer has begun to train."""
        device = self.accelerator.device
        self._step = saved["micro_batches"]
        self._buffered_inputs = saved["buffered"] and send_to_device(saved["buffered"], device)
        self._metrics["train"].clear()
        self._metrics["train"].update(saved["metrics"])
        self._tr_loss += saved["loss"].to(device)
        # `train_loss`, like the throughput beside it, covers the steps of this call alone
        self._total_loss_scalar -= self.accelerator.gather(self._tr_loss).mean().item()
        self._globalstep_last_logged = saved["last_logged"]
        self.state.num_input_tokens_seen = saved["tokens"]
        logs: dict[str, Any] = self._logs
        for name, values in saved["completions"].items():
            if isinstance(values, dict):
                for column, some in values.items():
                    logs[name][column].extend(some)
            else:
                logs[name].extend(values)
        self.set_own_state(saved)

    def _save_checkpoint(self, model: nn.Module, trial: Any, run_state: dict[str, Any] | None = None) -> None:
        """Same as GRPOTrainer, with `run_state` (default: as it is now) and a seal; only then the oldest may go.

        Raises:
            CheckpointError: a file could not be written, by name.
        """
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        try:
            self._write(folder, model, trial, self.run_state() if run_state is None else run_state)
        except (OSError, SafetensorError, RuntimeError) as error:
            # others of these are a rank that died, or a device that is full
            if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
                raise
            raise CheckpointError(
                f"{folder} could not be written: {error}. {shutil.disk_usage(output_dir).free / 1e9:.3f} GB are free "
                "there. It is no whole checkpoint and is passed over by `resume_from_checkpoint=True`."
            ) from error
        self.last_good_step.saved = self.state.global_step
        if self.args.push_to_hub:
            with lent(self, args=self.written_args()):  # it writes and uploads `training_args.bin` too
                self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            folders.rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint, folder)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path, model: nn.Module, trial: Any, run_state: dict[str, Any]) -> None:
        if self.args.should_save:
            folders.begin(folder)  # there may be one of a run that was killed here, perhaps with more processes
        self.accelerator.wait_for_everyone()
        # GRPOTrainer uploads, and deletes old checkpoints, before all of the new one is written
        with lent(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        folder.mkdir(parents=True, exist_ok=True)  # on a node of its own, where GRPOTrainer may write nothing
        torch.save(run_state, folder / f"run_state_{self.args.process_index}.pt")
        if self.args.should_save:  # as they are without what was lent; beside FSDP's sharded state there is none
            torch.save(self.written_args(), folder / TRAINING_ARGS_NAME)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folders.seal(folder, self.run_settings())

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Same as GRPOTrainer; on SIGTERM the step in progress is saved whatever the strategy."""
        good, control, step = self.last_good_step, self.control, self.state.global_step
        if self.stop.stopped and good.saved == step:  # called again, as at an epoch's end
            if not float(self.state.epoch).is_integer():  # broken off within the epoch
                control.should_log = control.should_evaluate = control.should_save = False
            elif control.should_log or control.should_evaluate:
                good.saved = None  # what comes of these belongs in the checkpoint
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop.stopped and good.saved != step:
            self.control.should_save, self.control.should_evaluate = True, False
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Same as GRPOTrainer; a run that SIGTERM ended will be resumed: all checkpoints and the model stay."""
        kept = {"save_total_limit": None, "load_best_model_at_end": False} if self.stop.stopped else {}
        with lent(self.args, **kept):
            return super()._finalize_training(*args, **kwargs)


class Resumption(TrainerCallback):
    """Puts the saved state back where GRPOTrainer has set its own, and notes the states an epoch begins with."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the checkpoint's state, if one is resumed whose batches were this run's."""
        self.trainer.last_good_step.forget()
        folder = self.trainer._resumed
        if folder is None:
            return
        control.should_training_stop = state.global_step >= state.max_steps
        then, now = folders.settings_of(folder), self.trainer.run_settings()
        if any(then.get(name) != now[name] for name in folders.BATCH_SETTINGS):
            logger.warning("Batches are not what they were: metrics begin anew, and so do rollouts.")
            return
        path = folder / f"run_state_{args.process_index}.pt"
        self.trainer.set_run_state(torch.load(path, map_location="cpu", weights_only=True))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch's data loader moves the random state, and a resumed run will have it do so again."""
        self.trainer.last_good_step.begin()


@contextmanager
def lent(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of `owner` have these values within the context."""
    kept = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(kept)


def as_plain(value: Any) -> Any:
    """Nested containers in plain values; what is neither a number nor text becomes text."""
    if isinstance(value, dict):
        return {name: as_plain(part) for name, part in value.items() if name != "images"}
    if not isinstance(value, (str, bytes)) and hasattr(value, "__iter__"):
        return [as_plain(part) for part in value]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)
