"""The arms: each distils the teacher into the student by LoRA, and is evaluated before and after."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from steps import Clock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, TrainerCallback

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from sg_opd.evaluation import EvaluationResult, evaluate_model

from .world import World

GENERATIONS = 8  # of a prompt
SAMPLES = 8  # of a question in an evaluation
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
RATE = 5e-4  # the learning rate of LoRA
WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Arm:
    """One way to train the student: its name on the command line, a title for tables, and fields of `SGOPDConfig`."""

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)


ARMS = (
    Arm("opd", "OPD", {"preset": "opd"}),
    Arm("sg-opd-lite", "SG-OPD lite", {"preset": "sg-opd-lite"}),
    Arm("r2-opd", "R2-OPD", {"preset": "r2-opd"}),
    Arm("sg-opd", "SG-OPD", {"preset": "sg-opd"}),
)
# what a teacher on a server can tell; trained where they are asked for
ESTIMATORS = (
    Arm("opd-sampled", "OPD, sampled", {"preset": "opd", "estimator": "sampled"}),
    Arm("opd-top-16", "OPD, top_k 16", {"preset": "opd", "estimator": "top_k", "teacher_top_k": 16}),
)


@dataclass(frozen=True)
class Size:
    """What a machine can do.

    Attributes:
        rollouts: completions a step; `GENERATIONS` of each prompt.
        batch: of them in one forward and backward.
        questions: of the test set.
        unseen: questions of the set of templates never trained on.
        at_once: completions of an evaluation that are generated at a time.
        length: of a completion, in tokens, at the most. The longest worked solution has 71.
        learning_rate: of LoRA.
    """

    rollouts: int
    batch: int
    questions: int
    unseen: int
    at_once: int
    length: int = 80
    learning_rate: float = RATE


@dataclass(frozen=True)
class Pair:
    """Folders of the student and its teacher, and the problems."""

    student: Path
    teacher: Path
    world: World


class StepTimes(TrainerCallback):
    """The seconds of each step, on a clock that waits for the device."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds, self.since = clock, [], 0.0

    def now(self) -> float:
        if self.clock.device.type == "cuda":
            torch.cuda.synchronize(self.clock.device)
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.since = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.since)


class MergedWhileSampling(SGOPDTrainer):
    """LoRA's weights are merged while the student samples, which spares its kernels at every token.

    Merged in fp32 they move no logit by more than 1e-4.
    """

    def _generate(self, prompts: list) -> tuple:
        model = self.accelerator.unwrap_model(self.model)
        model.merge_adapter()
        try:
            return super()._generate(prompts)
        finally:
            model.unmerge_adapter()


def trainer_of(pair: Pair, arm: Arm, size: Size, steps: int, seed: int, on_cpu: bool, output: Path) -> SGOPDTrainer:
    """The trainer of an arm.

    The weights of both models are in fp32 and the forwards under bf16 autocast, as TRL does by default: teacher and
    student round in one way, and generation, which no autocast covers, draws from fp32.
    """
    args = SGOPDConfig(
        output_dir=str(output),
        num_generations=GENERATIONS,
        max_completion_length=size.length,
        max_steps=steps,
        per_device_train_batch_size=size.batch,
        gradient_accumulation_steps=size.rollouts // size.batch,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARM_UP * steps),
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=on_cpu,
        seed=seed,
        logging_steps=1,
        log_gate_samples=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"estimator": "full", **arm.settings},
    )
    trainer = MergedWhileSampling(
        model=str(pair.student),
        teacher_model=str(pair.teacher),
        args=args,
        train_dataset=Dataset.from_list(pair.world.prompts("train")),
        peft_config=LoraConfig(**LORA),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: SGOPDTrainer) -> dict[str, Any]:
    """Train; the seconds by phase and by step, the peak of memory on a GPU in GiB, and what was logged at each step."""
    clock = Clock(trainer.accelerator.device)
    steps = StepTimes(clock)
    trainer.add_callback(steps)
    clock.wrap(trainer, "_generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "grade")
    clock.wrap(trainer, "compute_loss", "forward+backward")
    clock.wrap(trainer.accelerator, "backward", "forward+backward")
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with clock.phase("rest"):
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if clock.device.type == "cuda" else None
    return {
        "seconds": {name: round(seconds, 2) for name, seconds in clock.seconds.items() if seconds},
        "step_seconds": [round(seconds, 3) for seconds in steps.seconds],
        "peak_gib": peak,
        "history": trainer.state.log_history,
    }


def load(folder: Path, on_cpu: bool) -> tuple[PreTrainedModel, Any]:
    """A model in fp32 on its device, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to("cpu" if on_cpu else "cuda"), AutoTokenizer.from_pretrained(folder)


def evaluated(model: PreTrainedModel, tokenizer: Any, world: World, size: Size, verifier: MathVerifier) -> dict:
    """By test set, the figures with their intervals and the counts by question."""
    found = {}
    for name, count in (("test", size.questions), ("unseen", size.unseen)):
        start = time.perf_counter()
        questions = world.prompts(name, count)
        settings = SAMPLES, size.length, 1.0, size.at_once
        result = evaluate_model(model, tokenizer, questions, verifier, *settings, progress=False)
        found[name] = {**summary(result), "seconds": round(time.perf_counter() - start, 2)}
    return found


def summary(result: EvaluationResult) -> dict[str, Any]:
    """What of an evaluation is kept."""
    figures = {name: {key: round(value, 3) for key, value in i._asdict().items()} for name, i in result.figures.items()}
    return {
        "figures": figures,
        "questions": result.num_questions,
        "correct": {question.id: question.correct for question in result.questions},
    }


def run_arm(
    pair: Pair, arm: Arm, size: Size, steps: int, seed: int, on_cpu: bool, output: Path, verifier: MathVerifier
) -> dict[str, Any]:
    """Train and evaluate an arm; LoRA is merged in fp32, where that moves no logit by more than 1e-4."""
    start = time.perf_counter()
    trainer = trainer_of(pair, arm, size, steps, seed, on_cpu, output)
    set_up = round(time.perf_counter() - start, 2)
    record = {"title": arm.title, "settings": arm.settings, "steps": steps, "seed": seed, **train(trainer)}
    model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    tokenizer = trainer.processing_class
    record["after"] = evaluated(model, tokenizer, pair.world, size, verifier)
    record["seconds"] |= {"set up": set_up, "in all": round(time.perf_counter() - start, 2)}
    return record
