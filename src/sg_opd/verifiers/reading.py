r"""Reads an answer's text: what kind of thing it is, and its parts.

`read` returns a form of `forms`, or `None` where the text has no meaning that can be compared: what stands for a missing
answer, prose, unbalanced LaTeX. Standard library only; no expression is evaluated here.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence

from .forms import Choice, Condition, Equation, Expression, Form, Interval, Labelled, Members, Number, Special, Words
from .notation import balanced, plain
from .numerals import literal, number
from .quantities import LETTERS, MARK, compound, money, quantity

DEEPEST = 12  # forms within forms
TEXT = re.compile(r"\\text\{([^{}]*)\}")
RUN = re.compile(rf"{MARK}?[{LETTERS}]+(?:'[a-z]+)?")
# what stands for a missing answer in datasets, or refers to one
SENTINEL = re.compile(
    r"None|NaN|nan|null|NULL|N\.?A\.?|n/a|na|<NA>|[Pp]roof|PROOF|[Pp]rove(?: it)?|[Nn]o (?:final )?answer(?: found)?|[Uu]nknown|\[ ?\]|\( ?\)"
    r"|-+|\?+|[Aa]nswer|[Ss]olution|TBD|TODO|[Ss]ee (?:the )?(?:solution|proof|above|figure|explanation|below)"
    r"|[Nn]ot (?:found|available|given|provided|applicable)|[Mm]issing|#N/A|\\text\{N/A\}"
)
# words of sentences: beside digits or formulas they make prose of it, which nothing can be compared with
PROSE = frozenset(
    [
        "is",
        "are",
        "was",
        "were",
        "be",
        "so",
        "the",
        "it",
        "its",
        "hence",
        "thus",
        "therefore",
        "then",
        "because",
        "since",
        "get",
        "gets",
        "gives",
        "give",
        "adding",
        "there",
        "that",
        "this",
        "which",
        "have",
        "has",
        "had",
        "can",
        "will",
        "would",
        "should",
        "must",
        "answer",
        "equals",
        "let",
        "find",
        "with",
        "our",
        "you",
        "they",
        "he",
        "she",
        "his",
        "her",
        "their",
        "we",
        "us",
        "if",
    ]
)
# words that make a condition of a number
QUALIFIERS = [
    (r"\ge", "at least|no less than|not less than|no fewer than|greater than or equal to|a? ?minimum of", "before"),
    (r"\le", "at most|no more than|not more than|less than or equal to|up to|a? ?maximum of", "before"),
    (r"\ne", "not equal to|is not|not|cannot be|can't be|never|anything but|except|other than", "before"),
    (">", "more than|greater than|larger than|over|above", "before"),
    ("<", "less than|fewer than|smaller than|under|below", "before"),
    (r"\ge", r"or (?:more|greater|above|higher|larger|over)|and (?:above|up|over|more)|\+", "after"),
    (r"\le", "or (?:less|fewer|below|under|smaller|lower)|and (?:below|under|less)", "after"),
]
QUALIFIED = [
    (sign, re.compile(rf"(?:{words}) +(.+)" if place == "before" else rf"(.+?) *(?:{words})", re.IGNORECASE))
    for sign, words, place in QUALIFIERS
]
ABOUT = re.compile(r"(?:about|approximately|roughly|exactly|around|approx\.?) +", re.IGNORECASE)
LETTER = re.compile(rf"\(?{MARK}?([A-J])\)?[.):]?")
OPTION = re.compile(
    rf"(?:\({MARK}?(?P<framed>[A-J])\)|{MARK}?(?P<bare>[A-J])(?: ?[).:](?!\d+$|\d+:)))[.:]? ?(?P<rest>.+)"
)
CHOICE_WORD = re.compile(rf"{MARK}?(?:option|choice|answer) ?:? ?(?=\(?{MARK}?[A-J]\)?$)", re.IGNORECASE)
OR = re.compile(rf",? ?(?<![{LETTERS}]){MARK}?or(?![{LETTERS}]) ?,?|,? ?\\lor(?![A-Za-z]) ?(?=[A-Za-z] ?[<>=\\])")
AND = re.compile(rf",? ?(?<![{LETTERS}]){MARK}?and(?![{LETTERS}]) ?,?|,? ?\\& ?")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
RELATION = re.compile(r"\\(?:le|ge|ne|approx)(?![A-Za-z])|:=|<=|>=|!=|==|[<>=]")
SIGNS = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "=", ":=": "=", r"\approx": "="}
UNCOUNTED = re.compile(
    r"\\(?:equiv|notin|pmod|bmod|perp|parallel|cong|subset|subseteq|not|Rightarrow|Leftrightarrow|iff)(?![A-Za-z])"
)
SUBSCRIPT = r"(?:_(?:\{[^{}]{1,30}\}|\\?\w+))?'*"
POINTS = r"(?:[A-Z]'?){2,6}"
NAME = re.compile(
    rf"(?:\\(?!pi|infty|emptyset|ldots)[a-zA-Z]+|[A-Za-z]){SUBSCRIPT}(?:\^\{{?(?:\*|\(?[a-z]\)?|-1)\}}?)?(?: ?\([^()=<>]{{1,30}}\))?"
    rf"|\\(?:vec|hat|bar|tilde|overline|overrightarrow|widehat|mathcal|mathbb) ?\{{[^{{}}]{{1,10}}\}}{SUBSCRIPT}(?: ?\([^()=<>]{{1,30}}\))?"
    rf"|m? ?\\angle ?(?:{POINTS}|[A-Z])|\\triangle ?{POINTS}|\|?{POINTS}\|?|\[{POINTS}\]"
    rf"|(?:{MARK}?[{LETTERS}]{{2,20}} ?){{1,4}}{SUBSCRIPT}(?: ?\([^()=<>]{{1,30}}\))?"
)
SET_BUILDER = re.compile(r"(?P<name>[^{}]{1,60}?) ?(?:\\mid(?![A-Za-z])|\||:) ?(?P<condition>.+)")
MEMBER_OF = re.compile(r"(?P<name>[A-Za-z]|\\[a-z]+) ?\\in(?![A-Za-z]) ?(?P<set>.+)")
ROWS = re.compile(r"\\begin\{(?:cases|aligned|align\*?|gathered)\}(?P<rows>.+)\\end\{[a-z*]+\}")
PM = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
MAX_PM = 3  # signs, each doubling the members
SET_SIGN = re.compile(r"\\(?:cup|cap|setminus|mathbb|emptyset)(?![A-Za-z])")
MATHEMATICS = re.compile(r"[\d\\+*/^_=<>|%$]")
WORD = re.compile(rf"{MARK}?[{LETTERS}]+")
VOWEL = re.compile(r"[aeiouyAEIOUY]")
CLOSING = {"(": ")]", "[": "])", "{": "}", "\\{": "\\}"}


def read(text: str) -> Form | None:
    """The form of an answer, or `None`."""
    stripped = text.strip().strip("$.").strip()
    if SENTINEL.fullmatch(stripped):
        return None
    if stripped.startswith(("['", '["')):
        return _listed(stripped)
    latex = plain(text)
    if not latex or (SENTINEL.fullmatch(TEXT.sub(r"\1", latex).strip()) and latex != r"\text{None}"):
        return None
    text = flat(latex)
    if not balanced(latex):
        return _choice(text, DEEPEST)  # whose letter may have half of a pair of parentheses
    return None if _is_prose(text) else _read(text, DEEPEST)


def read_answer(text: str, reference: Form) -> Form | None:
    """`read` in the light of the reference answer: beside a list, `100,200` is a list of two and no number."""
    form = read(text)
    if isinstance(form, Number) and isinstance(reference, Members) and "," in text:
        items = [number(part.strip()) for part in plain(text).split(",")]
        if len(items) > 1 and None not in items:
            return Members("list", tuple(item for item in items if item is not None))
    return form


def _is_prose(text: str) -> bool:
    """Whether it has words of sentences beside digits or formulas, and is no qualified number."""
    words = unmarked(text)
    found = PROSE & {word.casefold() for word in re.findall(rf"(?<![\\{LETTERS}])[{LETTERS}]{{2,}}", words)}
    return bool(found) and bool(MATHEMATICS.search(words)) and not any(p.fullmatch(words) for _, p in QUALIFIED)


def flat(latex: str) -> str:
    """Text commands replaced by their words, each with a mark."""
    words = TEXT.sub(lambda match: " " + RUN.sub(lambda run: MARK + run[0].lstrip(MARK), match[1]) + " ", latex)
    return " ".join(words.split())


def unmarked(text: str) -> str:
    """Without the marks of words."""
    return " ".join(text.replace(MARK, "").split())


def _listed(text: str) -> Form | None:
    """A Python or JSON list of texts and numbers, as datasets hold it."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    values = values if isinstance(values, list) else []
    items = [read(str(value)) for value in values]
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
    for reader in (_rows, _qualified, _alternatives, _listing, _bracketed, _related, _both_signs):
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
    if option is None or (option["bare"] and not option["rest"].strip()):
        return None
    rest = _read(option["rest"], depth - 1)
    return None if rest is None else Choice(option["framed"] or option["bare"], rest)


