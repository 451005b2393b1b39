r"""Answers as text: finds a completion's `\boxed{}`, and compares two answers where that needs no sympy.

Standard library only; no expression of an answer is evaluated here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from fractions import Fraction
from numbers import Real
from typing import Any

from .grader import Task

MAX_TAIL = 20_000  # characters after the last think delimiter in which a box is looked for
MAX_ANSWER = 1_000  # a longer answer is compared letter by letter only, never by sympy
MAX_REFERENCE = 4_000  # the same for a reference answer; below the number of digits that Python refuses to read
THINK = re.compile(r"<(/?)(?:think|thinking)>|<\|(end|begin)_of_thought\|>")
BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
INTEGERS = re.compile(r"\s*-?\d+\s*(?:,\s*-?\d+\s*)+")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
QUANTITY = re.compile(
    r"(?:\\?\$|\\pounds|[€£])?\s*(?P<number>[+-]?[\d.,{}\\]*\d)\s*~?\s*"
    r"(?:(?P<words>(?<=[\s~])[A-Za-z]{3,}(?: [A-Za-z]+)*)"
    r"|\\(?:text|mathrm)\s*\{\s*(?P<text>[A-Za-z]+(?: [A-Za-z]+)*)\s*\})?"
)
RATIONAL = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s+(?=\d)|\s*(?=\\)))?"
    r"(?:(?P<n>\d+)\s*/\s*(?P<d>\d+)|\\[dt]?frac\s*\{\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\})"
)
PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*percent\s*\}|percent)\s*$")
UNIT = re.compile(r"\\(?:text|mathrm)\s*\{\s*([A-Za-z]+)\s*\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?\s*$")
# what people type for LaTeX, in the forms math-verify does not read
TYPED = {"°": r"^\circ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", r"\varnothing": r"\emptyset"}
ROOT = re.compile(r"√\s*\(?(\w+)\)?")
NO_SPACE = re.compile(r"\\[,!]|\\left(?![a-z])|\\right(?![a-z])")
WIDE_SPACE = re.compile(r"~|\\[;: ]|\\q?quad\b")
LONE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
# words after a number that make it another one, where a unit may stand
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
CHANGING = re.compile(
    r"[\d}][\s~]*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?(?:is\s+)?(minus|plus|negative|squared|cubed|factorial|divided"
    rf"|times(?=\s+\w)|not|wrong|incorrect|false|{'|'.join(SCALES)})"
)
BASE = re.compile(r"\d_\{?(\d+)\}?$")  # of a numeral
EDGE = re.compile(r"^(?:\s|~|\\[,!;: ])+|(?:\s|~|\\[,!;: ]|(?<!\\right)\.)+$")  # which math-verify stumbles over
CHOICE = re.compile(r"^\(([A-Za-z])\)$")  # one letter in parentheses
NAME = re.compile(r"\\[A-Za-z]+|[A-Za-z]")  # a command or a letter
GREEK_CAPITALS = {"\\Gamma", "\\Delta", "\\Theta", "\\Lambda", "\\Xi", "\\Pi", "\\Sigma", "\\Phi", "\\Psi", "\\Omega"}


def extract_answer(completion: str) -> str | None:
    r"""The content of the last complete `\boxed{}` after the last think delimiter; `None` without one.

    A think block that was opened and never closed hides what follows it: such a completion has no answer yet.
    """
    delimiters = list(THINK.finditer(completion))
    if delimiters:
        last = delimiters[-1]
        if last[1] == "" or last[2] == "begin":
            return None
        completion = completion[last.end() :]
    return last_box(completion[-MAX_TAIL:])


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}` or `\fbox{}` whose braces close, or `None`; one pass over `text`."""
    opened: list[int | None] = []  # where a box's content begins, None for an ordinary brace
    start, content = -1, None
    for token in BOX_TOKEN.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None and begin > start:
                start, content = begin, text[begin : token.start()].strip()
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.end())
    return content


