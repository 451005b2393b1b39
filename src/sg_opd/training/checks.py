"""What is verified before the first step: clear errors, or one warning each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoTokenizer, IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase

from ..config import SGOPDConfig
from ..data import rows_to_check
from ..method.divergence import check_linear, head_of
from ..teachers.local import LocalTeacher, blocks_of
from ..teachers.protocol import Teacher, eos_set
from ..teachers.server import ServerTeacher

logger = get_logger(__name__)  # of the main process only

T = TypeVar("T")

TEMPLATE_TOKENS = 64  # at most, that a chat template adds to a prompt
REFUSED_WITH_PHASE = ("tools", "rollout_func", "environment_factory")


def by_main_process(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, called by the main process alone; each process gets its answer."""

    def answer(*given: Any) -> T:
        found = [function(*given) if PartialState().is_main_process else None]
        return broadcast_object_list(found)[0]

    return answer


def check_arguments(
    teacher: Any, model: Any, verifier: Any, args: Any, eval_dataset: Any, extra: dict[str, Any]
) -> None:
    """Refuse trainer arguments that cannot work together, naming each."""
    for name in ("reward_funcs", "reward_processing_classes"):
        if extra.get(name) is not None:
            raise ValueError(f"`{name}` has no place in SG-OPD: pass what judges an answer as `verifier`.")
    if not isinstance(args, SGOPDConfig):
        raise TypeError(f"`args` must be an SGOPDConfig, got {type(args).__name__}.")
    if teacher is None and args.teacher_server_url is None:
        raise ValueError(
            "No teacher: pass `teacher_model`, or set `teacher_model_name_or_path` or `teacher_server_url` in `args`."
        )
    if args.teacher_server_url is not None and not isinstance(teacher, str | None):
        raise ValueError(
            f"`teacher_server_url` has the teacher already, but `teacher_model` is a {type(teacher).__name__}; pass "
            "the id of the served model, or nothing."
        )
    check_path("model", model)
    if args.teacher_server_url is None:
        check_path("teacher_model", teacher)
    if teacher is model and not isinstance(model, str):
        raise ValueError("`teacher_model` is the very object passed as `model`; the teacher is frozen, pass a copy.")
    if args.teacher_offload:
        check_offload(teacher, args)
    if not callable(verifier):
        raise TypeError(f"`verifier` must be callable in TRL's reward-function form, got {type(verifier).__name__}.")
    if args.teacher_phase_steps > 0:
        for name in REFUSED_WITH_PHASE:
            if extra.get(name):
                raise ValueError(
                    f"`{name}` and a teacher phase do not go together: the teacher proposes plain completions only. "
                    "Set `teacher_phase_steps=0`."
                )
    if args.eval_strategy != "no" and eval_dataset is None:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise ValueError(f"`eval_strategy={strategy!r}` needs an `eval_dataset`.")
    if args.use_vllm and args.vllm_importance_sampling_correction and truncated_sampling(args):
        logger.warning(
            "top_p, top_k or min_p cut the sampling distribution, which the engine correction then counts as mismatch; "
            "use top_p=1, top_k=0, min_p=None for an exact correction."
        )


def check_offload(teacher: Any, args: SGOPDConfig) -> None:
    """Refuse `teacher_offload=True` where there is no whole model in this process to offload."""
    if not isinstance(teacher, str | PreTrainedModel):
        raise ValueError(
            f"`teacher_offload=True` is for a model, but `teacher_model` is a {type(teacher).__name__}, which keeps "
            "its weights itself, if it has any. Set teacher_offload=False."
        )
    kind = args.distributed_state.distributed_type
    if kind in ["DEEPSPEED", "FSDP"]:
        raise ValueError(
            f"`teacher_offload=True` does not run under {kind.value}, which places the teacher itself. Set "
            "teacher_offload=False; DeepSpeed's own way is ZeRO-3 with `offload_param` "
            "(examples/accelerate/zero3_offload.yaml)."
        )


def check_path(name: str, value: Any) -> None:
    """Refuse a local path that is not there, which would be looked for on the hub and answered with a riddle."""
    if not isinstance(value, str) or Path(value).is_dir():
        return
    if Path(value).is_absolute() or value.startswith((".", "~")) or value.count("/") > 1:
        raise ValueError(f"`{name}`: there is no folder {value!r} (looked in {Path.cwd()}).")
    if "/" in value and Path(value).parent.is_dir():  # a name on the hub, or one mistyped
        logger.warning(
            "`%s`: there is no folder %r here, so it is taken for a model of the hub, although there is a folder %r.",
            *(name, value, str(Path(value).parent)),
        )


def truncated_sampling(args: SGOPDConfig) -> bool:
    """Whether rollouts come from a cut-off distribution instead of the student's own."""
    return args.top_p < 1 or args.top_k > 0 or bool(args.min_p)


