"""A teacher in this process: a frozen model, placed or sharded as the student is; on request offloaded by blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..method.buckets import Buckets
from ..method.divergence import Head, head_of, last_hidden_state, places, put, sequence, taken, unsharded
from ..method.top_k import likeliest
from .protocol import TEACHER_MEMBERS, padded
from .sampling import sample_completions

if TYPE_CHECKING:
    from trl import GRPOConfig

# in one forward with offloaded blocks, at least. A weight computes 2 FLOP a token, at 100 TFLOP/s, and its 2 bytes come
# at 20 GB/s: both take equally long at 5,000 tokens, and beyond six times as many little is left to gain
TOKENS_AT_ONCE = 32_768

MERGE = "A teacher is a whole model: merge the adapter into its base first (docs/merging.md)."


class Forward(Protocol):
    """The forward passes that a trainer lends to frozen models, whole or sharded."""

    def completion_logps(self, model: nn.Module, batch: dict[str, Any], rows: int | None = None) -> Tensor:
        """Log-probabilities of a batch's completion tokens, (B, T); `rows` of them in one forward."""

    def run_within(self, model: nn.Module, method: Callable, *args: Any) -> Any:
        """`method(unwrapped model, *args)` within the wrapper's forward."""


def sequence_logps(forward: Forward, model: nn.Module, ids: list[int], device: torch.device | None = None) -> Tensor:
    """A model's log-probabilities of a sequence's tokens but the first, (length - 1,), without dropout.

    `device` takes the tokens; by default the one of the first parameter.
    """
    row = torch.tensor([ids], device=device or next(model.parameters()).device)
    mask, training = torch.ones_like(row), model.training
    batch = {"prompt_ids": row[:, :1], "completion_ids": row[:, 1:]}
    model.eval()
    logps = forward.completion_logps(model, {**batch, "prompt_mask": mask[:, :1], "completion_mask": mask[:, 1:]})
    model.train(training)
    return logps[0].float().cpu()


def load_teacher(teacher_model: Any, revision: str | None, init_kwargs: Any, **defaults: Any) -> PreTrainedModel:
    """The teacher as a model, loaded in its checkpoint's dtype unless `init_kwargs` asks for another.

    Args:
        teacher_model: a path, a hub id, or a model, which is returned as it is.
        revision: branch, tag or commit of a hub id.
        init_kwargs: for `from_pretrained`; wins over `defaults`.

    Raises:
        TypeError: `teacher_model` is neither text nor a model.
        ValueError: settings for loading were given together with a model that needs none; an adapter.
        OSError: it cannot be loaded; with a note that names it.
    """
    from trl.trainer.utils import create_model_from_path

    if isinstance(teacher_model, str):
        kwargs = {"dtype": "auto", **defaults, **(init_kwargs or {})}
        if revision is not None:
            kwargs["revision"] = revision
        try:
            return create_model_from_path(teacher_model, **kwargs)
        except (OSError, ValueError) as error:
            if find_adapter_config_file(teacher_model, revision=revision):
                raise ValueError(f"`teacher_model` {teacher_model!r} is an adapter. {MERGE}") from error
            if isinstance(error, OSError):  # whose words name no model where the hub cannot be reached
                error.add_note(f"It was about the teacher, {teacher_model!r}.")
            raise
    if isinstance(teacher_model, nn.Module) and is_peft_model(teacher_model):
        raise TypeError(f"`teacher_model` is a {type(teacher_model).__name__}, a model under an adapter. {MERGE}")
    if not isinstance(teacher_model, PreTrainedModel):
        missing = [name for name in TEACHER_MEMBERS if not hasattr(teacher_model, name)]
        raise TypeError(
            f"`teacher_model` must be a path, a hub id, a PreTrainedModel or a `sg_opd.teachers.Teacher`; a "
            f"{type(teacher_model).__name__} is none, and lacks {', '.join(map(repr, missing))} to be a Teacher."
        )
    if init_kwargs or revision:
        raise ValueError(
            "`teacher_model_init_kwargs` and `teacher_model_revision` are for a teacher loaded by name, but "
            "`teacher_model` is a model already. Drop one of them."
        )
    return teacher_model


