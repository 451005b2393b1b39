"""What is verified of student and teacher beside each other, and of the precision they are loaded in."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import SGOPDConfig
from ..teachers.local import blocks_of
from ..teachers.protocol import eos_set
from ..teachers.several import Source

logger = get_logger(__name__)  # of the main process only


def check_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SGOPDConfig,
    source: Source,
    own_prompts: bool = False,
) -> None:
    """Compare student and teacher: causal heads, tokenizers, EOS sets, chat templates, and that they differ at all.

    `source` is where the teacher is had from. A teacher with prompts of its own need not differ.
    """
    check_causal("student", without_adapter(student))
    check_causal(source.role, teacher)
    if args.teacher_offload:
        blocks_of(teacher)  # raises
    teacher_tokenizer, size = tokenizer_of(teacher, args, source), teacher.config.get_text_config().vocab_size
    if teacher_tokenizer is not None:
        check_tokenizers(tokenizer, teacher_tokenizer)
    elif len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids but the teacher's vocabulary only {size}: they cannot share a "
            "tokenizer."
        )
    ends = [eos_set(model.generation_config.eos_token_id) for model in (student, teacher)]
    if ends[0] != ends[1]:
        logger.warning(
            "Student and %s end a completion with different tokens (%s and %s): the teacher will rate the "
            "student's ending as unlikely. Align `generation_config.eos_token_id`.",
            *(source.role, *(sorted(end) for end in ends)),
        )
    if not own_prompts and same_weights(student, teacher):
        logger.warning(
            "%s and student are the same model, by path or by weights: every delta is zero and nothing is learnt.",
            source.role[0].upper() + source.role[1:],
        )


def tell_narrow(student: PreTrainedModel, args: SGOPDConfig) -> None:
    """Warn of a student whose trained weights are in 16 bits; not with an adapter, nor where a master copy is kept."""
    kind = args.distributed_state.distributed_type
    if is_peft_model(student) or kind == "DEEPSPEED" or (kind == "FSDP" and (args.bf16 or args.fp16)):
        return
    narrow = {weight.dtype for weight in student.parameters() if weight.requires_grad} & {torch.bfloat16, torch.float16}
    for dtype in sorted(narrow, key=str):
        logger.warning(
            "The student is trained in %s weights: what an update changes by less than about 1/%d of a weight is lost, "
            "at a small learning rate (here %g) nearly all. Load it in float32, model_init_kwargs={'dtype': 'float32'} "
            "where it is given by name; bf16=True computes in bfloat16 all the same.",
            *(dtype, 2 / torch.finfo(dtype).eps, args.learning_rate),
        )


def tell_dtypes(student: PreTrainedModel, teacher: PreTrainedModel, args: SGOPDConfig, source: Source) -> None:
    """Warn where a teacher loaded by name has another dtype than the student, and none was asked for."""
    given: Any = source.init_kwargs or {}
    asked = given.keys() & {"dtype", "torch_dtype", "quantization_config"}
    own, other = without_adapter(student).dtype, teacher.dtype
    if not asked and own != other:
        logger.warning(
            "The student's weights are %s, the %s's %s, as in its checkpoint: their log-probabilities round "
            "differently, by some thousandths of a nat, so that deltas as small mean nothing. For one precision set "
            "teacher_model_init_kwargs={'dtype': '%s'}, or a dtype in `model_init_kwargs`.",
            *(own, source.role, other, str(own).removeprefix("torch.")),
        )


def without_adapter(model: Any) -> PreTrainedModel:
    """The model that an adapter was put on, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def check_causal(role: str, model: PreTrainedModel) -> None:
    """Refuse a model that does not predict the next token from the ones before it."""
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(f"The {role} ({name}) has no language-model head; pass a causal LM.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"The {role} ({name}) is an encoder-decoder; pass a causal LM.")
    if not model.can_generate():
        raise ValueError(f"The {role} ({name}) is no model that generates; pass a causal LM.")


def tokenizer_of(teacher: PreTrainedModel, args: SGOPDConfig, source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the teacher; `None`, with a warning, where there is none to compare with."""
    path = getattr(teacher.config, "_name_or_path", "")
    missing = f"The {source.role} has no path to load its tokenizer from"
    try:
        if path:
            return AutoTokenizer.from_pretrained(
                path, revision=source.revision, trust_remote_code=args.trust_remote_code
            )
    except (OSError, ValueError) as error:  # what transformers raises where it finds no tokenizer
        missing = f"No tokenizer at the {source.role}'s {path!r} ({error})"
    logger.warning("%s; only the sizes of vocabularies are compared.", missing)
    return None


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse different vocabularies (padding of a head's size is no difference); warn of chat templates that differ."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
        shown = ", ".join(f"{t!r} ({ours.get(t)} / {theirs.get(t)})" for t in sorted(differing)[:3])
        raise ValueError(
            f"Student and teacher use different tokenizers: {len(differing)} tokens have other ids, first {shown} "
            "(student / teacher). Token-level distillation needs one tokenizer; choose a teacher of the same family."
        )
    if student.chat_template and teacher.chat_template and student.chat_template != teacher.chat_template:
        logger.warning(
            "Student and teacher have different chat templates; the teacher is asked with the student's. If its "
            "deltas are large from the first step, use a student and a teacher of the same template."
        )


def same_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether both models come from one path or, not sharded, have equal parameters; the student without an adapter."""
    paths = [getattr(model.config, "_name_or_path", "") for model in (student, teacher)]
    if paths[0] and paths[0] == paths[1]:
        return True
    student = without_adapter(student)
    ours = {
        name.replace(".base_layer", ""): value for name, value in student.state_dict().items() if "lora_" not in name
    }
    theirs = teacher.state_dict()
    if ours.keys() != theirs.keys() or any(value.numel() == 0 for value in ours.values()):
        return False
    return all(
        value.shape == theirs[name].shape and torch.equal(value, theirs[name].to(value.device, value.dtype))
        for name, value in ours.items()
    )
