"""Reads mathematics datasets and benchmarks as columns `prompt` and `solution`, and checks a trainer's datasets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

logger = get_logger(__name__)  # of the main process only

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
COLLECTED = "teacher_completions"  # a column of rollouts collected earlier, a list a row: texts, or token ids with EOS
ROWS_CHECKED = 10_000  # of a larger dataset, rows spread evenly over it
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
Unparseable = Callable[[Sequence[Any]], list[int]]  # of a column `solution`, the rows on which a verifier would abstain
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
            raise ValueError(f"{path} is one file, so its only split is 'train'; {split!r} needs a folder of files.")
        return load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    if path.suffix in LOADERS:
        raise FileNotFoundError(f"{name_or_path} is not there (looked in {Path.cwd()}).")
    return load_dataset(name_or_path, name=name, split=split)


def prepare_dataset(dataset: Any, instruction: str | None = INSTRUCTION) -> Any:
    r"""A dataset with the columns `prompt` (one user message) and `solution` (the reference answer, as text).

    Understood are the columns of `FORMS` (of DAPO's `reward_model` its `ground_truth`, of GSM8K's `answer` what follows
    `####`), and `prompt` with `solution`, which stays as it is. Of the others only `teacher_completions` is kept.

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
    pair = next((pair for pair in FORMS if set(pair) <= set(columns)), None)
    if pair is None:
        raise ValueError(
            f"No known form in the columns {', '.join(map(repr, columns))}. Rename them to 'prompt' and 'solution' "
            f"or to one of: {'; '.join(', '.join(map(repr, form)) for form in FORMS)}."
        )
    question, answer = pair
    return dataset.map(
        lambda row: {"prompt": as_messages(row[question], instruction), "solution": as_gold(row[answer])},
        remove_columns=[name for name in columns if name not in ("prompt", "solution", COLLECTED)],
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
    """The reference answer as text: DAPO's ground truth, what follows GSM8K's `####`, or the answer itself."""
    if isinstance(answer, dict):
        answer = answer.get("ground_truth")
    if isinstance(answer, (list, tuple)):  # OlympiadBench; several are read as a set
        answer = str(answer[0]) if len(answer) == 1 else rf"\{{{', '.join(map(str, answer))}\}}"
    if answer is None:
        return None
    text = str(answer)
    return text.rsplit("####", 1)[-1].strip() if "####" in text else text


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


def check_datasets(
    train: Any,
    held_out: Any,
    *,
    unparseable: Unparseable | None,
    required: bool,
    remove_unused_columns: bool,
    teacher_phase: bool,
    generation_batch_size: int,
    num_generations: int,
) -> None:
    """Refuse datasets that a trainer cannot use, and warn once of what is doubtful in them.

    Args:
        train: the trainer's `train_dataset`.
        held_out: its `eval_dataset`, or a dict of several.
        unparseable: of a column `solution`, the rows to abstain on; `None` where the verifier does not read it.
        required: whether there must be a `train_dataset`.
        remove_unused_columns: whether the trainer drops the columns that only the verifier reads.
        teacher_phase: whether the teacher's own completions are trained on.
        generation_batch_size: completions of one generation.
        num_generations: completions a prompt.

    Raises:
        ValueError: what cannot be used, by dataset and row.
    """
    if train is None and required:
        raise ValueError("`train_dataset` is required: a dataset with the columns the verifier reads.")
    parts = [*named_parts("train_dataset", train), *named_parts("eval_dataset", held_out)]
    for name, dataset in parts:
        check_dataset(name, dataset, unparseable, teacher_phase)
    if parts and remove_unused_columns and unparseable is not None:
        raise ValueError("`remove_unused_columns=True` would drop the column 'solution'; leave it at False.")
    check_held_out(train, held_out)
    check_batch(train, generation_batch_size, num_generations)


def named_parts(name: str, dataset: Any) -> list[tuple[str, Any]]:
    """A dataset with its name, or each of a dict of datasets; none for `None`."""
    if isinstance(dataset, dict):
        return [pair for key, part in dataset.items() for pair in named_parts(f"{name}[{key!r}]", part)]
    return [] if dataset is None else [(name, dataset)]


def check_dataset(name: str, dataset: Any, unparseable: Unparseable | None, teacher_phase: bool = False) -> None:
    """Check that a dataset has rows and their columns, and what stands in these; of a streaming one the first row."""
    sized = hasattr(dataset, "__len__")
    first = next(iter(dataset), None) if not sized else dataset[0] if len(dataset) else None
    if first is None:
        raise ValueError(f"`{name}` is empty.")
    needed = ["prompt"] if unparseable is None else ["prompt", "solution"]
    missing = [column for column in needed if column not in first]
    if missing:
        raise ValueError(
            f"`{name}` lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, first))}. `sg_opd.data.prepare_dataset` converts the usual mathematics sets."
        )
    columns = [column for column in (*needed, COLLECTED) if column in first]
    check_rows(name, narrowed(dataset, columns) if sized else [first], unparseable is not None)
    if teacher_phase and has_images(first):
        raise ValueError(f"`{name}` has images, which a teacher phase does not support. Set `teacher_phase_steps=0`.")
    if sized and unparseable is not None:
        check_solutions(name, narrowed(dataset, ["solution"]), unparseable)


def check_rows(name: str, dataset: Any, with_solution: bool) -> None:
    """Refuse a row by what stands in its `prompt`, its `solution` or its `teacher_completions`."""
    for row in rows_to_check(len(dataset)):
        values = dataset[row]
        prompt, solution, collected = values["prompt"], values.get("solution"), values.get(COLLECTED)
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(f"`prompt` in `{name}`, row {row} is empty: {prompt!r}.")
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise ValueError(
                f"`prompt` in `{name}`, row {row}: expected text, or a list of messages "
                f"{{'role': ..., 'content': ...}}, got {str(prompt)[:80]!r}. `sg_opd.data.prepare_dataset` makes them."
            )
        if with_solution and not isinstance(solution, str | int | float | None):
            raise ValueError(
                f"`solution` in `{name}`, row {row}: expected text, a number or None, got {str(solution)[:80]!r}. "
                "`sg_opd.data.prepare_dataset` reads the usual forms."
            )
        if collected is not None and not (isinstance(collected, list) and all(map(is_completion, collected))):
            raise ValueError(
                f"`{COLLECTED}` in `{name}`, row {row}: expected a list of texts, or of non-empty lists of token ids, "
                f"got {str(collected)[:80]!r}."
            )


def is_conversation(prompt: Any) -> bool:
    """Whether it is a list of messages, each with a role, and a content or calls of tools."""
    return isinstance(prompt, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (message.get("content") is not None or message.get("tool_calls"))
        for message in prompt
    )


def is_completion(value: Any) -> bool:
    """Whether it is a text, or a list of token ids that is not empty."""
    is_ids = isinstance(value, list) and value != [] and all(isinstance(token, int) for token in value)
    return is_ids or isinstance(value, str)


def check_solutions(name: str, dataset: Any, unparseable: Unparseable) -> None:
    """Warn once of reference answers on which every verdict would abstain; an error where it is all of them."""
    rows = rows_to_check(len(dataset))
    solutions = [dataset[row]["solution"] for row in rows]
    bad = unparseable(solutions)
    if not bad:
        return
    shown = "; ".join(f"row {rows[i]}: {str(solutions[i])[:80]!r}" for i in bad[:3])
    message = f"{len(bad)} of the {len(rows)} reference answers checked in `{name}` cannot be parsed, first {shown}."
    if len(bad) == len(rows):
        raise ValueError(f"{message} The verifier would abstain on every row.")
    logger.warning("%s The verifier abstains on these rows, where the gate is neutral.", message)


def check_held_out(train: Any, held_out: Any) -> None:
    """Warn of questions that are held out and trained on, and of those that are trained on several times, by count."""
    if not has_questions(train):
        return
    trained = set(questions(train))
    if again := len(train) - len(trained):
        logger.warning("%d of the %d rows of `train_dataset` repeat an earlier row's question.", again, len(train))
    for name, part in named_parts("eval_dataset", held_out):
        if has_questions(part) and (known := sum(question in trained for question in questions(part))):
            logger.warning(
                "%d of the %d questions of `%s` are in `train_dataset` too: what is measured on them is no measure of "
                "unseen questions.",
                *(known, len(part), name),
            )


def has_questions(dataset: Any) -> TypeGuard[Dataset]:
    """Whether its prompts can be read at once, and are all there is of a question; not where images are part of it."""
    return isinstance(dataset, Dataset) and narrowed(dataset, ["prompt"]) is not dataset and not has_images(dataset[0])


def questions(dataset: Dataset) -> Iterator[str]:
    """Each row's question: its prompt, or that prompt's last message, without differences in white space."""
    for batch in dataset.select_columns("prompt").iter(1000):
        for prompt in batch["prompt"]:
            yield " ".join(str(prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())


def check_batch(dataset: Any, generation_batch_size: int, num_generations: int) -> None:
    """Refuse a dataset of fewer prompts than one generation takes, on which GRPOTrainer would train no step."""
    prompts = generation_batch_size // num_generations
    if hasattr(dataset, "__len__") and len(dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} rows, but one generation takes {prompts} prompts "
            f"(generation_batch_size={generation_batch_size} = per_device_train_batch_size x processes x "
            f"steps_per_generation, over num_generations={num_generations}): no step could be trained. Lower the "
            "batch, or raise `num_generations`."
        )


def narrowed(dataset: Any, columns: list[str]) -> Any:
    """With these columns only, so that looking at a row decodes no image; as it is where a transform makes the rows."""
    plain = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
    return dataset.select_columns(columns) if plain and {*columns} <= {*dataset.column_names} else dataset


def has_images(row: dict[str, Any]) -> bool:
    """Whether a row carries images, in a column of their own or within its messages."""
    prompt = row["prompt"] if isinstance(row["prompt"], list) else []
    parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
    return "image" in row or "images" in row or any(part.get("type") == "image" for part in parts)


def rows_to_check(length: int) -> range:
    """At most `ROWS_CHECKED` places, evenly spread over `length` rows."""
    return range(0, length, max(1, -(-length // ROWS_CHECKED)))