def loading_defaults(args: GRPOConfig, on_host: bool = False) -> dict[str, Any]:
    """Keyword arguments for loading a frozen model, under those a user gives; `on_host`, into host memory.

    No code of the checkpoint is run unless the trainer's arguments say so, and no weights in pickles are read.
    """
    defaults: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    if on_host or args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED", "FSDP"]:
        defaults["device_map"] = None  # as GRPOTrainer does: "auto" fails there
    return defaults


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself: in eval mode, so without dropout, and with no gradient."""
    return model.eval().requires_grad_(False)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether frozen models are spread over the ranks, so that each must enter their forward equally often."""
    return accelerator.distributed_type in ["DEEPSPEED", "FSDP"]


def prepare_frozen(model: PreTrainedModel, accelerator: Accelerator, placed: bool = False) -> Any:
    """A frozen model placed (unless it is `placed`), or sharded as the student is, on the accelerator's devices."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if accelerator.distributed_type == "DEEPSPEED":
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == "FSDP":
        return prepare_fsdp(model, accelerator)
    placement = False if placed else None  # None: the accelerator's own choice
    return accelerator.prepare_model(model, device_placement=placement, evaluation_mode=True)


def shared_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """How many ids both heads have; the larger one's other rows are padding of its vocabulary."""
    return min(model.config.get_text_config().vocab_size for model in (student, teacher))


def padding_ids(model: PreTrainedModel, shared: int) -> list[int] | None:
    """The ids of `model` beyond the shared vocabulary, never to be sampled; `None` where there are none."""
    return list(range(shared, model.config.get_text_config().vocab_size)) or None


