"""One training step of each trainer on the same rollouts, its time by phase and its peak memory.

Generation is replaced by an answer that was drawn beforehand, so that all trainers train on the same tokens.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, ProgressCallback, Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from sg_opd import SGOPDConfig, SGOPDTrainer

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from geometry import Geometry

HEAD_DIM = 64
LEARNING_RATE = 1e-6
SPECIAL = ("<unk>", "<pad>", "<eos>")  # the first ids
PHASES = ("generate", "grade", "score teacher", "score student", "forward+backward", "gate", "optimizer", "rest")


@dataclass(frozen=True)
class Size:
    """What a step is made of.

    Attributes:
        vocab: ids of both models' heads, which are tied to their embeddings as in Qwen3's small models.
        student, teacher: layers and hidden size, or all sizes of a Qwen3 model, whose vocabulary must be `vocab`.
        batch: completions a rank.
        prompt, tokens: length of every prompt and of every completion.
        generations: completions of a prompt.
        checkpointing: of the student's activations, by every trainer and by the floor.
        floor_rows: sequences of one pass of the floor, whose logits are whole; 0: all.
    """

    name: str
    vocab: int = 32_768
    student: tuple[int, int] | Geometry = (4, 256)
    teacher: tuple[int, int] | Geometry = (8, 384)
    batch: int = 8
    prompt: int = 32
    tokens: int = 64
    generations: int = 4
    checkpointing: bool = False
    floor_rows: int = 0

    def hidden(self, role: str) -> int:
        shape = getattr(self, role)
        return shape.hidden if isinstance(shape, Geometry) else shape[1]


@dataclass(frozen=True)
class Variant:
    """A trainer with settings: `trainer` is a key of `TRAINERS`, `settings` are fields of its configuration.

    `lora` is the rank of an adapter on all linear maps, 0 for none.
    """

    name: str
    trainer: str = "sg-opd"
    settings: dict[str, Any] = field(default_factory=dict)
    lora: int = 0


class Clock:
    """Seconds by phase; a phase within another stops the outer one's time.

    On a GPU each edge of a phase waits for the device. Where `coarse` is set only the outermost phase is timed, so that
    host and device overlap as they do in training. A profiler sees the phases by name.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.coarse = device, False
        self.reset()

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.open: list[str] = []
        self.shown: list[Any] = []
        self.since = 0.0

    def _lap(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def begin(self, phase: str) -> None:
        if not (self.coarse and self.open):
            self._lap()
        self.open.append(phase)
        self.shown.append(torch.profiler.record_function(phase))
        self.shown[-1].__enter__()

    def end(self) -> None:
        self.shown.pop().__exit__(None, None, None)
        if not (self.coarse and len(self.open) > 1):
            self._lap()
        self.open.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def wrap(self, owner: Any, method: str, phase: str) -> None:
        """Count the time of an object's method as a phase."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def watch(self, model: nn.Module, phase: Callable[[], str]) -> None:
        """Count a model's forward as the phase that `phase` names when it begins."""
        model.register_forward_pre_hook(lambda *_: self.begin(phase()))
        model.register_forward_hook(lambda *_: self.end(), always_call=True)


class Replay:
    """Before a trainer among the bases of a class: its generation answers `replayed`, token ids by row."""

    replayed: list[list[int]]
    generates = False  # also generate, for the time it takes

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.generates:
            super()._generate_single_turn(prompt_ids, *args, **kwargs)  # type: ignore[misc]
        answer = [list(ids) for ids in self.replayed]
        return answer if isinstance(self, DistillationTrainer) else (answer, None)


class ReplayedSGOPD(Replay, SGOPDTrainer):
    """`SGOPDTrainer` on given completions."""


class ReplayedGRPO(Replay, GRPOTrainer):
    """`GRPOTrainer` on given completions."""


class ReplayedDistillation(Replay, DistillationTrainer):
    """`DistillationTrainer` on given completions."""


TRAINERS: dict[str, tuple[type, type]] = {
    "sg-opd": (ReplayedSGOPD, SGOPDConfig),
    "grpo": (ReplayedGRPO, GRPOConfig),
    "distillation": (ReplayedDistillation, DistillationConfig),
}


@cache
def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word a token id: `w3 w4 ...`."""
    ids = {**{name: i for i, name in enumerate(SPECIAL)}, **{f"w{i}": i for i in range(len(SPECIAL), vocab)}}
    words = Tokenizer(WordLevel(ids, unk_token=SPECIAL[0]))
    words.pre_tokenizer = WhitespaceSplit()
    unknown, padding, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown, pad_token=padding, eos_token=end)


def model(size: Size, shape: tuple[int, int] | Geometry, seed: int, device: str = "cpu") -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights in fp32, drawn on `device`."""
    torch.manual_seed(seed)
    with torch.device(device):
        return Qwen3ForCausalLM(config_of(size, shape))


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a frozen model, which a trainer may patch, on the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def config_of(size: Size, shape: tuple[int, int] | Geometry) -> Qwen3Config:
    special = {"pad_token_id": SPECIAL.index("<pad>"), "eos_token_id": SPECIAL.index("<eos>"), "bos_token_id": None}
    special["max_position_embeddings"] = size.prompt + size.tokens
    if isinstance(shape, Geometry):
        return shape.config(**special)
    layers, hidden = shape
    heads = hidden // HEAD_DIM
    return Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        **special,
    )


