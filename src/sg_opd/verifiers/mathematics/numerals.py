r"""Reads plain LaTeX that is a number or another literal: `1,234.5`, `2.1\times10^4`, `0.\overline{3}`, `4:30 p.m`."""

from __future__ import annotations

import re
from fractions import Fraction

from .forms import Number, Special

MAX_PLACES = 50  # of a decimal that stays one for sympy
MAX_DIGITS = 4_000  # Python refuses to write more than 4,300
MAX_EXPONENT = 400  # of ten; what is larger is left to sympy's own caution
SCALES: dict[str, int | Fraction] = {
    **{"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"lakh": 10**5, "crore": 10**7, "bn": 10**9, "百": 100, "千": 10**3, "万": 10**4, "亿": 10**8},
    **{
        name: Fraction(1, part)
        for name, part in (("half", 2), ("halve", 2), ("third", 3), ("quarter", 4), ("fifth", 5))
    },
    **{name: Fraction(1, part) for name, part in (("tenth", 10), ("hundredth", 100), ("thousandth", 1000))},
}
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d*)?|\.\d+)"
PLAIN = re.compile(rf"(?P<sign>[+-]?) ?(?P<number>{DECIMAL})(?:[eE](?P<exponent>[+-]?\d+))?")
POWER_OF_TEN = re.compile(
    rf"(?P<sign>[+-]?) ?(?:(?P<number>{DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?)?"
    r"10 ?\^ ?(?:\{ ?(?P<braced>[+-]?\d+) ?\}|(?P<bare>[+-]?\d))"
)
FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?:(?P<whole>\d+)(?: (?=\d)| ?(?=\\frac)))?"
    r"(?:(?P<n>\d+) ?/ ?(?P<d>\d+)|\\frac ?\{ ?(?P<top>-?\d+) ?\} ?\{ ?(?P<bottom>\d+) ?\})"
)
RECURRING = re.compile(
    r"(?P<sign>[+-]?) ?(?P<whole>\d*)\.(?P<start>\d*) ?"
    r"(?:\\(?:overline|bar|overbar) ?(?:\{ ?(?P<braced>\d+) ?\}|(?P<one>\d))|\((?P<round>\d+)\)"
    r"|\\dot ?\{?(?P<first>\d)\}?(?:(?P<between>\d*) ?\\dot ?\{?(?P<last>\d)\}?)?)"
)
TIME = re.compile(r"(\d{1,2})(?:[:.](\d\d))?(?::(\d\d))? ?([ap])\.? ?m\.?|(\d{1,2}):(\d\d)(?::(\d\d))?", re.IGNORECASE)
ISO_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")
SLASHED_DATE = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
MONTH = re.compile(
    r"\b(january|february|march|april|may|june|july|august|september|october|november|december"
    r"|jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec)\b\.?",
    re.IGNORECASE,
)
DAY_OR_YEAR = re.compile(r"(\d{1,4})(?:st|nd|rd|th)?\b", re.IGNORECASE)
NUMERAL = re.compile(
    r"(?P<digits>(?=[A-F]*[0-9])[0-9A-F]++(?:\.[0-9A-F]+)?|\([0-9A-F]+\)) ?_ ?"
    r"(?:\{ ?(?P<base>\d{1,2}|[a-z]+) ?\}|(?P<one>\d))"
)
BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}
REMAINDER = re.compile(r"(\d+) ?(?:[rR]\.?|remainder|rem\.?|with remainder) ?(?:of )?(\d+)")
RATIO = re.compile(r"(\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+)")


def number(text: str) -> Number | None:
    """The exact value of a plain number, a power of ten, a fraction, a mixed number or a recurring decimal."""
    if match := PLAIN.fullmatch(text):
        return _scientific(match["sign"], match["number"], match["exponent"] or "0")
    if match := POWER_OF_TEN.fullmatch(text):
        return _scientific(match["sign"], match["number"] or "1", match["braced"] or match["bare"])
    if match := FRACTION.fullmatch(text):
        return _fraction(match)
    if match := RECURRING.fullmatch(text):
        return _recurring(match)
    return None


