"""Compares two answers: `same` says whether they are equal, or that nobody can tell.

It decides by itself what needs no sympy; the rest it asks `Symbols`, which workers have. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

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
from .measures import MeasureComparison, Symbols, UndecidedError, Verdict, latex_of
from .reading import vector

__all__ = ["Symbols", "UndecidedError", "Verdict", "compare", "same"]

# words that are formulas, or each other
MEANINGS = {
    **dict.fromkeys(("no solution", "no solutions", "no real solution", "no real solutions"), r"\emptyset"),
    **dict.fromkeys(("empty set", "the empty set", "empty"), r"\emptyset"),
    **dict.fromkeys(("infinity", "positive infinity"), r"\infty"),
    "negative infinity": r"-\infty",
    **dict.fromkeys(("all real numbers", "all reals", "real numbers", "the real numbers"), r"\mathbb{R}"),
    **dict.fromkeys(("dne", "does not exist", "doesn't exist"), "dne"),
}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
NUMBER_WORDS = _NUMBER_WORDS.split()
SET_LIKE = (Condition, Interval)
MAX_MEMBERS = 64


def same(reference: Form, answer: Form, symbols: Symbols | None = None) -> Verdict:
    """Whether an answer equals a reference answer.

    Raises:
        UndecidedError: without `symbols`, where they are needed.
    """
    return reference == answer or compare(reference, answer, symbols)


def compare(a: Form, b: Form, symbols: Symbols | None = None) -> Verdict:
    """As `same`, but not content with both being written alike: of one form it tells whether it can be compared."""
    return _Comparison(symbols).same(a, b)


class _Comparison(MeasureComparison):
    def same(self, a: Form, b: Form) -> Verdict:
        for kinds, rule in (
            (Choice, self._choice),
            (Words, self._words_or_letters),
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
        return self.symbols.equal(latex_of(a), latex_of(b))

    def _choice(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Choice) and isinstance(b, Choice):
            if a.letter != b.letter or not a.option or not b.option:
                return a.letter == b.letter
            return self.same(a.option, b.option) or None  # one letter and two texts: which of them was meant?
        choice, other = (a, b) if isinstance(a, Choice) else (b, a)
        assert isinstance(choice, Choice)
        if isinstance(other, Expression) and len(other.latex) == 1:
            return isinstance(a, Choice) and choice.letter == other.latex.upper()
        if isinstance(other, Expression | Equation) and choice.option is None:  # the letter may be a variable
            other_latex = other.latex if isinstance(other, Expression) else other.sides[-1]
            return self.symbols.equal(choice.letter, other_latex) if choice.letter in other_latex else False
        return False if choice.option is None else self.instead(choice, choice.option, a, b)

    def _words(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Words) and isinstance(b, Words):
            if _meaning(a.words) == _meaning(b.words):
                return True
            if not (a.product and b.product) or sorted(a.product) != sorted(b.product):
                return False
            # letters in another order: a product, or another word, name or ranking
            is_product = (len(a.product) == 2 and a.product.isupper()) or not set(a.product.lower()) & set("aeiou")
            return True if is_product and not (a.product.isupper() and len(a.product) > 2) else None
        words, other = (a, b) if isinstance(a, Words) else (b, a)
        assert isinstance(words, Words)
        if words.words in MEANINGS and isinstance(other, Expression):
            return MEANINGS[words.words] == other.latex.replace(" ", "")
        if words.words in NUMBER_WORDS and isinstance(other, Number | Quantity):
            value = Number(Fraction(NUMBER_WORDS.index(words.words)), str(NUMBER_WORDS.index(words.words)))
            return self.instead(words, value, a, b)
        if words.product and isinstance(other, Expression):
            return self.symbols.equal(words.product, other.latex)
        if words.product and isinstance(other, Equation):
            return self.instead(other, other.value, a, b) if other.name else None
        return False

    def _words_or_letters(self, a: Form, b: Form) -> Verdict:
        if isinstance(a, Members) or isinstance(b, Members):
            return self._members(a, b)
        return self._words(a, b)

    # several

    def _family(self, a: Form, b: Form) -> Verdict:
        """Values for every integer `k`: of arithmetic progressions it can be told whether they are one."""
        values = [form.value if isinstance(form, Family) else form for form in (a, b)]
        values = [form.value if isinstance(form, Equation) and form.name else form for form in values]
        if all(isinstance(value, Members) for value in values):
            families = [tuple(Family(item) for item in value.items) for value in values if isinstance(value, Members)]
            return self._matched(*families) if len(families[0]) == len(families[1]) else None
        latex = [latex_of(value) for value in values]
        return self.symbols.progression(*latex) if all(latex) else None

    def _members(self, a: Form, b: Form) -> Verdict:
        if any(isinstance(form, SET_LIKE) or _is_region(form) for form in (a, b)):
            return self._set(a, b)
        if isinstance(a, Equation) or isinstance(b, Equation):
            one = a if isinstance(a, Equation) else b
            assert isinstance(one, Equation)
            if one.name and isinstance(one.value, Members | Expression):
                return self.instead(one, one.value, a, b)
        a, b = (vector(form.latex) or form if isinstance(form, Expression) else form for form in (a, b))
        a, b = (_letters(form) if isinstance(form, Words) else form for form in (a, b))
        items = [self._items(form) for form in (a, b)]
        kinds = [form.kind if isinstance(form, Members) else "list" for form in (a, b)]
        if ("tuple" in kinds and {"set", "or"} & set(kinds)) or min(map(len, items)) == 0:
            return False
        if self._may_be_set(a, b):
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
        verdicts = [self.same(one, other) for one, other in zip(a, b, strict=True)]
        return False if False in verdicts else None if None in verdicts else True

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
                return self.same(a.value, b.value) if a.name == b.name else None if not (a.name and b.name) else False
            if a.name and a.name == b.name and self.same(a.value, b.value):
                return True
            return self.symbols.equation(f"{a.sides[0]}={a.sides[-1]}", f"{b.sides[0]}={b.sides[-1]}")
        equation, other = (a, b) if isinstance(a, Equation) else (b, a)
        assert isinstance(equation, Equation)
        if isinstance(other, SET_LIKE):
            return self.instead(equation, equation.value, a, b) if equation.name else self._set(a, b)
        found = self.instead(equation, equation.value, a, b)
        if equation.name or not found or self._has_value(equation):
            return found
        return False if equation is a else None  # `m+n=17` says 17, but is it what was asked for?

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
                and isinstance(other, Members)
                and (form.brackets, len(other.items)) == ("[]", 2)
            ):
                return None if other.kind in ("list", "and") else False  # an interval, or a list in Python's notation
        names = [form.variable for form in (a, b) if isinstance(form, Condition)]
        if len(names) == 2 and all(names) and names[0] != names[1]:
            return False
        return self.symbols.same_set(a, b)


def _is_region(form: Form) -> bool:
    """Whether members are conditions on one number, or intervals."""
    if not isinstance(form, Members) or not form.items:
        return False
    names = {item.variable for item in form.items if isinstance(item, Condition)}
    return len(names) <= 1 and all(isinstance(item, SET_LIKE) or _is_region(item) for item in form.items)


def _letters(words: Words) -> Form:
    """`ABD` as the letters of several choices, where it may be that."""
    letters = words.product
    is_choice = letters.isupper() and max(letters) <= "J" and list(letters) == sorted(set(letters))
    return Members("list", tuple(map(Choice, letters))) if letters and is_choice else words


def _meaning(words: str) -> str:
    return MEANINGS.get(words, words.replace(" ", ""))


def _name(form: Form) -> str:
    return form.name if isinstance(form, Equation) else ""


def _is_constant(form: Form) -> bool:
    return not isinstance(form, Expression)
