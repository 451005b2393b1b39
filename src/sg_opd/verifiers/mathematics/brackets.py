"""What stands within which brackets, and the parts of a text between separators outside of all of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Set

MAX_DEPTH = 24  # of brackets; deeper is no everyday answer
TOKEN = re.compile(r"\\begin(?![A-Za-z])|\\end(?![A-Za-z])|\\.|.", re.DOTALL)
OPENING = frozenset(("(", "[", "{", "\\{", "\\begin"))
CLOSING = frozenset((")", "]", "}", "\\}", "\\end"))
BRACES = frozenset("{"), frozenset("}")
PARENTHESES = frozenset("("), frozenset(")")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")


def balanced(text: str) -> bool:
    """Whether braces, and brackets but for those of half-open intervals, close in their order, none too deep."""
    stack: list[str] = []
    escaped = text.replace("\\{", "\x01").replace("\\}", "\x02")
    for character in escaped:
        if character in "{([\x01":
            stack.append(character)
            if len(stack) > MAX_DEPTH:
                return False
        elif character in "})]\x02":
            pair = {"}": "{", ")": "([", "]": "[(", "\x02": "\x01"}[character]
            if not stack or stack.pop() not in pair:
                return False
    return not stack


def closing(text: str, start: int = 0, opening: Set[str] = BRACES[0], closes: Set[str] = BRACES[1]) -> int:
    """The place of the bracket that closes the one at `start`, by default of braces; -1 where none does."""
    depth = 0
    for token in TOKEN.finditer(text, start):
        depth += (token[0] in opening) - (token[0] in closes)
        if depth == 0:
            return token.end() - 1
    return -1


def tops(text: str) -> list[bool]:
    r"""For each place whether it is outside of all brackets and environments."""
    depth, found, place = 0, [], 0
    for token in TOKEN.finditer(text):
        depth -= token[0] in CLOSING
        found += [depth <= 0] * (token.end() - place)
        depth += token[0] in OPENING
        place = token.end()
    return found


def split(text: str, separator: re.Pattern) -> list[str]:
    """The parts between separators that are outside of all brackets."""
    if not separator.search(text):
        return [text]
    outside, parts, start = tops(text), [], 0
    for match in separator.finditer(text):
        if outside[match.start()] and match.end() > match.start():
            parts.append(text[start : match.start()])
            start = match.end()
    return [part for part in (*parts, text[start:]) if part.strip()]


def commas(text: str, is_within: bool) -> list[str]:
    """The parts between commas and semicolons; a comma of a number's thousands is none.

    Those are written without a space, and within brackets beside a separator that has one: `(123,456)` is a pair.
    """
    if "," not in text and ";" not in text:
        return [text]
    spaced = re.search(r", |;", text) is not None
    grouped = {i for match in THOUSANDS.finditer(text) for i in range(match.start(), match.end()) if text[i] == ","}
    outside = tops(text)
    marks = {place for place, character in enumerate(text) if character == "," and outside[place]}
    if (is_within and not spaced) or (not spaced and marks - grouped):
        grouped = set()
    places = sorted(marks - grouped | {i for i, character in enumerate(text) if character == ";" and outside[i]})
    parts = [text[start + 1 : end] for start, end in itertools.pairwise([-1, *places, len(text)])]
    return [part for part in parts if part.strip()]
