"""What a teacher is: a frozen model in this process that scores token ids and proposes completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

# said explicitly: what a generation config leaves out, transformers fills from the checkpoint's own
WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def load_teacher(
    teacher_model: str | PreTrainedModel, revision: str | None, init_kwargs: dict[str, Any] | None, **defaults: Any
) -> PreTrainedModel:
    """The teacher as a model, loaded in its checkpoint's dtype unless `init_kwargs` asks for another.

    Args:
        teacher_model: a path, a hub id, or a model, which is returned as it is.
        revision: branch, tag or commit of a hub id.
        init_kwargs: for `from_pretrained`; wins over `defaults`.

    Raises:
        TypeError: `teacher_model` is neither text nor a model.
        ValueError: settings for loading were given together with a model that needs none.
    """
    from trl.trainer.utils import create_model_from_path

    if isinstance(teacher_model, str):
        kwargs = {"dtype": "auto", **defaults, **(init_kwargs or {})}
        if revision is not None:
            kwargs["revision"] = revision
        return create_model_from_path(teacher_model, **kwargs)
    if not isinstance(teacher_model, PreTrainedModel):
        raise TypeError(f"`teacher_model` must be a path, a hub id or a PreTrainedModel, got {type(teacher_model)}.")
    if init_kwargs or revision:
        raise ValueError(
            "`teacher_model_init_kwargs` and `teacher_model_revision` are for a teacher loaded by name, but "
            "`teacher_model` is a model already. Drop one of them."
        )
    return teacher_model


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself: in eval mode, so without dropout, and with no gradient."""
    return model.eval().requires_grad_(False)


def prepare_frozen(model: PreTrainedModel, trainer: Any) -> nn.Module:
    """A frozen model placed, or sharded as the student is, on the trainer's devices."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    """Completions of token-id prompts in one batch, each up to and with its first EOS.

    `config.num_return_sequences` of them a prompt, those of one prompt together.
    """
    longest = max(len(ids) for ids in prompt_ids)
    padded = [[config.pad_token_id] * (longest - len(ids)) + list(ids) for ids in prompt_ids]
    attended = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(attended, device=model.device),
        generation_config=config,
    )
    return [up_to_eos(ids, eos_set(config.eos_token_id)) for ids in output[:, longest:].tolist()]


def eos_set(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The ids that end a completion, from a generation config's `eos_token_id` in any of its forms."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def up_to_eos(ids: Sequence[int], eos: frozenset[int]) -> list[int]:
    """`ids` up to and with the first EOS; all of them where there is none."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids) - 1)
    return list(ids[: end + 1])


def shared_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """How many ids both heads have; the larger one's other rows are padding of its vocabulary."""
    return min(model.config.get_text_config().vocab_size for model in (student, teacher))


def padding_ids(model: PreTrainedModel, shared: int) -> list[int] | None:
    """The ids of `model` beyond the shared vocabulary, never to be sampled; `None` where there are none."""
    return list(range(shared, model.config.get_text_config().vocab_size)) or None


class LocalTeacher:
    """A frozen teacher in this process.

    Args:
        model: the teacher, frozen.
        trainer: the trainer whose accelerator, generation settings and EOS ids it shares.
        shared: the number of ids that student and teacher share.
    """

    def __init__(self, model: PreTrainedModel, trainer: Any, shared: int) -> None:
        args = trainer.args
        given = {name: getattr(args, name) for name in WHOLE_DISTRIBUTION if getattr(args, name) is not None}
        self.generation_config = GenerationConfig(
            do_sample=True,
            temperature=args.temperature,
            **WHOLE_DISTRIBUTION | given,
            max_new_tokens=args.max_completion_length,
            eos_token_id=trainer.eos_token_ids,
            pad_token_id=trainer._tokenizer.pad_token_id,
            suppress_tokens=padding_ids(model, shared),
            disable_compile=True,
        )
        self.accelerator = trainer.accelerator
        self.backend = trainer._dist
        self.gather_for_generation = args.ds3_gather_for_generation
        self.sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        self.model = prepare_frozen(model, trainer)

    @property
    def unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """`candidates` completions of each prompt as token ids, from one batched generation.

        Under a sharded teacher every rank must call this equally often, each with at least one prompt.
        """
        from trl.models import unwrap_model_for_generation

        config = GenerationConfig(**{**self.generation_config.to_dict(), "num_return_sequences": candidates})
        with (
            unwrap_model_for_generation(
                self.model, self.accelerator, gather_deepspeed3_params=self.gather_for_generation
            ) as model,
            self.backend.summon_full_params(self.model, recurse=False),
        ):
            completions = sample_completions(model, prompt_ids, config)
        return [completions[i : i + candidates] for i in range(0, len(completions), candidates)]

    def ended(self, completion_ids: Sequence[int]) -> bool:
        """Whether a completion ended with EOS rather than at the length limit."""
        return completion_ids[-1] in eos_set(self.generation_config.eos_token_id)
