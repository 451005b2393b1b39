"""Think blocks that a prompt opens, as some chat templates do: the delimiter is then no part of the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .answers import THINK, extract_answer

SPLIT_OFF = ("reasoning_content", "thinking")  # where GRPOTrainer's parsers put a think block that was closed
TAIL = 32  # tokens at the end of a prompt in which a delimiter is looked for


def openings(processing_class: Any, prompt_ids: Sequence[Sequence[int]]) -> list[str]:
    """The think delimiter that each prompt ends with, as text, which `opened` puts before its completions."""
    tails = processing_class.batch_decode([list(ids[-TAIL:]) for ids in prompt_ids], skip_special_tokens=False)
    return [opening_of(tail) for tail in tails]


def opening_of(prompt: str) -> str:
    """The think delimiter that a prompt ends with and leaves open, with the space that follows; empty without one."""
    delimiters = list(THINK.finditer(prompt))
    if not delimiters or prompt[delimiters[-1].end() :].strip():
        return ""
    opening = prompt[delimiters[-1].start() :]
    return opening if extract_answer(rf"{opening}\boxed{{0}}") is None else ""  # not a block that is closed again


def opened(opening: str, completion: Any) -> Any:
    """A completion, plain or as messages, as a verifier is to see it: with the think delimiter of its prompt.

    A message from which a parser split the think block off has none any more and stays as it is.
    """
    if not opening or not completion:
        return completion
    if isinstance(completion, str):
        return opening + completion
    *earlier, last = completion
    content = last.get("content")
    if not isinstance(content, str) or any(last.get(name) for name in SPLIT_OFF):
        return completion
    return [*earlier, {**last, "content": opening + content}]
