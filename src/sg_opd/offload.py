"""A frozen model whose decoder blocks rest in host memory, on accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import named_module_tensors
from torch import Tensor, nn
from transformers import PreTrainedModel


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a model, in order: its outermost modules of the classes in its `_no_split_modules`.

    Raises:
        ValueError: a model that cannot be offloaded block by block: quantised, dispatched already, or without blocks.
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
    classes = model._no_split_modules or ()
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents before children
        if type(module).__name__ in classes and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    if not blocks:
        raise ValueError(
            f"`teacher_offload=True` moves the blocks that a model names in `_no_split_modules`, but a "
            f"{type(model).__name__} has none. Set teacher_offload=False."
        )
    return blocks


class BlockOffload:
    """Sends a model's blocks to host memory, from where each comes to the device for its own forward only.

    The rest (embeddings, norms, head) goes to the device and stays. Parameters of a resting block are on the meta
    device. `accelerate.hooks.remove_hook_from_submodules(model)` brings every block back to where it was.

    Args:
        model: a frozen model, changed in place.
        device: where it computes; the host's copies are page-locked where that is a CUDA device.

    Raises:
        ValueError: as `blocks_of`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.blocks = blocks_of(model)
        self.hooks = []
        if device.type == "cpu":  # of "cpu:0", as ranks are given, accelerate's hook would make plain tensors
            device = torch.device("cpu")
        for block in self.blocks:
            hook = AlignDevicesHook(
                device,
                offload=True,
                place_submodules=True,
                weights_map=host_weights(block, page_locked=device.type == "cuda"),
                skip_keys=model._skip_keys_device_placement,
            )
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


def host_weights(module: nn.Module, page_locked: bool) -> dict[str, Tensor]:
    """By name, the parameters of a module in host memory, where they stay; those already there are not copied."""
    weights = {name: tensor.detach().to("cpu") for name, tensor in named_module_tensors(module, False, recurse=True)}
    return {name: tensor.pin_memory() for name, tensor in weights.items()} if page_locked else weights


def _send_back(block: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(block, None)