def check_prompts(
    name: str,
    dataset: Any,
    tokenize: Callable[[list], tuple],
    context: int,
    completion: int,
    server_context: int | None = None,
) -> None:
    """Refuse prompts that fill the context; warn once where prompt and completion together may pass it.

    Args:
        tokenize: prompts -> token ids and more, the trainer's own.
        context: the shorter context of both models, in tokens.
        completion: `max_completion_length`.
        server_context: of a teacher's server, which refuses a longer sequence and needs room for a token more.
    """
    rows = [*rows_to_check(len(dataset))]
    if server_context:  # which refuses a longer one in the middle of a run: every row that may be one
        rows = sorted({*rows, *long_rows(dataset, server_context - completion - TEMPLATE_TOKENS)})
    lengths = [len(ids) for ids in tokenize([dataset[row]["prompt"] for row in rows])[0]]
    too_long = [rows[i] for i, length in enumerate(lengths) if length >= context]
    if too_long:
        raise ValueError(
            f"{len(too_long)} prompts in `{name}` fill the models' context of {context} tokens, first row "
            f"{too_long[0]}. Filter the dataset by prompt length."
        )
    needed = max(lengths) + completion + 1
    if server_context and needed > server_context:
        raise ValueError(
            f"The longest prompt in `{name}` ({max(lengths)} tokens), `max_completion_length` ({completion}) and one "
            f"more token pass the {server_context} of the teacher's server: start it with --max-model-len {needed}, "
            "shorten `max_completion_length`, or filter the dataset."
        )
    if max(lengths) + completion > context:
        logger.warning(
            "The longest prompt in `%s` (%d tokens) and `max_completion_length` (%d) pass the models' context of %d.",
            *(name, max(lengths), completion, context),
        )


def long_rows(dataset: Dataset, tokens: int) -> list[int]:
    """Rows whose prompts may have more than so many tokens, which is never more than their bytes."""
    rows: list[int] = []
    for start, batch in zip(range(0, len(dataset), 1000), dataset.select_columns("prompt").iter(1000), strict=True):
        rows += [start + i for i, prompt in enumerate(batch["prompt"]) if len(str(prompt).encode()) > tokens]
    return rows


def check_context(
    dataset: Any, tokenize: Callable[[list], tuple], student: PreTrainedModel, teacher: Teacher, completion: int
) -> None:
    """`check_prompts` of the training dataset against the shorter context of both models, as far as it is known."""
    own = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    context = min((size for size in (own, teacher.context) if size), default=None)
    if context and isinstance(dataset, Dataset):
        # a server refuses what is longer than its context, in the middle of a run
        strict = teacher.context if isinstance(teacher, ServerTeacher) else None
        check_prompts("train_dataset", dataset, tokenize, context, completion, strict)


def check_set_up(
    args: SGOPDConfig,
    student: PreTrainedModel,
    teacher: Teacher,
    multimodal: bool,
    router_loss: bool,
    fsdp_version: int | None,
) -> None:
    """Refuse a teacher that cannot do what the student and the estimator need."""
    if multimodal and not isinstance(teacher, LocalTeacher):
        raise ValueError("A multimodal student needs a model in this process as teacher: others take token ids only.")
    if args.estimator != "full":
        return
    if not isinstance(teacher, LocalTeacher):
        raise ValueError(
            f"estimator='full' needs a model in this process as teacher, not a {type(teacher).__name__}; use "
            "estimator='sampled'."
        )
    if multimodal:
        raise ValueError("estimator='full' is for text models; use estimator='sampled' with this processor.")
    if router_loss:
        raise ValueError("estimator='full' has no router loss: set `router_aux_loss_coef=0`.")
    if fsdp_version == 1:
        raise ValueError(
            "estimator='full' does not run under FSDP version 1, which shows no sharded head outside its forward: "
            "set `fsdp_version: 2`, or use estimator='sampled'."
        )
    if args.reference_policy == "initial":
        check_linear(head_of(student), head_of(teacher.unwrapped))


def check_models(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SGOPDConfig
) -> None:
    """Compare student and teacher: causal heads, tokenizers, EOS sets, chat templates, and that they differ at all."""
    check_causal("student", without_adapter(student))
    check_causal("teacher", teacher)
    if args.teacher_offload:
        blocks_of(teacher)  # raises
    teacher_tokenizer = tokenizer_of(teacher, args)
    if teacher_tokenizer is not None:
        check_tokenizers(tokenizer, teacher_tokenizer)
    elif len(tokenizer) > teacher.config.get_text_config().vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids but the teacher's vocabulary only "
            f"{teacher.config.get_text_config().vocab_size}: they cannot share a tokenizer."
        )
    ends = [eos_set(model.generation_config.eos_token_id) for model in (student, teacher)]
    if ends[0] != ends[1]:
        logger.warning(
            "Student and teacher end a completion with different tokens (%s and %s): the teacher will rate the "
            "student's ending as unlikely. Align `generation_config.eos_token_id`.",
            *(sorted(end) for end in ends),
        )
    if same_weights(student, teacher):
        logger.warning(
            "Teacher and student are the same model, by path or by weights: every delta is zero and nothing is learnt."
        )


def without_adapter(model: Any) -> PreTrainedModel:
    """The model that an adapter was put on, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def check_causal(role: str, model: PreTrainedModel) -> None:
    """Refuse a model that does not predict the next token from the ones before it."""
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(f"The {role} ({name}) has no language-model head; pass a causal LM.")
    if model.config.is_encoder_decoder or not model.can_generate():
        kind = "an encoder-decoder" if model.config.is_encoder_decoder else "no model that generates"
        raise ValueError(f"The {role} ({name}) is {kind}; pass a causal LM.")


def tokenizer_of(teacher: PreTrainedModel, args: SGOPDConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the teacher; `None`, with a warning, where there is none to compare with."""
    path = getattr(teacher.config, "_name_or_path", "")
    if not path:
        logger.warning(
            "The teacher has no path to load its tokenizer from; only the sizes of vocabularies are compared."
        )
        return None
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:  # what transformers raises where it finds no tokenizer
        logger.warning(
            "No tokenizer at the teacher's %r (%s); only the sizes of vocabularies are compared.", path, error
        )
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
    """Whether both models come from one path or have equal parameters; sharded ones are not compared by these.

    Of a student with an adapter, the model without it.
    """
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


logger = get_logger(__name__)
