"""Think blocks that a prompt opens, as some chat templates do: the delimiter is then no part of the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .answers import THINK, after_thinking, extract_answer

SPLIT_OFF = ("reasoning_content", "thinking")  # where GRPOTrainer's parsers put a think block that was closed
TAIL = 32  # tokens at the end of a prompt in which a delimiter is looked for


class Openings:
    """The think delimiters that prompts end with, and their completions as a verifier is to see them."""

    def __init__(self, processing_class: Any, prompt_ids: Sequence[Sequence[int]]) -> None:
        self.processing_class = processing_class
        tails = processing_class.batch_decode([list(ids[-TAIL:]) for ids in prompt_ids], skip_special_tokens=False)
        self.by_prompt = [opening_of(tail) for tail in tails]

    def before(
        self, prompts: Sequence[int], completions: Sequence[Any], completion_ids: Sequence[list[int]]
    ) -> list[Any]:
        """`opened` completions of prompts, which are given by their places; texts or messages, and their token ids."""
        ids = [ids if self.by_prompt[place] else [] for place, ids in zip(prompts, completion_ids, strict=True)]
        wholes = self.processing_class.batch_decode(ids, skip_special_tokens=False) if any(ids) else [""] * len(ids)
        of_prompts = zip(prompts, completions, wholes, strict=True)
        return [opened(self.by_prompt[place], completion, whole) for place, completion, whole in of_prompts]


def opening_of(prompt: str) -> str:
    """The think delimiter that a prompt ends with and leaves open, with the space that follows; empty without one."""
    delimiters = list(THINK.finditer(prompt))
    if not delimiters or prompt[delimiters[-1].end() :].strip():
        return ""
    opening = prompt[delimiters[-1].start() :]
    return opening if extract_answer(rf"{opening}\boxed{{0}}") is None else ""  # not a block that is closed again


def opened(opening: str, completion: Any, whole: str | None = None) -> Any:
    """A completion, plain or as messages, as a verifier is to see it: with the think delimiter of its prompt.

    A message from which a parser split the think block off has none any more and stays as it is. So does a completion
    that closed its block with a delimiter which its text has lost, as a special token or to a parser: the opening would
    hide the answer. `whole` tells that: the completion's tokens as text, special ones too; `None` is the text itself.
    """
    if not opening or not completion:
        return completion
    if isinstance(completion, str):
        return completion if _closing_lost(opening, completion, whole) else opening + completion
    *earlier, last = completion
    content = last.get("content")
    if not isinstance(content, str) or any(last.get(name) for name in SPLIT_OFF):
        return completion
    return completion if _closing_lost(opening, content, whole) else [*earlier, {**last, "content": opening + content}]


def _closing_lost(opening: str, text: str, whole: str | None) -> bool:
    closed = whole is not None and after_thinking(opening + whole) is not None
    return closed and after_thinking(opening + text) is None
