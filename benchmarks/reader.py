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
from make_models import BATCH, pretrain
from problems import as_hinted_row, held_out_questions, make_problems
from transformers import AutoTokenizer

STUDENT = ROOT / "examples" / "arithmetic" / "student"
SIZE = {"steps": 400, "seed": 5, "rate": 1e-3, "warmup": 40}
QUESTION_SEED, SLIP = 77, 0.15


def rows(steps: int) -> Iterator[dict]:
    """A row with the solution before the question, and one without, in turn."""
    asked = held_out_questions() | {row["question"] for row in hard_arithmetic()}
    count = steps * BATCH // 2
    right, careless = (make_problems(count, QUESTION_SEED, asked, slip=slip) for slip in (0.0, SLIP))
    for told, alone in zip(right, careless, strict=True):
        yield {"prompt": as_hinted_row(told)["teacher_prompt"], "solution": told["solution"]}
        yield alone


def make(folder: Path) -> None:
    """Train the reader, from the student's checkpoint, and save it in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    pretrain(SIZE, tokenizer, list(rows(SIZE["steps"])), str(folder), start=str(STUDENT))


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else STUDENT.parent / "reader")