def parity(completions: Sequence[str], **columns: Any) -> list[float]:
    """A verifier that costs nothing: whether a completion's last word ends on an even digit."""
    return [float(completion[-1] in "02468") for completion in completions]


class Step:
    """One variant's trainer, ready to be stepped on the same rollouts again and again.

    Args:
        size: of models and batch.
        variant: which trainer.
        device: "cpu" or "cuda".
        folder: for the trainer's output.
        bf16: under autocast.
        teacher: a frozen model to take a copy of that shares its weights; default: one with weights of its own.
    """

    def __init__(
        self,
        size: Size,
        variant: Variant,
        device: str,
        folder: Path,
        bf16: bool = False,
        teacher: nn.Module | None = None,
    ) -> None:
        kind, config = TRAINERS[variant.trainer]
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(len(SPECIAL), size.vocab, (size.batch // size.generations, size.prompt), generator=draw)
        self.rows = [
            {"prompt": " ".join(f"w{i}" for i in prompts[row // size.generations].tolist()), "solution": "1"}
            for row in range(size.batch)
        ]
        grouped = {} if variant.trainer == "distillation" else {"num_generations": size.generations}
        args = config(
            output_dir=str(folder / variant.name),
            per_device_train_batch_size=size.batch,
            gradient_accumulation_steps=1,
            max_completion_length=size.tokens,
            max_steps=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=size.checkpointing,
            bf16=bf16,
            use_cpu=device == "cpu",
            ddp_backend="gloo" if device == "cpu" and "WORLD_SIZE" in os.environ else None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **grouped,
            **variant.settings,
        )
        models = {}
        if variant.trainer != "grpo":
            models["teacher_model"] = sharing(teacher) if teacher else model(size, size.teacher, 1, device)
        if variant.lora:
            models["peft_config"] = LoraConfig(r=variant.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        judged = {"sg-opd": {"verifier": parity}, "grpo": {"reward_funcs": parity}}.get(variant.trainer, {})
        self.trainer = kind(
            model=model(size, size.student, 0, device),
            args=args,
            train_dataset=Dataset.from_list(self.rows * 4),
            processing_class=tokenizer(size.vocab),
            **models,
            **judged,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(callback)
        self.trainer.replayed = torch.randint(
            len(SPECIAL), size.vocab, (size.batch, size.tokens), generator=draw
        ).tolist()
        self.trainer.train()  # warm-up; it also makes the optimizer and wraps the student
        self.clock = Clock(self.trainer.accelerator.device)
        self._count()

    def _count(self) -> None:
        trainer, clock = self.trainer, self.clock
        clock.watch(trainer.model, lambda: "forward+backward" if torch.is_grad_enabled() else "score student")
        clock.wrap(trainer, "_generate_single_turn", "generate")
        clock.wrap(trainer, "compute_loss", "forward+backward")
        clock.wrap(trainer.accelerator, "backward", "forward+backward")
        if isinstance(trainer, GRPOTrainer):
            clock.wrap(trainer, "_calculate_rewards", "grade")
        if isinstance(trainer, DistillationTrainer):
            clock.watch(trainer.teacher_model, lambda: "score teacher")
        if isinstance(trainer, SGOPDTrainer):
            clock.watch(trainer.teacher.model, lambda: "score teacher")
            if trainer.args.reference_policy == "initial" and trainer.initial_policy.frozen is not None:
                clock.watch(trainer.initial_policy.frozen, lambda: "score student")
            for owner, method in ((trainer, "_set_advantages"), (trainer, "_decide")):
                clock.wrap(owner, method, "gate")
            for method in ("update", "compute"):
                clock.wrap(trainer._meter, method, "gate")

    def once(self) -> dict[str, float]:
        """Take one optimizer step; seconds by phase."""
        trainer, clock = self.trainer, self.clock
        trainer.accelerator.wait_for_everyone()
        clock.reset()
        with clock.phase("rest"):
            trainer.training_step(trainer.model_wrapped, self.rows, None)
            with clock.phase("optimizer"):
                trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
            if isinstance(trainer, SGOPDTrainer):
                trainer._gather_metrics()
            trainer.log({})
            trainer.state.log_history.clear()
        return dict(clock.seconds)

    def memory(self) -> dict[str, float]:
        """Bytes: `resident` (weights and optimizer state), `peak` of a step above that."""
        trainer = self.trainer
        held = [*trainer.model.parameters(), *(getattr(trainer, "teacher_model", None) or nn.Module()).parameters()]
        if isinstance(trainer, SGOPDTrainer):
            held += trainer.teacher.model.parameters()
            if trainer.args.reference_policy == "initial" and trainer.initial_policy.frozen is not None:
                held += trainer.initial_policy.frozen.parameters()
        held += [x for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held if not x.is_meta}
        return {"resident": sum(storages.values()), "peak": peak_of(self.once, self.clock.device)}


def peak_of(work: Callable[[], Any], device: torch.device) -> float:
    """The most bytes that `work` had allocated at one time, beyond those there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0.0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
