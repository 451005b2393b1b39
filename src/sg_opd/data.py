"""Reads mathematics datasets and benchmarks as columns `prompt` and `solution`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value, load_dataset

from .paths import check_path
from .verifiers.answers import last_box

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
COLLECTED = "teacher_completions"  # a column of rollouts collected earlier, a list a row: texts, or token ids with EOS
TEACHER_PROMPT = "teacher_prompt"  # a column that the teacher reads in place of `prompt`: text, messages, or None
# (question, reference answer): the first pair of columns that a dataset has; GSM8K, MATH, AIME, DeepMath, Open-R1 ...
FORMS = (
    ("prompt", "reward_model"),  # DAPO
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
# a sentence that asks for a boxed answer, not one that shows a box: "put your final answer within \boxed{}", "\boxed{}
# for the answer", "\boxed{answer}"; a box asked for twice does no harm, one not asked for makes answers incorrect
ANSWER = r"(?:\b(?:answer|solution|result|response)s?\b|答案)"
ASKS_FOR_BOX = re.compile(
    rf"{ANSWER}[^.?!\n]*(?:\b(?:in|within|inside|into|with|using|as|by)\b|在|入|用)"
    r"(?:[^\w\\.?!\n]*\b(?:an?|the|form|format|latex|of)\b)*[^\w\\.?!\n]*\\boxed(?!\s*\{[^{}]*\d)"
    rf"|\\boxed\S*\s+(?:for|around)\b[^.?!\n]*{ANSWER}"
    rf"|\\boxed\{{[^{{}}]*{ANSWER}",
    re.IGNORECASE,
)
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_data(
    name_or_path: str, split: str = "train", name: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """One split of a dataset, from a local JSON, JSON Lines or Parquet file, a local folder, or the hub.

    A folder's splits are its files by name (`train.jsonl`, `test.jsonl`); a single file is the split "train". With
    `streaming` it is an `IterableDataset`, whose rows are read as they are asked for.

    Raises:
        ValueError: a local file of another kind, or another split of a single file.
        FileNotFoundError: a path that is not there, or a name that ends like a local file which is not.
    """
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix not in LOADERS:
            raise ValueError(f"{name_or_path}: expected one of {', '.join(LOADERS)}.")
        if split != "train":
            raise ValueError(f"{path} is one file, so its only split is 'train'; {split!r} needs a folder of files.")
        return load_dataset(LOADERS[path.suffix], data_files=str(path), split="train", streaming=streaming)
    if path.suffix in LOADERS:
        raise FileNotFoundError(f"{name_or_path} is not there (looked in {Path.cwd()}).")
    check_path("name_or_path", name_or_path, "dataset")
    return load_dataset(name_or_path, name=name, split=split, streaming=streaming)


def prepare_dataset(dataset: Any, instruction: str | None = INSTRUCTION, keep: Sequence[str] = ()) -> Any:
    r"""A dataset with the columns `prompt` (one user message) and `solution` (the reference answer, as text).

    Understood are the columns of `FORMS` (of DAPO's `reward_model` its `ground_truth`, of GSM8K's `answer`, which has
    no box, what follows `####`), and `prompt` with `solution`, which stays as it is. Of the others
    `teacher_completions`, `teacher_prompt` and those in `keep` are kept.

    Args:
        dataset: a `Dataset`, an `IterableDataset`, or a dict of them by split.
        instruction: appended to each question on a line of its own unless it already asks for a `\boxed{}` answer, not
            merely shows one; `None` appends nothing.
        keep: further columns to keep where they are there, such as the one that names each row's teacher.

    Raises:
        ValueError: none of the forms fits, or there is no row to tell one by.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        return type(dataset)({split: prepare_dataset(part, instruction, keep) for split, part in dataset.items()})
    if format_of(dataset) not in (None, "custom"):  # torch, numpy, pandas ...: rows would be no plain values
        dataset = dataset.with_format(None)
    columns = list(dataset.column_names or next(iter(dataset), ()))
    if not columns:
        raise ValueError("The dataset is empty: it has neither columns nor rows.")
    if {"prompt", "solution"} <= set(columns):
        return dataset
    pair = next((pair for pair in FORMS if set(pair) <= set(columns)), None)
    if pair is None:
        raise ValueError(
            f"No known form in the columns {', '.join(map(repr, columns))}. Rename them to 'prompt' and 'solution' "
            f"or to one of: {'; '.join(', '.join(map(repr, form)) for form in FORMS)}."
        )
    question, answer = pair
    kept = {"prompt", "solution", COLLECTED, TEACHER_PROMPT, *keep}
    if isinstance(dataset, Dataset) and format_of(dataset) is None:
        # the type of answers is stated: else the first thousand of them decide it, which may all be missing
        known = {name: feature for name, feature in dataset.features.items() if name in {question, *kept}}
        dataset = dataset.map(
            lambda row: {"solution": as_gold(row[answer])},
            remove_columns=[name for name in columns if name not in known],
            features=Features({**known, "solution": Value("string")}),
        )
        return dataset.map(
            lambda row: {"prompt": as_messages(row[question], instruction)},
            remove_columns=[name for name in known if name not in kept],
        )
    dataset = dataset.map(
        lambda row: {"prompt": as_messages(row[question], instruction), "solution": as_gold(row[answer])},
        remove_columns=[name for name in columns if name not in kept],
    )
    # a transform was applied by now, and would miss the columns that are gone
    return dataset.with_format(None) if isinstance(dataset, Dataset) else dataset


