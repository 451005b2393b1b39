"""What is verified of a trainer's datasets before the first step: clear errors, or one warning each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeGuard

from accelerate.logging import get_logger
from datasets import Dataset

from ..config import SGOPDConfig
from ..data import COLLECTED, TEACHER_PROMPT, format_of, text_of
from ..teachers.several import check_names
from ..verifiers.verdicts import check_columns

logger = get_logger(__name__)  # of the main process only

SUPPLIES_PROMPTS = "environment_factory"  # the argument of GRPOTrainer
MENTIONS_BOX = re.compile(
    r"\\(?:boxed|fbox)|\bbox(?:ed)?\b[^.\n]{0,60}\banswer|\banswer\b[^.\n]{0,60}\bbox(?:ed)?\b", re.IGNORECASE
)
ROWS_CHECKED = 10_000  # of a larger dataset, rows spread evenly over it
Unparseable = Callable[[Sequence[Any]], list[int]]  # of a column `solution`, the rows on which a verifier would abstain


def check_datasets(
    train: Any, held_out: Any, unparseable: Unparseable | None, args: SGOPDConfig, turns: str | None = None
) -> None:
    """Refuse datasets that a trainer cannot use, and warn once of what is doubtful in them.

    Args:
        train: the trainer's `train_dataset`.
        held_out: its `eval_dataset`, or a dict of several.
        unparseable: of a column `solution`, the rows to abstain on; `None` where the verifier does not read it.
        args: of the trainer.
        turns: the argument that makes several turns of a rollout, for which prompts must be messages: "tools", or
            "environment_factory", which may supply them, so that there need be neither `prompt` nor dataset.

    Raises:
        ValueError: what cannot be used, by dataset and row.
    """
    if train is None and turns != SUPPLIES_PROMPTS:
        raise ValueError("`train_dataset` is required: a dataset with the columns the verifier reads.")
    if isinstance(train, dict):
        raise ValueError(f"`train_dataset` is a dict of splits, {', '.join(map(repr, train))}: pass one of them.")
    parts = [*named_parts("train_dataset", train), *named_parts("eval_dataset", held_out)]
    for name, dataset in parts:
        check_dataset(name, dataset, unparseable, args.teacher_phase_steps > 0, turns)
    if parts and args.remove_unused_columns and unparseable is not None:
        raise ValueError("`remove_unused_columns=True` would drop the column 'solution'; leave it at False.")
    if turns != SUPPLIES_PROMPTS:  # whose questions are in no column
        check_held_out(train, held_out)
    check_batch(train, args.generation_batch_size, args.num_generations)
    check_best_metric(held_out, args.metric_for_best_model)


def check_routes(train: Any, names: list[str], column: str) -> None:
    """Refuse a dataset whose rows do not say which of several teachers is theirs; of a streaming one the first row."""
    first = None if train is None else next(iter(train), None)
    if first is None or column not in first:
        raise ValueError(
            f"`train_dataset` lacks the column {column!r} (`teacher_column`), which names each row's teacher, one of "
            f"{', '.join(map(repr, names))}."
        )
    rows = narrowed(train, [column]) if hasattr(train, "__len__") else [first]
    given = [row.get(column) for row in rows]
    check_names(given, names, column)
    if len(given) > 1 and (idle := [name for name in names if name not in given]):
        logger.warning("No row of `train_dataset` is of the teacher %s.", ", ".join(map(repr, idle)))


def check_best_metric(held_out: Any, metric: str | None) -> None:
    """Refuse a metric for the best model that no evaluation logs, because each of several sets has its own."""
    if metric is None or not isinstance(held_out, dict):
        return
    name = metric.removeprefix("eval_")
    if not name.startswith(tuple(f"{key}_" for key in held_out)):
        raise ValueError(
            f"`metric_for_best_model={metric!r}` with a dict of evaluation sets: each logs its own, such as "
            f"{', '.join(repr(f'eval_{key}_reward') for key in held_out)}."
        )


def named_parts(name: str, dataset: Any) -> list[tuple[str, Any]]:
    """A dataset with its name, or each of a dict of datasets; none for `None`."""
    if isinstance(dataset, dict):
        return [pair for key, part in dataset.items() for pair in named_parts(f"{name}[{key!r}]", part)]
    return [] if dataset is None else [(name, dataset)]


def check_dataset(
    name: str, dataset: Any, unparseable: Unparseable | None, teacher_phase: bool = False, turns: str | None = None
) -> None:
    """Check that a dataset has rows and their columns, and what stands in these; of a streaming one the first row."""
    if (form := format_of(dataset)) not in (None, "custom"):
        raise ValueError(
            f"`{name}` gives its rows in the format {form!r}, but a prompt must be text or a list of messages, and a "
            "verifier reads plain values. Pass it as `dataset.with_format(None)`."
        )
    sized = hasattr(dataset, "__len__")
    first = next(iter(dataset), None) if not sized else dataset[0] if len(dataset) else None
    if first is None:
        raise ValueError(f"`{name}` is empty.")
    check_columns(name, first)
    needed = [] if turns == SUPPLIES_PROMPTS else ["prompt"]
    needed += [] if unparseable is None else ["solution"]
    missing = [column for column in needed if column not in first]
    if missing:
        raise ValueError(
            f"`{name}` lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, first))}. `sg_opd.data.prepare_dataset` converts the usual mathematics sets."
        )
    columns = [column for column in ("prompt", *needed, COLLECTED, TEACHER_PROMPT) if column in first]
    check_rows(name, narrowed(dataset, columns) if sized else [first], unparseable is not None, turns)
    if teacher_phase and has_images(first):
        raise ValueError(f"`{name}` has images, which a teacher phase does not support. Set `teacher_phase_steps=0`.")
    if sized and unparseable is not None:
        check_solutions(name, narrowed(dataset, ["solution"]), unparseable)


def check_rows(name: str, dataset: Any, with_solution: bool, turns: str | None = None) -> None:
    """Refuse a row by what stands in its `prompt`, its `solution` or another column that is read."""
    for row in rows_to_check(len(dataset)):
        values = dataset[row]
        solution, collected = values.get("solution"), values.get(COLLECTED)
        if "prompt" in values:
            check_prompt(f"`prompt` in `{name}`, row {row}", values["prompt"], turns)
        if values.get(TEACHER_PROMPT) is not None:
            check_prompt(f"`{TEACHER_PROMPT}` in `{name}`, row {row}", values[TEACHER_PROMPT], turns)
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


def check_prompt(place: str, prompt: Any, turns: str | None) -> None:
    """Refuse a prompt that is neither text nor a list of messages, or has nothing in it; `place` names it.

    Text too where an argument of the trainer makes several `turns`.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"{place} is empty: {prompt!r}.")
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise ValueError(
            f"{place}: expected text, or a list of messages {{'role': ..., 'content': ...}}, got {str(prompt)[:80]!r}. "
            "`sg_opd.data.prepare_dataset` makes them."
        )
    if turns and isinstance(prompt, str):
        raise ValueError(
            f"{place} is text, but with `{turns}` a rollout has several turns: pass a list of messages, "
            "[{'role': 'user', 'content': ...}]."
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
            content = prompt if isinstance(prompt, str) else prompt[-1].get("content")
            yield " ".join((text_of(content) or str(content)).split())


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


def check_box(train: Any, chat_template: Any) -> None:
    r"""Warn once where most prompts do not ask for the box in which `MathVerifier` looks, nor the chat template does.

    `\boxed` counts wherever it stands: in the question, a system message, an example; so does a sentence about an
    answer and a box. Of a streaming dataset the first row is looked at.
    """
    if hasattr(train, "__len__"):
        prompts = narrowed(train, ["prompt"])
        asked = [prompts[row]["prompt"] for row in rows_to_check(len(train))]
    else:
        asked = [row["prompt"] for row in islice(train, 1)]
    silent = sum(MENTIONS_BOX.search(str(prompt)) is None for prompt in asked)
    if 2 * silent > len(asked) and not MENTIONS_BOX.search(str(chat_template)):
        logger.warning(
            "%d of the %d prompts checked in `train_dataset` do not ask for \\boxed{}, where MathVerifier looks for "
            "the answer: a completion without a box is judged incorrect. Unless the student writes boxes anyway, ask "
            "for them as `sg_opd.data.INSTRUCTION` does, in the questions or in a system message.",
            *(silent, len(asked)),
        )


def narrowed(dataset: Any, columns: list[str]) -> Any:
    """With these columns only, so that looking at a row decodes no image; as it is where a transform makes the rows."""
    plain = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
    return dataset.select_columns(columns) if plain and {*columns} <= {*dataset.column_names} else dataset


def has_images(row: dict[str, Any]) -> bool:
    """Whether a row carries images, in a column of their own or within its messages."""
    contents = [message.get("content") for message in row["prompt"]] if isinstance(row.get("prompt"), list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return "image" in row or "images" in row or any(part.get("type") == "image" for part in parts)


def rows_to_check(length: int) -> range:
    """At most `ROWS_CHECKED` places, evenly spread over `length` rows."""
    return range(0, length, max(1, -(-length // ROWS_CHECKED)))
