"""Mathematics datasets in their usual forms -> columns `prompt` and `solution`, for training and evaluation alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
COLLECTED = "teacher_completions"  # a column of rollouts collected earlier, a list a row: texts, or token ids with EOS
# (question column, gold column), the first pair that a dataset has; GSM8K, MATH, AIME, DeepMath, Open-R1 and their kin
FORMS = (
    ("problem", "answer"),
    ("question", "final_answer"),
    ("question", "answer"),
    ("problem", "solution"),
    ("question", "solution"),
    ("prompt", "answer"),
)
# DAPO's own frame asks for a line "Answer: ...", where the verifier looks for a box
DAPO_FRAME = re.compile(
    r"Solve the following math problem step by step\..*?\n\n(?P<problem>.*)\n\nRemember to put your answer.*", re.DOTALL
)
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_data(name_or_path: str, split: str = "train", name: str | None = None) -> Dataset | IterableDataset:
    """One split of a dataset, from a local JSON, JSON Lines or Parquet file, a local folder, or the hub.

    A folder's splits are its files by name (`train.jsonl`, `test.jsonl`); a single file is the split "train".

    Raises:
        ValueError: a local file of another kind, or another split of a single file.
        FileNotFoundError: a name that ends like a local file which is not there.
    """
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix not in LOADERS:
            raise ValueError(f"{name_or_path}: expected one of {', '.join(LOADERS)}.")
        if split != "train":
            raise ValueError(
                f"{name_or_path} is one file, so only the split 'train'; {split!r} needs a folder of files."
            )
        return load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    if path.suffix in LOADERS:
        raise FileNotFoundError(f"{name_or_path} is not there (looked in {Path.cwd()}).")
    return load_dataset(name_or_path, name=name, split=split)


def prepare_dataset(dataset: Any, instruction: str | None = INSTRUCTION) -> Any:
    r"""A dataset with the columns `prompt` (one user message) and `solution` (the gold, as text).

    Of the others only `teacher_completions` is kept.

    Understood are the columns of `FORMS`, DAPO's (`prompt`, `reward_model.ground_truth`), and `prompt` with `solution`,
    which stays as it is. GSM8K's `answer` is cut to what follows `####`.

    Args:
        dataset: a `Dataset`, an `IterableDataset`, or a dict of them by split.
        instruction: appended to each question on a line of its own unless it already asks for a `\boxed{}` answer;
            `None` appends nothing.

    Raises:
        ValueError: none of the forms fits.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        return type(dataset)({split: prepare_dataset(part, instruction) for split, part in dataset.items()})
    columns = list(dataset.column_names or next(iter(dataset)))
    if {"prompt", "solution"} <= set(columns):
        return dataset
    if {"prompt", "reward_model"} <= set(columns):
        question, gold = "prompt", "reward_model"
    else:
        pair = next((pair for pair in FORMS if set(pair) <= set(columns)), None)
        if pair is None:
            raise ValueError(
                f"No known form in the columns {', '.join(map(repr, columns))}. Rename them to 'prompt' and 'solution' "
                f"or to one of: {'; '.join(', '.join(map(repr, form)) for form in FORMS)}."
            )
        question, gold = pair

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": as_messages(row[question], instruction), "solution": as_gold(row[gold])}

    return dataset.map(
        convert, remove_columns=[name for name in columns if name not in ("prompt", "solution", COLLECTED)]
    )


def as_messages(question: str | list[dict[str, str]], instruction: str | None) -> list[dict[str, str]]:
    """A question as messages that ask for a box; messages stay as they are, but for DAPO's frame around a problem."""
    if not isinstance(question, str):
        framed = DAPO_FRAME.fullmatch(question[0]["content"].strip()) if len(question) == 1 else None
        if framed is None:
            return question
        question = framed["problem"]
    if instruction and r"\boxed" not in question:
        question = f"{question}\n{instruction}"
    return [{"role": "user", "content": question}]


def as_gold(answer: Any) -> str | None:
    """The gold as text: DAPO's ground truth, what follows GSM8K's `####`, or the answer itself."""
    if isinstance(answer, dict):
        answer = answer.get("ground_truth")
    if isinstance(answer, (list, tuple)):  # OlympiadBench; several are read as a set
        answer = str(answer[0]) if len(answer) == 1 else rf"\{{{', '.join(map(str, answer))}\}}"
    if answer is None:
        return None
    text = str(answer)
    return text.rsplit("####", 1)[-1].strip() if "####" in text else text
