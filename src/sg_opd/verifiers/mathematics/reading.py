r"""Reads an answer's text: what kind of thing it is, and its parts.

`read` returns a form of `forms`, or `None` where the text has no meaning that can be compared: what stands for a
missing answer, prose, unbalanced LaTeX. Standard library only; no expression is evaluated here.
"""

from __future__ import annotations

import ast
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Literal

from .brackets import CLOSING, OPENING, balanced, closing, commas, split
from .forms import Choice, Equation, Expression, Family, Form, Interval, Labelled, Members, Number, Special, Words
from .notation import plain
from .numerals import literal, number
from .quantities import LETTERS, MARK, compound, money, quantity, unmarked
from .relations import MATHEMATICS, NO, QUALIFIED, RELATION, Found, qualified, related

DEEPEST = 12  # forms within forms
TEXT = re.compile(r"\\text\{([^{}]*)\}")
RUN = re.compile(rf"{MARK}?[{LETTERS}]+(?:'[a-z]+)?")
# what stands for a missing answer in datasets, or refers to one
SENTINEL = re.compile(
    r"None|NONE|\[ ?(?:None|nan|null)? ?\]|\( ?\)|-+|\?+|\\text\{N/A\}"
    r"|\(?(?i:nan|nat|null|n\.?a\.?|n/a|#n/a|<na>|missing|tbd|todo"
    r"|unknown|answer|solution|prove(?: it)?|proof\b.*|q\.?e\.?d\.?|no (?:final )?answer(?: found)?|.{0,30}\bomitted"
    r"|see (?:the )?(?:solution|proof|above|figure|explanation|below|text|diagram|graph)|answers? (?:may|will|can) vary"
    r"|(?:the )?(?:answer|proof|rest) is left .*|not (?:found|available|given|provided|applicable))\)?"
    r"|(?:证明|答案|解析|解答)?略|证明[::]?.*|(?:详)?见(?:解析|证明|答案|图)|无答案|无"
)
# words of sentences: beside digits or formulas they make prose of it, which nothing can be compared with
PROSE = (
    "is are was were be so the it its hence thus therefore then because since get gets gives give adding there that"
    " this which have has had can will would should must equals let find with our you they he she his her their"
    " we us if"
)
PROSE_WORD = re.compile(rf"(?<![\\{LETTERS}])(?:{'|'.join(PROSE.split())})(?![{LETTERS}])", re.IGNORECASE)
MOST_WORDS = 6  # outside of formulas, beside a formula
LETTER = re.compile(rf"\(?{MARK}?([A-J])\)?[.):]?")
OPTION = re.compile(
    rf"(?:\({MARK}?(?P<framed>[A-J])\)|{MARK}?(?P<bare>[A-J])(?: ?[).:](?!\d+$|\d+:)))[.:]? ?(?P<rest>.+)"
)
CHOICE_WORD = re.compile(rf"{MARK}?(?:option|choice|answer) ?:? ?(?=\(?{MARK}?[A-J]\)?$)", re.IGNORECASE)
OR = re.compile(
    rf",? ?(?<![{LETTERS}]){MARK}?or(?![{LETTERS}]) ?,?|,? ?\\lor(?![A-Za-z]) ?(?=[A-Za-z] ?[<>=\\])", re.IGNORECASE
)
AND = re.compile(
    rf",? ?(?<![{LETTERS}]){MARK}?and(?![{LETTERS}]) ?,?|,? ?\\& ?|,? ?\\land(?![A-Za-z]) ?(?=[A-Za-z] ?[<>=\\])",
    re.IGNORECASE,
)
SET_BUILDER = re.compile(r"(?P<name>.{1,60}?) ?(?:\\mid(?![A-Za-z])|\||:) ?(?P<condition>.+)")
INTEGER = re.compile(
    rf"[,;]? ?\(?(?:{MARK}?where |{MARK}?for |{MARK}?any )*(?P<name>[a-z]) ?"
    rf"(?:\\in ?(?:\\mathbb ?\{{? ?[ZN] ?\}}?|[ZN])(?:\^[+*])?|{MARK}?is {MARK}?an {MARK}?integer)\)?$"
)
ROWS = re.compile(
    r"(?:\\\{ ?)?\\begin\{(?:cases|aligned|align\*?|gathered|array)\}(?:\{[lcr ]*\})?(?P<rows>.+)\\end\{[a-z*]+\}"
)
MATRIX = re.compile(r"[(\[]?\\begin\{[pbv]?(matrix|array)\}(?:\{[^{}]*\})?(?P<rows>.*)\\end\{[pbv]?\1\}[)\]]?")
PM = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
MAX_PM = 3  # signs, each doubling the members
WORD = re.compile(rf"{MARK}?[{LETTERS}]+")
LABEL = re.compile(rf"((?:{MARK}?[{LETTERS}]{{2,}}+[.]? ?)+:?) ?(?=\S)")
BARE_LABEL = re.compile(r"(?=[^ ]*[aeiouy])[A-Za-z]*[a-z]{2}[a-z ]* ")
ANSWER_WORDS = frozenset(("answer", "ans", "final answer", "result", "答案", "答"))
PAIRS = {"(": ")]", "[": "])", "\\{": "\\}"}


