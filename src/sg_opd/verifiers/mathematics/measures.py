"""Compares numbers, and numbers with something: a unit, a percent sign, a label, a base, a time of day."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from .forms import Compound, Expression, Form, Labelled, Members, Number, Quantity, Special
from .quantities import COMMON

Verdict = bool | None  # `None`: it cannot be told
CASE_MATTERS = 4  # letters, up to which a unit is a symbol: mW is no MW
DEGREES = (r"^\circ", "degrees", "degree", "deg")
RADIANS = ("rad", "radians", "radian", "rads")
PLACES = 6  # to which a rounded decimal is compared with what is none
SMALL = Fraction(1, 10**5)  # relative difference of two small numbers that are equal to so many places


class UndecidedError(Exception):
    """The comparison needs sympy or units, and there are none here."""


class Symbols(Protocol):
    """What a worker knows of formulas, sets and units; see `symbols`."""

    def equal(self, a: str, b: str) -> Verdict:
        """Whether two formulas are equal."""

    def equation(self, a: str, b: str) -> Verdict:
        """Whether two equations have the same solutions."""

    def are_equal_sides(self, sides: Sequence[str]) -> Verdict:
        """Whether all sides that are numbers are one number; `None` where less than two are."""

    def same_set(self, a: Form, b: Form) -> Verdict:
        """Whether two conditions, intervals or sets hold the same numbers."""

    def progression(self, a: str, b: str) -> Verdict:
        """Whether two formulas have the same values where `k` is any integer."""

    def conversion(self, a: str, b: str) -> tuple[Fraction, Fraction] | None:
        """Factor and offset from units a to units b; `None` where they measure different things."""

    def knows(self, unit: str) -> bool:
        """Whether it is the name of a unit."""


def close(a: Fraction, b: Fraction) -> bool:
    """Whether a number and a decimal that may be rounded are equal: to six places, small ones to five digits."""
    return round(a, PLACES) == round(b, PLACES) and abs(a - b) <= SMALL * max(abs(a), abs(b))


class MeasureComparison(ABC):
    """Comparisons that need nothing but values; `same` compares any two forms."""

    def __init__(self, symbols: Symbols | None) -> None:
        self.given = symbols

    @property
    def symbols(self) -> Symbols:
        if self.given is None:
            raise UndecidedError
        return self.given

    @abstractmethod
    def same(self, a: Form, b: Form) -> Verdict:
        """Whether two forms are equal."""

    def instead(self, form: Form, other: Form, a: Form, b: Form) -> Verdict:
        """Whether two forms are equal, with `other` in the place of that one which is `form`."""
        return self.same(other if form is a else a, other if form is b else b)

    def _matched(self, a: Sequence[Form], b: Sequence[Form]) -> Verdict:
        """Whether the members of one side can be paired with equal ones of the other, each once."""
        left, unsure = list(b), False
        for one in a:
            verdicts = [self.same(one, other) for other in left]
            if True in verdicts:
                left.pop(verdicts.index(True))
            elif None in verdicts:
                left.pop(verdicts.index(None))
                unsure = True
            else:
                return False
        return None if unsure else True

    def _number(self, a: Number, b: Number) -> bool:
        if a.value == b.value or a.is_decimal == b.is_decimal:
            return a.value == b.value
        exact = b if a.is_decimal else a
        # a decimal may be a rounded value of what no decimal is equal to
        return 10**400 % exact.value.denominator != 0 and close(a.value, b.value)

    def _labelled(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Labelled) and isinstance(b, Labelled):
            return self.same(a.value, b.value) if a.label == b.label else False
        labelled = a if isinstance(a, Labelled) else b
        assert isinstance(labelled, Labelled)
        found = self.instead(labelled, labelled.value, a, b)
        return None if found else found

    def _special(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Special) and isinstance(b, Special):
            return self._specials(a, b)
        special, other = (a, b) if isinstance(a, Special) else (b, a)
        assert isinstance(special, Special)
        if isinstance(other, Number) and special.kind == "numeral":
            return special.value[0] == other.latex
        if isinstance(other, Number) and special.kind in ("ratio", "clock") and len(special.value) == 2:
            equal = special.value[1] != 0 and Fraction(special.value[0]) / special.value[1] == other.value
            return None if equal and special.kind == "clock" else equal
        formal = special.kind in ("ratio", "clock", "numeral", "ellipsis")
        return None if isinstance(other, Expression) and formal else False

    @staticmethod
    def _specials(a: Special, b: Special) -> Verdict:
        kinds = {a.kind, b.kind}
        if kinds == {"clock", "time"}:  # "4:30" may be in either half of the day, 16:30 is in one
            clock, time = (a, b) if a.kind == "clock" else (b, a)
            apart = 60 * clock.value[0] + clock.value[1] - time.value[0]
            return apart % (720 if clock.value[0] <= 12 else 1440) == 0
        if len(a.value) != len(b.value) or (len(kinds) > 1 and kinds != {"clock", "ratio"}):
            return False
        if kinds <= {"clock", "ratio"}:
            pairs = itertools.combinations(zip(a.value, b.value, strict=True), 2)
            equal = a.value == b.value or (all(a.value + b.value) and all(p * s == q * r for (p, q), (r, s) in pairs))
            return None if equal and kinds == {"clock"} and a.value != b.value else equal  # ratios, or times of day
        if a.kind == "date":
            return a.value[1:] == b.value[1:] and (a.value[0] == b.value[0] or 0 in (a.value[0], b.value[0]))
        return a.value == b.value

    def _quantity(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Quantity) and isinstance(b, Quantity):
            if _unit(a.unit) == _unit(b.unit):
                return self.same(a.number, b.number)
            for product in {a.product, b.product} - {""}:
                if not self.symbols.knows(a.unit if product == a.product else b.unit):
                    return self._as_products(a, b)
            return self._converted(a.number, a.unit, b.number, b.unit)
        quantity, other = (a, b) if isinstance(a, Quantity) else (b, a)
        assert isinstance(quantity, Quantity)
        if not isinstance(other, Number | Expression):
            return False
        equal = self.instead(quantity, quantity.number, a, b)
        if quantity.product and not is_common(quantity.unit):  # letters that may be factors
            if not self.symbols.knows(quantity.unit):
                return self._as_products(a, b)
            return self._as_products(a, b) or (None if equal else equal)
        if quantity.unit == "%":
            return self._percent(quantity.number, other, equal, quantity is a)
        if not equal and quantity.unit == r"^\circ" and isinstance(other, Expression):  # radians
            return self.symbols.equal(_radians(quantity.number), other.latex)
        return equal

    def _as_products(self, a: Form, b: Form) -> Verdict:
        """Letters that are no unit are factors."""
        latex = [form.product if isinstance(form, Quantity) else latex_of(form) for form in (a, b)]
        return self.symbols.equal(*latex) if all(latex) else False

    def _percent(self, per_cent: Form, other: Form, equal: Verdict, is_reference: bool) -> Verdict:
        """`30\\%` is 0.3, and 30 where a number of per cent was asked for; but no fraction is its own per cent."""
        if isinstance(per_cent, Number) and isinstance(other, Number):
            part = Number(per_cent.value / 100, "", per_cent.is_decimal)
            if self._number(part, other):
                return True
            if equal and abs(per_cent.value) <= 1:
                return None if is_reference or abs(per_cent.value) == 1 else False
            return equal
        return self.symbols.equal(rf"\frac{{{latex_of(per_cent)}}}{{100}}", latex_of(other)) or (
            None if is_reference and equal else False
        )

    def _converted(self, a: Form, unit: str, b: Form, other: str) -> Verdict:
        """Whether two quantities of different units are equal, as 2 hours and 120 minutes are."""
        angles = [
            DEGREES if u in DEGREES else RADIANS if u in RADIANS else () for u in (unit.casefold(), other.casefold())
        ]
        if angles in ([DEGREES, RADIANS], [RADIANS, DEGREES]):  # exactly, and no multiple
            one, two = (a, b) if angles[0] is DEGREES else (b, a)
            return self.symbols.equal(_radians(one), latex_of(two))
        conversion = self.symbols.conversion(unit, other)
        if conversion is None:
            nouns = not self.symbols.knows(unit) and not self.symbols.knows(other)
            return None if nouns and self.same(a, b) else False  # children are kids, and apples no oranges
        factor, offset = conversion
        if isinstance(a, Number) and isinstance(b, Number):
            value = a.value * factor + offset
            if (factor, offset) == (1, 0):
                return self._number(Number(value, "", a.is_decimal), b)
            return abs(value - b.value) <= Fraction(1, 10**9) * abs(b.value)
        scaled = rf"({latex_of(a)})\cdot\frac{{{factor.numerator}}}{{{factor.denominator}}}"
        return self.symbols.equal(rf"{scaled}+\frac{{{offset.numerator}}}{{{offset.denominator}}}", latex_of(b))

    def _compound(self, a: Form, b: Form) -> Verdict:
        parts = [form.parts if isinstance(form, Compound) else (form,) for form in (a, b)]
        if not all(isinstance(part, Quantity) for some in parts for part in some):
            members = [Members("list", form.parts) if isinstance(form, Compound) else form for form in (a, b)]
            return self.same(*members) if isinstance(a, Members) or isinstance(b, Members) else False
        totals = [self._total(some) for some in parts]  # type: ignore[arg-type]
        if None in totals or self.symbols.conversion(parts[0][0].unit, parts[1][0].unit) is None:  # type: ignore[union-attr]
            if len(parts[0]) != len(parts[1]):
                return False
            by_unit = [sorted(some, key=lambda part: _unit(part.unit)) for some in parts]  # type: ignore[union-attr]
            if [_unit(p.unit) for p in by_unit[0]] == [_unit(p.unit) for p in by_unit[1]]:  # type: ignore[union-attr]
                return all(self.same(x, y) for x, y in zip(*by_unit, strict=True))
            return self._matched(*parts)
        (one, unit), (two, other) = totals  # type: ignore[misc]
        return self._converted(one, unit, two, other)

    def _total(self, parts: tuple[Quantity, ...]) -> tuple[Number, str] | None:
        """The sum in the unit of the first part; `None` where the parts measure different things."""
        total = Fraction(0)
        for part in parts:
            conversion = self.symbols.conversion(part.unit, parts[0].unit)
            if conversion is None or not isinstance(part.number, Number):
                return None
            total += part.number.value * conversion[0]
        return Number(total, "", any(getattr(part.number, "is_decimal", False) for part in parts)), parts[0].unit


def latex_of(form: Form) -> str:
    return form.latex if isinstance(form, Number | Expression) else ""


def _radians(degrees: Form) -> str:
    return rf"({latex_of(degrees)})\frac{{\pi}}{{180}}"


def _unit(unit: str) -> str:
    """A unit's name for comparison by its letters; short ones are symbols, whose case and last letter count."""
    unit = unit.replace(" ", "").rstrip(".")
    return unit.casefold().removesuffix("s") if unit.isalpha() and len(unit) > CASE_MATTERS else unit


def is_common(unit: str) -> bool:
    """Whether letters outside of text commands are hardly ever a product: `cm`, `km/h`, a letter apart."""
    letters = re.findall(r"[A-Za-z]+", unit)
    return all(len(run) == 1 or run in COMMON for run in letters)
