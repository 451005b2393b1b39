"""Checkpoint folders: each sealed once it is whole, the last whole one found again, and the settings of its run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

SEAL = "complete.json"  # written last, so a checkpoint without it is a part of one
UNFINISHED = f"{SEAL}.part"  # there from the first, so a folder with it is ours, and one without it perhaps not
FORMER = ".former"  # a whole checkpoint whose step is written anew, until that is whole too
PATTERN = re.compile(rf"checkpoint-(\d+)({re.escape(FORMER)})?")
# GRPO's settings that alter what is computed
GRPO_SETTINGS = (
    *("seed", "data_seed", "full_determinism", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("shuffle_dataset", "ignore_data_skip", "dataloader_drop_last", "train_sampling_strategy"),
    *("gradient_accumulation_steps", "steps_per_generation", "num_iterations", "num_generations"),
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
    *("cache_implementation", "use_transformers_continuous_batching", "max_tool_calling_iterations"),
    *("chat_template_kwargs", "mask_truncated_completions", "use_vllm", "vllm_structured_outputs_regex"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    *("loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "entropy_coef"),
    *("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "use_bias_correction_kl", "off_policy_mask_threshold", "top_entropy_quantile"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "cast_lm_head_to_fp32"),
    *("router_aux_loss_coef", "use_liger_kernel", "neftune_noise_alpha"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "tf32", "disable_dropout"),
)
# with another of these, rollouts that wait to be trained on belong to no batch of the resumed run
BATCH_SETTINGS = (
    *("processes", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
    *("num_iterations", "num_generations"),
)
# of the arguments for loading a model: what is secret, and what says only where it comes from or is put
NOT_DIGESTED = re.compile(r"token|auth|prox|secret|password|device_map|max_memory|cache_dir|offload|local_files_only")
ROWS_COMPARED = 100  # of a dataset at most, spread evenly


def seal(folder: Path, settings: dict[str, Any]) -> None:
    """Mark a folder with every file of every rank as whole: the files reach the disk, then the list of them appears.

    `settings` are the run's, to be compared with those of a run that resumes from here.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (SEAL, UNFINISHED))
    for path in paths:
        flush(path)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    unfinished = folder / UNFINISHED
    unfinished.write_text(json.dumps({"settings": settings, "files": files}, indent=1))
    flush(unfinished)
    os.replace(unfinished, folder / SEAL)
    flush(folder)
    discard(former(folder))


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Delete a checkpoint, past files still in use as GRPOTrainer does. A kill meanwhile leaves no whole one."""
    if (folder / SEAL).is_file():
        os.replace(folder / SEAL, folder / UNFINISHED)
    shutil.rmtree(folder, ignore_errors=True)


def begin(folder: Path) -> None:
    """Begin a checkpoint: a whole one of the same step gets another name until `seal`, a part of one is deleted."""
    if flaw(folder) is None:
        discard(former(folder))
        os.replace(folder, former(folder))
    elif folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / UNFINISHED).touch()


def former(folder: Path) -> Path:
    """Where `begin` puts a whole checkpoint."""
    return folder.with_name(folder.name + FORMER)


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings that a whole checkpoint was written with."""
    return json.loads((folder / SEAL).read_text())["settings"]


def flaw(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, by its files alone; `None` where it is one.

    What has a flaw is passed over, and deleted where a new checkpoint of its step begins. What depends on the run that
    resumes belongs in `ResumableTrainer.train`.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / SEAL).is_file():
        return f"it has no {SEAL}, which is written last, so its writing did not end"
    try:
        content = json.loads((folder / SEAL).read_text())
        files, _ = content["files"].items(), content["settings"]
    except (ValueError, TypeError, KeyError, AttributeError):  # no JSON, no text, or another content
        return f"its {SEAL} cannot be read, so it was cut off, or is no list of files"
    for name, size in files:
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes, not {size}"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Every folder with a checkpoint's name, by step; a former one comes before the one that replaces it."""
    found = {path: PATTERN.fullmatch(path.name) for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    steps = {path: (int(match[1]), match[2] is None) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def last_whole(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint of the highest step, if there is one, and of each later one why it is none."""
    skipped: dict[Path, str] = {}
    for path in reversed(checkpoints(output_dir)):
        reason = flaw(path)
        if reason is None:
            return path, skipped
        skipped[path] = reason
    return None, skipped


def rotate(output_dir: Path, limit: int | None, best: str | None, last: Path) -> None:
    """Delete the whole checkpoints that were sealed first beyond `limit`, and parts of ours that nothing writes to.

    A part counts for none, or it would displace a whole one. Folders without a mark of ours are left alone, such as
    those of plain transformers. `limit` is `save_total_limit`. The checkpoint just written, `last`, stays, as does the
    best model's, known by its name so that the run's folder can be moved.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(output_dir)
    for path in found:
        if (path / UNFINISHED).is_file() and not (path / SEAL).is_file():
            discard(path)
    whole = sorted((path for path in found if flaw(path) is None), key=lambda path: (path / SEAL).stat().st_mtime_ns)
    spare = [path for path in whole if path.name not in (last.name, best and Path(best).name)]
    for path in spare[: max(0, len(whole) - limit)]:
        discard(path)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that are not what they were, one text each: name, value then, value now."""
    return [
        f"`{name}` was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def loading(arguments: Any) -> str | None:
    """The names of the arguments for loading a model and a digest of their values; without secrets and places."""
    known = {name: value for name, value in (arguments or {}).items() if not NOT_DIGESTED.search(name)}
    return f"{', '.join(sorted(known))}: {digest(known)}" if known else None


def digest(value: Any) -> str | None:
    """Twelve digits that are the same for equal nested values, in whatever order; `None` of nothing."""

    def as_json(value: Any) -> Any:
        if hasattr(value, "to_dict"):  # a configuration
            return value.to_dict()
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    return sha(json.dumps(value, default=as_json, sort_keys=True)) if value else None


def fingerprint(dataset: Any) -> str | None:
    """The number of rows and a digest of some of them; `None` of a stream, which has neither."""
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    rows = range(0, len(dataset), -(-len(dataset) // ROWS_COMPARED))  # the step is rounded up
    shown = json.dumps([dataset[row] for row in rows], default=lambda value: type(value).__name__)
    return f"{len(dataset)} rows, {sha(shown)}"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