class LocalTeacher:
    """A frozen teacher in this process; implements `Teacher`.

    Args:
        model: the teacher; frozen here, its head fused as the student's is.
        forward: runs it, as the trainer does.
        accelerator: places or shards it.
        sampling: of proposals: temperature, truncation, length, EOS and padding ids.
        rows: of one forward.
        offload: whether its blocks rest in host memory.
        gather: whether ZeRO-3 gathers its weights to generate, as `ds3_gather_for_generation`.
        cast_lm_head_to_fp32: as for the student, or the two would round differently.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Forward,
        accelerator: Accelerator,
        sampling: dict[str, Any],
        rows: int,
        offload: bool = False,
        gather: bool = True,
        cast_lm_head_to_fp32: bool = False,
    ) -> None:
        from trl.trainer.utils import add_fused_lm_head

        self.generation_config = GenerationConfig(do_sample=True, disable_compile=True, **sampling)
        self.forward = forward
        self.accelerator = accelerator
        self.rows = rows
        self.temperature = sampling["temperature"]
        self.gather = gather
        self.sharded = is_sharded(accelerator)
        add_fused_lm_head(freeze(model), sampling["temperature"], cast_lm_head_to_fp32)
        self.offload = BlockOffload(model, accelerator.device) if offload else None
        self.model = prepare_frozen(model, accelerator, placed=offload)

    @property
    def unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def context(self) -> int | None:
        return getattr(self.unwrapped.config.get_text_config(), "max_position_embeddings", None)

    @property
    def name(self) -> str:
        return getattr(self.unwrapped.config, "_name_or_path", "") or "a model in memory"

    def head(self) -> Head:
        """The head as it is now: to be asked for within the forward that uses it."""
        return head_of(self.unwrapped)

    def score_batch(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of a batch's completion tokens, (B, T), on the trainer's device; never whole logits."""
        return self.forward.completion_logps(self.model, batch, self._rows_at_once(batch))

    @torch.no_grad()
    def states(self, batch: dict[str, Any]) -> Tensor:
        """The last hidden states that predict a batch's completion tokens, (B, T, H), on the trainer's device."""
        rows, keep = self._rows_at_once(batch), batch["completion_ids"].size(1)
        with self.accelerator.autocast():
            states = [
                self.forward.run_within(self.model, last_hidden_state, *chunk, keep)
                for chunk in zip(*(part.split(rows) for part in sequence(batch)), strict=True)
            ]
        return torch.cat(states)

    @torch.no_grad()
    def top_batch(self, batch: dict[str, Any], k: int, vocabulary: int) -> Buckets:
        """The distributions over its `k` likeliest ids below `vocabulary`, the sampled one and the rest, (B, T, ...).

        Zero where masked. Neither whole logits nor states are kept: of a few rows at a time, in chunks of ids.
        """
        rows, temperature = self._rows_at_once(batch), self.temperature

        def top(model: PreTrainedModel, tokens: Tensor, kept: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            states, at = last_hidden_state(model, tokens, kept, ids.size(1)), places(mask)
            sampled = taken(ids, at)
            answer = likeliest(taken(states, at), unsharded(head_of(model)), sampled, k, vocabulary, temperature)
            return tuple(put(part, mask) for part in answer)

        parts = *sequence(batch), batch["completion_ids"], batch["completion_mask"].bool()
        with self.accelerator.autocast():
            chunks = zip(*(part.split(rows) for part in parts), strict=True)
            answers = [self.forward.run_within(self.model, top, *chunk) for chunk in chunks]
        return Buckets(*map(torch.cat, zip(*answers, strict=True)))

    def _rows_at_once(self, batch: dict[str, Any]) -> int:
        """`rows`, or more where each forward has to bring the blocks."""
        return self.rows if self.offload is None else max(self.rows, TOKENS_AT_ONCE // sequence(batch)[0].size(1))

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `Teacher.score`, on the trainer's device."""
        pad, device = self.generation_config.pad_token_id, self.accelerator.device
        prompt = padded(prompt_ids, pad, "left", device)
        completion = padded([ids or [pad] for ids in completion_ids], pad, "right", device)
        batch = {"prompt_ids": prompt[0], "completion_ids": completion[0]}
        logps = self.score_batch({**batch, "prompt_mask": prompt[1], "completion_mask": completion[1]})
        return [row[: len(ids)] for row, ids in zip(logps.float(), completion_ids, strict=True)]

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """As `Teacher.propose`, from one batched generation, for which offloaded blocks all come to the device."""
        from trl.distributed import DistributedBackend
        from trl.models import unwrap_model_for_generation

        config = GenerationConfig(**{**self.generation_config.to_dict(), "num_return_sequences": candidates})
        with (
            self.offload.lent() if self.offload else nullcontext(),
            unwrap_model_for_generation(self.model, self.accelerator, gather_deepspeed3_params=self.gather) as model,
            DistributedBackend(self.accelerator).summon_full_params(self.model, recurse=False),
        ):
            completions = sample_completions(model, prompt_ids, config)
        return [completions[i : i + candidates] for i in range(0, len(completions), candidates)]


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a model, in order: its outermost modules of the classes in its `_no_split_modules`.

    Refuses a model that cannot be offloaded block by block: quantised, dispatched already, or without blocks.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "`teacher_offload=True` needs a teacher in plain weights, but this one is quantised. Set "
            "teacher_offload=False, or drop `quantization_config` from `teacher_model_init_kwargs`."
        )
    devices = {*getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            "`teacher_offload=True` places the teacher itself, but this one is dispatched or offloaded already. Load "
            "it without `device_map`, or pass it through `accelerate.hooks.remove_hook_from_submodules` first."
        )
    inside: set[nn.Module] = set()
    blocks = []
    for module in model.modules():  # parents before children
        if type(module).__name__ in (model._no_split_modules or ()) and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    if not blocks:
        raise ValueError(
            f"`teacher_offload=True` moves the blocks that a model names in `_no_split_modules`, but a "
            f"{type(model).__name__} has none. Set teacher_offload=False."
        )
    return blocks


class BlockOffload:
    """Sends a frozen model's blocks to host memory, from where each comes to the device for its own forward only.

    The rest (embeddings, norms, head) goes to the device and stays. Parameters of a resting block are on the meta
    device; `accelerate.hooks.remove_hook_from_submodules(model)` brings every block back to where it was. The host's
    copies are page-locked where the device is a CUDA one.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.blocks = blocks_of(model)
        self.hooks = []
        if device.type == "cpu":  # of "cpu:0", as ranks are given, accelerate's hook would make plain tensors
            device = torch.device("cpu")
        for block in self.blocks:
            weights = {name: parameter.detach().cpu() for name, parameter in block.named_parameters()}
            if device.type == "cuda":
                weights = {name: weight.pin_memory() for name, weight in weights.items()}
            skipped = model._skip_keys_device_placement
            hook = AlignDevicesHook(device, offload=True, place_submodules=True, weights_map=weights, skip_keys=skipped)
            add_hook_to_module(block, hook)
            self.hooks.append(hook)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # in place: ties stay ties

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The whole model on its device, to be called as often as generation does; then back, also after an error."""
        with ExitStack() as stack:
            for block, hook in zip(self.blocks, self.hooks, strict=True):
                stack.callback(_send_back, block, hook)
                hook.pre_forward(block)
                hook.offload = False
            yield


def _send_back(block: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(block, None)
