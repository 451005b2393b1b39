"""Prompts, the student's and the teacher's own: what each model reads of a row, and what is verified of it.

A row's `teacher_prompt`, where it has one, is what the teacher reads in place of `prompt`, to score completions and to
propose them: the worked solution, a hint, a system prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import TEACHER_PROMPT, plain_messages
from ..teachers.protocol import padded
from ..teachers.server import ServerTeacher
from ..teachers.several import Teachers, named
from .datasets import narrowed, rows_to_check

logger = get_logger(__name__)  # of the main process only

TEMPLATE_TOKENS = 64  # at most, that a chat template adds to a prompt
Tokenize = Callable[[list], tuple]  # the trainer's `tokens_of`: the ids of prompts of one kind come first


def readable(prompts: list, as_they_are: bool) -> list:
    """Prompts with text in parts as one text a message, for templates of text models leave parts out."""
    return prompts if as_they_are else [*map(plain_messages, prompts)]


def read_by_teacher(row: dict[str, Any]) -> Any:
    """The prompt that the teacher reads, text or messages: the row's `teacher_prompt`, else its `prompt`."""
    own = row.get(TEACHER_PROMPT)
    return row.get("prompt") if own is None else own


@dataclass(frozen=True)
class RowsOfTeachers:
    """The training set's rows, by the teacher whose they are."""

    dataset: Any  #: `None` where environments supply the prompts
    column: str  #: with a teacher's name in each row, where there are several
    tokenize: Tokenize

    def places(self, name: str | None) -> list[int] | None:
        """The rows of a teacher, by number; `None` is all of them: of a single teacher, or of a stream."""
        if name is None or not hasattr(self.dataset, "__len__"):
            return None
        given = (row.get(self.column) for row in narrowed(self.dataset, [self.column]))
        return [row for row, teacher in enumerate(given) if teacher == name]

    def of(self, name: str | None) -> Any:
        """The rows themselves, as a dataset."""
        places = self.places(name)
        return self.dataset if places is None else self.dataset.select(places)

    def read(self, name: str | None) -> Any:
        """The rows with what the teacher reads as their `prompt`; `None` where there is no dataset."""
        rows = self.of(name)
        return None if rows is None else ({"prompt": read_by_teacher(row)} for row in rows)


def has_own_prompts(dataset: Any) -> bool:
    """Whether the teacher reads another prompt than the student in any row; of a stream, whether it has the column."""
    if dataset is None or not any(TEACHER_PROMPT in row for row in islice(dataset, 1)):
        return False
    return not hasattr(dataset, "__len__") or any(read_by_teacher(row) != row.get("prompt") for row in _both(dataset))


def _both(dataset: Any) -> Any:
    """A dataset's rows with the prompts alone, where it is one whose rows need not be made first."""
    return narrowed(dataset, ["prompt", TEACHER_PROMPT])


def tokenized(prompts: Sequence[Any], tokenize: Tokenize) -> list[list[int]]:
    """The token ids of prompts, texts and messages among each other."""
    ids: dict[int, list[int]] = {}
    for text in (True, False):
        if rows := [row for row, prompt in enumerate(prompts) if isinstance(prompt, str) == text]:
            ids |= zip(rows, tokenize([prompts[row] for row in rows])[0], strict=True)
    return [ids[row] for row in range(len(prompts))]


def teacher_prompt_ids(
    rows: Sequence[dict[str, Any]], prompt_ids: Sequence[list[int]], tokenize: Tokenize
) -> list[list[int]] | None:
    """What the teacher reads of each row, as token ids: `prompt_ids` where it has no prompt of its own there.

    `None` where it has none in any row.
    """
    own = {row: given for row, of_row in enumerate(rows) if (given := of_row.get(TEACHER_PROMPT)) is not None}
    if not own:
        return None
    ids = dict(zip(own, tokenized([*own.values()], tokenize), strict=True))
    return [ids.get(row, student) for row, student in enumerate(prompt_ids)]


