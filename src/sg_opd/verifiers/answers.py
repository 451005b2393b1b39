"""Answers as text: where a completion has its own, and what is decided of two without sympy.

Standard library only, and no expression of an answer is ever evaluated here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any

from .grader import units_agree

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
MAX_TAIL = 20_000  # characters after the last think delimiter in which a box is looked for
MAX_ANSWER = 1_000  # a longer answer is compared letter by letter only, never by sympy
MAX_GOLD = 4_000  # the same for a gold; below the number of digits that Python refuses to read


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
                start, content = begin, text[begin : token.start()]
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.end())
    return None if content is None else content.strip()


def gold_answer(gold: Any) -> str | None:
    """A dataset's gold as bare LaTeX: the last box of a worked answer, else the text itself; `None` where missing."""
    if gold is None or (isinstance(gold, Real) and not isinstance(gold, int) and not math.isfinite(gold)):
        return None
    if isinstance(gold, int) and gold.bit_length() > 3 * MAX_GOLD:  # Python writes out none of over 4,300 digits
        return None
    text = str(gold).strip()
    boxed = last_box(text)
    return " ".join(as_latex(text if boxed is None else boxed).split()) or None


def as_latex(text: str) -> str:
    """The text with signs that people type, such as ° or √, as LaTeX."""
    for sign, latex in TYPED.items():
        text = text.replace(sign, latex)
    return ROOT.sub(r"\\sqrt{\1}", text)


def plain_number(text: str) -> Decimal | None:
    """The value of a plain integer or decimal, with or without thousands separators; `None` for anything else."""
    text = undecorated(text).replace("\\,", "").replace("{,}", ",")
    if not text or not NUMBER.fullmatch(text) or not text[-1].isdigit():
        return None
    return Decimal(text.replace(",", ""))


def quantity(text: str) -> tuple[Fraction, str] | None:
    r"""A plain number and its unit, which may be empty: `25 dollars`, `5\text{ cm}`, `\$5`, `5`, `3 million`."""
    text = undecorated(text)
    whole = TEXT_COMMAND.fullmatch(text)
    match = QUANTITY.fullmatch(whole[1] if whole else text)
    number = plain_number(match["number"]) if match else None
    if match is None or number is None:
        return None
    value, words = Fraction(number), (match["text"] or match["words"] or "").split()
    while words and words[0].casefold().removesuffix("s") in SCALES:
        value *= SCALES[words.pop(0).casefold().removesuffix("s")]
    return value, " ".join(words)


def rational(text: str) -> Fraction | None:
    r"""The exact value of a number, `a/b`, `\frac{a}{b}`, a mixed number of these, or any of them in per cent."""
    text = undecorated(text)
    bare = PERCENT.sub("", text)
    number, match = plain_number(bare), RATIONAL.fullmatch(bare)
    if number is not None:
        return Fraction(number)
    if match is None:
        return None
    top, bottom = (int(match[a] or match[b]) for a, b in (("n", "top"), ("d", "bottom")))
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(top, bottom)
    return -value if match["sign"] == "-" else value


def integer_list(text: str) -> list[int] | None:
    r"""The sorted members of `1, 2` or `\{1, 2\}`; `None` for anything else."""
    text = undecorated(text).removeprefix("\\{").removesuffix("\\}")
    return sorted(map(int, text.split(","))) if INTEGERS.fullmatch(text) else None


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


def for_sympy(gold: str, answer: str) -> tuple[str, str]:
    r"""Both without spacing and full stops at their ends, and without `\%` where both have it: math-verify reads no
    `\sqrt{8}.` and no `\frac{1}{2}\%`."""
    gold, answer = EDGE.sub("", gold), EDGE.sub("", answer)
    if PERCENT.search(gold) and PERCENT.search(answer):
        gold, answer = PERCENT.sub("", gold), PERCENT.sub("", answer)
    return gold, answer


def canonical_answer(answer: str) -> Hashable:
    """What two ways to write an answer have in common, for counting votes: an exact number's value, else the text."""
    answer = as_latex(answer)
    value = rational(answer) if len(answer) <= MAX_ANSWER else None
    return normalised(answer) if value is None else value


def quick_verdict(gold: str, answer: str) -> float | None:
    """The verdict where no sympy is needed, else `None`: equal texts, plain numbers, words, over-long answers."""
    a, b = normalised(gold), normalised(answer)
    if a == b or (len(a) == 1 and a in "ABCDEFGHIJ" and a == b.upper()):
        return 1.0
    if len(gold) > MAX_GOLD:
        return None
    if len(answer) > MAX_ANSWER:
        return 0.0
    if is_false(answer) or another_base(a, b):
        return 0.0
    said = [sorted(CHANGING.findall(text.casefold())) for text in (gold, answer)]
    if any(set(words) - SCALES.keys() for words in said) and said[0] != said[1]:
        return 0.0
    members = integer_list(gold)
    if members is not None and members == integer_list(answer):
        return 1.0
    some, other = quantity(gold), quantity(answer)
    if some is not None and other is not None:
        agree = not some[1] or not other[1] or units_agree(some[1], other[1])
        return float(some[0] == other[0] and agree)
    if said[0] != said[1]:
        return 0.0
    p, q = rational(gold), rational(answer)
    if p is not None and q is not None:
        if p == q:
            return 1.0
        if "." not in gold + answer and "%" not in gold + answer:  # else a matter of rounding, or of per cent
            return 0.0
    if is_text(gold):
        return float(a.casefold() == b.casefold())
    if a.casefold() == b.casefold() == "no":
        return 1.0
    if a.isalpha() and b.isalpha() and len(a) > 2:  # words, but for anagrams, which may be products
        if a.casefold() == b.casefold():
            return 1.0
        if sorted(a.casefold()) != sorted(b.casefold()):
            return 0.0
    return None


def is_false(text: str) -> bool:
    """Whether it is an equation of exact numbers that are not equal, of which math-verify would read the last."""
    values = {rational(side) for side in text.split("=")} if "." not in text and "%" not in text else set()
    return None not in values and len(values) > 1


def another_base(a: str, b: str) -> bool:
    """Whether both are numerals, of different bases."""
    bases = BASE.search(a), BASE.search(b)
    return bases[0] is not None and bases[1] is not None and bases[0][1] != bases[1][1]


def is_readable(gold: str) -> bool:
    """Whether a gold can be compared without sympy: words, a number with or without a unit, a fraction."""
    return is_text(gold) or normalised(gold).isalpha() or quantity(gold) is not None or rational(gold) is not None


def is_text(gold: str) -> bool:
    """Whether a gold is nothing but words in text commands."""
    return TEXT_COMMAND.sub("", undecorated(gold)).strip() == "" and any(map(str.isalpha, gold))