def literal(text: str) -> Special | None:
    """A time of day, a date, a numeral with its base, a quotient with its remainder, or a ratio."""
    if match := TIME.fullmatch(text):
        return _time(match, text)
    date = _date(text)
    if date is not None:
        return date
    if match := NUMERAL.fullmatch(text):
        base = match["one"] or match["base"]
        if base.isdigit() or base in BASES:
            return Special("numeral", (match["digits"].strip("()"), int(base) if base.isdigit() else BASES[base]))
    if match := REMAINDER.fullmatch(text):
        return Special("remainder", (int(match[1]), int(match[2])))
    return _ratio(text)


def _number(sign: str, value: Fraction, is_decimal: bool = False) -> Number:
    """With LaTeX that every parser reads alike; a decimal keeps its point, by which it is told from an exact number."""
    value = -value if sign == "-" else value
    if value.denominator == 1:
        latex = f"{value.numerator}" + ".0" * is_decimal
    elif is_decimal and 10**MAX_PLACES % value.denominator == 0:
        digits = f"{abs(value.numerator) * 10**MAX_PLACES // value.denominator:0{MAX_PLACES + 1}}"
        latex = "-" * (value < 0) + f"{digits[:-MAX_PLACES]}.{digits[-MAX_PLACES:]}".rstrip("0")
    else:
        latex = rf"{'-' * (value < 0)}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return Number(value, latex, is_decimal)


def exactly(value: Fraction) -> Number:
    """A number that is written without a point."""
    return _number("", value)


def _scientific(sign: str, mantissa: str, exponent: str) -> Number | None:
    power = int(exponent)
    digits = mantissa.replace(",", "")
    if abs(power) > MAX_EXPONENT or len(digits) + abs(power) > MAX_DIGITS:
        return None
    value = Fraction(digits + "0" * digits.endswith(".")) * Fraction(10) ** power
    return _number(sign, value, "." in digits and not digits.endswith("."))


def _fraction(match: re.Match) -> Number | None:
    top, bottom = int(match["n"] or match["top"]), int(match["d"] or match["bottom"])
    if bottom == 0 or (match["whole"] and top < 0):
        return None
    value = int(match["whole"] or 0) + Fraction(top, bottom)
    return _number(match["sign"], value)


def _recurring(match: re.Match) -> Number:
    start = match["start"]
    period = match["braced"] or match["one"] or match["round"]
    if period is None:
        period = match["first"] + (match["between"] or "") + (match["last"] or "")
    value = int(match["whole"] or 0) + Fraction(int(start or 0), 10 ** len(start))
    value += Fraction(int(period), 10 ** len(start) * (10 ** len(period) - 1))
    return _number(match["sign"], value)


def _time(match: re.Match, text: str) -> Special | None:
    """Minutes after midnight."""
    hour, minute, half = int(match[1] or match[5]), int(match[2] or match[6] or 0), (match[4] or "").casefold()
    if not half:
        return Special("clock", (hour, minute)) if hour <= 24 and minute < 60 and not match[7] else _ratio(text)
    if hour > 12 or minute > 59:
        return None
    return Special("time", (60 * (hour % 12 + 12 * (half == "p")) + minute + int(match[3] or 0) / 60,))


def _date(text: str) -> Special | None:
    """Year (0 where it is not given), month and day."""
    if match := ISO_DATE.fullmatch(text):
        return Special("date", tuple(map(int, match.groups())))
    if match := SLASHED_DATE.fullmatch(text):
        return Special("date", (int(match[3]), int(match[1]), int(match[2])))
    month = MONTH.search(text)
    if month is None or len(text) > 30:
        return None
    rest = (text[: month.start()] + " " + text[month.end() :]).replace(",", " ")
    parts = [part for part in rest.split() if part.casefold() not in ("of", "the")]
    numbers = [DAY_OR_YEAR.fullmatch(part) for part in parts]
    if not numbers or None in numbers:
        return None
    values = [int(found[1]) for found in numbers if found]
    days, years = [v for v in values if v <= 31], [v for v in values if v > 31]
    if len(days) > 1 or len(years) > 1:
        return None
    return Special("date", ((years or [0])[0], MONTHS.index(month[1][:3].casefold()) + 1, (days or [0])[0]))


def _ratio(text: str) -> Special | None:
    if not RATIO.fullmatch(text):
        return None
    return Special("ratio", tuple(Fraction(part.strip()) for part in text.split(":")))