# Each reader from here on answers whether a text is of its kind, and its form, `None` where it has no meaning.
Found = tuple[bool, Form | None]
NO: Found = (False, None)


def _rows(text: str, depth: int) -> Found:
    """The rows of a system; a function by cases, whose rows have two columns, is an expression."""
    match = ROWS.fullmatch(text)
    if match is None:
        return NO
    rows = [row.replace("&", "") for row in match["rows"].split("\\\\") if row.strip()]
    if any("&" in row.replace("&=", "").replace("& =", "") for row in match["rows"].split("\\\\")):
        return True, Expression(unmarked(text))
    return True, _members("list", rows, depth)


def _qualified(text: str, depth: int) -> Found:
    """`at least 5`, `5 or more`, and a relation without its left side."""
    words = unmarked(text)
    about = ABOUT.match(words)
    if about and MATHEMATICS.search(words):
        return True, _read(words[about.end() :], depth)
    for sign, pattern in QUALIFIED:
        match = pattern.fullmatch(words)
        if (
            match
            and MATHEMATICS.search(match[1])
            and not (sign == r"\ge" and pattern is QUALIFIED[5][1] and "+" in match[1])
        ):
            value = _read(match[1], depth)
            return True, _bound(sign, value)
    relation = RELATION.match(text)
    if relation and relation[0] not in ("=", ":=", "==", r"\approx"):
        return True, _bound(SIGNS.get(relation[0], relation[0]), _read(text[relation.end() :], depth))
    return NO