def teacher_prompt_tensors(ids: list[list[int]] | None, pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """`teacher_prompt_ids` and `teacher_prompt_mask`, both (B, P), padded left; none where the teacher has no own."""
    if ids is None:
        return {}
    tokens, mask = padded(ids, pad_token_id, "left", device)
    return {"teacher_prompt_ids": tokens, "teacher_prompt_mask": mask}


def as_teacher_reads(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with the teacher's prompts in place of the student's; the completions stay, which follow either."""
    if "teacher_prompt_ids" not in batch:
        return batch
    return {**batch, "prompt_ids": batch["teacher_prompt_ids"], "prompt_mask": batch["teacher_prompt_mask"]}


def check_bos(dataset: Any, tokenizer: PreTrainedTokenizerBase, column: str = "prompt") -> None:
    """Refuse text prompts that begin with the tokenizer's BOS, before which tokenising puts another."""
    token = tokenizer.bos_token
    rows = rows_to_check(len(dataset)) if hasattr(dataset, "__len__") else range(1)  # of a stream the first
    given = (dataset[row] for row in rows) if len(rows) > 1 else iter([next(iter(dataset))])
    for row, prompt in zip(rows, (of_row.get(column) for of_row in given), strict=True):
        if not (token and isinstance(prompt, str) and prompt.startswith(token)):
            continue
        if tokenizer(prompt)["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
            raise ValueError(
                f"`{column}` in `train_dataset`, row {row} begins with {token!r}, and the tokenizer puts another "
                "before it: the models would see two. Pass messages instead of text, or take it off: "
                f"dataset.map(lambda row: {{'{column}': row['{column}'].removeprefix({token!r})}})."
            )
        return  # the tokenizer puts none


def check_prompts(
    dataset: Any, tokenize: Tokenize, completion: int, own: int | None, other: int | None, served: bool
) -> None:
    """Refuse prompts that fill the context; warn once where prompt and completion together may pass it.

    `tokenize` is the trainer's own, `completion` is `max_completion_length`, `own` and `other` are the student's and
    the teacher's context in tokens. A teacher that is `served` needs room for one token more, and would refuse a longer
    sequence in the middle of a run: every row that may be one is looked at.
    """
    if not isinstance(dataset, Dataset):
        return
    server = other if served else None
    if has_own_prompts(dataset):
        _check_lengths(dataset, "prompt", tokenize, completion, own)
        _check_lengths(dataset, TEACHER_PROMPT, tokenize, completion, other, server)
    else:
        context = min((size for size in (own, other) if size), default=None)
        _check_lengths(dataset, "prompt", tokenize, completion, context, server)


def check_read(
    rows: RowsOfTeachers, tokenizer: PreTrainedTokenizerBase, completion: int, own: int | None, teachers: Teachers
) -> None:
    """As `check_bos` and `check_prompts`, of one teacher or of several, each for its rows."""
    for column in ("prompt", TEACHER_PROMPT):
        check_bos(rows.dataset, tokenizer, column)
    of_all = rows.dataset, rows.tokenize, completion
    if teachers.only is not None:
        check_prompts(*of_all, own, teachers.only.context, isinstance(teachers.only, ServerTeacher))
        return
    check_prompts(*of_all, own, None, served=False)
    for name, teacher in teachers.by_name.items():
        server = teacher.context if isinstance(teacher, ServerTeacher) else None
        if isinstance(rows.dataset, Dataset) and (of_teacher := rows.places(name)):
            with named(name):
                part = rows.dataset.select(of_teacher)
                _check_lengths(part, TEACHER_PROMPT, *of_all[1:], teacher.context, server, of_teacher)


def _check_lengths(
    dataset: Dataset,
    column: str,
    tokenize: Tokenize,
    completion: int,
    context: int | None,
    server: int | None = None,
    places: Sequence[int] | None = None,
) -> None:
    """As `check_prompts`, of the prompts that a model reads; `server` is the context where that is a server's.

    `places` are the numbers of the rows, where these are a part of the training set.
    """
    if not context:
        return
    rows, read = {*rows_to_check(len(dataset))}, _both(dataset)
    if server:  # a text has at most as many tokens as bytes
        short = server - completion - TEMPLATE_TOKENS
        rows |= {row for row, prompt in enumerate(_prompts(read, column)) if len(str(prompt).encode()) > short}
    checked = sorted(rows)
    lengths = [*map(len, tokenized([*_prompts((read[row] for row in checked), column)], tokenize))]
    too_long = [row for row, length in zip(checked, lengths, strict=True) if length >= context]
    noun, whose = ("prompt", "the models'") if column == "prompt" else ("teacher prompt", "the teacher's")
    if too_long:
        raise ValueError(
            f"{len(too_long)} {noun}s in `train_dataset` fill {whose} context of {context} tokens, first row "
            f"{places[too_long[0]] if places else too_long[0]}. Filter the dataset by prompt length."
        )
    needed = max(lengths) + completion
    if server and needed + 1 > server:
        raise ValueError(
            f"The longest {noun} in `train_dataset` ({max(lengths)} tokens), `max_completion_length` ({completion}) "
            f"and one more token pass the {server} of the teacher's server: start it with --max-model-len "
            f"{needed + 1}, shorten `max_completion_length`, or filter the dataset."
        )
    if needed > context:
        logger.warning(
            "The longest %s in `train_dataset` (%d tokens) and `max_completion_length` (%d) pass %s context of %d.",
            *(noun, max(lengths), completion, whose, context),
        )


def _prompts(rows: Any, column: str) -> Iterator[Any]:
    """The prompts that the student reads, or, where `column` is the teacher's, the teacher."""
    return (read_by_teacher(row) if column == TEACHER_PROMPT else row["prompt"] for row in rows)
