"""What a teacher is: it scores token ids and proposes completions. Here, a frozen model in this process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .divergence import last_hidden_state, sequence
from .faults import TeacherError
from .offload import BlockOffload

# said explicitly: what a generation config leaves out, transformers fills from the checkpoint's own
WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
TEACHER_MEMBERS = ("score", "propose", "sharded", "context", "name")
# of one forward with offloaded blocks, at least. A weight computes 2 FLOP a token, at 100 TFLOP/s, and 2 bytes of it
# come at 20 GB/s: these take equally long at 5,000 tokens; at six times as many, still more would gain little
TOKENS_AT_ONCE = 32_768
NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity, which JSON does not have
# what a multimodal batch carries beside token ids, as the parent's forward takes it
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@runtime_checkable
class Teacher(Protocol):
    """What the trainer asks of a teacher; any object with these can be its `teacher_model` (sampled estimator)."""

    sharded: bool
    """Whether every rank must enter `score` and `propose` equally often, each with at least one row."""

    context: int | None
    """Longest sequence of prompt and completion it can take, in tokens; `None` where it is not known."""

    name: str
    """What a model card calls it."""

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities in nats of each completion's tokens after its prompt, float32, (T_i,) each.

        At the training temperature. A completion may be empty.

        Raises:
            TeacherError: it cannot answer, and training is to stop on every rank.
        """

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """`candidates` sampled completions of each prompt as token ids, each up to and with its first EOS."""


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
        OSError: it cannot be loaded; with a note that names it.
    """
    from trl.trainer.utils import create_model_from_path

    if isinstance(teacher_model, str):
        kwargs = {"dtype": "auto", **defaults, **(init_kwargs or {})}
        if revision is not None:
            kwargs["revision"] = revision
        try:
            return create_model_from_path(teacher_model, **kwargs)
        except OSError as error:  # whose words name no model where the hub cannot be reached
            error.add_note(f"It was about the teacher, {teacher_model!r}.")
            raise
    if not isinstance(teacher_model, PreTrainedModel):
        missing = [name for name in TEACHER_MEMBERS if not hasattr(teacher_model, name)]
        raise TypeError(
            f"`teacher_model` must be a path, a hub id, a PreTrainedModel or a `sg_opd.teacher.Teacher`; a "
            f"{type(teacher_model).__name__} is none, and lacks {', '.join(map(repr, missing))} to be a Teacher."
        )
    if init_kwargs or revision:
        raise ValueError(
            "`teacher_model_init_kwargs` and `teacher_model_revision` are for a teacher loaded by name, but "
            "`teacher_model` is a model already. Drop one of them."
        )
    return teacher_model


def loading_defaults(args: Any, on_host: bool = False) -> dict[str, Any]:
    """Keyword arguments for loading a frozen model, under those a user gives; `on_host`, into host memory.

    No code of the checkpoint is run unless the trainer's arguments say so, and no weights in pickles are read.
    """
    defaults = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    if on_host or args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED", "FSDP"]:
        defaults["device_map"] = None  # as the parent trainer does: "auto" fails there
    return defaults


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself: in eval mode, so without dropout, and with no gradient."""
    return model.eval().requires_grad_(False)