def reference_answer(solution: Any) -> str | None:
    """A `solution` as bare LaTeX: the last box of a worked one, else the text itself; `None` where missing."""
    if solution is None or (
        isinstance(solution, Real) and not isinstance(solution, int) and not math.isfinite(solution)
    ):
        return None
    if (
        isinstance(solution, int) and solution.bit_length() > 3 * MAX_REFERENCE
    ):  # Python writes out 4,300 digits at most
        return None
    text = str(solution).strip()
    boxed = last_box(text)
    return " ".join(as_latex(text if boxed is None else boxed).split()) or None


def as_latex(text: str) -> str:
    """The text with signs that people type, such as ° or √, as LaTeX."""
    for sign, latex in TYPED.items():
        text = text.replace(sign, latex)
    return ROOT.sub(r"\\sqrt{\1}", text)


def canonical_answer(answer: str) -> Hashable:
    """What two ways to write an answer have in common, for counting votes: an exact number's value, else the text."""
    answer = as_latex(answer)
    value = rational(answer) if len(answer) <= MAX_ANSWER else None
    return normalised(answer) if value is None else value


def is_readable(reference: str) -> bool:
    """Whether a reference answer can be compared without sympy: words, a number with or without a unit, a fraction."""
    is_number = quantity(reference) is not None or rational(reference) is not None
    return is_number or is_text(reference) or normalised(reference).isalpha()


def quick_verdict(reference: str, answer: str) -> float | None:
    """The verdict where no sympy is needed, else `None`: equal texts, plain numbers, words, over-long answers."""
    a, b = normalised(reference), normalised(answer)
    if a == b or (len(a) == 1 and a in "ABCDEFGHIJ" and a == b.upper()):
        return 1.0
    if len(reference) > MAX_REFERENCE:
        return None
    if len(answer) > MAX_ANSWER or is_false(answer) or len({base[1] for base in map(BASE.search, (a, b)) if base}) > 1:
        return 0.0
    said = [sorted(CHANGING.findall(text.casefold())) for text in (reference, answer)]
    if any(set(words) - SCALES.keys() for words in said) and said[0] != said[1]:
        return 0.0
    members = integer_list(reference)
    if members is not None and members == integer_list(answer):
        return 1.0
    some, other = quantity(reference), quantity(answer)
    if some is not None and other is not None:
        agree = not some[1] or not other[1] or units_agree(some[1], other[1])
        return float(some[0] == other[0] and agree)
    if said[0] != said[1]:
        return 0.0
    p, q = rational(reference), rational(answer)
    if p is not None and q is not None and (p == q or not {".", "%"} & {*reference, *answer}):
        return float(p == q)  # with a point or in per cent, what differs may still be equal when rounded
    a, b = a.casefold(), b.casefold()
    if is_text(reference) or a == b == "no" or (a == b and is_word(a)):
        return float(a == b)
    return 0.0 if is_word(a) and b.isalpha() and sorted(a) != sorted(b) else None  # anagrams may be equal products


def plain_number(text: str) -> Fraction | None:
    """The value of a plain integer or decimal, with or without thousands separators; `None` for anything else."""
    text = undecorated(text).replace("\\,", "").replace("{,}", ",")
    return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) and text[-1:].isdigit() else None


def quantity(text: str) -> tuple[Fraction, str] | None:
    r"""A plain number and its unit, which may be empty: `25 dollars`, `5\text{ cm}`, `\$5`, `5`, `3 million`."""
    text = undecorated(text)
    whole = TEXT_COMMAND.fullmatch(text)
    match = QUANTITY.fullmatch(whole[1] if whole else text)
    number = plain_number(match["number"]) if match else None
    if match is None or number is None:
        return None
    words = (match["text"] or match["words"] or "").split()
    while words and words[0].casefold().removesuffix("s") in SCALES:
        number *= SCALES[words.pop(0).casefold().removesuffix("s")]
    return number, " ".join(words)


