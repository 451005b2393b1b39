"""Compares two answers: `same` says whether they are equal, or that nobody can tell.

It decides by itself what needs no sympy; the rest it asks `Symbols`, which workers have. Standard library only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from .forms import (
    Choice,
    Compound,
    Condition,
    Equation,
    Expression,
    Family,
    Form,
    Interval,
    Labelled,
    Members,
    Number,
    Quantity,
    Special,
    Words,
)

from .reading import vector

Verdict = bool | None  # `None`: it cannot be told
PLACES = 6  # to which a rounded decimal is compared with what is none
SMALL = Fraction(1, 10**5)  # relative difference of two small numbers that are equal to so many places
MAX_MEMBERS = 64
NO_SOLUTION = frozenset(
    {"no solution", "no solutions", "no real solution", "no real solutions", "empty set", "the empty set", "empty"}
)
SET_LIKE = (Condition, Interval)


class Undecided(Exception):
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

    def factor(self, a: str, b: str) -> Fraction | float | None:
        """How many of unit b one of unit a is; `None` where they measure different things."""

    def knows(self, unit: str) -> bool:
        """Whether it is the name of a unit."""


def same(reference: Form, answer: Form, symbols: Symbols | None = None) -> Verdict:
    """Whether an answer equals a reference answer.

    Raises:
        Undecided: without `symbols`, where they are needed.
    """
    return reference == answer or compare(reference, answer, symbols)


def compare(a: Form, b: Form, symbols: Symbols | None = None) -> Verdict:
    """As `same`, without a glance at whether both are written alike: of one form it tells whether it can be compared."""
    return _Comparison(symbols).same(a, b)


def close(a: Fraction, b: Fraction) -> bool:
    """Whether a number and a decimal that may be rounded are equal: to six places, small ones to five digits."""
    return round(a, PLACES) == round(b, PLACES) and abs(a - b) <= SMALL * max(abs(a), abs(b))


class _Comparison:
    def __init__(self, symbols: Symbols | None) -> None:
        self.given = symbols

    @property
    def symbols(self) -> Symbols:
        if self.given is None:
            raise Undecided
        return self.given

    def same(self, a: Form, b: Form) -> Verdict:
        for kinds, rule in (
            (Choice, self._choice),
            (Words, self._words),
            (Family, self._family),
            (Members, self._members),
            (Equation, self._equation),
            (SET_LIKE, self._set),
            (Labelled, self._labelled),
            (Compound, self._compound),
            (Special, self._special),
            (Quantity, self._quantity),
        ):
            if isinstance(a, kinds) or isinstance(b, kinds):  # type: ignore[arg-type]
                return rule(a, b)
        if isinstance(a, Number) and isinstance(b, Number):
            return self._number(a, b)
        assert isinstance(a, Number | Expression) and isinstance(b, Number | Expression)
        return self.symbols.equal(a.latex, b.latex)

    def _number(self, a: Number, b: Number) -> bool:
        if a.value == b.value or a.is_decimal == b.is_decimal:
            return a.value == b.value
        exact = b if a.is_decimal else a
        # a decimal may be a rounded value of what no decimal is equal to
        return 10**400 % exact.value.denominator != 0 and close(a.value, b.value)

    def _choice(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Choice) and isinstance(b, Choice):
            return a.letter == b.letter
        choice, other = (a, b) if isinstance(a, Choice) else (b, a)
        assert isinstance(choice, Choice)
        if isinstance(other, Expression) and len(other.latex) == 1:
            return isinstance(a, Choice) and choice.letter == other.latex.upper()
        if isinstance(other, Expression | Equation) and choice.option is None:  # the letter may be a variable
            other_latex = other.latex if isinstance(other, Expression) else other.sides[-1]
            return self.symbols.equal(choice.letter, other_latex) if choice.letter in other_latex else False
        return (
            False if choice.option is None else self.same(*((choice.option, b) if choice is a else (a, choice.option)))
        )

    def _words(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Words) and isinstance(b, Words):
            if a.words == b.words or a.words.replace(" ", "") == b.words.replace(" ", ""):
                return True
            return bool(a.product and b.product) and sorted(a.product) == sorted(b.product)
        words, other = (a, b) if isinstance(a, Words) else (b, a)
        assert isinstance(words, Words)
        if words.words in NO_SOLUTION and isinstance(other, Expression):
            return other.latex == r"\emptyset"
        if words.product and isinstance(other, Expression):
            if len(words.product) > 4 and not set(words.product) & set(other.latex):
                return False
            return self.symbols.equal(words.product, other.latex)
        if words.product and isinstance(other, Equation):
            return self.same(*((words, other.value) if words is a else (other.value, words))) if other.name else None
        return False

    # several

    def _family(self, a: Form, b: Form) -> Verdict:
        """Values for every integer `k`: of arithmetic progressions it can be told whether they are one."""
        values = [form.value if isinstance(form, Family) else form for form in (a, b)]
        values = [form.value if isinstance(form, Equation) and form.name else form for form in values]
        if all(isinstance(value, Members) for value in values):
            families = [tuple(Family(item) for item in value.items) for value in values if isinstance(value, Members)]
            return self._matched(*families) if len(families[0]) == len(families[1]) else None
        latex = [_latex(value) for value in values]
        return self.symbols.progression(*latex) if all(latex) else None

    def _members(self, a: Form, b: Form) -> Verdict:
        if any(isinstance(form, SET_LIKE) or _is_region(form) for form in (a, b)):
            return self._set(a, b)
        if isinstance(a, Equation) or isinstance(b, Equation):
            one, other = (a, b) if isinstance(a, Equation) else (b, a)
            assert isinstance(one, Equation) and isinstance(other, Members)
            if one.name and isinstance(one.value, Members | Expression):
                return self.same(*((one.value, other) if one is a else (other, one.value)))
        a, b = (vector(form.latex) or form if isinstance(form, Expression) else form for form in (a, b))
        items = [self._items(form) for form in (a, b)]
        kinds = [form.kind if isinstance(form, Members) else "list" for form in (a, b)]
        if ("tuple" in kinds and {"set", "or"} & set(kinds)) or min(map(len, items)) == 0:
            return False
        if isinstance(a, Expression) or isinstance(b, Expression):
            if not all(isinstance(form, Members) for form in (a, b)) and self._may_be_set(a, b):
                return self._set(a, b)
        if len(items[0]) != len(items[1]) or max(map(len, items)) > MAX_MEMBERS:
            return None if len(items[0]) == len(items[1]) else False
        found = self._in_order(*items) if "tuple" in kinds or self._are_named(*items) else self._matched(*items)
        # "2 and 5" for "2 or 5" may or may not be what was meant
        doubtful = {"and", "or"} <= set(kinds) or (
            kinds.count("or") == 1 and all(isinstance(item, Choice | Words) for item in items[0])
        )
        return None if found and doubtful else found

    def _items(self, form: Form) -> tuple[Form, ...]:
        """The members; those of a set, or of alternatives, once each."""
        if not isinstance(form, Members):
            return (form,)
        if form.kind not in ("set", "or") or len(form.items) > MAX_MEMBERS:
            return form.items
        kept: list[Form] = []
        for item in form.items:
            if not any(self.same(item, other) for other in kept):
                kept.append(item)
        return tuple(kept)

    @staticmethod
    def _may_be_set(a: Form, b: Form) -> bool:
        latex = a.latex if isinstance(a, Expression) else b.latex if isinstance(b, Expression) else ""
        return any(sign in latex for sign in (r"\cup", r"\cap", r"\setminus", r"\emptyset", r"\mathbb"))

    @staticmethod
    def _are_named(*sides: tuple[Form, ...]) -> bool:
        """Whether one side names each of its values by another letter, and the other names none: then order counts."""
        names = [[item.name for item in side if isinstance(item, Equation) and item.name] for side in sides]
        complete = [name for name, side in zip(names, sides, strict=True) if len(name) == len(side)]
        return len(complete) == 1 and [] in names and len({name[0] for name in complete[0]}) == len(complete[0])

    def _in_order(self, a: Sequence[Form], b: Sequence[Form]) -> Verdict:
        a, b = (sorted(some, key=_name) if all(map(_name, some)) else some for some in (a, b))
        return _all(self.same(one, other) for one, other in zip(a, b, strict=True))

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

    # relations and sets

    def _equation(self, a: Form, b: Form) -> Verdict:
        for form in (a, b):
            if isinstance(form, Equation) and len(form.sides) > 1 and self._is_false(form):
                return False
        if isinstance(a, Equation) and isinstance(b, Equation):
            if a.name and a.name == b.name and not isinstance(a.value, Expression):
                return self.same(a.value, b.value)
            if a.name and b.name and a.name != b.name and _is_constant(a.value) and _is_constant(b.value):
                return False
            if not all(isinstance(form.value, Number | Expression) for form in (a, b)):
                return self.same(a.value, b.value) if a.name == b.name else False
            return self.symbols.equation(f"{a.sides[0]}={a.sides[-1]}", f"{b.sides[0]}={b.sides[-1]}")
        equation, other = (a, b) if isinstance(a, Equation) else (b, a)
        assert isinstance(equation, Equation)
        if isinstance(other, SET_LIKE):
            return self._set(a, b) if not equation.name else self._valued(equation, other, equation is a)
        found = self._valued(equation, other, equation is a)
        if equation.name or not found or self._has_value(equation):
            return found
        return False if equation is a else None  # `m+n=17` says 17, but is it what was asked for?

    def _valued(self, equation: Equation, other: Form, is_reference: bool) -> Verdict:
        return self.same(equation.value, other) if is_reference else self.same(other, equation.value)

    def _is_false(self, equation: Equation) -> bool:
        """Whether two sides are numbers that differ, as in 12+6=17."""
        if len(equation.sides) == 2 and (equation.name or equation.sides[1] == ""):
            return False
        return self.symbols.are_equal_sides(equation.sides) is False

    def _has_value(self, equation: Equation) -> bool:
        """Whether two sides are one number, which the equation then states, as in 12+5=17."""
        return self.symbols.are_equal_sides(equation.sides) is True

    def _set(self, a: Form, b: Form) -> Verdict:
        for form, other in ((a, b), (b, a)):
            if isinstance(form, SET_LIKE) and isinstance(other, Number | Special | Quantity | Compound | Labelled):
                return False
            if (
                isinstance(form, Interval)
                and form.brackets == "[]"
                and isinstance(other, Members)
                and len(other.items) == 2
            ):
                if other.kind in ("list", "and"):
                    return None  # a list in Python's notation, or an interval
                return False
        names = [form.variable for form in (a, b) if isinstance(form, Condition)]
        if len(names) == 2 and all(names) and names[0] != names[1]:
            return False
        return self.symbols.same_set(a, b)

    # numbers with something

    def _labelled(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Labelled) and isinstance(b, Labelled):
            return self.same(a.value, b.value) if a.label == b.label else False
        labelled, other = (a, b) if isinstance(a, Labelled) else (b, a)
        assert isinstance(labelled, Labelled)
        found = self.same(*((labelled.value, other) if labelled is a else (other, labelled.value)))
        return None if found else found

    def _special(self, a: Form, b: Form) -> Verdict:
        for form, other in ((a, b), (b, a)):
            if (
                isinstance(form, Special)
                and form.kind == "ratio"
                and len(form.value) == 2
                and isinstance(other, Number)
            ):
                return form.value[1] != 0 and form.value[0] / form.value[1] == other.value
            if isinstance(form, Special) and form.kind == "numeral" and isinstance(other, Number):
                return form.value[0] == other.latex
            if (
                isinstance(form, Special)
                and isinstance(other, Expression)
                and form.kind in ("ratio", "numeral", "ellipsis")
            ):
                return None
        if not isinstance(a, Special) or not isinstance(b, Special):
            return False
        if {a.kind, b.kind} == {"ratio", "time"}:  # "4:30" without its half of the day
            ratio, time = (a, b) if a.kind == "ratio" else (b, a)
            return len(ratio.value) == 2 and (60 * ratio.value[0] + ratio.value[1] - time.value[0]) % 720 == 0
        if a.kind != b.kind:
            return False
        if a.kind == "ratio":
            return len(a.value) == len(b.value) and all(
                p * s == q * r for (p, q), (r, s) in itertools.combinations(zip(a.value, b.value, strict=True), 2)
            )
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
        if quantity.product and not self.symbols.knows(quantity.unit):
            return self._as_products(a, b)
        equal = self.same(*((quantity.number, other) if quantity is a else (other, quantity.number)))
        if quantity.unit == "%":
            return self._percent(quantity.number, other, equal, quantity is a)
        if not equal and quantity.unit == r"^\circ" and isinstance(other, Expression):  # radians
            return self.symbols.equal(rf"({_latex(quantity.number)})\frac{{\pi}}{{180}}", other.latex)
        return equal

    def _as_products(self, a: Form, b: Form) -> Verdict:
        """Letters that are no unit are factors."""
        latex = [form.product if isinstance(form, Quantity) else _latex(form) for form in (a, b)]
        return self.symbols.equal(*latex) if all(latex) else False

    def _percent(self, per_cent: Form, other: Form, equal: Verdict, is_reference: bool) -> Verdict:
        """`30\\%` is 0.3, and 30 where a number of per cent was asked for; but no fraction is its own per cent."""
        if isinstance(per_cent, Number) and isinstance(other, Number):
            part = Number(per_cent.value / 100, "", per_cent.is_decimal)
            if self._number(part, other):
                return True
            if equal and abs(per_cent.value) < 1:
                return None if is_reference else False
            return equal
        return self.symbols.equal(rf"\frac{{{_latex(per_cent)}}}{{100}}", _latex(other)) or equal

    def _converted(self, a: Form, unit: str, b: Form, other: str) -> Verdict:
        """Whether two quantities of different units are equal, as 2 hours and 120 minutes are."""
        factor = self.symbols.factor(unit, other)
        if factor is None:
            return False
        if isinstance(a, Number) and isinstance(b, Number):
            value = a.value * Fraction(factor)
            if factor == 1:
                return self._number(Number(value, "", a.is_decimal), b)
            return abs(value - b.value) <= Fraction(1, 10**9) * abs(b.value)
        scale = Fraction(factor).limit_denominator(10**9)
        return self.symbols.equal(rf"({_latex(a)})\cdot\frac{{{scale.numerator}}}{{{scale.denominator}}}", _latex(b))

    def _compound(self, a: Form, b: Form) -> Verdict:
        parts = [form.parts if isinstance(form, Compound) else (form,) for form in (a, b)]
        if not all(isinstance(part, Quantity) for some in parts for part in some):
            members = [Members("list", form.parts) if isinstance(form, Compound) else form for form in (a, b)]
            return self._members(*members) if isinstance(a, Members) or isinstance(b, Members) else False
        totals = [self._total(some) for some in parts]  # type: ignore[arg-type]
        if None in totals or self.symbols.factor(parts[0][0].unit, parts[1][0].unit) is None:  # type: ignore[union-attr]
            return self._matched(*parts) if len(parts[0]) == len(parts[1]) else False
        (one, unit), (two, other) = totals  # type: ignore[misc]
        return self._converted(one, unit, two, other)

    def _total(self, parts: tuple[Quantity, ...]) -> tuple[Number, str] | None:
        """The sum in the unit of the first part; `None` where the parts measure different things."""
        total = Fraction(0)
        for part in parts:
            factor = self.symbols.factor(part.unit, parts[0].unit)
            if factor is None or not isinstance(part.number, Number):
                return None
            total += part.number.value * Fraction(factor).limit_denominator(10**9)
        return Number(total, "", any(getattr(part.number, "is_decimal", False) for part in parts)), parts[0].unit


def _is_region(form: Form) -> bool:
    """Whether members are conditions on one number, or intervals."""
    if not isinstance(form, Members) or not form.items:
        return False
    names = {item.variable for item in form.items if isinstance(item, Condition)}
    return len(names) <= 1 and all(isinstance(item, SET_LIKE) or _is_region(item) for item in form.items)


def _all(verdicts: object) -> Verdict:
    found = list(verdicts)  # type: ignore[call-overload]
    return False if False in found else None if None in found else True


def _name(form: Form) -> str:
    return form.name if isinstance(form, Equation) else ""


def _latex(form: Form) -> str:
    return form.latex if isinstance(form, Number | Expression) else ""


def _unit(unit: str) -> str:
    """A unit's name for comparison by its letters; short ones are symbols, whose case and last letter count."""
    unit = unit.replace(" ", "").rstrip(".")
    return unit if len(unit) <= 3 else unit.casefold().removesuffix("s")


def _is_constant(form: Form) -> bool:
    return not isinstance(form, Expression)
