"""What alters a run, as values that can be written down: a resumed run is compared with the one that was killed."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from trl.trainer.utils import get_callable_name

from .config import own_fields

# the parent's settings that alter what is computed; the method's own are all compared but where the teacher answers
PARENT_SETTINGS = (
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
NOT_COMPARED = ("teacher_server_", "log_gate_samples")  # the method's own that do not alter what is computed
# of the arguments for loading a model: what is secret, and what says only where it comes from or is put
NOT_DIGESTED = re.compile(r"token|auth|prox|secret|password|device_map|max_memory|cache_dir|offload|local_files_only")
ROWS_COMPARED = 100  # of a dataset at most, spread evenly


def run_settings(trainer: Any, data: str | None) -> dict[str, Any]:
    """The settings that alter what a run computes, as JSON has them; without tokens and addresses.

    Args:
        trainer: with its models.
        data: `fingerprint` of its training data.
    """
    own = [name for name in own_fields(trainer.args) if not name.startswith(NOT_COMPARED)]
    values, model = trainer.args.to_dict(), trainer.model
    found = {name: values[name] for name in (*own, *PARENT_SETTINGS) if name in values}
    found |= {
        "model": getattr(model.config, "_name_or_path", ""),
        "model_init_kwargs": loading(trainer.args.model_init_kwargs),
        "quantization": digest(getattr(model.config, "quantization_config", None)),
        "peft": digest(getattr(model, "peft_config", None)),
        "teacher_model": trainer.teacher.name,
        "teacher_model_init_kwargs": loading(trainer.args.teacher_model_init_kwargs),
        "verifier": get_callable_name(trainer.verifier),
        "train_dataset": data,
        "processes": trainer.accelerator.num_processes,
    }
    return json.loads(json.dumps(found, default=str))


def loading(arguments: dict[str, Any] | None) -> str | None:
    """The names of the arguments for loading a model and a digest of their values; without secrets and places."""
    known = {name: value for name, value in (arguments or {}).items() if not NOT_DIGESTED.search(name)}
    return f"{', '.join(sorted(known))}: {digest(known)}" if known else None


def digest(value: Any) -> str | None:
    """Twelve digits that are the same for equal nested values, in whatever order; `None` of nothing."""
    if not value:
        return None
    return hashlib.sha256(json.dumps(value, default=as_json, sort_keys=True).encode()).hexdigest()[:12]


def as_json(value: Any) -> Any:
    """What JSON has no form for: a configuration as its fields, a set in an order, and else its text."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def fingerprint(dataset: Any) -> str | None:
    """The number of rows and a digest of some of them; `None` of a stream, which has neither."""
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    step = -(-len(dataset) // ROWS_COMPARED)  # rounded up
    rows = json.dumps(
        [dataset[row] for row in range(0, len(dataset), step)], default=lambda value: type(value).__name__
    )
    return f"{len(dataset)} rows, {hashlib.sha256(rows.encode()).hexdigest()[:12]}"
