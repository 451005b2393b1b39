"""What an answer can be: the forms that `reading` makes of a text and `comparing` compares."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True)
class Number:
    """An exact rational number."""

    value: Fraction
    latex: str
    is_decimal: bool = False  #: Written with a point, so that it may stand for a rounded value.


@dataclass(frozen=True)
class Expression:
    """A formula, for sympy."""

    latex: str


@dataclass(frozen=True)
class Words:
    """Nothing but words, in small letters; `product` holds a single one that may be letters multiplied, as in `AB`."""

    words: str
    product: str = ""


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple-choice question, A to J, with its option where that is given."""

    letter: str
    option: Form | None = None


@dataclass(frozen=True)
class Quantity:
    r"""A number with a unit, or with a noun: `5\text{ cm}`, `25 dollars`, `30%`."""

    number: Form
    unit: str
    product: str = ""  #: The whole as a formula, where it may be one: `25cm` has the letters of a product.


@dataclass(frozen=True)
class Compound:
    """Several quantities that are one: `5 feet 6 inches`."""

    parts: tuple[Quantity, ...]


@dataclass(frozen=True)
class Labelled:
    r"""A word and what it names: `\text{width }5`."""

    label: str
    value: Form


@dataclass(frozen=True)
class Members:
    """Several answers; "list" is separated by commas, "and" and "or" by these words."""

    kind: Literal["list", "and", "or", "set", "tuple"]
    items: tuple[Form, ...]


@dataclass(frozen=True)
class Family:
    r"""Values for every integer: `\frac{\pi}{4}+k\pi, k\in\mathbb{Z}`; the integer is called `k`."""

    value: Form


@dataclass(frozen=True)
class Interval:
    """An interval with a square bracket; `(1, 2)` is a tuple until it is compared with a set."""

    brackets: str
    ends: tuple[Form, Form]


@dataclass(frozen=True)
class Equation:
    """Sides joined by `=`; `name` where the first is one, such as `x`, `f(x)` or `AB`."""

    sides: tuple[str, ...]
    value: Form  #: Of the last side.
    name: str = ""


@dataclass(frozen=True)
class Condition:
    r"""Inequalities, a chain of them, or `\ne`; `variable` is empty in `at least 5`."""

    latex: str
    variable: str


@dataclass(frozen=True)
class Special:
    """What is neither number nor formula: a time of day in minutes, a date, a numeral with its base and the like."""

    kind: Literal["time", "clock", "date", "numeral", "remainder", "ratio", "ellipsis"]
    value: tuple


Form = (
    Number
    | Expression
    | Words
    | Choice
    | Quantity
    | Compound
    | Labelled
    | Members
    | Family
    | Interval
    | Equation
    | Condition
    | Special
)
