r"""Units of measurement by pint, with the spellings and the currencies that answers use; for workers."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from pint import Unit, UnitRegistry
from pint.errors import PintError

from .measures import CASE_MATTERS

CURRENCIES = {
    "dollar": ("$", r"\$", "usd", "us$", "dollars", "buck", "bucks"),
    "us_cent": ("¢", "cent", "cents"),
    "euro": ("€", "eur", "euros"),
    "sterling": ("£", "gbp", "pounds sterling"),
    "penny": ("pence", "pennies", "p"),
    "rupee": ("₹", "inr", "rs", "rupees"),
    "yen": ("¥", "jpy"),
    "yuan": ("元", "rmb", "cny"),
    "won": ("₩",),
    "ruble": ("₽", "rubles", "roubles"),
}
# spellings that pint does not know, or takes for something else
SPELLINGS = {
    **{spelling: name for name, spellings in CURRENCIES.items() for spelling in spellings},
    **dict.fromkeys((r"^\circ", "deg", "degs", "degrees", "°"), "degree"),
    **dict.fromkeys(
        (r"^\circc", "degree celsius", "degrees celsius", "degree centigrade", "degrees c", "celsius"), "degC"
    ),
    **dict.fromkeys((r"^\circf", "degree fahrenheit", "degrees fahrenheit", "degrees f", "fahrenheit"), "degF"),
    **dict.fromkeys(("hrs", "hr", "h"), "hour"),
    **dict.fromkeys(("mins", "min"), "minute"),
    **dict.fromkeys(("secs", "sec", "s"), "second"),
    **dict.fromkeys(("cms",), "cm"),
    **dict.fromkeys(("mms",), "mm"),
    **dict.fromkeys(("kms",), "km"),
    **dict.fromkeys(("kgs", "kilos", "kilo"), "kg"),
    **dict.fromkeys(("gm", "gms", "gram", "grams"), "g"),
    **dict.fromkeys(("lbs", "lb"), "pound"),
    **dict.fromkeys(("yds", "yd"), "yard"),
    **dict.fromkeys(("kph", "kmph", "kmh"), "km/hour"),
    **dict.fromkeys(("ltr", "ltrs"), "liter"),
    **dict.fromkeys(("unit", "units", "u"), "generic_unit"),
    **{"厘米": "cm", "毫米": "mm", "分米": "dm", "米": "m", "千米": "km", "公里": "km", "小时": "hour", "时": "hour"},
    **{
        "分钟": "minute",
        "秒": "second",
        "天": "day",
        "千克": "kg",
        "公斤": "kg",
        "克": "g",
        "吨": "tonne",
        "升": "liter",
    },
    **{"毫升": "mL", "度": "degree", "平方厘米": "cm**2", "平方米": "m**2", "立方厘米": "cm**3", "立方米": "m**3"},
    **{"ms^{-1}": "m/s", "ms^-1": "m/s", "ms^{-2}": "m/s**2", "kms^{-1}": "km/s", "pts": "point", "pt": "point"},
    "ω": "ohm",
    **{"kg": "kg", "km": "km", "cm": "cm", "kwh": "kWh"},  # in any case
    "in": "inch",
    "ins": "inch",
    "cc": "cm**3",
    "ccs": "cm**3",
    "%": "percent",
}
DENOMINATOR = 10**9  # of a factor: pint computes it with floats
ALLOWED = re.compile(r"[A-Za-z_µμΩÅ0-9*/() ^-]{1,60}")
# one sign or word for two things
SAME_CURRENCY = ({"£", "pounds"}, {"£", "pound"}, {"¥", "元"}, {"¥", "yuan"}, {"¥", "rmb"})
_FILLERS = "old away long wide tall high deep each apart older younger of in total left remaining per. from"
FILLERS = frozenset(_FILLERS.split())
POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}


@functools.lru_cache(maxsize=1)
def registry() -> UnitRegistry:
    """Pint's units with currencies."""
    known: UnitRegistry = UnitRegistry(autoconvert_offset_to_baseunit=True)
    for name in CURRENCIES:
        if name not in ("us_cent", "penny"):
            known.define(f"{name} = [{name}]")
    known.define("generic_unit = [generic]")
    known.define("us_cent = 0.01 dollar")
    known.define("penny = 0.01 sterling")
    return known


