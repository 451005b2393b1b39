"""What is verified before the first step: clear errors, or one warning each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..config import SGOPDConfig
from ..data import rows_to_check
from ..method.divergence import check_linear, head_of
from ..teachers.local import LocalTeacher, blocks_of
from ..teachers.protocol import eos_set
from ..teachers.server import ServerTeacher

logger = get_logger(__name__)  # of the main process only

TEMPLATE_TOKENS = 64  # at most, that a chat template adds to a prompt
REFUSED_WITH_PHASE = ("tools", "rollout_func", "environment_factory")


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
        raise ValueError(f"`eval_strategy={args.eval_strategy.value!r}` needs an `eval_dataset`.")
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
    local = Path(value).is_absolute() or value.startswith((".", "~")) or value.count("/") > 1
    if local or ("/" in value and Path(value).parent.is_dir()):
        raise ValueError(f"`{name}`: there is no folder {value!r} (looked in {Path.cwd()}).")


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


def check_set_up(trainer: Any) -> None:
    """What needs both models in place: prompts against the shorter context, and what the full estimator can do."""
    args, dataset = trainer.args, trainer.train_dataset
    student, teacher = trainer.accelerator.unwrap_model(trainer.model), trainer.teacher
    contexts = getattr(student.config.get_text_config(), "max_position_embeddings", None), teacher.context
    context = min((size for size in contexts if size), default=None)
    if context and isinstance(dataset, Dataset) and not trainer._is_vlm and trainer.environment_factories is None:
        # a server refuses what is longer than its context, in the middle of a run
        strict = teacher.context if isinstance(teacher, ServerTeacher) else None
        check_prompts("train_dataset", dataset, trainer._tokenize_prompts, context, args.max_completion_length, strict)
    if not isinstance(teacher, LocalTeacher) and trainer._is_vlm:
        raise ValueError("A multimodal student needs a model in this process as teacher: others take token ids only.")
    if args.estimator == "full":
        if not isinstance(teacher, LocalTeacher):
            raise ValueError(
                f"estimator='full' needs a model in this process as teacher, not a {type(teacher).__name__}; use "
                "estimator='sampled'."
            )
        models = student, teacher.unwrapped
        if trainer._is_vlm:
            raise ValueError("estimator='full' is for text models; use estimator='sampled' with this processor.")
        if trainer.aux_loss_enabled:
            raise ValueError("estimator='full' has no router loss: set `router_aux_loss_coef=0`.")
        if trainer._dist.fsdp_version == 1:
            raise ValueError(
                "estimator='full' does not run under FSDP version 1, which shows no sharded head outside its forward: "
                "set `fsdp_version: 2`, or use estimator='sampled'."
            )
        if args.reference_policy == "initial":
            check_linear(*map(head_of, models))


def check_models(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SGOPDConfig
) -> None:
    """Compare student and teacher: causal heads, tokenizers, EOS sets, chat templates, and that they differ at all."""
    check_causal("student", student.get_base_model() if hasattr(student, "get_base_model") else student)
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
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
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

# by whose log-probabilities are checked; "updated" is the student after updates on the rollout
MODELS = {"student": "student", "teacher": "teacher", "initial": "initial policy", "updated": "student"}


class NonFiniteError(RuntimeError):
    """A model gave a sampled token a log-probability that is NaN or infinite, on which no delta can be trained."""


class FiniteGuard(TrainerCallback):
    """Stops at log-probabilities that are NaN or infinite, or has their optimizer step skipped on every rank.

    As `non_finite_log_probs` says. An infinite one of the teacher or the reference is bounded by `log_ratio_clip`
    where that is set, and then let through.

    Args:
        trainer: whose tokenizer names the tokens.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.found = False
        """Whether this rank is within a step that will be skipped."""

    @property
    def skips(self) -> bool:
        """Whether such a step is skipped instead of ending the run."""
        return self.trainer.args.non_finite_log_probs == "skip"

    def checked(self, inputs: dict[str, Any], mask: Tensor, **logps: Tensor | None) -> dict[str, Any]:
        """The log-probabilities (B, T) as given, or with zeros for what is no number where the step is to be skipped.

        Args:
            inputs: the micro-batch, for its tokens and prompts.
            mask: (B, T), the trained tokens.
            **logps: by whose they are, see `MODELS`.

        Raises:
            NonFiniteError: at the first such token, unless the step is to be skipped.
        """
        bad = {whose: self._bad(whose, values, mask) for whose, values in logps.items() if values is not None}
        if not torch.stack([*bad.values()]).any():  # the host waits for the device here, once a micro-batch
            return logps
        for whose, places in bad.items():
            values = logps[whose]
            if values is not None and places.any():
                self._report(self._words(inputs, places, whose, values))
                logps[whose] = values.masked_fill(places, 0.0)
        return logps

    def _bad(self, whose: str, values: Tensor, mask: Tensor) -> Tensor:
        bounded = MODELS[whose] != "student" and self.trainer.args.log_ratio_clip is not None
        return mask & (values.isnan() if bounded else ~values.isfinite())

    def _report(self, message: str) -> None:
        if not self.skips:
            raise NonFiniteError(f"{message} Nothing was trained on it; set non_finite_log_probs='skip' to go on.")
        if not self.found:
            logger.warning("%s This optimizer step is skipped.", message, main_process_only=False)
        self.found = True

    def _words(self, inputs: dict[str, Any], bad: Tensor, whose: str, values: Tensor) -> str:
        row, place = (int(index) for index in bad.nonzero()[0])
        tokenizer = self.trainer._tokenizer
        token = int(inputs["completion_ids"][row, place])
        prompt = tokenizer.decode(inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()])
        rank = self.trainer.accelerator.process_index
        return (
            f"Step {self.trainer.state.global_step}, rank {rank}: the {MODELS[whose]}'s log-probability of "
            f"token {place} ({token}, {tokenizer.decode([token])!r}) of the rollout in row {row} of "
            f"its micro-batch is {values[row, place].item():g}, and {int(bad.sum())} in all are no numbers. Its prompt "
            f"ends with {prompt[-80:]!r}."
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients where any rank found one, so that no optimizer moves a weight."""
        if not self.skips:
            return
        accelerator = self.trainer.accelerator
        found = accelerator.reduce(torch.tensor([float(self.found)], device=accelerator.device), reduction="sum")
        self.found = False
        if found.item() > 0:
            kwargs["model"].zero_grad(set_to_none=True)
