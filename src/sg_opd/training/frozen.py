"""The frozen models of a run: its teacher, as the settings describe it, and the initial policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

from ..config import SGOPDConfig
from ..method.buckets import Buckets
from ..method.divergence import Head
from ..teachers.http import Endpoints
from ..teachers.local import (
    Forward,
    LocalTeacher,
    freeze,
    is_sharded,
    load_teacher,
    loading_defaults,
    padding_ids,
    prepare_frozen,
    sequence_logps,
    shared_vocabulary,
)
from ..teachers.probe import check_patience, check_server, first_prompt
from ..teachers.protocol import Teacher, TeacherError
from ..teachers.sampling import OF_RUN, SERVED, run_sampling, stated, tell_unused
from ..teachers.server import ServerTeacher
from ..teachers.several import Source, Teachers, named
from .models import check_head, check_models, tell_dtypes
from .prompts import RowsOfTeachers, has_own_prompts

ADAPTER = "ref"  # GRPOTrainer's own name for a frozen copy of an adapter


logger = get_logger(__name__)  # of the main process only


@dataclass(frozen=True)
class Run:
    """What a run lends to its teacher."""

    student: PreTrainedModel  #: unwrapped
    tokenizer: PreTrainedTokenizerBase  #: of both models
    eos_token_ids: Sequence[int]  #: that end the student's completions
    accelerator: Accelerator
    forward: Forward  #: runs frozen models
    rows: RowsOfTeachers  #: of the training set
    #: its context raises a teacher's error on every rank
    agreed: Callable[[type[TeacherError]], AbstractContextManager]
    initial: InitialPolicy | None = None  #: the student before training, where it is a teacher or the reference


def build_teachers(sources: Sequence[Source], args: SGOPDConfig, run: Run) -> tuple[Teachers, int]:
    """The teachers of a run, ready to be asked, and how many ids all of them share with the student.

    Raises:
        ValueError, TypeError, OSError, TeacherServerError: as `build_teacher`, beginning with the teacher's name.
    """
    of_run = run.tokenizer, args, run.forward, run.accelerator
    check_head("student", run.student, *of_run)  # and so the initial policy, which is a copy
    built, shared = {}, []
    for source in sources:
        with named(source.name):
            teacher, vocabulary = build_teacher(source, args, run)
            if type(teacher) is LocalTeacher:
                check_head(source.role, teacher.model, *of_run)
        built[source.name] = teacher
        shared.append(vocabulary)
    return Teachers(built, args.teacher_column), min(shared)


def build_teacher(source: Source, args: SGOPDConfig, run: Run) -> tuple[Any, int]:
    """The teacher ready to be asked, and how many ids it shares with the student.

    Raises:
        ValueError, TypeError, OSError: a teacher that cannot be had or does not fit the student.
        TeacherServerError: no usable answer of a server.
    """
    known = max(run.tokenizer.get_vocab().values()) + 1
    if isinstance(source.model, Teacher):
        return source.model, known
    own_prompts = has_own_prompts(run.rows.of(source.name))
    if source.server_url:
        sampling = {**run_sampling(args, SERVED), "max_tokens": args.max_completion_length}
        return connect(source, args, run, sampling, own_prompts), known
    if run.initial is not None and source.is_initial:
        initial = InitialTeacher(run.initial, run.forward, local_sampling(args, run), args)
        return initial, run.student.config.get_text_config().vocab_size
    settings = source.revision, source.init_kwargs
    model = load_teacher(source.model, *settings, **loading_defaults(args, on_host=args.teacher_offload))
    check_models(run.student, model, run.tokenizer, args, source, own_prompts)
    if isinstance(source.model, str):
        tell_dtypes(run.student, model, args, source)
    if args.teacher_phase_steps:
        tell_unused(logger, source.role, model.generation_config.to_dict(), stated(args), OF_RUN)
    shared = shared_vocabulary(run.student, model)
    sampling = {**local_sampling(args, run), "suppress_tokens": padding_ids(model, shared)}
    limits = args.per_device_train_batch_size, args.teacher_offload, args.ds3_gather_for_generation
    teacher = LocalTeacher(model, run.forward, run.accelerator, sampling, *limits, args.cast_lm_head_to_fp32)
    return teacher, shared


def local_sampling(args: SGOPDConfig, run: Run) -> dict[str, Any]:
    """How a teacher in this process samples its proposals."""
    return run_sampling(args) | {
        "max_new_tokens": args.max_completion_length,
        "eos_token_id": run.eos_token_ids,
        "pad_token_id": run.tokenizer.pad_token_id,
    }


def connect(source: Source, args: SGOPDConfig, run: Run, sampling: dict[str, Any], own_prompts: bool) -> ServerTeacher:
    """The teacher behind servers, which have scored a prompt as they should."""
    limits = args.teacher_server_timeout, args.teacher_server_concurrency, args.teacher_server_retries
    endpoints = Endpoints(source.server_url or (), *limits, offset=run.accelerator.process_index)
    teacher = ServerTeacher(endpoints, source.model, sampling, frozenset(run.eos_token_ids))
    # a sharded student cannot score before training begins
    sharded = is_deepspeed_zero3_enabled() or run.accelerator.distributed_type == "FSDP"
    scores = None if sharded or own_prompts else partial(sequence_logps, run.forward, run.student)
    prompt = first_prompt(run.rows.read(source.name), run.tokenizer, run.rows.tokenize)
    with run.agreed(TeacherError):
        teacher.connect()
        top_k = args.teacher_top_k if args.estimator == "top_k" else 0
        check_server(teacher, run.tokenizer, prompt, run.eos_token_ids, args.gate_dead_zone, scores, top_k)
    if run.accelerator.num_processes > 1:
        check_patience(endpoints.longest, args.ddp_timeout)
    return teacher


def capture(model: Any, args: GRPOConfig) -> PreTrainedModel | None:
    """What must be kept of a student that gets no new adapter, before the trainer patches and trains it.

    A copy of an instance. `None` for a `PeftModel`, which keeps a frozen copy of its adapter, and for a path, which can
    be loaded again.

    Raises:
        ValueError: an instance without a path under ZeRO-3, which cannot copy a sharded model; a `PeftModel` with an
            adapter of the copy's name that is none.
    """
    if isinstance(model, str):
        return None
    if is_peft_model(model):
        trained, known = model.active_adapter, model.peft_config
        if ADAPTER in known:
            if trained == ADAPTER or known[ADAPTER] is not known[trained]:
                raise ValueError(
                    f"`model` has an adapter of its own called {ADAPTER!r}, the name of the frozen copy that the "
                    f"initial policy needs. Drop it, model.delete_adapter({ADAPTER!r}), or load it by another name."
                )
            model.delete_adapter(ADAPTER)  # an earlier trainer's copy: the adapter may have been trained since
        if args.beta == 0.0:  # else GRPOTrainer makes the same copy
            model.add_adapter(ADAPTER, model.peft_config[trained])
            weights = get_peft_model_state_dict(model, adapter_name=trained)
            set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
        return None
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        if get_config_model_id(model.config):
            return None
        raise ValueError(
            "The initial policy (`reference_policy='initial'`, `teacher_model='initial'`) under ZeRO-3 is the student "
            "loaded again from its path, but `model` is an instance without one. Pass the path as `model`, or set "
            "reference_policy='current' (preset 'sg-opd-lite')."
        )
    reference = copy.deepcopy(model)
    reference.__dict__.pop("forward", None)  # the copy of a patched forward would still run the original
    return reference


class InitialPolicy:
    """Lends the initial policy to be called like the student.

    `captured` is what `capture` kept; `student` returns the trainer's model, which training may wrap anew;
    `temperature` and `cast_lm_head_to_fp32` are as for the student; `loading` is for `from_pretrained`, where the
    student's path is loaded again.
    """

    def __init__(
        self,
        captured: PreTrainedModel | None,
        student: Callable[[], Any],
        accelerator: Accelerator,
        temperature: float,
        cast_lm_head_to_fp32: bool,
        **loading: Any,
    ) -> None:
        self.student = student
        self.accelerator = accelerator
        self.frozen: nn.Module | None = None
        if is_peft_model(student()):
            return
        if captured is None:
            loading.setdefault("dtype", student().dtype)
            captured = create_model_from_path(get_config_model_id(student().config), **loading)
        add_fused_lm_head(freeze(captured), temperature, cast_lm_head_to_fp32)
        self.frozen = prepare_frozen(captured, accelerator)

    @classmethod
    def of_run(
        cls,
        args: SGOPDConfig,
        accelerator: Accelerator,
        captured: PreTrainedModel | None,
        student: Callable[[], Any],
        quantization: Any = None,
    ) -> InitialPolicy:
        """That of a run with these settings; `quantization` is what the student was loaded with."""
        given: Any = args.model_init_kwargs or {}
        loading = loading_defaults(args) | given
        loading |= {} if quantization is None else {"quantization_config": quantization}
        return cls(captured, student, accelerator, args.temperature, args.cast_lm_head_to_fp32, **loading)

    @property
    def unwrapped(self) -> Any:
        """The model that is lent, without its wrapper."""
        return self.accelerator.unwrap_model(self.student() if self.frozen is None else self.frozen)

    @contextmanager
    def lend(self) -> Iterator[nn.Module]:
        """A frozen model; with PEFT the student itself, its adapter switched off or set back to the copy."""
        if self.frozen is not None:
            yield self.frozen
            return
        model = self.student()
        student = self.accelerator.unwrap_model(model)
        training = student.training
        student.eval()  # a reference has no dropout
        try:
            with use_adapter(student, ADAPTER if ADAPTER in student.peft_config else None):
                yield model
        finally:
            student.train(training)


class InitialTeacher(LocalTeacher):
    """The student before training as teacher: what the run's `InitialPolicy` lends, which is not held twice."""

    offload = None

    def __init__(self, initial: InitialPolicy, forward: Forward, sampling: dict[str, Any], args: SGOPDConfig) -> None:
        self.initial = initial
        self.generation_config = GenerationConfig(do_sample=True, disable_compile=True, **sampling)
        self.forward = forward
        self.accelerator = initial.accelerator
        self.rows, self.temperature = args.per_device_train_batch_size, sampling["temperature"]
        self.gather = args.ds3_gather_for_generation
        self.sharded = is_sharded(self.accelerator)

    @property
    def unwrapped(self) -> PreTrainedModel:
        return self.initial.unwrapped

    @property
    def name(self) -> str:
        return "the student before training"

    def head(self) -> Head:
        with self.initial.lend():  # with a trained head of its own the adapter must be off
            return super().head()

    def score_batch(self, batch: dict[str, Any]) -> Tensor:
        with self.initial.lend() as self.model:
            return super().score_batch(batch)

    def states(self, batch: dict[str, Any]) -> Tensor:
        with self.initial.lend() as self.model:
            return super().states(batch)

    def top_batch(self, batch: dict[str, Any], k: int, vocabulary: int) -> Buckets:
        with self.initial.lend() as self.model:
            return super().top_batch(batch, k, vocabulary)

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        with self.initial.lend() as self.model:
            return super().propose(prompt_ids, candidates)