def format_of(dataset: Any) -> str | None:
    """What `with_format` was given for it, such as "torch"; "custom" is a transform, `None` plain values."""
    if isinstance(dataset, IterableDataset):
        return getattr(dataset._formatting, "format_type", None)  # it has no public name
    return dataset.format["type"] if isinstance(dataset, Dataset) else None


def text_of(content: Any) -> str | None:
    """A message's content as text: itself, or its parts of text joined; `None` where a part is of another kind."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return None
    return "".join(part.get("text") or "" for part in content)


def plain_messages(prompt: Any) -> Any:
    """Messages with content as text, which templates of text models read; other parts, and plain text, stay."""
    if isinstance(prompt, str):
        return prompt
    texts = [text_of(message.get("content")) for message in prompt]
    return [m if text is None else {**m, "content": text} for m, text in zip(prompt, texts, strict=True)]


def as_messages(question: str | list[dict[str, Any]], instruction: str | None) -> list[dict[str, Any]]:
    """A question as messages that ask for a box; messages stay as they are, but for DAPO's frame around a problem.

    Content made of parts becomes text, where all parts are.
    """
    if not isinstance(question, str):
        messages = plain_messages(question)
        content = messages[0].get("content") if len(messages) == 1 else None
        framed = DAPO_FRAME.fullmatch(content.strip()) if isinstance(content, str) else None
        if framed is None:
            return messages
        question = framed["problem"]
    if instruction and not ASKS_FOR_BOX.search(question):
        question = f"{question}\n{instruction}"
    return [{"role": "user", "content": question}]


def as_gold(answer: Any) -> str | None:
    """The reference answer as text: DAPO's ground truth, what follows GSM8K's `####`, or the answer itself.

    An answer with a box stays whole, for the verifier reads the box.

    `None` where there is none: `None`, a NaN of any library, or a list that is empty or has one of these in it.
    """
    if isinstance(answer, dict):
        answer = answer.get("ground_truth")
    if isinstance(answer, (list, tuple)):  # OlympiadBench; several are read as a set
        golds = [as_gold(part) for part in answer]
        if not golds or None in golds:
            return None
        return golds[0] if len(golds) == 1 else rf"\{{{', '.join(map(str, golds))}\}}"
    if pd.isna(answer):
        return None
    text = str(answer)
    # beside a box it is a heading in Markdown
    return text.rsplit("####", 1)[-1].strip() if "####" in text and last_box(text) is None else text


class Task(NamedTuple):
    """A benchmark on the hub."""

    dataset: str
    split: str
    question: str  # the column of its text
    answer: str  # the column of the reference answer
    id: str | None = None  # the column that names a question; `None` numbers them by row
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
    r"""A benchmark as a dataset with the columns `id`, `prompt` (one user message) and `solution` (text).

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
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"{path} is not there (looked in {Path.cwd()}).")
    split = "train" if path is not None and Path(path).is_file() else task.split
    data = load_data(task.dataset, split, task.config) if path is None else load_data(path, split)
    missing = [name for name in (task.question, task.answer, task.id) if name not in (None, *data.column_names)]
    if missing:
        raise ValueError(
            f"{path or task.dataset}: the task {name} needs {', '.join(map(repr, missing))}, which is not among the "
            f"columns {', '.join(map(repr, data.column_names))}."
        )
    rows = [
        {
            "id": str(index if task.id is None else row[task.id]),
            "prompt": as_messages(row[task.question], instruction),
            "solution": as_gold(row[task.answer]),
        }
        for index, row in enumerate(data)
    ]
    return Dataset.from_list(rows)
