r"""Reads relations: equations, inequalities, bounds in words such as `at least 5`, and membership in a set."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from .brackets import tops
from .forms import Condition, Equation, Expression, Form, Members, Number
from .quantities import LETTERS, MARK, quantity, unmarked

Reader = Callable[[str], Form | None]
# whether a text is of a kind, and its form: `None` where it has no meaning
Found = tuple[bool, Form | None]
NO: Found = (False, None)

MATHEMATICS = re.compile(r"[\d\\+*/^_=<>|%$]")
# words that make a bound of a number
QUALIFIERS = (
    (r"\ge", "(?:at least|no less than|not less than|no fewer than|greater than or equal to|a? ?minimum of) +(.+)"),
    (r"\le", "(?:at most|(?:no|not) more than|less than or equal to|up to|a? ?maximum of) +(.+)"),
    (r"\ne", "(?:not equal to|is not|not|cannot be|can't be|never|anything but|except|other than) +(.+)"),
    (">", "(?:more than|greater than|larger than|over|above) +(.+)"),
    ("<", "(?:less than|fewer than|smaller than|under|below) +(.+)"),
    (r"\ge", "(.+?) +(?:or (?:more|greater|above|higher|larger|over)|and (?:above|up|over|more))"),
    (r"\le", "(.+?) +(?:or (?:less|fewer|below|under|smaller|lower)|and (?:below|under|less))"),
    (r"\ge", r"([\d.,]+) ?\+"),
)
QUALIFIED = [(sign, re.compile(pattern, re.IGNORECASE)) for sign, pattern in QUALIFIERS]
ABOUT = re.compile(r"(?:about|approximately|roughly|exactly|around|approx\.?) +", re.IGNORECASE)
RELATION = re.compile(r"\\(?:le|ge|ne|approx)(?![A-Za-z])|:=|<=|>=|!=|==|[<>=]")
SIGNS = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "=", ":=": "="}
# relations that are compared sign by sign
FORMAL = re.compile(
    r"\\(?:equiv|notin|pmod|bmod|perp|parallel|cong|subset|subseteq|not|Rightarrow|Leftrightarrow|iff)(?![A-Za-z])"
)
SUBSCRIPT = r"(?:_(?:\{[^{}]{1,30}\}|\\?\w+))?'*"
ARGUMENTS = r"(?: ?\([^()=<>]{1,30}\))?"
POINTS = r"(?:[A-Z]'?){2,6}"
NAME = re.compile(
    rf"(?:\\(?!pi|infty|emptyset|ldots)[a-zA-Z]+|[A-Za-z]){SUBSCRIPT}(?:\^\{{?(?:\*|\(?[a-z]\)?|-1)\}}?)?{ARGUMENTS}"
    r"|\\(?:vec|hat|bar|tilde|overline|overrightarrow|widehat|mathcal|mathbb) ?"
    rf"\{{[^{{}}]{{1,10}}\}}{SUBSCRIPT}{ARGUMENTS}"
    r"|[A-Za-z]{1,3}(?: ?: ?[A-Za-z]{1,3})+"
    rf"|m? ?\\angle ?(?:{POINTS}|[A-Z])|\\triangle ?{POINTS}|\|?{POINTS}\|?|\[{POINTS}\]"
    rf"|(?:{MARK}?[{LETTERS}]{{2,20}} ?){{1,4}}{SUBSCRIPT}{ARGUMENTS}"
)
MEMBER_OF = re.compile(r"(?P<name>[A-Za-z]|\\[a-z]+) ?\\in(?![A-Za-z]) ?(?P<set>.+)")
VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?:_\w)?|\\(?:alpha|beta|gamma|theta|lambda|mu|phi)(?![a-z])")


def qualified(text: str, read: Reader) -> Found:
    """`at least 5`, `5 or more`, and a relation without its left side."""
    words = unmarked(text)
    about = ABOUT.match(words)
    if about and MATHEMATICS.search(words):
        return True, read(words[about.end() :])
    for sign, pattern in QUALIFIED:
        match = pattern.fullmatch(words)
        if match and MATHEMATICS.search(match[1]):
            return True, _bound(sign, read(match[1]))
    relation = RELATION.match(text)
    if relation and relation[0] not in ("=", ":=", "==", r"\approx"):
        return True, _bound(SIGNS.get(relation[0], relation[0]), read(text[relation.end() :]))
    return NO


def related(text: str, read: Reader) -> Found:
    """An equation, inequalities, or membership in a set."""
    member = MEMBER_OF.fullmatch(text)
    if member and not RELATION.search(text):
        return True, read(member["set"])
    if FORMAL.search(text):
        return NO
    parts, signs = _sides(text)
    if not signs:
        return NO
    if r"\approx" in signs:  # what is rounded after the answer itself is left away
        place = signs.index(r"\approx")
        exact = r" = ".join(parts[: place + 1])
        if place > 0 or not _is_name(parts[0]):
            return True, read(exact)
        signs = ["=" if sign == r"\approx" else sign for sign in signs]
    if not all(parts):
        return True, None
    if set(signs) != {"="}:
        latex = " ".join(itertools.chain(*itertools.zip_longest(map(_measure, parts), signs, fillvalue=""))).strip()
        letters = set(VARIABLE.findall(latex))
        return True, None if MARK in latex else Condition(latex, letters.pop() if len(letters) == 1 else "")
    return True, _equation(parts, read)


def _equation(parts: list[str], read: Reader) -> Form | None:
    value = read(parts[-1])
    if value is None:
        return None
    names = _names(parts[0])
    if names and len(parts) == 2 and isinstance(value, Members) and len(value.items) == len(names):
        sides = zip(names, value.items, strict=True)
        return Members("list", tuple(Equation((name, ""), item, name) for name, item in sides))
    return Equation(tuple(map(_measure, parts)), value, unmarked(parts[0]) if _is_name(parts[0]) else "")


def _bound(sign: str, value: Form | None) -> Form | None:
    """The condition of a bound; that of a quantity is the bound of its number."""
    latex = formula(value)
    return None if latex is None else Condition(f"x {sign} {latex}", "")


def formula(form: Form | None) -> str | None:
    """The LaTeX of a number or an expression, a quantity's without its unit; `None` for anything else."""
    form = getattr(form, "number", form)
    return form.latex if isinstance(form, Number | Expression) else None


def _measure(part: str) -> str:
    """A side of a relation without a unit."""
    measured = quantity(part)
    return (formula(measured) if measured else None) or (part if MARK in part else unmarked(part))


def _is_name(text: str) -> bool:
    """Whether a side is a name: `x`, `AB`, `f(x)`, a word; but not letters multiplied, as in `xy`."""
    is_product = text.isalpha() and text.isascii() and text.islower() and 1 < len(text) < 5
    return NAME.fullmatch(text) is not None and not is_product


def _names(text: str) -> list[str]:
    """The names of `(x, y)`, none of anything else."""
    names = [name.strip() for name in text[1:-1].split(",")] if text.startswith("(") and text.endswith(")") else []
    return names if len(names) > 1 and all(map(_is_name, names)) else []


def _sides(text: str) -> tuple[list[str], list[str]]:
    """The sides of relations outside of all brackets, and the relations between them."""
    outside, parts, signs, start = tops(text), [], [], 0
    for match in RELATION.finditer(text):
        if outside[match.start()]:
            parts.append(text[start : match.start()].strip())
            signs.append(SIGNS.get(match[0], match[0]))
            start = match.end()
    return [*parts, text[start:].strip()], signs
