"""What is verified of student and teacher: each one's head, the two beside each other, and their precision."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import SGOPDConfig
from ..method.divergence import chunked_nll, head_of, last_hidden_state
from ..method.gate import is_divergence
from ..teachers.local import Forward, blocks_of, is_sharded, sequence_logps
from ..teachers.protocol import eos_set
from ..teachers.several import Source

logger = get_logger(__name__)  # of the main process only

TOKENS = 8  # that a head is tried on


def check_head(
    role: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: SGOPDConfig,
    forward: Forward,
    accelerator: Accelerator,
) -> None:
    """Refuse a model whose log-probabilities, as this run computes them, are not those of its own logits.

    TRL's fused head and `head_of` both take logits for `W h + b`, scaled and soft-capped as the configuration says.
    Some heads are more than that. The model, wrapped or not, is asked about one short sequence, without dropout; not a
    sharded one, nor a quantised student on a CPU.
    """
    own = accelerator.unwrap_model(model)
    name = f"The {role} ({type(without_adapter(own)).__name__} {own.config._name_or_path!r})"
    if isinstance(own.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"{name} has an adapter on its head, which log-probabilities here would not count. Merge the adapter into "
            "the model first (docs/merging.md)."
        )
    quantised = getattr(without_adapter(own), "hf_quantizer", None) is not None
    # bitsandbytes packs what runs on a CPU in eval mode for good, and has no gradient through it then
    if is_sharded(accelerator) or (quantised and role == "student" and accelerator.device.type == "cpu"):
        return
    training = own.training
    own.eval()
    scored, expected, tolerance = _scored(model, own, tokenizer, args, forward, accelerator)
    own.train(training)
    off = (scored - expected).abs().max().item()
    if off > tolerance:  # a NaN is none: what is no number is reported in training, by its token
        instead = "" if role == "student" else ", or serve it by vLLM (`teacher_server_url`)"
        raise ValueError(
            f"{name} has a head that estimator={args.estimator!r} does not know: log-probabilities are computed from "
            "the last hidden states and the weights of the head, with the scaling and the soft cap of the "
            f"configuration, and are up to {off:.2g} nats off those of the model's own logits. Choose another model"
            f"{instead}."
        )


@torch.no_grad()
def _scored(
    model: nn.Module,
    own: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SGOPDConfig,
    forward: Forward,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor, float]:
    """Log-probabilities of a few tokens as the run computes them and from logits, and by how much rounding may differ.

    The tokens are spread evenly over the vocabulary, without special ones, which may stand for images.
    """
    embedding: Any = own.get_input_embeddings()
    device = accelerator.device if embedding.weight.is_meta else embedding.weight.device
    known = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    usable = sorted(token for token in known if token < own.config.get_text_config().vocab_size)
    ids = [usable[i * len(usable) // TOKENS] for i in range(TOKENS)]
    row = torch.tensor([ids], device=device)
    tokens = row, torch.ones_like(row)

    def whole(own: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return own(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[0, -TOKENS:-1]

    def by_head(own: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = last_hidden_state(own, input_ids, attention_mask, TOKENS - 1)[0]
        return -chunked_nll(states, head_of(own), row[0, 1:].to(states.device), args.temperature)

    with accelerator.autocast():
        logits = forward.run_within(model, whole, *tokens).float().cpu() / args.temperature
        by_states = is_divergence(args.estimator)
        scored = (
            forward.run_within(model, by_head, *tokens) if by_states else sequence_logps(forward, model, ids, device)
        )
    at = row.cpu()[0, 1:, None]
    largest = torch.maximum(logits.gather(1, at).abs(), logits.amax(1, keepdim=True).abs()).max().item()
    narrow = accelerator.mixed_precision != "no" or own.dtype != torch.float32
    tolerance = 2 * largest * (2**-7 if narrow else 2**-10)  # two roundings, to bfloat16 or to TF32
    return scored.float().cpu(), logits.log_softmax(-1).gather(1, at).squeeze(1), tolerance


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
            "%s and student are the same model, by their weights: every delta is zero and nothing is learnt.",
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
    """Whether both have equal parameters, in the narrower precision; the student without an adapter.

    Of sharded ones, which have no weights to compare, whether both come from one path in one revision.
    """
    student = without_adapter(student)
    ours = {
        name.replace(".base_layer", ""): value for name, value in student.state_dict().items() if "lora_" not in name
    }
    theirs = teacher.state_dict()
    if any(value.numel() == 0 for value in (*ours.values(), *theirs.values())):
        origins = [
            (config._name_or_path, getattr(config, "_commit_hash", None)) for config in (student.config, teacher.config)
        ]
        return bool(origins[0][0]) and origins[0] == origins[1]
    return ours.keys() == theirs.keys() and all(_equal(value, theirs[name]) for name, value in ours.items())


def _equal(value: Tensor, other: Tensor) -> bool:
    dtype = min(value.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return value.shape == other.shape and torch.equal(value.to(dtype), other.to(value.device, dtype))