def read(text: str) -> Form | None:
    """The form of an answer, or `None`."""
    stripped = text.strip().strip("$.").strip()
    if SENTINEL.fullmatch(stripped):
        return None
    if stripped.startswith(("['", '["')):
        return _listed(stripped)
    latex = plain(text)
    # "None" may be Python's, but not in a text command
    if not latex or (latex != r"\text{None}" and SENTINEL.fullmatch(TEXT.sub(r"\1", latex).strip())):
        return None
    flat = _flat(latex)
    if not balanced(latex):
        return _choice(flat, DEEPEST)  # whose letter may have half of a pair of parentheses
    return None if _is_prose(flat) else _read(flat, DEEPEST)


def read_answer(text: str, reference: Form) -> Form | None:
    """`read` in the light of the reference answer: beside a list, `100,200` is a list of two and no number."""
    form = read(text)
    if isinstance(form, Number) and isinstance(reference, Members) and "," in text:
        items = [number(part.strip()) for part in plain(text).split(",")]
        found = tuple(item for item in items if item is not None)
        return Members("list", found) if 1 < len(found) == len(items) else form
    return form


def vector(latex: str) -> Members | None:
    """A matrix of one row or one column as a tuple; `None` for anything else."""
    match = MATRIX.fullmatch(latex)
    rows = [row.split("&") for row in match["rows"].split("\\\\") if row.strip()] if match else []
    if min(len(rows), max(map(len, rows), default=0)) != 1:
        return None
    form = _members("tuple", [cell.strip() for row in rows for cell in row], 2)
    return form if isinstance(form, Members) else None


def _flat(latex: str) -> str:
    """Text commands replaced by their words, each with a mark."""
    words = TEXT.sub(lambda match: " " + RUN.sub(lambda run: MARK + run[0].lstrip(MARK), match[1]) + " ", latex)
    return " ".join(words.split())


def _is_prose(text: str) -> bool:
    """Whether it has words of sentences, or many, beside digits or formulas, and is no qualified number."""
    words = unmarked(text)
    if not MATHEMATICS.search(words):
        return False
    if not PROSE_WORD.search(words):
        return len(re.findall(rf"(?<![\\{LETTERS}])[{LETTERS}]{{3,}}", words)) > MOST_WORDS
    return not any(pattern.fullmatch(words) for _, pattern in QUALIFIED) and not INTEGER.search(text)


def _listed(text: str) -> Form | None:
    """A Python or JSON list of texts and numbers, as datasets hold it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of what an answer may hold
            values = ast.literal_eval(text)
        texts = list(map(str, values)) if isinstance(values, list) else []
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    items = [read(value) for value in texts]
    found = tuple(item for item in items if item is not None)
    if not items or len(found) < len(items):
        return None
    return found[0] if len(found) == 1 else Members("list", found)


def _read(text: str, depth: int) -> Form | None:
    text = text.strip().removesuffix(";").removesuffix(",").strip()
    if not text or depth == 0:
        return None
    exact = number(text) or _choice(text, depth) or literal(unmarked(text)) or compound(text)
    if exact is not None:
        return exact
    for reader in (_rows, _family, _qualified, _alternatives, _listing, _bracketed, _related, _both_signs):
        found, form = reader(text, depth - 1)
        if found:
            return form
    return _single(text, depth - 1)


def _choice(text: str, depth: int) -> Form | None:
    """A letter, or a letter with its option's text."""
    text = CHOICE_WORD.sub("", text)
    letter = LETTER.fullmatch(text)
    if letter:
        return Choice(letter[1])
    option = OPTION.fullmatch(text)
    if option is None or not option["rest"].strip():
        return None
    rest = _read(option["rest"], depth - 1)
    return None if rest is None else Choice(option["framed"] or option["bare"], rest)


# Each reader from here on answers whether a text is of its kind, and its form.


def _rows(text: str, depth: int) -> Found:
    """The rows of a system; a function by cases, whose rows have two columns, is an expression."""
    match = ROWS.fullmatch(text)
    if match is None:
        return NO
    rows = [row for row in match["rows"].split("\\\\") if row.strip(" .,")]
    if any("&" in row.replace("&=", "").replace("& =", "") for row in rows):
        return True, Expression(unmarked(text))
    return True, _members("list", [row.replace("&", "").strip(" .,") for row in rows], depth)


def _family(text: str, depth: int) -> Found:
    """Values for every integer, whose name stands at the end."""
    match = INTEGER.search(text)
    if match is None or match.start() == 0:
        return NO
    renamed = re.sub(rf"(?<![\\A-Za-z]){match['name']}(?![A-Za-z])", "k", text[: match.start()])
    value = _read(renamed, depth)
    return True, None if value is None else Family(value)


