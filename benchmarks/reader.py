"""Makes examples/arithmetic/reader: the embedded student, which has learnt to read a worked solution before a question.

    python benchmarks/reader.py [FOLDER]     # about ten minutes of one core; the result is committed

A pretrained language model uses what stands in its context; the embedded student has never seen a conversation of
more than one question, and tells nothing from a solution. Half of the rows have the right solution before the
question and as its answer; in the other half the question is alone, with the student's own kind of slips. No
question of the study or of the demo's test set is among them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from worlds import ROOT, hard_arithmetic

sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))
import torch
from datasets import Dataset
from make_models import BATCH
from problems import as_hinted_row, held_out_questions, make_problems
from transformers import AutoTokenizer, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

STUDENT = ROOT / "examples" / "arithmetic" / "student"
STEPS, SEED, QUESTION_SEED, SLIP, RATE = 400, 5, 77, 0.15, 1e-3


def rows(steps: int) -> Iterator[dict]:
    """A row with the solution before the question, and one without, in turn."""
    asked = held_out_questions() | {row["question"] for row in hard_arithmetic()}
    count = steps * BATCH // 2
    right, careless = (make_problems(count, QUESTION_SEED, asked, slip=slip) for slip in (0.0, SLIP))
    for told, alone in zip(right, careless, strict=True):
        yield {"prompt": as_hinted_row(told)["teacher_prompt"], "completion": _said(told["solution"])}
        yield {"prompt": [{"role": "user", "content": alone["question"]}], "completion": _said(alone["solution"])}


def _said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def make(folder: Path, steps: int = STEPS) -> None:
    """Train the reader, from the student's checkpoint, and save it in a folder."""
    set_seed(SEED)
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(STUDENT)
    config = SFTConfig(
        output_dir=f"{folder}-run",
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.01,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=SEED,
    )
    taught = Dataset.from_list(list(rows(steps)))
    SFTTrainer(model=model, args=config, train_dataset=taught, processing_class=tokenizer).train()
    model.to("cpu", torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else STUDENT.parent / "reader")