def prepare_frozen(model: PreTrainedModel, trainer: Any, placed: bool = False) -> nn.Module:
    """A frozen model placed (unless it is `placed`), or sharded as the student is, on the trainer's devices."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    placement = False if placed else None  # None: the accelerator's own choice
    return trainer.accelerator.prepare_model(model, device_placement=placement, evaluation_mode=True)


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    """Completions of token-id prompts in one batch, each up to and with its first EOS.

    `config.num_return_sequences` of them a prompt, those of one prompt together.
    """
    ids, mask = padded(prompt_ids, config.pad_token_id, "left", model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [up_to_eos(sample, eos_set(config.eos_token_id)) for sample in output[:, ids.size(1) :].tolist()]


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


def proposal_sampling(args: Any) -> dict[str, Any]:
    """How proposals are sampled: as the student's rollouts, by a trainer's settings."""
    given = {name: getattr(args, name) for name in WHOLE_DISTRIBUTION if getattr(args, name) is not None}
    return {"temperature": args.temperature, **WHOLE_DISTRIBUTION, **given}


def as_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids of each row where `mask` is set; both (B, L)."""
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def as_rectangle(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows of unequal length as one (B, width) tensor, zero to the right of each."""
    filled = rows[0].new_zeros(len(rows), width)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return filled


def ask(teacher: Teacher, batch: dict[str, Any], log_ratio_clip: float | None, skips: bool = False) -> Tensor:
    """The teacher's log-probabilities of a batch's completion tokens, (B, T), anything where masked.

    With `skips`, what is no number is left for whoever skips the step, and no probability is minus infinity.

    Raises:
        TeacherError: an answer that does not fit the batch, that is not a number, or, unless log-ratios are clipped,
            that gives a token no probability.
    """
    if isinstance(teacher, LocalTeacher):  # as it is: its padding, and what a multimodal batch has beside ids
        return teacher.score_batch(batch)
    prompts, completions = (as_lists(batch[f"{part}_ids"], batch[f"{part}_mask"]) for part in ("prompt", "completion"))
    rows = teacher.score(prompts, completions)
    if [len(row) for row in rows] != [len(ids) for ids in completions]:
        raise TeacherError(
            f"{teacher.name} scored rows of {[len(row) for row in rows]} tokens, but the batch has "
            f"{[len(ids) for ids in completions]}"
        )
    if skips:
        rows = [row.masked_fill(row <= NO_PROBABILITY, -math.inf) for row in rows]
    for row, ids in zip(rows, completions, strict=True) if not skips else ():
        for logp, token in zip(row.tolist(), ids, strict=True):
            if math.isnan(logp) or (logp <= NO_PROBABILITY and log_ratio_clip is None):
                raise TeacherError(
                    f"{teacher.name} gives token {token} the log-probability {logp:g}, on which no delta can be "
                    "trained. Set `log_ratio_clip`, which bounds it, or look at the teacher"
                )
    ids = batch["completion_ids"]
    return as_rectangle(rows, ids.size(1)).to(ids.device)


def padded(rows: Sequence[Sequence[int]], pad_token_id: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both (B, L), from rows of unequal length, padded at `side`."""
    from trl.trainer.utils import pad

    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad([torch.ones_like(row) for row in ids], 0, side)
    return pad(ids, pad_token_id, side).to(device), mask.to(device)


class LocalTeacher:
    """A frozen teacher in this process; implements `Teacher`.

    Args:
        model: the teacher; frozen here, its head fused as the student's is, and with `teacher_offload` its blocks
            sent to host memory.
        trainer: the trainer whose accelerator, generation settings and EOS ids it shares.
    """

    def __init__(self, model: PreTrainedModel, trainer: Any) -> None:
        from trl.trainer.utils import add_fused_lm_head

        args = trainer.args
        self.shared_vocabulary = shared_vocabulary(trainer.accelerator.unwrap_model(trainer.model), model)
        self.generation_config = GenerationConfig(
            do_sample=True,
            **proposal_sampling(args),
            max_new_tokens=args.max_completion_length,
            eos_token_id=trainer.eos_token_ids,
            pad_token_id=trainer._tokenizer.pad_token_id,
            suppress_tokens=padding_ids(model, self.shared_vocabulary),
            disable_compile=True,
        )
        self.trainer = trainer
        self.accelerator = trainer.accelerator
        self.backend = trainer._dist
        self.gather_for_generation = args.ds3_gather_for_generation
        self.sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        add_fused_lm_head(freeze(model), temperature=args.temperature)
        self.offload = BlockOffload(model, self.accelerator.device) if args.teacher_offload else None
        self.model = prepare_frozen(model, trainer, placed=args.teacher_offload)

    @property
    def unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def context(self) -> int | None:
        return getattr(self.unwrapped.config.get_text_config(), "max_position_embeddings", None)

    @property
    def name(self) -> str:
        return getattr(self.unwrapped.config, "_name_or_path", "") or "a model in memory"

    def score_batch(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of a batch's completion tokens, (B, T), on the trainer's device; never whole logits."""
        rows = self._rows_at_once(batch)
        return self.trainer.completion_logps(self.model, batch, rows)

    @torch.no_grad()
    def states(self, batch: dict[str, Any]) -> Tensor:
        """The last hidden states that predict a batch's completion tokens, (B, T, H), on the trainer's device."""
        rows, keep = self._rows_at_once(batch), batch["completion_ids"].size(1)
        with self.accelerator.autocast():
            states = [
                self.trainer.run_within(self.model, last_hidden_state, *chunk, keep)
                for chunk in zip(*(part.split(rows) for part in sequence(batch)), strict=True)
            ]
        return torch.cat(states)

    def _rows_at_once(self, batch: dict[str, Any]) -> int:
        """Rows of one forward: the trainer's micro-batch, or more where each forward has to bring the blocks."""
        rows = self.trainer.args.per_device_train_batch_size
        if self.offload is None:
            return rows
        return max(rows, TOKENS_AT_ONCE // sum(batch[f"{part}_ids"].size(1) for part in ("prompt", "completion")))

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `Teacher.score`, on the trainer's device."""
        pad, device = self.generation_config.pad_token_id, self.accelerator.device
        prompts = padded(prompt_ids, pad, "left", device)
        completions = padded([ids or [pad] for ids in completion_ids], pad, "right", device)
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        logps = self.score_batch(dict(zip(keys, (*prompts, *completions), strict=True)))
        return [row[: len(ids)] for row, ids in zip(logps.float(), completion_ids, strict=True)]

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """As `Teacher.propose`, from one batched generation, for which offloaded blocks all come to the device."""
        from trl.models import unwrap_model_for_generation

        config = GenerationConfig(**{**self.generation_config.to_dict(), "num_return_sequences": candidates})
        with (
            self.offload.lent() if self.offload else nullcontext(),
            unwrap_model_for_generation(
                self.model, self.accelerator, gather_deepspeed3_params=self.gather_for_generation
            ) as model,
            self.backend.summon_full_params(self.model, recurse=False),
        ):
            completions = sample_completions(model, prompt_ids, config)
        return [completions[i : i + candidates] for i in range(0, len(completions), candidates)]