@functools.lru_cache(maxsize=4096)
def unit(name: str) -> Unit | None:
    """A unit by the name that an answer gives it; `None` where it is none."""
    name = _without_fillers(name).replace(" ^", "^")
    text = " ".join(re.sub(r"\.(?=\s|$|[A-Za-z])", " ", name).replace("\\cdot", "*").replace("·", "*").split())
    whole = text.casefold().replace(r"^\circ ", r"^\circ")
    text = SPELLINGS[whole] if whole in SPELLINGS else _formula(text)
    if not ALLOWED.fullmatch(text):
        return None
    try:
        return registry().parse_units(text)
    except (
        PintError,
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        KeyError,
        AssertionError,
    ):  # no name of a unit
        return None


def conversion(a: str, b: str) -> tuple[Fraction, Fraction] | None:
    """The factor and the offset that make a number of units b of one of units a; `None` where they measure different
    things, or where one of them is no unit. Two names that are no units are one where they have the same words."""
    one, other = unit(a), unit(b)
    if a == b or {a.casefold(), b.casefold()} in SAME_CURRENCY:
        return Fraction(1), Fraction(0)
    if one is None or other is None:
        words = [{_singular(word) for word in re.findall(r"[^\W\d]+", _without_fillers(name))} for name in (a, b)]
        # brown eggs are eggs
        is_same = one is other and all(words) and (words[0] <= words[1] or words[1] <= words[0])
        return (Fraction(1), Fraction(0)) if is_same else None
    nothing, single = (registry().Quantity(value, one) for value in (0.0, 1.0))
    if single.dimensionality != registry().Quantity(1.0, other).dimensionality or _ratio_of(one) != _ratio_of(other):
        return None
    offset = float(nothing.to(other).magnitude)
    factor = float(single.to(other).magnitude) - offset
    return Fraction(factor).limit_denominator(DENOMINATOR), Fraction(offset).limit_denominator(DENOMINATOR)


def _without_fillers(name: str) -> str:
    """`years old` as `years`, `hours of work` as `hours`."""
    words = name.split()
    places = [place for place, word in enumerate(words) if place and word.casefold() in FILLERS]
    return " ".join(words[: places[0]] if places else words)


def _ratio_of(some: Unit) -> str:
    """Which of the dimensionless units it is: an angle is no percentage."""
    if not registry().Quantity(1.0, some).dimensionless:
        return ""
    return "percent" if "percent" in str(some) else "angle"


def _singular(word: str) -> str:
    word = " ".join(word.casefold().replace(".", " ").split())
    return word.removesuffix("s") if len(word) > 3 else word


def _formula(text: str) -> str:
    """`square feet per hour` as `feet**2 / hour`."""
    text = re.sub(r"\bper\b", "/", text)
    tokens = re.findall(r"[^\W\d_]+|\^ ?\{? ?-?\d ?\}?|\*\*|[*/()]", text)
    parts: list[str] = []
    power = 0
    for token in tokens:
        lower = token.casefold()
        if lower in POWERS and parts and lower.endswith("ed"):
            parts.append(f"**{POWERS[lower]}")
        elif lower in POWERS:
            power = POWERS[lower]
        elif token[0] == "^":
            parts.append("**" + token.strip("^{} "))
        elif token in ("*", "/", "(", ")", "**"):
            parts.append(token)
        else:
            if parts and parts[-1] not in ("*", "/", "("):
                parts.append("*")
            parts.append(SPELLINGS.get(lower, token if len(token) <= CASE_MATTERS else lower))
            if power:
                parts.append(f"**{power}")
                power = 0
    return " ".join(parts)
