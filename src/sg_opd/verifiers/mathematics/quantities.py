r"""Reads numbers with units: `5\text{ cm}^2`, `\$1.5 million`, `2 hours 15 minutes`. What a unit is, `units` knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from .forms import Compound, Expression, Form, Number, Quantity
from .numerals import SCALES, exactly, number
from .signs import CJK

MARK = "\ue000"  # before each word that stood in a text command
LETTERS = rf"A-Za-z{CJK}\u00c0-\u024fµμΩ"
UNIT = (
    rf"(?:{MARK}?[A-Za-zµμΩÅ]++\.?|{MARK}?[{CJK}]++|\^\\circ ?{MARK}?(?:[CFK](?![A-Za-z]))?|%|[€£¥₹¢₽₩₫]|\\\$)"
    r"(?: ?\^ ?(?:\{ ?-?\d ?\}|-?\d))?"
)
# parts are joined by a sign, a space or a full stop: without one of them a run of letters could be split in many ways
TAIL = re.compile(rf"(?<![A-Za-z\\{MARK}]){UNIT}(?:(?: ?(?:/|\\cdot|\*|-) ?| |(?<=\.))\(?{UNIT}\)?){{0,7}}$")
MONEY = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<unit>(?:US|A|C)? ?\\\$|[€£¥₹₽₩₫]|{MARK}?(?:Rs|USD|EUR|GBP|INR|RMB|CNY)\.?(?![A-Za-z]))"
    r" ?(?P<rest>[+-]?[\d.\\].*)"
)
VALUE = r"\d+ \d+/\d+|\d+/\d+|(?:\d+ ?)?\\frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?"
PART = re.compile(
    rf"(?P<value>{VALUE}) ?(?P<unit>{MARK}?[A-Za-z{CJK}]+\.?|\^\\circ|\\\$)(?: ?, ?| )?(?:{MARK}?and(?![A-Za-z]) ?)?"
)
FEET = re.compile(r"(\d+) ?' ?(\d+(?:\.\d+)?) ?(?:''|\")?")
ARC = re.compile(r"(\d+) ?\^\\circ ?(\d+) ?'(?: ?(\d+) ?(?:''|\"))?")
# one letter that is a unit where it stands after a number and a space
ONE_LETTER_UNITS = frozenset("mgsNJWVLlhKCF")
_MONEY_WORDS = "dollar usd euro eur pound gbp rupee yen yuan rmb cny 元"
MONEY_WORDS = frozenset(_MONEY_WORDS.split())
LONE = re.compile(r"[A-Za-z](?![A-Za-z])")
CHINESE_SCALE = re.compile(r"^([百千万亿])")
VOWEL = re.compile(r"[aeiouy]", re.IGNORECASE)
FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_NO_UNITS = (
    "and or not minus plus negative squared cubed factorial divided wrong incorrect false mod remainder r below "
    "above under over less more short greater fewer 折"
)
NO_UNITS = frozenset(_NO_UNITS.split())
# symbols of units that are hardly ever meant as a product of letters; others are looked at twice
_COMMON = (
    "cm mm km kg ml mL cL dL ft lb lbs oz mi yd hr hrs min mins sec secs mph kmh kph Hz kHz MHz GHz kW kWh kJ kN "
    "kPa Pa dm nm sq cc rpm eV keV MeV GB MB in mol rad deg gal USD EUR GBP"
)
COMMON = frozenset(_COMMON.split())
PER_CENT = frozenset(("percent", "percents", "per cent", "pct", "percentage"))


def unmarked(text: str) -> str:
    """Without the marks of words."""
    return " ".join(text.replace(MARK, "").split())


def quantity(text: str, read: Callable[[str], Form | None] | None = None) -> Form | None:
    """A formula and its unit, a multiple such as `5 million`, or `None`; `read` reads the formula."""
    match = TAIL.search(text)
    while match and LONE.match(match[0]) and text[match.start() - 1] != " ":  # `5x\\text{ cm}`: the letter is no unit
        match = TAIL.search(text, match.start() + 1)
    if match is None or match.start() == 0:
        return None
    head, tail = text[: match.start()].rstrip(" ~"), match[0]
    words = CHINESE_SCALE.sub(r"\1 ", tail.replace(MARK, " ")).split()
    scale = Fraction(1)
    while words and (name := words[0].casefold().rstrip(".").removesuffix("s")) in SCALES:
        scale, words = scale * SCALES[name], words[1:]
    value: Form | None = number(head)
    if value is None:
        value = (read(head) if read else Expression(head)) if _is_formula(head) else None
    if not isinstance(value, Number | Expression) or NO_UNITS & {word.casefold() for word in words}:
        return None
    if scale != 1:
        if not isinstance(value, Number):
            return None
        value = exactly(value.value * scale)
    unit = " ".join(words)
    unit = "%" if unit.casefold() in PER_CENT else unit
    if not unit:
        return value
    sure = scale != 1 or MARK in tail or _is_sure(unit, is_apart=text[match.start() - 1] == " ")
    own = "" if isinstance(value, Number) else head  # letters of a number are none of a variable: 2e-3
    if not sure and not _may_be_unit(unit, own, is_apart=text[match.start() - 1] == " "):
        return None
    return Quantity(value, unit, "" if sure else text)


def money(text: str, read: Callable[[str], Form | None]) -> Form | None:
    """An amount with its sign before it: `\\$1.5 million`."""
    match = MONEY.fullmatch(text)
    if match is None:
        return None
    value = read(match["sign"] + match["rest"])
    unit = match["unit"].replace(MARK, "").replace(" ", "")
    if isinstance(value, Quantity):  # the unit is said twice, as in `\$5 dollars`, or it is of something
        unit = unit if value.unit.casefold().removesuffix("s") in MONEY_WORDS else f"{unit} {value.unit}"
        value = value.number
    return Quantity(value, unit) if isinstance(value, Number | Expression) else None


def compound(text: str) -> Compound | None:
    """Several quantities in a row that are one, such as feet and inches."""
    for pattern, units in ((FEET, ("feet", "inches")), (ARC, ("degrees", "arcminutes", "arcseconds"))):
        if match := pattern.fullmatch(text):
            values = [number(value) for value in match.groups() if value]
            return Compound(tuple(Quantity(v, unit) for v, unit in zip(values, units, strict=False) if v))
    parts, place = [], 0
    while place < len(text):
        match = PART.match(text, place)
        value = match and number(match["value"])
        unit = match["unit"].replace(MARK, "").rstrip(".") if match else ""
        if value is None or unit.casefold() in NO_UNITS or unit.casefold().removesuffix("s") in SCALES:
            return None
        parts.append(Quantity(value, unit))
        place = match.end() if match else place
    return Compound(tuple(parts)) if len(parts) > 1 and not text.rstrip().endswith("and") else None


def _is_formula(head: str) -> bool:
    """Whether what stands before a unit can be a number: no words, no angle's function, a closed end."""
    ends = re.search(r"(?:[\d)}\]!.]|\\pi|(?<![A-Za-z\\])[A-Za-z])$", head.rstrip()) is not None
    return ends and MARK not in head and head.isascii() and not FUNCTION.search(head)


def _may_be_unit(unit: str, head: str, is_apart: bool) -> bool:
    """Whether letters after a number may be a unit: no variable before them, and one letter only apart and if usual."""
    first = re.findall(r"[A-Za-z]+", unit)[0]
    usual = is_apart and first in ONE_LETTER_UNITS if len(first) == 1 else is_apart or first in COMMON
    return usual and re.search(r"(?<![\\A-Za-z])[A-Za-z]", head) is None


def _is_sure(unit: str, is_apart: bool) -> bool:
    """Whether letters outside of text commands are no product: signs, other scripts, or a word apart."""
    unit = unit.replace(r"\cdot", "")
    if re.search(rf"[^A-Za-z ^{{}}\d.*/-]|[{CJK}]|\\", unit):
        return True
    words = re.findall(r"[A-Za-z]+", unit)
    return is_apart and bool(words) and all(len(word) > 2 and VOWEL.search(word) for word in words)
