"""What is verified before the first step: clear errors, or one warning each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoConfig, IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase

from ..config import SGOPDConfig
from ..method.divergence import check_linear, head_of
from ..method.gate import is_divergence
from ..paths import check_path
from ..teachers.local import LocalTeacher
from ..teachers.protocol import Teacher, TopKTeacher
from ..verifiers.verdicts import MathVerifier
from .datasets import Unparseable, rows_to_check
from .models import tell_narrow

logger = get_logger(__name__)  # of the main process only

TEMPLATE_TOKENS = 64  # at most, that a chat template adds to a prompt
REFUSED_WITH_PHASE = ("tools", "rollout_func", "environment_factory")
HUB_ARGUMENTS = ("revision", "cache_dir", "subfolder", "token", "local_files_only")


def by_main_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called by the main process alone; every rank gets its result."""

    def call(*given: Any) -> Any:
        found = [function(*given) if PartialState().is_main_process else None]
        return broadcast_object_list(found)[0]

    return call


def unparseable_by(verifier: Any) -> Unparseable | None:
    """What tells the reference answers a verifier cannot read, asked once for all ranks; `None` if it reads none."""
    return by_main_process(verifier.unparseable) if isinstance(verifier, MathVerifier) else None


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
    if is_divergence(args.estimator):
        check_router_loss(model, args)
    if verifier is not None and not callable(verifier):
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
    truncated = args.top_p < 1 or args.top_k > 0 or args.min_p
    if args.use_vllm and args.vllm_importance_sampling_correction and truncated:
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


def check_router_loss(model: Any, args: SGOPDConfig) -> None:
    """Refuse a divergence with a mixture of experts whose router loss counts; a student by name by its config."""
    coefficient = args.router_aux_loss_coef
    if coefficient == 0.0:
        return
    if isinstance(model, str):
        given: Any = args.model_init_kwargs or {}
        config = AutoConfig.from_pretrained(
            model,
            trust_remote_code=given.get("trust_remote_code", args.trust_remote_code),
            **{name: given[name] for name in HUB_ARGUMENTS if name in given},
        )
    else:
        config = model.config
    text = config.get_text_config()
    # as GRPOTrainer decides it
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    if hasattr(text, "output_router_logits") and coefficient:
        raise ValueError(
            f"estimator={args.estimator!r} has no router loss, but `model` is a mixture of experts with one "
            f"(coefficient {coefficient}): set `router_aux_loss_coef=0.0`, or use estimator='sampled'."
        )


