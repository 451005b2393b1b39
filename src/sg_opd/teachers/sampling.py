"""How completions are sampled: whatever shapes them is stated by the caller, and not by a checkpoint's own file.

What a call leaves out, transformers and vLLM servers fill in from the checkpoint's `generation_config.json`. Here only
its token ids count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from .protocol import eos_set, padded, up_to_eos

if TYPE_CHECKING:
    from trl import GRPOConfig

# the settings that transformers and vLLM share, at the values that leave the model's distribution whole
WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# with those that are vLLM's own: what a server takes from the file where a request leaves it out
SERVED = {**WHOLE_DISTRIBUTION, "presence_penalty": 0.0, "frequency_penalty": 0.0}
# with those that are transformers' own; of any other a value that is not set, or zero, is neutral
OF_RUN = "SGOPDConfig, what has no field there in its `generation_kwargs`"  # where a run states it
NEUTRAL = {
    **SERVED,
    **{"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0},
    **{"num_beams": 1, "length_penalty": 1.0, "encoder_repetition_penalty": 1.0, "renormalize_logits": False},
    **{"num_beam_groups": 1, "diversity_penalty": 0.0, "guidance_scale": 1.0, "early_stopping": False},
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# the beginnings of names in a generation config that shape no completion, or its length alone, which is always stated
SHAPELESS = (
    *(*TOKEN_IDS, "_", "transformers_version", "max_length", "max_new_tokens", "num_return", "return_", "output_"),
    *("use_cache", "cache_", "max_cache_len", "compile_", "disable_compile", "continuous_", "low_memory", "prefill_"),
    *("assistant_", "is_assistant", "num_assistant_", "target_lookbehind", "prompt_lookup", "early_stopping"),
)


def run_sampling(args: GRPOConfig, names: Mapping[str, Any] = WHOLE_DISTRIBUTION) -> dict[str, Any]:
    """How a run samples its rollouts: `temperature` and the settings `names`, which have the neutral values.

    A value in `generation_kwargs` wins over the field of its name, as it does in GRPOTrainer; `None` is neutral.
    """
    kwargs: Any = args.generation_kwargs or {}
    stated = {name: kwargs.get(name, getattr(args, name, None)) for name in names}
    return {"temperature": args.temperature, **names, **{n: value for n, value in stated.items() if value is not None}}


def stated(args: GRPOConfig) -> dict[str, Any]:
    """All that a run states of its rollouts' sampling."""
    kwargs: Any = args.generation_kwargs or {}
    return {"do_sample": True, **run_sampling(args), **kwargs}


@contextmanager
def only_stated(model: Any) -> Iterator[None]:
    """Within, generation takes from the model's own generation config nothing but its token ids.

    The object itself is emptied, since wrappers such as PEFT's and FSDP's all refer to it, and is then as it was.
    """
    config = model.generation_config
    own = dict(vars(config))
    neutral = GenerationConfig(**{name: own.get(name) for name in TOKEN_IDS})
    vars(config).clear()
    vars(config).update(vars(neutral))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(own)


@torch.no_grad()
def sample_completions(model: Any, prompt_ids: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """`config.num_return_sequences` completions of each prompt, in one batch, each up to and with its first EOS.

    What `config` leaves out is transformers' own default, never the checkpoint's.
    """
    ids, mask = padded(prompt_ids, config.pad_token_id, "left", model.device)
    with only_stated(model):
        output: Any = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [up_to_eos(sample, eos_set(config.eos_token_id)) for sample in output[:, ids.size(1) :].tolist()]


def tell_unused(logger: Any, role: str, own: Mapping[str, Any], used: Mapping[str, Any], place: str) -> None:
    """Warn of what the generation config of a checkpoint sets otherwise than it is used.

    `logger` is the caller's, `role` says whose checkpoint it is, and `place` where to set it instead.
    """
    if unused := without_effect(own, used):
        logger.warning(
            "The generation_config.json of the %s sets %s, which does not count here: what is stated alone does. To "
            "have it, set it in %s (temperature, top_p, top_k, min_p, repetition_penalty).",
            *(role, unused, place),
        )


def without_effect(own: Mapping[str, Any], used: Mapping[str, Any]) -> str:
    """What a checkpoint's generation config, `own`, sets otherwise than it is `used`, as text; empty where nothing.

    Settings that `used` does not name are neutral. Values that no engine reads are left out.
    """
    known = {*vars(GenerationConfig()), *SERVED}
    differing = {
        name: value
        for name, value in own.items()
        if name in known and not name.startswith(SHAPELESS) and _differ(value, used.get(name, NEUTRAL.get(name)))
    }
    return ", ".join(f"{name}={value!r}" for name, value in differing.items())


def _differ(value: Any, used: Any) -> bool:
    return value is not None and value != used and bool(value or used) and (value, used) != (-1, 0)  # top_k of vLLM