def _qualified(text: str, depth: int) -> Found:
    return qualified(text, lambda part: _read(part, depth))


def _related(text: str, depth: int) -> Found:
    return related(text, lambda part: _read(part, depth))


def _alternatives(text: str, depth: int) -> Found:
    parts = split(text, OR)
    if len(parts) > 1 and not re.search(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])", text):  # "1, 2 or 3" has three
        parts = [piece for part in parts for piece in commas(part, False)]
    return (True, _members("or", parts, depth)) if len(parts) > 1 else NO


def _listing(text: str, depth: int) -> Found:
    """Members between commas, semicolons and "and"."""
    parts = [piece for part in split(text, AND) for piece in commas(part, False)]
    if len(parts) < 2:
        return NO
    return True, _members("list" if {",", ";"} & {*text} else "and", parts, depth)


def _members(kind: Literal["list", "and", "or", "set", "tuple"], parts: Sequence[str], depth: int) -> Form | None:
    """Members, of which an equation's name holds for those after it: `n=3,5`."""
    if any(part.strip() == r"\ldots" for part in parts):
        return Special("ellipsis", tuple(unmarked(part).replace(" ", "") for part in parts))
    items = [_read(part, depth) for part in parts]
    if len(items) < 2:
        return items[0] if items else None
    first, others = items[0], items[1:]
    if isinstance(first, Equation) and first.name and all(isinstance(o, Number | Expression | Members) for o in others):
        items[0] = first.value
    found = tuple(item for item in items if item is not None)
    return Members(kind, found) if len(found) == len(items) else None


def _bracketed(text: str, depth: int) -> Found:
    """A set, a tuple, an interval, or something within needless brackets."""
    opening = text[:2] if text.startswith("\\{") else text[:1]
    if opening not in PAIRS or closing(text, 0, OPENING, CLOSING) != len(text) - 1:
        return NO
    end = "\\}" if opening == "\\{" else text[-1]
    inner = text[len(opening) : -len(end)].strip()
    if opening == "\\{":
        return True, _set(inner, depth)
    parts = commas(inner, True)
    if len(parts) == 1:
        return True, _read(inner, depth)
    items = _members("tuple", parts, depth)
    if opening + end != "()" and isinstance(items, Members) and len(items.items) == 2:
        return True, Interval(opening + end, (items.items[0], items.items[1]))
    return True, items if opening + end in ("()", "[]") else None


def _set(inner: str, depth: int) -> Form | None:
    if not inner:
        return Expression(r"\emptyset")
    builder = SET_BUILDER.fullmatch(inner)
    if builder and RELATION.search(builder["condition"]) and not RELATION.search(builder["name"]):
        return _read(builder["condition"], depth)
    parts = [piece for part in split(inner, AND) for piece in commas(part, True)]
    form = _members("set", parts, depth)
    return Members("set", (form,)) if form is not None and len(parts) == 1 else form


def _both_signs(text: str, depth: int) -> Found:
    r"""The members that `\pm` stands for: `\mp` is its opposite, several `\pm` are independent."""
    found = PM.findall(text)
    if not found or len(found) > MAX_PM:
        return NO
    independent = 1 if r"\mp" in found else len(found)
    parts = []
    for signs in itertools.product("+-", repeat=independent):
        chosen = list(signs) * (len(found) // independent)
        opposite = {"+": "-", "-": "+"}
        filled = [one if sign == r"\pm" else opposite[one] for sign, one in zip(found, chosen, strict=True)]
        pieces = PM.split(text)
        part = "".join(itertools.chain(*itertools.zip_longest(pieces, filled, fillvalue="")))
        parts.append(part.replace("(+", "(").replace("{+", "{").lstrip("+ "))
    return True, _members("list", parts, depth)


def _single(text: str, depth: int) -> Form | None:
    """What has no parts at the top: words, a quantity, something with a label, or a formula."""
    if not MATHEMATICS.search(text) and _are_words(text):
        words = unmarked(re.sub(r"[.,!?;:\"]", " ", text)).casefold()
        return Words(words, text if text.isalpha() and text.isascii() else "")
    measured = money(text, lambda rest: _read(rest, depth)) or quantity(text, lambda head: _read(head, depth))
    if measured is not None:
        return measured
    label = LABEL.match(text)
    if label and (MARK in label[1] or label[1].endswith(":") or BARE_LABEL.fullmatch(label[1])):
        value, name = _read(text[label.end() :], depth), unmarked(label[1]).strip(" :").casefold()
        return value if value is None or name in ANSWER_WORDS else Labelled(name, value)
    return None if MARK in text or not text.isascii() else Expression(text)


def _are_words(text: str) -> bool:
    """Whether a text without mathematics is words: marked, of another script, or longer than a product's letters."""
    if MARK in text or not text.isascii():
        return True
    longest = max(map(len, WORD.findall(text)), default=0)
    return longest > 1 and not ("-" in text and longest < 4) and re.fullmatch(r"[A-Za-z ,.'!?;:-]+", text) is not None
