"""The initial policy: the student before training, kept frozen for `reference_policy="initial"`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

from ..config import SGOPDConfig
from ..teachers.local import freeze, loading_defaults, prepare_frozen

ADAPTER = "ref"  # the parent trainer's own name for a frozen copy of an adapter


def capture(model: Any, peft_config: Any, args: SGOPDConfig) -> PreTrainedModel | None:
    """What must be kept of a student before the trainer patches and trains it.

    A copy of an instance; for a `PeftModel`, a frozen copy of its adapter within it, and `None`. Also `None` where
    nothing needs keeping: a new adapter can be switched off, and a path loaded again.

    Raises:
        ValueError: an instance without a path under ZeRO-3, which cannot copy a sharded model.
    """
    if args.reference_policy != "initial" or isinstance(model, str) or peft_config is not None:
        return None
    if is_peft_model(model):
        if args.beta == 0.0:  # else the parent makes the same copy
            trained = model.active_adapter
            model.add_adapter(ADAPTER, model.peft_config[trained])
            weights = get_peft_model_state_dict(model, adapter_name=trained)
            set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
        return None
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        if not get_config_model_id(model.config):
            raise ValueError(
                "`reference_policy='initial'` under ZeRO-3 reloads the student from its path, but `model` is an "
                "instance without one. Pass the path as `model`."
            )
        return None
    reference = copy.deepcopy(model)
    reference.__dict__.pop("forward", None)  # the copy of a patched forward would still run the original
    return reference


class InitialPolicy:
    """Lends the initial policy to be called like the student.

    Args:
        captured: what `capture` kept.
        trainer: the trainer, its student set up.
        quantization_config: the student's, where its path is loaded again.
    """

    def __init__(self, captured: PreTrainedModel | None, trainer: Any, quantization_config: Any = None) -> None:
        self.trainer = trainer
        self.frozen: nn.Module | None = None
        if is_peft_model(trainer.model):
            return
        if captured is None:
            args = trainer.args
            loading = {**loading_defaults(args), "dtype": trainer.model.dtype, **(args.model_init_kwargs or {})}
            if quantization_config is not None:
                loading["quantization_config"] = quantization_config
            captured = create_model_from_path(get_config_model_id(trainer.model.config), **loading)
        add_fused_lm_head(freeze(captured), temperature=trainer.temperature)
        self.frozen = prepare_frozen(captured, trainer)

    @contextmanager
    def lend(self) -> Iterator[nn.Module]:
        """A frozen model; with PEFT the student itself, its adapter switched off or set back to the copy."""
        if self.frozen is not None:
            yield self.frozen
            return
        student = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = student.training
        student.eval()  # a reference has no dropout
        try:
            with use_adapter(student, ADAPTER if ADAPTER in student.peft_config else None):
                yield self.trainer.model
        finally:
            student.train(training)
