"""A killed run goes on as if it had not been killed: what a checkpoint keeps, and how one is chosen."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name

from .checkpoints import differences, flaw, last_whole, seal, settings_of, unseal
from .faults import CheckpointError, LastGoodStep
from .loss import GateDecision
from .metrics import GateMeter
from .preemption import StopAtStepEnd, listening

logger = get_logger(__name__)  # of the main process only

# the parent's settings that alter what is computed; the method's own are all compared but where the teacher answers
PARENT_SETTINGS = (
    *("seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "shuffle_dataset"),
    *("gradient_accumulation_steps", "steps_per_generation", "num_iterations", "num_generations"),
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
    *("chat_template_kwargs", "mask_truncated_completions", "use_vllm", "vllm_importance_sampling_correction"),
    *("loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "entropy_coef"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "disable_dropout"),
)
# with another of these, rollouts that wait to be trained on belong to no batch of the resumed run
BATCH_SETTINGS = (
    *("processes", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
    *("num_iterations", "num_generations"),
)
# may hold tokens, or do not alter what is computed
NOT_COMPARED = ("teacher_model_init_kwargs", "teacher_server_", "log_gate_samples")
TORCH_WRITER = "inline_container"  # where torch's RuntimeError comes from when it cannot write a file
ROWS_COMPARED = 100  # of a dataset, spread evenly


class ResumableTrainer(GRPOTrainer):
    """What `SGOPDTrainer` needs to go on after a kill with the same weights, metrics and order of the data.

    The parent's checkpoints keep weights, optimizer, scheduler, random states and the log. Added here: rollouts that
    are not trained on yet, sums and metrics since the last log, the parent's count of micro-batches, and the order of
    the data in later epochs; a seal that is written last; and the settings, to be compared on resuming.
    """

    args: Any
    teacher: Any
    verifier: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.last_good_step = LastGoodStep(self)
        self._meter = GateMeter()
        self._row_advantages: Tensor | None = None
        self._resumed: Path | None = None
        self._epochs_done = 0
        self._tr_loss, self._globalstep_last_logged = torch.zeros(()), 0  # the parent's, which sets them in `train`
        kwargs["args"].enable_jit_checkpoint = listening(kwargs["args"])
        super().__init__(*args, **kwargs)
        self._data = fingerprint(self.train_dataset)
        self.stop = StopAtStepEnd(self)
        self.callback_handler.callbacks[:0] = [Resumption(self), self.stop]  # before those that look at the state

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's; `True` takes the last whole checkpoint, and the beginning where there is none.

        Raises:
            ValueError: a checkpoint given by its path that is not whole.
            SystemExit: after SIGTERM, with a checkpoint of the step that was in progress (see `StopAtStepEnd`).
        """
        self._resumed = self._whole(resume_from_checkpoint)
        self._epochs_done = 0
        if self._resumed is not None:
            state = json.loads((self._resumed / "trainer_state.json").read_text())
            self._epochs_done = int(state["epoch"])
            changed = differences(settings_of(self._resumed), self.run_settings())
            if changed:
                logger.warning(
                    "%s was written by a run with other settings: %s. This run goes on with its own, and is not the "
                    "one that was interrupted.",
                    *(self._resumed, "; ".join(changed)),
                )
        with self.stop.watching():
            return super().train(self._resumed and str(self._resumed), *args, **kwargs)

    def _whole(self, wanted: str | bool | None) -> Path | None:
        """The checkpoint to go on from; a later one that is not whole is named in a warning."""
        if not wanted:
            return None
        if wanted is not True:
            reason = flaw(Path(wanted))
            if reason is not None:
                raise ValueError(
                    f"{wanted} is no whole checkpoint: {reason}. `resume_from_checkpoint=True` takes the last whole "
                    "one."
                )
            return Path(wanted)
        output_dir = Path(self.args.output_dir)
        folder, skipped = last_whole(output_dir)
        for path, reason in skipped.items():
            logger.warning("%s is passed over: %s.", path, reason)
        if folder is None:
            logger.warning("There is no whole checkpoint in %s: the run begins with its first step.", output_dir)
        else:
            logger.info("Going on from %s.", folder)
        return folder

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """The parent's, which draws an order an epoch from one generator: a resumed one has drawn the earlier ones."""
        sampler = super()._get_train_sampler(dataset)
        if sampler.shuffle:
            for _ in range(self._epochs_done):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple:
        """The parent's, which would train a step beyond the last one where the run was killed after that."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def run_settings(self) -> dict[str, Any]:
        """The settings that alter what a run computes, as JSON has them."""
        own = [name for name in type(self.args).__annotations__ if not name.startswith(NOT_COMPARED)]
        values = self.args.to_dict()
        found = {name: values[name] for name in (*own, *PARENT_SETTINGS) if name in values}
        found |= {
            "model": getattr(self.model.config, "_name_or_path", ""),
            "teacher_model": self.teacher.name,
            "verifier": get_callable_name(self.verifier),
            "train_dataset": self._data,
            "processes": self.accelerator.num_processes,
        }
        return json.loads(json.dumps(found, default=str))

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank between two optimizer steps, in tensors and plain values."""
        generation = self.args.steps_per_generation * self.num_iterations
        buffered = self._buffered_inputs if self._step % generation else None  # else the next step generates anew
        return {
            "micro_batches": self._step,
            "buffered": buffered and [as_saved(inputs) for inputs in buffered],
            "row_advantages": self._row_advantages,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "totals": dict(self._meter.totals),
            "deltas": list(self._meter.deltas),
            "loss": self._tr_loss.clone(),
            "last_logged": self._globalstep_last_logged,
            "tokens": self.state.num_input_tokens_seen,
            "completions": as_plain(self._logs) if self.log_completions else {},
        }

    def set_run_state(self, saved: dict[str, Any]) -> None:
        """Set this rank back to what `run_state` answered, once the parent has begun to train."""
        device = self.accelerator.device
        self._step = saved["micro_batches"]
        buffered = saved["buffered"]
        self._buffered_inputs = buffered and [as_trained(inputs, device) for inputs in buffered]
        advantages = saved["row_advantages"]
        self._row_advantages = None if advantages is None else advantages.to(device)
        self._metrics["train"].clear()
        self._metrics["train"].update(saved["metrics"])
        self._meter.totals = {name: value.to(device) for name, value in saved["totals"].items()}
        self._meter.deltas = [value.to(device) for value in saved["deltas"]]
        self._tr_loss += saved["loss"].to(device)
        # `train_loss`, like the throughput beside it, speaks of the steps of this call alone
        self._total_loss_scalar -= self.accelerator.gather(self._tr_loss).mean().item()
        self._globalstep_last_logged = saved["last_logged"]
        self.state.num_input_tokens_seen = saved["tokens"]
        for name, values in saved["completions"].items():
            if isinstance(values, dict):
                for column, some in values.items():
                    self._logs[name][column].extend(some)
            else:
                self._logs[name].extend(values)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_checkpoint(model, trial, self.run_state())

    def write_checkpoint(self, model: nn.Module, trial: Any, run_state: dict[str, Any]) -> None:
        """Write and seal a checkpoint of the last finished step; only then the oldest may go.

        Raises:
            CheckpointError: a file could not be written, by name.
        """
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            unseal(folder)
            shutil.rmtree(folder)  # of a run that was killed here, perhaps with more processes
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the parent deletes before all is written
        try:
            super()._save_checkpoint(model, trial)
            torch.save(run_state, folder / f"run_state_{self.args.process_index}.pt")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder, self.run_settings())
        except (OSError, SafetensorError, RuntimeError) as error:
            if type(error) is RuntimeError and TORCH_WRITER not in str(error):  # such as a rank that died
                raise
            raise CheckpointError(
                f"{folder} could not be written: {error}. {shutil.disk_usage(output_dir).free / 1e9:.3f} GB are free "
                "there. It is no whole checkpoint and is passed over by `resume_from_checkpoint=True`."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.last_good_step.saved = self.state.global_step
        if self.args.should_save:
            rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()


class Resumption(TrainerCallback):
    """Puts the saved state back where the parent has set its own, and notes the states an epoch begins with."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the checkpoint's state, if one is resumed whose batches were this run's."""
        folder = self.trainer._resumed
        if folder is None:
            return
        control.should_training_stop = state.global_step >= state.max_steps
        then, now = settings_of(folder), self.trainer.run_settings()
        if any(then[name] != now[name] for name in BATCH_SETTINGS):
            logger.warning("Batches are not what they were: metrics begin anew, and so do rollouts.")
            return
        path = folder / f"run_state_{args.process_index}.pt"
        self.trainer.set_run_state(torch.load(path, map_location="cpu", weights_only=True))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch's data loader moves the random state, and a resumed run will have it do so again."""
        self.trainer.last_good_step.begin()


def as_saved(inputs: dict[str, Any]) -> dict[str, Any]:
    """A buffered micro-batch without classes of this package, which a checkpoint does not load."""
    return {name: value._asdict() if isinstance(value, GateDecision) else value for name, value in inputs.items()}


def as_trained(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What `as_saved` was given, on the device."""
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    if "decision" in moved:
        moved["decision"] = GateDecision(**{name: value.to(device) for name, value in moved["decision"].items()})
    return moved


def as_plain(value: Any) -> Any:
    """Nested containers in plain values; what is neither a number nor text, as in columns of a table, as text."""
    if isinstance(value, dict):
        return {name: as_plain(part) for name, part in value.items() if name != "images"}
    if not isinstance(value, (str, bytes)) and hasattr(value, "__iter__"):
        return [as_plain(part) for part in value]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)


def fingerprint(dataset: Any) -> str | None:
    """The number of rows and a digest of some of them; `None` of a stream, which has neither."""
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    step = max(1, len(dataset) // ROWS_COMPARED)
    rows = json.dumps(
        [dataset[row] for row in range(0, len(dataset), step)], default=lambda value: type(value).__name__
    )
    return f"{len(dataset)} rows, {hashlib.sha256(rows.encode()).hexdigest()[:12]}"