def _bound(sign: str, value: Form | None) -> Form | None:
    """The condition of a bound; that of a quantity is the bound of its number."""
    latex = formula(value)
    return None if latex is None else Condition(f"x {sign} {latex}", "")


def formula(form: Form | None) -> str | None:
    """The LaTeX of a number or an expression, a quantity's without its unit; `None` for anything else."""
    form = getattr(form, "number", form)
    return form.latex if isinstance(form, Number | Expression) else None


def _alternatives(text: str, depth: int) -> Found:
    parts = _split(text, OR)
    return (True, _members("or", parts, depth)) if len(parts) > 1 else NO


def _listing(text: str, depth: int) -> Found:
    """Members between commas, semicolons and "and"."""
    parts = [piece for part in _split(text, AND) for piece in _commas(part, False)]
    if len(parts) < 2:
        return NO
    return True, _members("and" if "," not in text and ";" not in text else "list", parts, depth)


def _members(kind: str, parts: Sequence[str], depth: int) -> Form | None:
    """Members, of which an equation's name holds for those after it: `n=3,5`."""
    if any(part.strip() == r"\ldots" for part in parts):
        return Special("ellipsis", tuple(unmarked(part).replace(" ", "") for part in parts))
    items = [_read(part, depth) for part in parts]
    if len(items) == 1:
        return items[0]
    if isinstance(items[0], Equation) and items[0].name and not any(isinstance(item, Equation) for item in items[1:]):
        if all(isinstance(item, Number | Expression | Members) for item in items[1:]):
            items[0] = items[0].value
    found = tuple(item for item in items if item is not None)
    return Members(kind, found) if len(found) == len(items) else None  # type: ignore[arg-type]