def rational(text: str) -> Fraction | None:
    r"""The exact value of a number, `a/b`, `\frac{a}{b}`, a mixed number of these, or any of them in per cent."""
    bare = PERCENT.sub("", undecorated(text))
    number, match = plain_number(bare), RATIONAL.fullmatch(bare)
    if number is not None or match is None:
        return number
    top, bottom = int(match["n"] or match["top"]), int(match["d"] or match["bottom"])
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(top, bottom)
    return -value if match["sign"] == "-" else value


def integer_list(text: str) -> list[int] | None:
    r"""The sorted members of `1, 2` or `\{1, 2\}`; `None` for anything else."""
    text = undecorated(text).removeprefix("\\{").removesuffix("\\}")
    return sorted(map(int, text.split(","))) if INTEGERS.fullmatch(text) else None


def is_false(text: str) -> bool:
    """Whether it is an equation of exact numbers that are not equal, of which math-verify would read the last."""
    values = {rational(side) for side in text.split("=")} if "." not in text and "%" not in text else set()
    return None not in values and len(values) > 1


def is_word(text: str) -> bool:
    """Whether a normalised answer is letters only, and too many for a product of variables such as `xy`."""
    return len(text) > 2 and text.isalpha()


def is_text(reference: str) -> bool:
    """Whether a reference answer is nothing but words in text commands."""
    return TEXT_COMMAND.sub("", undecorated(reference)).strip() == "" and any(map(str.isalpha, reference))


def undecorated(text: str) -> str:
    """Without surrounding space, math delimiters and a final full stop."""
    text = text.strip().removesuffix("\\\\").removesuffix(".").removeprefix("\\approx").strip()
    for left, right in (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("$", "$")):
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
    return text.removesuffix(".")


def normalised(text: str) -> str:
    """For comparison letter by letter: besides, without text commands, and without spacing but between two digits."""
    text = TEXT_COMMAND.sub(r"\1", undecorated(text).replace("dfrac", "frac").replace("tfrac", "frac"))
    text = " ".join(WIDE_SPACE.sub(" ", NO_SPACE.sub("", text)).split())
    return CHOICE.sub(r"\1", LONE_SPACE.sub("", text))


def as_task(reference: str, answer: str) -> Task:
    r"""The comparison for sympy, without what math-verify does not read: spacing and full stops at the ends, as in
    `\sqrt{8}.`, `\%` where both have it, and a capital beside its small letter."""
    words = is_word(normalised(reference))
    reference, answer = EDGE.sub("", reference), EDGE.sub("", answer)
    if PERCENT.search(reference) and PERCENT.search(answer):
        reference, answer = PERCENT.sub("", reference), PERCENT.sub("", answer)
    return Task(*distinct_cases(reference, answer), words, same_unit(reference, answer))


def distinct_cases(a: str, b: str) -> tuple[str, str]:
    """Both with a capital renamed where its small letter occurs too: math-verify reads `m/M` as 1, so it gets `m/b`."""
    names = {*NAME.findall(a), *NAME.findall(b)}
    free = iter(letter for letter in "bcfghjkqtuvwyzampnrsxl" if not names & {letter, letter.upper()})
    renamed = {
        name: f"{{{next(free)}}}" if name.startswith("\\") else next(free)
        for name in sorted(names)
        if name != name.lower() and name.lower() in names and (len(name) == 1 or name in GREEK_CAPITALS)
    }
    first, second = (NAME.sub(lambda match: renamed.get(match[0], match[0]), text) for text in (a, b))
    return first, second


def same_unit(reference: str, answer: str) -> bool:
    """False where both end in a unit and neither abbreviates the other, as cm does centimetres."""
    a, b = UNIT.search(reference), UNIT.search(answer)
    return a is None or b is None or (a[2] == b[2] and units_agree(a[1], b[1]))


def units_agree(a: str, b: str) -> bool:
    """Whether one unit is the other or abbreviates it."""
    short, long = sorted((a.casefold(), b.casefold()), key=len)
    letters = iter(long)
    return short[0] == long[0] and all(letter in letters for letter in short.removesuffix("s"))
