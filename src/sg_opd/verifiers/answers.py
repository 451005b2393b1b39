r"""Finds answers in texts: a completion's `\boxed{}`, a reference answer within a worked solution."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import Any

MAX_TAIL = 20_000  # characters after the last think delimiter in which an answer is looked for
MAX_ANSWER = 1_000  # a longer answer is not read
MAX_REFERENCE = 4_000  # the same for a reference answer; below the number of digits that Python refuses to read
THINK = re.compile(r"<(/?)(?:think|thinking)>|<\|(end|begin)_of_thought\|>")
BOX_TOKEN = re.compile(r"(?<!\\)\\+(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?P<brace>\{)?|\\.|[{}]", re.DOTALL)
# what a box without braces holds: a number, a command with its arguments, or a letter
BARE = re.compile(
    r"[+-]?\d[\d,]*(?:\.\d+)?%?|\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)|\\sqrt\{[^{}]*\}|[A-Za-z]"
)
# what may stand between two boxes of one answer beside a comma or a word: spacing, delimiters, Markdown's stars
BETWEEN = re.compile(r"\\q?quad|\\[,;:! ()\[\]]|\\(?:text|mbox|mathrm)\s*\{|[\s$*~}]|\\\\")
JOINT = re.compile(r"(?:[,;，、](?:and|or|&|或|和)?|(?:and|or|&|或|和)),?(?:\\?[A-Za-z](?:_(?:\w|\{\w{1,9}\}))?=)?")  # noqa: RUF001


def extract_answer(completion: str) -> str | None:
    r"""The content of the last `\boxed{}` after the last think delimiter; `None` without one. See `last_box`.

    A think block that was opened and never closed hides what follows it: such a completion has no answer yet.
    """
    said = after_thinking(completion)
    return None if said is None else last_box(said)


def after_thinking(completion: str) -> str | None:
    """What stands after the last think delimiter, its last 20,000 characters.

    `None` where a think block was opened and never closed: nothing is said yet.
    """
    delimiters = list(THINK.finditer(completion))
    if delimiters:
        last = delimiters[-1]
        if last[1] == "" or last[2] == "begin":
            return None
        completion = completion[last.end() :]
    return completion[-MAX_TAIL:]


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, or the contents of the last ones where a list gives each member its own.

    A box within another is part of that one. `\boxed 5` has no braces and holds a number, a fraction or a letter; one
    whose braces do not close is none. One pass over `text`.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    members = [boxes[-1]]
    words = []
    for box in reversed(boxes[:-1]):
        between = BETWEEN.sub("", text[box[1] : members[0][0]][:61])
        if not JOINT.fullmatch(between) or len(text[box[1] : members[0][0]]) > 60:
            break
        members.insert(0, box)
        words.append(between)
    contents = list(dict.fromkeys(content for _, _, content in members))
    return (" or " if any("or" in word or "或" in word for word in words) else ", ").join(contents)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each box that is within no other one, in order."""
    opened: list[tuple[int, int] | None] = []  # where a box and its content begin, None for an ordinary brace
    found: list[tuple[int, int, str]] = []
    for token in BOX_TOKEN.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                while found and found[-1][0] > begin[0]:  # within this one
                    found.pop()
                found.append((begin[0], token.end(), text[begin[1] : token.start()].strip(" \t\n")))
        elif token["brace"]:
            opened.append((token.start(), token.end()))
        elif len(token[0]) > 2 and (bare := BARE.match(text, token.end())):
            found.append((token.start(), bare.end(), bare[0]))
    return found


def reference_answer(solution: Any) -> str | None:
    """A `solution` as text: the last box of a worked one, else the whole; `None` where there is none.

    A number that is not finite is missing; so is an integer longer than `MAX_REFERENCE` digits, which Python refuses to
    write.
    """
    if solution is None or (
        isinstance(solution, Real) and not isinstance(solution, int) and not math.isfinite(solution)
    ):
        return None
    if isinstance(solution, int) and solution.bit_length() > 3 * MAX_REFERENCE:
        return None
    text = str(solution).strip()
    boxed = last_box(text)
    return " ".join((text if boxed is None else boxed).split()) or None