def _bracketed(text: str, depth: int) -> Found:
    """A set, a tuple, an interval, or something within needless brackets."""
    if text in (r"\{\}", r"\{ \}"):
        return True, Expression(r"\emptyset")
    opening = text[:2] if text.startswith("\\{") else text[:1]
    if text.startswith(r"\langle") and text.endswith(r"\rangle"):
        return True, _members("tuple", _commas(text[7:-7], True), depth)
    if opening not in CLOSING or _closes(text) != len(text):
        return NO
    closing = "\\}" if opening == "\\{" else text[-1]
    inner = text[len(opening) : -len(closing)].strip()
    if opening == "\\{":
        builder = SET_BUILDER.fullmatch(inner)
        if builder and RELATION.search(builder["condition"]) and not RELATION.search(builder["name"]):
            return True, _read(builder["condition"], depth)
        parts = [piece for part in _split(inner, AND) for piece in _commas(part, True)]
        form = _members("set", parts, depth)
        return True, Members("set", (form,)) if form is not None and len(parts) == 1 else form
    parts = _commas(inner, True)
    if len(parts) == 1:
        return True, _read(inner, depth)
    ends = _members("tuple", parts, depth)
    if opening + closing == "()" or ends is None:
        return True, ends
    if isinstance(ends, Members) and len(ends.items) == 2:
        return True, Interval(opening + closing, (ends.items[0], ends.items[1]))
    return (True, ends) if opening + closing == "[]" else (True, None)


def _related(text: str, depth: int) -> Found:
    """An equation, inequalities, or membership in a set."""
    member = MEMBER_OF.fullmatch(text)
    if member and not RELATION.search(text):
        return True, _read(member["set"], depth)
    if UNCOUNTED.search(text):
        return NO
    parts, signs = _sides(text)
    if not signs:
        return NO
    if set(signs) != {"="}:
        latex = " ".join(itertools.chain(*itertools.zip_longest(map(_formula_of, parts), signs, fillvalue="")))
        if any(MARK in part or not part for part in parts):
            return True, None
        return True, Condition(latex, next((p for p in parts if NAME.fullmatch(p) and not p.isupper()), ""))
    if not all(parts):
        return True, None
    pair = _names(parts[0])
    value = _read(parts[-1], depth)
    if value is None:
        return True, None
    if pair and len(parts) == 2 and isinstance(value, Members) and len(value.items) == len(pair):
        sides = zip(pair, value.items, strict=True)
        return True, Members("list", tuple(Equation((name, ""), item, name) for name, item in sides))
    name = unmarked(parts[0]) if NAME.fullmatch(parts[0]) and not _is_product(parts[0]) else ""
    return True, Equation(tuple(_formula_of(part) for part in parts), value, name)


def _formula_of(part: str) -> str:
    """A side of a relation without a unit."""
    measured = quantity(part)
    return unmarked((formula(measured) if measured else None) or part)


def _is_product(name: str) -> bool:
    """Whether a name may be letters multiplied: `xy`, but neither `AB` nor a word."""
    return (
        MARK not in name
        and name.isalpha()
        and name.isascii()
        and name.islower()
        and 1 < len(name) < 5
        and name != "ans"
    )


def _names(text: str) -> list[str]:
    """The names of `(x, y)`, none of anything else."""
    names = [name.strip() for name in text[1:-1].split(",")] if text.startswith("(") and text.endswith(")") else []
    return names if len(names) > 1 and all(map(NAME.fullmatch, names)) else []


def _both_signs(text: str, depth: int) -> Found:
    r"""The members that `\pm` stands for: `\mp` is its opposite, several `\pm` are independent."""
    found = PM.findall(text)
    if not found or len(found) > MAX_PM:
        return NO
    independent = 1 if any(sign == r"\mp" for sign in found) else len(found)
    parts = []
    for signs in itertools.product("+-", repeat=independent):
        chosen = iter(signs)

        def sign(match: re.Match, chosen: object = chosen, signs: tuple = signs) -> str:
            plus = signs[0] if independent == 1 else next(chosen)  # type: ignore[call-overload]
            return plus if match[0] == r"\pm" else {"+": "-", "-": "+"}[plus]

        parts.append(PM.sub(sign, text).replace("(+", "(").replace("{+", "{").lstrip("+ "))
    return True, _members("list", parts, depth)


