r"""Formulas, equations and sets by sympy and math-verify; for workers, which can be killed: sympy may take for ever.

`FormulaAlgebra` is what `comparing` calls `Symbols`. Formulas that sympy has no meaning for, such as `A\cap B`, are
compared sign by sign, operands of symmetric relations in any order.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.relational import Relational

from . import units
from .forms import Condition, Expression, Form, Interval, Members, Number
from .measures import close

# what sympy would evaluate for ever: huge exponents, towers of powers, huge or repeated factorials
BOMB = re.compile(
    r"\^\s*\{?\s*-?\d{5,}|\d\s*\}*\s*\^\s*\{?\s*\d{2,}\s*\^\s*\{?\s*\d|\^[\s{]*\d+[\s}]*\^[\s{]*\d+[\s}]*\^"
    r"|\d{5,}[\s})]*!|![\s})]*!"
)
CONVERSION = ConversionConfig(lowercase_symbols=False, interpret_contains_as_eq=False)
KEPT = 16_384  # formulas that a worker remembers as sympy's objects
DIGITS = 40  # of a numerical comparison
AGREE = sympy.Float("1e-25")  # relative difference of two values that are equal, or have to be proven so
POINTS = (Fraction(3137, 4219), Fraction(7919, 2741), Fraction(-1429, 911))  # at which formulas are compared first
CASES = re.compile(r"\\(?:begin|end)\{cases\}")
ANGLE = re.compile(r"\\angle ?([A-Z])([A-Z])([A-Z])")
TRIANGLE = re.compile(r"\\triangle ?([A-Z]{3})")
COMBINATIONS = re.compile(r"(?<![A-Za-z])([CA])_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?")
DEGREES = re.compile(r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|[a-z]|\)) ?\^\\circ(?! ?[CF])")
WITHOUT_MEANING = re.compile(
    r"\d\.\d+\.|\\(?:gcd|lcm)[^\d]*[a-z]|[^\x00-\x7f]|\\(?:mid|sim|not|aleph|ldots|text|subset|equiv|angle|triangle)(?![A-Za-z])"
)
SIGNS = re.compile(r"[A-Za-z0-9]|\\(?:aleph|beth|infty|emptyset|hbar|ell|wp|Re|Im|mathbb)")
CONSTANT = re.compile(r"\+ ?[cC]$")
LOGARITHM = re.compile(r"\\log(?![A-Za-z]| ?_)")
COMMAND = re.compile(r"\\[A-Za-z]+")
STATEMENT = re.compile(
    r"\\(?:neg|land|lor|to|Rightarrow|Leftrightarrow|iff|in|notin|not|subset|subseteq|parallel|perp|cup|cap|equiv|sim|mid)"
    r"(?![A-Za-z])"
)
UNORDERED = re.compile(r"\\(?:gcd|lcm)|[([].*\\(?:cup|cap|land|lor)")
CONGRUENCE = re.compile(r"(.+?) ?\\equiv ?(-?\d{1,9}) ?\(?\\?[pb]?mod ?\{? ?(\d{1,9}) ?\}?\)?")
SYMMETRIC = re.compile(r" ?\\(cap|cup|land|lor|sim|parallel|perp|cong|Leftrightarrow|iff|oplus|equiv)(?![A-Za-z]) ?")
IMAGINARY = {sympy.Symbol("i", real=True): sympy.I}


class FormulaAlgebra:
    """What needs sympy or pint. Whatever a method raises means that it cannot be told."""

    def equal(self, a: str, b: str) -> bool | None:
        some = parse(a), parse(b)
        if None in some:
            return _same_signs(a, b, some)
        if all(isinstance(value, sympy.Expr) for value in some):
            found = _equal_formulas(*some)
            return self._otherwise(a, b) if found is False else found
        return _verified(*some)

    def _otherwise(self, a: str, b: str) -> bool | None:
        """Of two formulas that differ: whether they are equal but for the name of a constant of integration.

        `None` where they would be if a logarithm without a base were the natural one.
        """
        constant = [CONSTANT.sub("+C", latex) for latex in (a, b)]
        if constant != [a, b] and all(CONSTANT.search(latex) for latex in (a, b)):
            return self.equal(*constant)
        natural = [LOGARITHM.sub(r"\\ln", latex) for latex in (a, b)]
        return None if natural != [a, b] and self.equal(*natural) else False

    def equation(self, a: str, b: str) -> bool | None:
        some = parse(a), parse(b)
        if None in some:
            return _same_signs(a, b, some)
        sides = [value.lhs - value.rhs for value in some if isinstance(value, sympy.Eq)]
        if len(sides) == 2 and all(isinstance(side, sympy.Expr) and side.free_symbols for side in sides):
            ratio = _value(sides[0] / sides[1], POINTS[0]), _value(sides[0] / sides[1], POINTS[1])
            if None not in ratio and _agree(*ratio):
                factor = sympy.nsimplify(ratio[0], rational=True)
                return _equal_formulas(sides[0], sides[1] * factor) or _verified(*some)
        return _verified(*some)

    def are_equal_sides(self, sides: Sequence[str]) -> bool | None:
        values = [parse(side) for side in sides if side]
        numbers = [value for value in values if isinstance(value, sympy.Expr) and not value.free_symbols]
        if len(numbers) < 2:
            return None
        found = [_equal_formulas(numbers[0], other) for other in numbers[1:]]
        return None if None in found else all(found)

    def same_set(self, a: Form, b: Form) -> bool | None:
        some = as_set(a), as_set(b)
        if None in some:
            bounds = [_bounds(parse(form.latex)) for form in (a, b) if isinstance(form, Condition)]
            return _same_bounds(*bounds) if len(bounds) == 2 else None
        if some[0] == some[1]:
            return True
        empty = sympy.SymmetricDifference(*some).is_empty
        return empty if empty is not None else _verified(*some) or None

    def progression(self, a: str, b: str) -> bool | None:
        k = sympy.Symbol("k", real=True)
        some = [sympy.expand(parse(latex)) for latex in (a, b)]
        steps = [value.diff(k) for value in some]
        if any(step.has(k) for step in steps):
            return _equal_formulas(*some) or None
        if 0 in steps:
            return False if steps != [0, 0] else _equal_formulas(*some)
        if not (same_step := _equal_formulas(abs(steps[0]), abs(steps[1]))):
            return same_step
        shift = sympy.simplify((some[0] - some[1]).subs(k, 0) / steps[0])
        return shift.is_integer

    def conversion(self, a: str, b: str) -> tuple[Fraction, Fraction] | None:
        return units.conversion(a, b)

    def knows(self, unit: str) -> bool:
        return units.unit(unit) is not None


@functools.lru_cache(maxsize=KEPT)
def parse(latex: str) -> Any:
    """Sympy's object for a formula; `None` for one that sympy has no meaning for.

    Raises:
        OverflowError: a formula that would be evaluated for ever.
        Exception: whatever else parser and sympy meet, but the bare class.
    """
    if BOMB.search(latex):
        raise OverflowError("not evaluated")
    if WITHOUT_MEANING.search(latex):
        return None
    latex = COMBINATIONS.sub(_combinations, latex)
    latex = DEGREES.sub(lambda match: rf"{match[1]}\cdot\frac{{\pi}}{{180}}", latex)
    latex = re.sub(r"(\d|\))\\cdot\\frac\{\\pi\}\{180\}", r"\1\\frac{\\pi}{180}", latex)
    try:
        value = latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=CONVERSION)
    except Exception as error:
        # the parser says by a bare `Exception` that a formula has no meaning, which is then compared by its signs; what
        # is more particular is a crash of parser or sympy, of which no verdict comes
        if type(error) is not Exception:
            raise
        return None
    if isinstance(value, sympy.Expr):
        value = value.xreplace(IMAGINARY).replace(_is_odd_root, lambda root: -((-root.base) ** root.exp))
    return value


def _is_odd_root(formula: sympy.Basic) -> bool:
    """Whether it is an odd root of a negative number, of which the real one is meant."""
    exponent = formula.exp if isinstance(formula, sympy.Pow) else sympy.S.Zero
    is_odd = exponent.is_Rational and exponent.p == 1 and exponent.q % 2 == 1 and exponent.q > 1
    return bool(is_odd and formula.base.is_negative)


def _combinations(match: re.Match) -> str:
    """`C_5^2` and `A_5^2`, the numbers of combinations and of arrangements."""
    n, k = match[2], match[3]
    return rf"\binom{{{n}}}{{{k}}}" if match[1] == "C" else rf"\frac{{{n}!}}{{({n}-{k})!}}"


def canonical(latex: str) -> tuple[str, ...]:
    """A formula's signs, without spaces and needless braces; operands of a symmetric relation in alphabetical order.

    Raises:
        ValueError: nothing but punctuation.
    """
    if not SIGNS.search(COMMAND.sub(lambda match: match[0] if SIGNS.fullmatch(match[0]) else "", latex)):
        raise ValueError("no formula")
    text = re.sub(r"\{(\w|\\[A-Za-z]+)\}", r"\1", latex)
    text = ANGLE.sub(lambda m: rf"\angle {min(m[1], m[3])}{m[2]}{max(m[1], m[3])}", text)
    text = TRIANGLE.sub(lambda m: r"\triangle " + "".join(sorted(m[1])), text)
    if CASES.search(text):  # in any order
        return tuple(sorted(row.replace(" ", "").strip(",.") for row in CASES.sub("", text).split("\\\\")))
    parts = [part.replace(" ", "") for part in SYMMETRIC.split(text)]
    operators = set(parts[1::2])
    # one kind of relation, and no other nor brackets that would bind otherwise
    is_plain = len(operators) == 1 and not re.search(r"[(\[]", text) and len(STATEMENT.findall(text)) <= len(parts) // 2
    return tuple(sorted(parts[::2]) + sorted(operators)) if is_plain else ("".join(text.split()),)


def _same_signs(a: str, b: str, parsed: Sequence[Any]) -> bool | None:
    """What can be told of formulas of which one or both have no meaning to sympy: then their signs count."""
    if canonical(a) == canonical(b):
        return True
    if sorted(a.replace(" ", "")) == sorted(b.replace(" ", "")) and (
        UNORDERED.search(a) or len(STATEMENT.findall(a)) > 1
    ):
        return None  # the same signs in another order, which may mean the same
    congruences = [CONGRUENCE.fullmatch(latex) for latex in (a, b)]
    if congruences[0] and congruences[1]:
        (one, r, m), (other, s, n) = (match.groups() for match in congruences if match)
        return canonical(one) == canonical(other) and m == n and (int(r) - int(s)) % max(int(m), 1) == 0
    is_statement = [STATEMENT.search(latex) is not None for latex in (a, b)]
    known = [value is not None for value in parsed]
    # both have no meaning to sympy, or one is a statement or a set of letters, and the other a value
    return False if not any(known) or is_statement[0] != is_statement[1] else None


def as_set(form: Form) -> sympy.Set | None:
    """The numbers that a condition, an interval or a set holds; `None` for what is no such thing."""
    if isinstance(form, Number | Expression):
        value = _rational(parse(form.latex))
        return value if isinstance(value, sympy.Set) else None if value is None else sympy.FiniteSet(value)
    if isinstance(form, Condition):
        relation = parse(form.latex)
        if relation in (True, False, None) or len(relation.free_symbols) != 1:
            return None
        return _rational(relation).as_set()
    if isinstance(form, Interval) or (isinstance(form, Members) and form.kind == "tuple" and len(form.items) == 2):
        ends = form.ends if isinstance(form, Interval) else form.items
        values = [_rational(parse(end.latex)) for end in ends if isinstance(end, Number | Expression)]
        brackets = form.brackets if isinstance(form, Interval) else "()"
        return sympy.Interval(*values, brackets[0] == "(", brackets[1] == ")") if len(values) == 2 else None
    return _union(form) if isinstance(form, Members) else None


def _union(members: Members) -> sympy.Set | None:
    """The union of members, the intersection of conditions."""
    parts = [as_set(item) for item in members.items]
    if members.kind == "set":  # whose members may be sets
        sets = [isinstance(item, Expression) and isinstance(parse(item.latex), sympy.Set) for item in members.items]
        parts = [sympy.FiniteSet(part) if is_set else part for is_set, part in zip(sets, parts, strict=True)]
    if None in parts:
        return None
    if members.kind == "or" or not any(isinstance(item, Condition) for item in members.items):
        return sympy.Union(*parts)
    both = sympy.Intersection(*parts)
    # a comma between conditions that exclude one another stands for "or"
    return sympy.Union(*parts) if members.kind == "list" and both.is_empty else both


def _bounds(relation: Any) -> list[tuple[type, sympy.Expr]]:
    """An inequality, or a chain of them, as kinds and expressions that are positive; nothing of what is none."""
    parts = relation.args if isinstance(relation, sympy.And) else (relation,)
    if not all(isinstance(part, Relational) and not isinstance(part, sympy.Eq) for part in parts):
        return []
    strict = sympy.StrictGreaterThan, sympy.StrictLessThan
    return [
        (sympy.Ne, part.lhs - part.rhs)
        if isinstance(part, sympy.Ne)
        else (sympy.Gt if isinstance(part, strict) else sympy.Ge, part.gts - part.lts)
        for part in parts
    ]


def _same_bounds(a: list[tuple[type, sympy.Expr]], b: list[tuple[type, sympy.Expr]]) -> bool | None:
    """Whether the expressions are pairwise the same, but for a positive factor."""
    if not a or not b:
        return None
    left = list(b)
    for kind, some in a:
        ratios = [(other, sympy.simplify(some / expression)) for other, expression in left]
        found = [ratio.is_number and (ratio > 0 or kind is sympy.Ne) and kind is other for other, ratio in ratios]
        if True not in found:
            return False
        left.pop(found.index(True))
    return not left


def _rational(value: Any) -> Any:
    """With exact numbers for decimals."""
    if value is None or not value.atoms(sympy.Float):
        return value
    return value.xreplace({number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)})


def _verified(a: Any, b: Any) -> bool:
    """What math-verify says; it raises what goes wrong within sympy."""
    options = {"allow_set_relation_comp": True, "timeout_seconds": None, "raise_on_error": True}
    return bool(verify(a, b, **options))


def _equal_formulas(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    """Whether two formulas are equal: different where their values differ anywhere, equal where sympy proves it."""
    decimals = [bool(value.atoms(sympy.Float)) for value in (a, b)]
    if a == b:
        return not a.has(sympy.nan, sympy.zoo)
    infinite = [value.doit().has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for value in (a, b)]
    if any(infinite):  # sympy may call it equal to anything
        return a.doit() == b.doit() if all(infinite) else False
    if not a.free_symbols and not b.free_symbols:
        return _equal_values(a, b, any(decimals))
    agree: list[bool] = []
    for point in () if any(decimals) else POINTS:
        values = [_value(value, point) for value in (a, b)]
        agree += [_agree(*values)] if None not in values else []
    if agree and not all(agree):
        # equal for positive numbers alone, which letters often stand for: sqrt(gh) and sqrt(g) sqrt(h)
        return None if agree[:2] == [True, True] else False
    if _verified(a, b):
        return True
    return None if agree else False


def _value(formula: sympy.Expr, point: Fraction) -> sympy.Expr | None:
    """Its value at `point` times a number of each letter's own; `None` where that is no number."""
    letters = sorted(formula.free_symbols, key=str)
    at = {
        letter: sympy.Rational(point.numerator, point.denominator)
        * (1 + sympy.Rational(sum(map(ord, str(letter))) % 97, 89))
        for letter in letters
    }
    value = formula.subs(at).evalf(DIGITS)
    return value if value.is_number and value.is_finite else None


def _agree(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(abs(a - b) <= AGREE * (abs(a) + abs(b)))


def _equal_values(a: sympy.Expr, b: sympy.Expr, is_decimal: bool) -> bool | None:
    """Whether two numbers are equal; to six places where one is a decimal, which may be rounded."""
    if is_decimal:
        parts = [value.evalf(DIGITS).as_real_imag() for value in (_rational(a), _rational(b))]
        return all(close(*(Fraction(str(part)) for part in pair)) for pair in zip(*parts, strict=True))
    values = [value.evalf(DIGITS) for value in (a, b)]
    if not all(value.is_number for value in values):
        return _verified(a, b)
    if not _agree(*values):
        return False
    difference = a.doit() - b.doit()
    # equal to as many digits, but proven so? `equals` searches for the minimal polynomial, as a last resort
    return difference == 0 or sympy.simplify(difference) == 0 or difference.equals(0)