def context_of(model: PreTrainedModel) -> int | None:
    """Longest sequence that a model takes, in tokens; `None` where its configuration names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_bos(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse text prompts that begin with the tokenizer's BOS, before which tokenising puts another."""
    token = tokenizer.bos_token
    rows = rows_to_check(len(dataset)) if hasattr(dataset, "__len__") else range(1)  # of a stream the first
    prompts = [dataset[row]["prompt"] for row in rows] if len(rows) > 1 else [next(iter(dataset))["prompt"]]
    for row, prompt in zip(rows, prompts, strict=True):
        if not (token and isinstance(prompt, str) and prompt.startswith(token)):
            continue
        if tokenizer(prompt)["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
            raise ValueError(
                f"`prompt` in `train_dataset`, row {row} begins with {token!r}, and the tokenizer puts another before "
                "it: the models would see two. Pass messages instead of text, or take it off: "
                f"dataset.map(lambda row: {{'prompt': row['prompt'].removeprefix({token!r})}})."
            )
        return  # the tokenizer puts none


def check_ids(vocabulary: int, **sequences: list[list[int]]) -> None:
    """Refuse token ids of a `rollout_func` that student and teacher do not share; by the name of the sequences."""
    for name, rows in sequences.items():
        for row, ids in enumerate(rows):
            if beyond := [token for token in ids if not 0 <= token < vocabulary]:
                raise ValueError(
                    f"`rollout_func` returned the token {beyond[0]} in `{name}`, row {row}, but the vocabulary that "
                    f"student and teacher share has the ids below {vocabulary} only."
                )


def check_prompts(
    dataset: Any, tokenize: Callable[[list], tuple], completion: int, own: int | None, other: int | None, served: bool
) -> None:
    """Refuse prompts that fill the context; warn once where prompt and completion together may pass it.

    `tokenize` is the trainer's own, `completion` is `max_completion_length`, `own` and `other` are the student's and
    the teacher's context in tokens. A teacher that is `served` needs room for one token more, and would refuse a longer
    sequence in the middle of a run: every row that may be one is looked at.
    """
    context, server = min((size for size in (own, other) if size), default=None), other if served else None
    if not (context and isinstance(dataset, Dataset)):
        return
    rows = {*rows_to_check(len(dataset))}
    if server:  # a text has at most as many tokens as bytes
        short = server - completion - TEMPLATE_TOKENS
        prompts = enumerate(dataset.select_columns("prompt")["prompt"])
        rows |= {row for row, prompt in prompts if len(str(prompt).encode()) > short}
    checked = sorted(rows)
    lengths = [len(ids) for ids in tokenize([dataset[row]["prompt"] for row in checked])[0]]
    too_long = [row for row, length in zip(checked, lengths, strict=True) if length >= context]
    if too_long:
        raise ValueError(
            f"{len(too_long)} prompts in `train_dataset` fill the models' context of {context} tokens, first row "
            f"{too_long[0]}. Filter the dataset by prompt length."
        )
    needed = max(lengths) + completion
    if server and needed + 1 > server:
        raise ValueError(
            f"The longest prompt in `train_dataset` ({max(lengths)} tokens), `max_completion_length` ({completion}) "
            f"and one more token pass the {server} of the teacher's server: start it with --max-model-len "
            f"{needed + 1}, shorten `max_completion_length`, or filter the dataset."
        )
    if needed > context:
        logger.warning(
            "The longest prompt in `train_dataset` (%d tokens) and `max_completion_length` (%d) pass the models' "
            "context of %d.",
            *(max(lengths), completion, context),
        )


def check_set_up(
    args: SGOPDConfig,
    student: PreTrainedModel,
    teacher: Teacher,
    multimodal: bool,
    fsdp_version: int | None,
    vocabulary: int,
) -> None:
    """Refuse a teacher that cannot do what the student and the estimator need; warn of a student in 16 bits.

    `vocabulary` is the number of ids that student and teacher share.
    """
    if multimodal and not isinstance(teacher, LocalTeacher):
        raise ValueError("A multimodal student needs a model in this process as teacher: others take token ids only.")
    tell_narrow(student, args)
    if not is_divergence(args.estimator):
        return
    named = f"estimator={args.estimator!r}"
    if not isinstance(teacher, LocalTeacher):
        kind = type(teacher).__name__
        if args.estimator == "full":
            raise ValueError(
                f"{named} needs a model in this process as teacher, not a {kind}; use estimator='top_k' or 'sampled'."
            )
        if not isinstance(teacher, TopKTeacher):
            raise ValueError(
                f"{named} asks the teacher for its likeliest ids, but a {kind} has no `score_top` "
                "(`sg_opd.teachers.TopKTeacher`): add it, or use estimator='sampled'."
            )
    if multimodal:
        raise ValueError(f"{named} is for text models; use estimator='sampled' with this processor.")
    if fsdp_version == 1:
        raise ValueError(
            f"{named} does not run under FSDP version 1, which shows no sharded head outside its forward: "
            "set `fsdp_version: 2`, or use estimator='sampled'."
        )
    if args.estimator == "top_k" and args.teacher_top_k > vocabulary:
        raise ValueError(
            f"`teacher_top_k` is {args.teacher_top_k}, but student and teacher share {vocabulary} ids only: set it to "
            f"{vocabulary} or less, or use estimator='full'."
        )
    if isinstance(teacher, LocalTeacher) and args.estimator == "full" and args.reference_policy == "initial":
        check_linear(head_of(student), head_of(teacher.unwrapped))