def _single(text: str, depth: int) -> Form | None:
    """What has no parts at the top: a quantity, words, something with a label, or a formula."""
    if not MATHEMATICS.search(text) and _are_words(text):
        return _words(text)
    measured = money(text, lambda rest: _read(rest, depth)) or quantity(text, lambda head: _read(head, depth))
    if measured is not None:
        return measured
    label = re.match(rf"((?:{MARK}?[{LETTERS}]{{2,}}[.]? ?)+:?) ?(?=\S)", text)
    if label and (MARK in label[1] or label[1].endswith(":") or (label[1].endswith(" ") and VOWEL.search(label[1]))):
        value = _read(text[label.end() :], depth)
        return None if value is None else Labelled(unmarked(label[1]).strip(" :").casefold(), value)
    return None if MARK in text or not text.isascii() else Expression(text)


def _are_words(text: str) -> bool:
    """Whether a text without mathematics is words: marked, of another script, or longer than a product's letters."""
    if MARK in text or not text.isascii():
        return True
    runs = WORD.findall(text)
    longest = max(map(len, runs), default=0)
    return longest > 1 and not ("-" in text and longest < 4) and re.fullmatch(r"[A-Za-z ,.'!?;:-]+", text) is not None


def _words(text: str) -> Words:
    words = unmarked(re.sub(r"[.,!?;:\"]", " ", text)).casefold()
    bare = MARK not in text and text.isalpha() and text.isascii()
    return Words(words, text if bare else "")


def _closes(text: str) -> int:
    """The place after the bracket that closes the first one; 0 where none does."""
    depth, place = 0, 0
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1
            character += text[place : place + 1]
        depth += (character in ("(", "[", "{", "\\{")) - (character in (")", "]", "}", "\\}"))
        place += 1
        if depth == 0:
            return place
    return 0


def _tops(text: str) -> list[bool]:
    """For each place whether it is outside of all brackets."""
    depth, tops, place = 0, [], 0
    while place < len(text):
        width = 2 if text[place] == "\\" and place + 1 < len(text) else 1
        token = text[place : place + width]
        depth -= token in (")", "]", "}", "\\}")
        tops += [depth <= 0] * width
        depth += token in ("(", "[", "{", "\\{")
        place += width
    return tops


def _split(text: str, separator: re.Pattern) -> list[str]:
    """The parts between separators that are outside of all brackets."""
    if not separator.search(text):
        return [text]
    tops, parts, start = _tops(text), [], 0
    for match in separator.finditer(text):
        if tops[match.start()] and match.end() > match.start():
            parts.append(text[start : match.start()])
            start = match.end()
    return [part for part in (*parts, text[start:]) if part.strip()]


def _commas(text: str, is_within: bool) -> list[str]:
    """The parts between commas and semicolons; a comma of a number's thousands is none.

    Those are written without a space, and within brackets beside a separator that has one: `(123,456)` is a pair.
    """
    if "," not in text and ";" not in text:
        return [text]
    spaced = re.search(r", |;", text) is not None
    grouped = {i for match in THOUSANDS.finditer(text) for i in range(match.start(), match.end()) if text[i] == ","}
    tops = _tops(text)
    commas = {place for place, character in enumerate(text) if character == "," and tops[place]}
    if (is_within and not spaced) or (not spaced and commas - grouped):
        grouped = set()
    marks = sorted(commas - grouped | {i for i, character in enumerate(text) if character == ";" and tops[i]})
    parts = [text[start + 1 : end] for start, end in itertools.pairwise([-1, *marks, len(text)])]
    return [part for part in parts if part.strip()]


def _sides(text: str) -> tuple[list[str], list[str]]:
    """The sides of relations outside of all brackets, and the relations between them."""
    tops, parts, signs, start = _tops(text), [], [], 0
    for match in RELATION.finditer(text):
        if tops[match.start()]:
            parts.append(text[start : match.start()].strip())
            signs.append(SIGNS.get(match[0], match[0]))
            start = match.end()
    return [*parts, text[start:].strip()], signs
