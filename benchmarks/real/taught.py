"""Teacher and student: the language model, fine-tuned on worked solutions until it is as good as asked.

Both are full fine-tuning by TRL's SFTTrainer with the loss on the solution alone. The weights are in fp32 and the
forward under bf16 autocast: a step of 4e-4 x Adam is below what bf16 weights resolve. Every few steps some questions
are answered greedily, and the checkpoint nearest to the target is kept.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from sg_opd import MathVerifier
from sg_opd.evaluation import evaluate_model

from .world import World

LEARNING_RATE, WARM_UP, ROWS = 4e-4, 10, 16


@dataclass(frozen=True)
class Lesson:
    """How a model is taught.

    Attributes:
        name: of its folder.
        target: share of the questions that it shall answer, in per cent, greedily.
        steps: at the most; the cosine ends there.
        first, every: the step of the first trial, and how many lie between two.
        questions: of a trial.
        seed: of the order of the lessons.
    """

    name: str
    target: float
    steps: int
    first: int
    every: int
    questions: int
    seed: int


@dataclass
class Nearest(TrainerCallback):
    """Keeps, on the host, the weights that were nearest to the target; ends the training once that is reached."""

    lesson: Lesson
    tokenizer: Any
    questions: list[dict[str, Any]]
    length: int
    verifier: MathVerifier
    trials: list[tuple[int, float]] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    at: tuple[int, float] = (0, float("inf"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step, lesson = state.global_step, self.lesson
        if step < state.max_steps and (step < lesson.first or (step - lesson.first) % lesson.every):
            return
        result = evaluate_model(
            model,
            self.tokenizer,
            self.questions,
            self.verifier,
            1,
            self.length,
            0.0,
            len(self.questions),
            progress=False,
        )
        accuracy = result.figures["avg@1"].mean
        self.trials.append((step, accuracy))
        print(f"{lesson.name}: step {step}: {accuracy:.1f} % greedily", flush=True)
        if abs(accuracy - lesson.target) <= abs(self.at[1] - lesson.target):
            self.at = step, accuracy
            self.kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        control.should_training_stop |= accuracy >= lesson.target


def teach(
    base: Path, world: World, lesson: Lesson, folder: Path, length: int, on_cpu: bool, rows: int
) -> dict[str, Any]:
    """Fine-tune the model of `base` as `lesson` says and save it in fp32 to `folder`.

    Args:
        base: the checkpoint.
        world: lessons and questions.
        lesson: how.
        folder: gets the model with its tokenizer.
        length: of a trial's completions, in tokens.
        on_cpu: whether to leave a GPU alone.
        rows: of one forward; a step has `ROWS`, and this divides it.

    Returns:
        The trials, the kept one, the losses and the seconds.
    """
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    nearest = Nearest(lesson, tokenizer, world.prompts("validation", lesson.questions), length, MathVerifier())
    args = SFTConfig(
        output_dir=str(folder / "trainer"),
        max_steps=lesson.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=ROWS // rows,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARM_UP,
        lr_scheduler_type="cosine",
        seed=lesson.seed,
        bf16=True,
        use_cpu=on_cpu,
        completion_only_loss=True,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(world.lessons()),
        processing_class=tokenizer,
        callbacks=[nearest],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.load_state_dict(nearest.kept)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"trials": nearest.trials, "kept": nearest.at, "losses": losses}
    return {**asdict(lesson), **found, "seconds": round(time.perf_counter() - start, 1)}
