r"""Everyday answers with the verdict that each should get, and what a verdict must not depend on.

`answers.jsonl` has lines of `gold`, `completion`, `expected` and `kind`: made after bug reports of people who grade
mathematical answers. `expected` is null where the reference answer cannot be read.
"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sg_opd.verifiers.answers import extract_answer, last_box, reference_answer
from sg_opd.verifiers.mathematics.comparing import compare
from sg_opd.verifiers.mathematics.measures import UndecidedError
from sg_opd.verifiers.mathematics.notation import plain
from sg_opd.verifiers.mathematics.reading import read
from sg_opd.verifiers.mathematics.symbols import FormulaAlgebra
from sg_opd.verifiers.mathematics.units import conversion
from sg_opd.verifiers.worker import judge_of_tasks

CASES = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text().splitlines()]
MANY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def verdicts(verifier):
    return verifier([case["completion"] for case in CASES], [case["gold"] for case in CASES])


def test_every_case_gets_its_verdict(verdicts):
    wrong = [
        f"{verdict} for {case}" for case, verdict in zip(CASES, verdicts, strict=True) if verdict != case["expected"]
    ]
    assert wrong == []


def test_no_verdict_hides_an_error():
    """In this process, where nothing is caught: what a worker would swallow as an abstention is raised."""
    judge, cases = judge_of_tasks(), [case for case in CASES if case["expected"] is not None]
    for case in cases[::3]:
        reference, answer = reference_answer(case["gold"]), extract_answer(case["completion"])
        assert not answer or judge(reference, answer) == case["expected"], case


def test_the_check_at_the_start_says_what_the_verdict_says(verifier):
    """A reference answer is reported where its verdict abstains, and nowhere else."""
    unreadable = {place for place, case in enumerate(CASES) if case["expected"] is None}
    assert set(verifier.unparseable([case["gold"] for case in CASES])) == unreadable


def test_every_readable_reference_answer_equals_itself(verifier):
    golds = [case["gold"] for case in CASES if case["expected"] is not None]
    texts = [reference_answer(gold) for gold in golds]
    found = verifier([rf"\boxed{{{text}}}" for text in texts], golds)
    assert [gold for gold, verdict in zip(golds, found, strict=True) if verdict != 1.0] == []


def test_equality_is_symmetric(verifier):
    """But for a letter, small for a choice, and `100,200`, which is two numbers beside a list and one elsewhere."""
    equal = [
        case
        for case in CASES
        if case["expected"] == 1.0
        and "boxed{4}+" not in case["completion"]
        and len(plain(last_box(case["completion"]) or "").strip("()")) > 1
    ]
    answers = [last_box(case["completion"]) for case in equal]
    back = verifier([rf"\boxed{{{reference_answer(case['gold'])}}}" for case in equal], answers)
    differing = [
        (case["gold"], answer) for case, answer, verdict in zip(equal, answers, back, strict=True) if verdict == 0.0
    ]
    assert differing == []


WRAPPERS = (
    r"\mathbf{%s}",
    r"\boldsymbol{%s}",
    r"\underline{%s}",
    r"\textcolor{red}{%s}",
    r"\color{blue}{%s}",
    r"{\Large %s}",
    r"\displaystyle %s",
    r"\text{$%s$}",
    r"$%s$",
    r"\(%s\)",
    r"\,%s\;",
    r"~%s\ ",
    r"\hspace{2mm}%s",
    "**%s**",
    "%s.",
    r"{{%s}}",
    r"\quad %s \\",
)
ANSWERS = (
    "7",
    "-12",
    "3.5",
    r"\frac{3}{7}",
    r"2\sqrt{5}",
    "x^2+1",
    "(3,4)",
    r"\{1,2,5\}",
    "[0,2)",
    r"x>3",
    r"5\pi",
    "1,234",
)


@pytest.mark.parametrize("answer", ANSWERS)
def test_wrappers_change_nothing(answer, verifier):
    boxes = [rf"\boxed{{{wrapper % answer}}}" for wrapper in WRAPPERS]
    assert verifier(boxes, [answer] * len(boxes)) == [1.0] * len(boxes)
    other = {"1,234": "1,235"}.get(answer, "1" + answer if answer[0].isdigit() else answer.replace("3", "8"))
    other = other if other != answer else answer.replace("1", "9").replace("2", "9")
    assert verifier(boxes, [other] * len(boxes)) == [0.0] * len(boxes)


FULL_WIDTH = {ord(sign): ord(sign) + 0xFEE0 for sign in "0123456789+-=(),.:<>[]xyab"}


@pytest.mark.parametrize("answer", ["17", "-3.5", "(1,2)", "x=4", "a+b", "[0,1)", "x<3", "1,2,3", "2:3", "3.50"])
def test_full_width_forms_are_the_plain_ones(answer, verifier):
    assert verifier([rf"\boxed{{{answer.translate(FULL_WIDTH)}}}"], [answer]) == [1.0]


@MANY
@given(members=st.lists(st.integers(-99, 99), min_size=2, max_size=6), data=st.data())
def test_the_order_of_a_set_is_none_and_that_of_a_tuple_is_one(members, data, verifier):
    order = data.draw(st.permutations(members))
    text, other = (", ".join(map(str, some)) for some in (members, order))
    found = verifier(
        [rf"\boxed{{\{{{other}\}}}}", rf"\boxed{{{other}}}", rf"\boxed{{({other})}}"],
        [rf"\{{{text}\}}", text, f"({text})"],
    )
    assert found == [1.0, 1.0, float(members == order)]


@MANY
@given(
    members=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    other=st.lists(st.integers(1, 9), min_size=2, max_size=5),
)
def test_a_list_is_compared_with_its_multiplicities_and_a_set_without(members, other, verifier):
    text, answer = (", ".join(map(str, some)) for some in (members, other))
    listed, as_set = verifier([rf"\boxed{{{answer}}}", rf"\boxed{{\{{{answer}\}}}}"], [text, rf"\{{{text}\}}"])
    assert listed == float(sorted(members) == sorted(other))
    assert as_set == float(set(members) == set(other))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{3}, \boxed{5}", "3, 5"),
        (r"$\boxed{3}$ and $\boxed{5}$", "3, 5"),
        (r"$x=\boxed{1}$ or $x=\boxed{3}$", "1 or 3"),
        (r"first \boxed{3}, then \boxed{5}", "5"),
        (r"\boxed{3}. So \boxed{5}", "5"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{\boxed{4}+1}", r"\boxed{4}+1"),
        (r"\boxed 5", "5"),
        (r"\boxed5.", "5"),
        (r"\boxed\frac12", r"\frac12"),
        (r"\boxed{3}, so $\boxed 12$", "12"),
        (r"\boxed{5\ }", "5\\"),
        (r"\boxed{4", None),
        (r"\boxedanswer{4}", None),
    ],
)
def test_which_box_is_the_answer(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("a", "b", "ratio"),
    [
        ("hours", "minutes", 60.0),
        ("km/h", "m/s", 1 / 3.6),
        ("sq. ft.", "square feet", 1.0),
        (r"kg \cdot m/s^2", "newtons", 1.0),
        ("cents", r"\$", 0.01),
        ("cents", "centimeters", None),
        ("m", "minutes", None),
        (r"^\circ", "%", None),
        ("mW", "MW", 1e-9),
        ("brown eggs", "eggs", 1.0),
        ("eggs", "apples", None),
    ],
)
def test_units(a, b, ratio):
    assert (found := conversion(a, b)) is None or found[1] == 0
    assert found is ratio is None or float(found[0]) == pytest.approx(ratio)


def test_a_formula_is_never_equal_by_a_small_difference_alone():
    symbols = FormulaAlgebra()
    for a, b in (
        (r"2^{100}", r"2^{100}+1"),
        (r"\pi", r"\pi+10^{-30}"),
        ("x", "x+10^{-30}"),
        (r"\frac{1}{2010!}", r"\frac{1}{2012!}"),
    ):
        assert symbols.equal(a, b) is (None if "x" in a else False)  # of a formula: near everywhere, and not proven
    assert symbols.equal(r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}") is True


def test_what_needs_no_sympy_is_decided_without():
    for a, b, verdict in (
        ("12", "12.0", True),
        (r"\frac12", "50%", True),
        ("A", "(A)", True),
        ("3 dollars", "3", True),
        ("5", "6", False),
    ):
        assert compare(read(a), read(b)) is verdict
    with pytest.raises(UndecidedError):
        compare(read("x+1"), read("1+x"))


@MANY
@given(text=st.text(alphabet=r"\{}()[]$%^_.,;:=<>+-*/|&~'\"0123456789abcxyzABC€°½²±∞π ", max_size=60))
def test_any_text_has_a_plain_form_which_is_its_own(text):
    once = plain(text)
    assert plain(once) == plain(plain(once))
    read(text)


# the sentences of docs/verifiers.md
@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("1,234", "1 234", 1.0),
        ("3 1/2", r"350\%", 1.0),
        ("1,234", "1.234", 0.0),
        ("0.3", "1/3", 0.0),
        ("12", "1 2", 0.0),
        (r"\ln 2", "0.693147", 1.0),
        (r"\ln 2", "0.6931", 0.0),
        (r"\frac12", r"\frac12\%", 0.0),
        (r"\$5", r"5\%", 0.0),
        ("2 hours 15 minutes", "135 min", 1.0),
        ("5 feet 6 inches", "5", 0.0),
        (r"5\text{ lb}", "5 pounds", 1.0),
        (r"5\text{ ft}^2", "5 sq. ft.", 1.0),
        ("x=2, x=5", "2, 5", 1.0),
        ("5", "5, 6", 0.0),
        (r"1,2,\ldots", "1,2", 0.0),
        ("x=1, y=2", "(1,2)", 1.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", 1.0),
        ("A", "A or B", 0.0),
        ("x<1 or x>2", r"\{x\mid x<1\text{ or }x>2\}", 1.0),
        ("x+y=5", "2x+2y=10", 1.0),
        ("AB=5", "5", 1.0),
        ("x=5", "y=5", 0.0),
        (r"\frac{\pi}{4}+k\pi, k\in\mathbb{Z}", r"x=\frac{5\pi}{4}+n\pi, n \in \mathbb{Z}", 1.0),
        (r"\frac{\pi}{4}+k\pi, k\in\mathbb{Z}", r"x=\frac{\pi}{4}+2n\pi, n \in \mathbb{Z}", 0.0),
        (r"x\ge5", "5 or more", 1.0),
        ("4:30 p.m.", "4:30", 1.0),
        ("January 2, 2023", "2023-01-02", 1.0),
        ("4 am", "4 pm", 0.0),
        # where nobody can tell
        ("[1,2]", "1, 2", None),
        ("2 or 5", "2 and 5", None),
        ("17", "m+n=17", None),
        (r"\log x", r"\ln x", None),
        (r"\text{width }5", "5", None),
        (r"\text{width }5", "6", 0.0),
        ("5", r"\text{Answer: }5", 1.0),
        (r"\emptyset", "no solution", 1.0),
        (r"A\setminus B", r"B\setminus A", 0.0),
        (r"A\cup B", r"B\cup A", 1.0),
        (r"10^\circ C", r"50^\circ F", 1.0),
        (r"10^\circ C", r"10^\circ F", 0.0),
        ("5", "1" * 1001, None),
        ("5", r"\frac{5", None),
        ("5", r"\begin{cases}\,\end{cases}", None),
    ],
)
def test_what_the_page_on_verifiers_says(reference, answer, verdict, verifier):
    box = rf"\boxed{{{answer}}}" if answer.count("{") == answer.count("}") else rf"\boxed{{{answer}}}}}"
    assert verifier([box], [reference]) == [verdict]


# where both readings are everyday ones: neither a 1 nor a 0 would be true
@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("3:30", "1:10"),
        ("A:B=2:3", "A:B=3:2"),
        ("C: x^2+y^2=1", "C: x^2+y^2=4"),
        ("\\textbf{(B)}\\ 12", "\\textbf{(B)}\\ 13"),
        ("BAC", "ABC"),
        ("stop", "spot"),
        ("no", "on"),
        ("dog", "god"),
        ("5", "5折"),
        ("\\$5\\text{ profit}", "\\$5\\text{ loss}"),
        ("5", "5\\text{ below zero}"),
        ("1", "1\\%"),
        ("p\\Rightarrow q\\Leftrightarrow r", "r\\Leftrightarrow p\\Rightarrow q"),
        ("\\sqrt{2gh}", "\\sqrt2\\sqrt g\\sqrt h"),
        ("2\\pi\\sqrt{l/g}", "2\\pi\\sqrt l/\\sqrt g"),
        ("\\ln(ab)", "\\ln a+\\ln b"),
        ("12\\text{ ways}", "12\\text{ arrangements}"),
        ("5\\text{ children}", "5\\text{ kids}"),
        ("\\gcd(a,b)", "\\gcd(b,a)"),
        ("P(A\\cup B)", "P(B\\cup A)"),
        ("x^2=4", "x=\\pm2"),
        ("5", "['a', {[]:1}]"),
    ],
)
def test_what_nobody_can_tell(reference, answer, verifier):
    assert verifier([rf"\boxed{{{answer}}}"], [reference]) == [None]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{3}\quad\text{and}\quad\boxed{5}",
        r"\boxed{3},\ \text{and}\ \boxed{5}",
        r"\(\boxed{3}\) and \(\boxed{5}\)",
        r"**\boxed{3}** and **\boxed{5}**",
    ],
)
def test_a_box_for_each_member_in_any_layout(text):
    assert last_box(text) == "3, 5"


def test_a_number_too_long_to_be_written_is_no_error(verifier):
    long = "1" * 3990 + "e400"
    assert verifier([r"\boxed{5}", rf"\boxed{{{'1' * 990}e9}}"], [long, "5"]) == [0.0, 0.0]
    verifier.unparseable([long, f"['a', 0x{'f' * 3900}]"])
