"""Mathematics benchmarks by name: where each is on the hub, and which of its columns are what."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from .data import INSTRUCTION, as_gold, as_messages, load_data


class Task(NamedTuple):
    """A benchmark on the hub."""

    dataset: str
    split: str
    question: str
    """Column of the question's text."""
    answer: str
    """Column of the gold."""
    id: str | None = None
    """Column that names a question; `None` numbers them by row."""
    config: str | None = None


TASKS = {
    "aime24": Task("HuggingFaceH4/aime_2024", "train", "problem", "answer", "id"),
    "aime25": Task("MathArena/aime_2025", "train", "problem", "answer", "problem_idx"),
    "aime26": Task("MathArena/aime_2026", "train", "problem", "answer", "problem_idx"),
    "hmmt25": Task("MathArena/hmmt_feb_2025", "train", "problem", "answer", "problem_idx"),
    "amc23": Task("math-ai/amc23", "test", "question", "answer"),
    "math500": Task("HuggingFaceH4/MATH-500", "test", "problem", "answer", "unique_id"),
    "gsm8k": Task("openai/gsm8k", "test", "question", "answer", config="main"),
}


def load_task(name: str, path: str | None = None, instruction: str | None = INSTRUCTION) -> Dataset:
    r"""A benchmark as a dataset with the columns `id`, `prompt` (one user message) and `solution` (the gold, as text).

    Args:
        name: one of `TASKS`.
        path: a local file, or a folder with its split, of the same columns; default: the hub.
        instruction: appended to each question unless it asks for a `\boxed{}` answer itself; `None` appends nothing.

    Raises:
        ValueError: no such task, or data without its columns.
        FileNotFoundError: `path` is not there.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
    task = TASKS[name]
    if path is None:
        data = load_data(task.dataset, task.split, task.config)
    elif not Path(path).exists():
        raise FileNotFoundError(f"{path} is not there (looked in {Path.cwd()}).")
    else:
        data = load_data(path, "train" if Path(path).is_file() else task.split)
    wanted = [column for column in (task.question, task.answer, task.id) if column is not None]
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise ValueError(
            f"{path or task.dataset}: the task {name} needs {', '.join(map(repr, missing))}, which is not among the "
            f"columns {', '.join(map(repr, data.column_names))}."
        )
    return Dataset.from_list(
        [
            {
                "id": str(index if task.id is None else row[task.id]),
                "prompt": as_messages(row[task.question], instruction),
                "solution": as_gold(row[task.answer]),
            }
            for index, row in enumerate(data)
        ]
    )
