"""What is verified before the first step: clear errors, or one warning each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoConfig, IntervalStrategy, PreTrainedModel

from ..config import SGOPDConfig
from ..data import TEACHER_PROMPT
from ..method.divergence import check_linear, head_of
from ..method.gate import is_divergence
from ..paths import check_path
from ..teachers.local import LocalTeacher
from ..teachers.protocol import Teacher, TopKTeacher
from ..teachers.several import Source, Teachers, named, sources_of
from ..verifiers.verdicts import MathVerifier
from .datasets import SUPPLIES_PROMPTS, Unparseable, check_routes
from .models import tell_narrow, without_adapter
from .prompts import RowsOfTeachers, has_own_prompts

logger = get_logger(__name__)  # of the main process only

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
    check_path("model", model)
    for source in sources_of(teacher, args):
        with named(source.name):
            check_source(source, model, args)
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


def check_source(source: Source, model: Any, args: SGOPDConfig) -> None:
    """Refuse a teacher that cannot be had, or not with the settings that are for teachers of another kind."""
    if source.model is None and source.server_url is None:
        raise ValueError(
            "No teacher: pass `teacher_model`, or set `teacher_model_name_or_path`, `teacher_server_url` or "
            "`teacher_models` in `args`."
        )
    if source.server_url is not None:
        if not isinstance(source.model, str | None):
            raise ValueError(
                "`teacher_server_url` has the teacher already, but `teacher_model` is a "
                f"{type(source.model).__name__}; pass the id of the served model, or nothing."
            )
        return
    check_path("teacher_model", source.model)
    if isinstance(model, nn.Module) and without_adapter(source.model) is without_adapter(model):
        raise ValueError(
            "`teacher_model` is the very object passed as `model`, or the one below its adapter: the teacher is "
            "frozen, and the adapter would be the teacher's too. Pass a copy (`copy.deepcopy`, before the adapter is "
            "put on), or for the student before training teacher_model='initial'."
        )
    if source.is_initial:
        check_initial(source, args)
    elif args.teacher_offload:
        check_offload(source.model, args)


def check_initial(source: Source, args: SGOPDConfig) -> None:
    """Refuse settings of a teacher that is another model than the student, where it is the student before training."""
    given = {"teacher_model_revision": source.revision, "teacher_model_init_kwargs": source.init_kwargs}
    given |= {"teacher_offload": args.teacher_offload and source.name is None}
    for name, value in given.items():
        if value:
            raise ValueError(
                f"`{name}` is for a teacher that is loaded, but `teacher_model='initial'` is the student before "
                "training. Drop it, or give the student's path a second time (a folder of that name is './initial')."
            )
    if args.sync_ref_model:
        raise ValueError("`sync_ref_model=True` moves the reference; teacher_model='initial' keeps it fixed.")


def check_rows_of_teachers(sources: Sequence[Source], train: Any, args: SGOPDConfig, turns: str | None) -> None:
    """Refuse a dataset that does not say whose its rows are, or whose teacher reads what it cannot, or must not."""
    names = [source.name for source in sources if source.name is not None]
    columns = [args.teacher_column] if names else []
    if names:
        check_routes(train, names, args.teacher_column)
    rows = RowsOfTeachers(train, args.teacher_column, lambda prompts: ())
    if has_own_prompts(train):
        columns.append(TEACHER_PROMPT)
        if turns == SUPPLIES_PROMPTS:
            raise ValueError(
                f"`{turns}` and the column '{TEACHER_PROMPT}' do not go together: environments add to `prompt` what "
                "the teacher would not read. Drop one of them."
            )
    for source in sources:
        if source.is_initial and not has_own_prompts(rows.of(source.name)):
            with named(source.name):
                raise ValueError(
                    "`teacher_model='initial'` is the student before training: what it reads must differ, or every "
                    f"delta is zero and nothing is learnt. Give `train_dataset` a column '{TEACHER_PROMPT}' (the "
                    "worked solution, a hint, a system prompt). A teacher in a folder of that name is './initial'."
                )
    for column in columns if args.remove_unused_columns else []:
        raise ValueError(f"`remove_unused_columns=True` would drop the column {column!r}; leave it at False.")


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


def check_ids(vocabulary: int, **sequences: list[list[int]]) -> None:
    """Refuse token ids of a `rollout_func` that student and teacher do not share; by the name of the sequences."""
    for name, rows in sequences.items():
        for row, ids in enumerate(rows):
            if beyond := [token for token in ids if not 0 <= token < vocabulary]:
                raise ValueError(
                    f"`rollout_func` returned the token {beyond[0]} in `{name}`, row {row}, but the vocabulary that "
                    f"student and teacher share has the ids below {vocabulary} only."
                )


def check_teachers(args: SGOPDConfig, student: PreTrainedModel, teachers: Teachers, *of_run: Any) -> None:
    """As `check_set_up`, of each teacher; warn of a student in 16 bits."""
    tell_narrow(student, args)
    for name, teacher in teachers.by_name.items():
        with named(name):
            check_set_up(args, student, teacher, *of_run)


def check_set_up(
    args: SGOPDConfig,
    student: PreTrainedModel,
    teacher: Teacher,
    multimodal: bool,
    fsdp_version: int | None,
    vocabulary: int,
    own_prompts: bool = False,
) -> None:
    """Refuse a teacher that cannot do what the student and the estimator need.

    `vocabulary` is the number of ids that student and teacher share.
    """
    if multimodal and not isinstance(teacher, LocalTeacher):
        raise ValueError("A multimodal student needs a model in this process as teacher: others take token ids only.")
    if multimodal and own_prompts:
        raise ValueError(
            f"A multimodal student has one teacher, which reads its prompts: no column '{TEACHER_PROMPT}', and no "
            "`teacher_models`."
        )
    if not is_divergence(args.estimator):
        return
    setting = f"estimator={args.estimator!r}"
    if not isinstance(teacher, LocalTeacher):
        kind = type(teacher).__name__
        if args.estimator == "full":
            raise ValueError(
                f"{setting} needs a model in this process as teacher, not a {kind}; use estimator='top_k' or 'sampled'."
            )
        if not isinstance(teacher, TopKTeacher):
            raise ValueError(
                f"{setting} asks the teacher for its likeliest ids, but a {kind} has no `score_top` "
                "(`sg_opd.teachers.TopKTeacher`): add it, or use estimator='sampled'."
            )
    if multimodal:
        raise ValueError(f"{setting} is for text models; use estimator='sampled' with this processor.")
    if fsdp_version == 1:
        raise ValueError(
            f"{setting} does not run under FSDP version 1, which shows no sharded head outside its forward: "
            "set `fsdp_version: 2`, or use estimator='sampled'."
        )
    if args.estimator == "top_k" and args.teacher_top_k > vocabulary:
        raise ValueError(
            f"`teacher_top_k` is {args.teacher_top_k}, but student and teacher share {vocabulary} ids only: set it to "
            f"{vocabulary} or less, or use estimator='full'."
        )
    if isinstance(teacher, LocalTeacher) and args.estimator == "full" and args.reference_policy == "initial":
        check_linear(head_of(student), head_of(teacher.unwrapped))
