"""Hostile answers in short form, and properties of any answer: what it equals, and on what a verdict depends."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hostile import HANGING, ITS_REFERENCE, KINDS, attacks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torture_answers import held, torture_answers

from sg_opd import MathVerifier
from sg_opd.evaluation.figures import Sample
from sg_opd.evaluation.results import EvaluationFolder
from sg_opd.verifiers import answers
from sg_opd.verifiers.answers import MAX_ANSWER, MAX_REFERENCE
from sg_opd.verifiers.mathematics import brackets, notation, numerals, quantities, reading, relations, symbols, units
from sg_opd.verifiers.mathematics.comparing import UndecidedError
from sg_opd.verifiers.verdicts import quick_verdict

ANSWERS = 300
# of a property: the grader's workers are slow to start, and the verifier is shared on purpose
MANY = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def single():
    verifier = MathVerifier(timeout=10.0, workers=1)
    yield verifier
    verifier.close()


def test_hostile_answers_in_short():
    """As `make torture` does with 2,100: no hang, nothing wrong called correct, memory bounded, as fast as before."""
    found = torture_answers(ANSWERS, timeout=0.7, rounds=2)
    assert found["answers_tried"] == ANSWERS
    assert sum(found["verdicts"].values()) == ANSWERS
    assert found["workers_replaced"] > 0
    assert found["workers_left"] >= 1
    assert found["throughput_ratio"] > 0.5  # two batches measure nothing finer; `make torture` holds it to 0.9
    assert held({**found, "throughput_ratio": 1.0}) == []


READERS = (answers, brackets, notation, numerals, quantities, reading, relations, symbols, units)
REPEATED = (
    " ",
    "~",
    "\t",
    "\\,",
    "\\",
    "\\text{",
    "{",
    "}",
    "}{",
    "1",
    "1,",
    "1 ",
    "1.",
    "1/",
    "-",
    "a ",
    "√(",
    "%",
    ".",
    "=",
)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("module", "name"),
    [(m, n) for m in READERS for n, value in vars(m).items() if isinstance(value, re.Pattern)],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)
def test_no_pattern_takes_more_than_squares_of_its_texts_length(module, name):
    """They run in the trainer's process, where nothing ends them; one with a repeat in a repeat would take for ever."""
    pattern = getattr(module, name)
    for part, end in itertools.product(REPEATED, ("x", "")):
        text = "1" + part * (MAX_ANSWER // len(part)) + end
        pattern.search(text)
        pattern.fullmatch(text)


MARKED = (
    "\ue000ab",
    "\ue000a ",
    "or ",
    "ab:",
    "\\frac",
    "\\sqrt",
    "\\pm",
    "^{",
    "_{",
    "(",
    "[",
    "\\{",
    "=x",
    "<",
    "\\le ",
    "√",
    "½",
    "个",
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", [*REPEATED, *MARKED])
def test_no_text_takes_long_to_read(part):
    """Reading happens in the trainer's process too; a second for the longest answer is far more than any takes."""
    for begin, end in itertools.product(("1", "", "x=", "5 ", "{" * 150), ("", "x", "1", " cm", "}", "}" * 150)):
        text = begin + part * ((MAX_ANSWER - len(begin + end)) // len(part)) + end
        start = time.process_time()
        reading.read(text)
        assert time.process_time() - start < 1.0


def test_what_an_attack_broke_is_named():
    found = {"hangs": 0, "taken_for_correct": [], "worker_peak_mib": 100, "throughput_ratio": 1.0}
    assert held(found) == []
    worse = {"hangs": 2, "taken_for_correct": ["soup: x"], "worker_peak_mib": 5000, "throughput_ratio": 0.5}
    for name, value in worse.items():
        assert len(held({**found, name: value})) == 1


def test_the_corpus_is_seeded_and_holds_every_kind():
    short, long = attacks(100), attacks(130)
    assert short == long[:100]
    assert {case.kind for case in short} == set(KINDS)
    assert short != attacks(100, seed=1)


@pytest.mark.parametrize(
    "completion",
    [None, 42, 4.2, True, b"x", {}, [], [1], ["x"], {"role": "assistant", "content": 5}, [{"content": [{"text": 5}]}]],
    ids=str,
)
def test_what_is_no_text_has_no_answer(verifier, completion):
    assert verifier([completion], ["4"]) == [0.0]


def test_a_single_message_is_graded(verifier):
    assert verifier([{"role": "assistant", "content": r"\boxed{4}"}], ["4"]) == [1.0]


@pytest.mark.parametrize(
    "reference",
    [10**5000, float("inf"), "9" * (MAX_REFERENCE + 1), "9" * 5000 + "/7", "1, " * 3000 + "1" * 4301],
    ids=lambda reference: type(reference).__name__,
)
def test_a_reference_answer_too_long_or_infinite_abstains_and_is_reported(verifier, reference):
    assert verifier([r"\boxed{fin}", r"\boxed{1/3}"], [reference, reference]) == [None, None]
    assert verifier.unparseable([reference, "4"]) == [0]


def test_a_long_reference_answer_still_equals_its_own_text(verifier):
    reference = "9" * 5000
    assert verifier([rf"\boxed{{{reference}}}"], [reference]) == [1.0]


def test_lone_surrogates_pass_to_a_worker_and_to_a_sample_line(tmp_path, verifier):
    assert verifier(["\\boxed{x+\ud800}", "\\boxed{x+1}"], ["1+x", "1+x"]) == [None, 1.0]
    sample = Sample("q", 1, 1, 3, "stop", 0.0, "\ud800", "\\boxed{\ud800}")
    folder = EvaluationFolder(tmp_path, {})
    folder.append([sample])
    assert folder.resume(1, [("q", 1)]) == [sample]


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("42", "42 million", 0.0),
        ("42000000", "42 million", 1.0),
        ("42 million", "42,000,000", 1.0),
        ("60", "5 dozen eggs", 1.0),
        ("42", "42 minus seven", 0.0),
        ("42", r"42\text{ thousand}", 0.0),
        ("42", "42 squared", 0.0),
        ("42", r"42\text{ is wrong}", None),
        ("42", "43=42", 0.0),
        ("42", "40+2=42", 1.0),
        ("1/2", "3/6=1/2", 1.0),
        ("42_7", "42_8", 0.0),
        ("5", "5 times", 1.0),
        (r"\frac{1}{2}", r"\frac12\text{ million}", 0.0),
        (r"5\text{ square meters}", "5", 1.0),
    ],
)
def test_what_changes_a_number_is_no_unit(verifier, reference, answer, verdict):
    assert verifier([rf"\boxed{{{answer}}}"], [reference]) == [verdict]


def test_an_orphan_ends_by_itself_within_its_task(tmp_path):
    """Its parent is killed while it computes; only the worker's own alarm can end it, a second after the limit."""
    code = (
        "import os, sys, threading\nfrom sg_opd import MathVerifier\nv = MathVerifier(timeout=2.0, workers=1)\n"
        "v([r'\\boxed{2x}'], ['x+x'])\nprint(v._grader.pool[0].process.pid, flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start()\n"
        f"v([{HANGING!r}], [{ITS_REFERENCE!r}])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    status = Path(f"/proc/{int(run.stdout)}/status")
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 5.0
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not status.exists() or "zombie" in status.read_text()


def test_an_idle_worker_outlives_its_limits():
    """Alarm and CPU limit are those of a task: nothing happens between two."""
    verifier = MathVerifier(timeout=0.5, workers=1)
    verifier([r"\boxed{2x}"], ["x+x"])
    pid = verifier._grader.pool[0].process.pid
    time.sleep(2.0)
    assert verifier([r"\boxed{2x}"] * 300, ["x+x"] * 300) == [1.0] * 300
    assert verifier._grader.pool[0].process.pid == pid
    verifier.close()


def test_a_worker_that_grew_is_replaced(monkeypatch):
    verifier = MathVerifier(workers=1)
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    pid = verifier._grader.pool[0].process.pid
    monkeypatch.setattr(
        "sg_opd.verifiers.grader._Worker.receive", lambda self: {**json.loads(self.stdout.readline()), "spent": 1}
    )
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    monkeypatch.undo()
    assert verifier._grader.pool[0].process.pid != pid
    assert verifier._grader.replaced == 1
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    verifier.close()


def test_a_time_out_delays_no_other_answer():
    """A replacement's start is waited for by nobody but its own task: 20 answers beside one that hangs."""
    verifier = MathVerifier(timeout=1.0, workers=2)
    verifier([r"\boxed{2x}", r"\boxed{3x}"], ["x+x", "x+x"])
    completions, references = [HANGING, *[r"\boxed{2x}"] * 20], [ITS_REFERENCE, *["x+x"] * 20]
    assert verifier(completions, references) == [None, *[1.0] * 20]
    assert len(verifier._grader.pool) == 2  # the replacement is there already
    verifier.close()


# every reference in every form, and every form as the answer
def forms_of_an_integer(n: int) -> list[str]:
    return [str(n), f"{n}.0", f"{n:,}", rf"\frac{{{2 * n}}}{{2}}", f"{3 * n}/3", f"{n:,}".replace(",", "{,}")]


def forms_of_a_fraction(value: Fraction) -> list[str]:
    p, q, sign = abs(value.numerator), value.denominator, "-" * (value < 0)
    forms = [
        rf"{sign}\frac{{{p}}}{{{q}}}",
        f"{sign}{p}/{q}",
        rf"{sign}\dfrac{{{2 * p}}}{{{2 * q}}}",
        rf"{sign}\tfrac{{{p}}}{{{q}}}",
    ]
    if 0 < q < p:
        forms += [rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}"] * (p % q > 0)
    if 10**6 % q == 0:
        forms += [f"{sign}{p * 10**6 // q / 10**6:.6f}".rstrip("0").rstrip(".")]
    return forms


def forms_of_a_percentage(n: int) -> list[str]:
    return [rf"{n}\%", f"{n} percent", rf"{n}\text{{ percent}}", rf"{n}.0\%", rf"\frac{{{2 * n}}}{{2}}\%"]


def forms_of_a_root(a: int, b: int) -> list[str]:
    return [
        rf"{a}\sqrt{{{b}}}",
        rf"\sqrt{{{a * a * b}}}",
        rf"{a}\cdot\sqrt{{{b}}}",
        rf"\sqrt{{{b}}}\cdot {a}",
        f"{a}√{b}",
    ]


def forms_of_pi(a: int, b: int) -> list[str]:
    return [rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}\pi", rf"{a}\pi/{b}", rf"\pi\cdot\frac{{{a}}}{{{b}}}"]


def forms_of_a_set(members: list[int]) -> list[str]:
    text, back = (", ".join(map(str, some)) for some in (members, members[::-1]))
    return [rf"\{{{text}\}}", rf"\{{{back}\}}", rf"\left\{{{text}\right\}}", rf"\{{ {text.replace(' ', '')} \}}"]


def forms_of_an_interval(a: int, b: int) -> list[str]:
    return [f"({a},{b}]", f"({a}, {b}]", rf"\left({a},{b}\right]", rf"{a}<x\le {b}", rf"x\in({a},{b}]"]


def forms_of_a_polynomial(a: int, b: int) -> list[str]:
    return [f"x^2+{a}x+{b}", f"{b}+{a}x+x^2", rf"x^{{2}} + {a}\cdot x + {b}", rf"x\cdot x+{a}x+{b}", f"x(x+{a})+{b}"]


small = st.integers(2, 99)
FORMS = {
    "integer": st.integers(-(10**12), 10**12).map(forms_of_an_integer),
    "fraction": st.builds(Fraction, st.integers(-999, 999), st.integers(1, 99)).map(forms_of_a_fraction),
    "percentage": st.integers(1, 400).map(forms_of_a_percentage),
    "root": st.tuples(small, st.sampled_from([2, 3, 5, 6, 7, 10, 11])).map(lambda pair: forms_of_a_root(*pair)),
    "pi": st.tuples(small, small).map(lambda pair: forms_of_pi(*pair)),
    "set": st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True).map(forms_of_a_set),
    "interval": st.tuples(st.integers(-99, 0), st.integers(1, 99)).map(lambda pair: forms_of_an_interval(*pair)),
    "polynomial": st.tuples(small, small).map(lambda pair: forms_of_a_polynomial(*pair)),
}
BOXES = (
    r"\boxed{%s}",
    r"so $\boxed{%s}$.",
    r"\boxed{ %s }",
    r"\boxed{$%s$}",
    r"\boxed{\,%s}",
    r"\fbox{%s.}",
    r"<think>\boxed{0}</think>\boxed{%s}",
)


@pytest.mark.parametrize("kind", FORMS)
@MANY
@given(data=st.data())
def test_a_reference_answer_equals_itself_in_every_form(kind, data, verifier):
    forms, box = data.draw(FORMS[kind]), data.draw(st.sampled_from(BOXES))
    pairs = [(reference, box % answer) for reference in forms for answer in forms]
    verdicts = verifier([answer for _, answer in pairs], [reference for reference, _ in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict != 1.0] == []


@pytest.mark.parametrize("kind", FORMS)
@MANY
@given(data=st.data())
def test_no_form_of_another_value_equals_a_reference_answer(kind, data, verifier):
    """Two values of one kind: their first forms are the same text, or no form of one equals a form of the other."""
    some, other = data.draw(FORMS[kind]), data.draw(FORMS[kind])
    if kind == "set" and sorted(some[0]) == sorted(other[0]):
        return
    if some[0] != other[0] and not (kind in ("pi", "root") and equal_products(kind, some[0], other[0])):
        pairs = [(reference, answer) for reference in some for answer in other]
        verdicts = verifier([rf"\boxed{{{answer}}}" for _, answer in pairs], [reference for reference, _ in pairs])
        assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict != 0.0] == []


def equal_products(kind: str, a: str, b: str) -> bool:
    """Whether two multiples of pi or of a root have one value."""
    (p, q), (r, s) = ([int(n) for n in re.findall(r"\d+", text)] for text in (a, b))
    return p * s == r * q if kind == "pi" else p * p * q == r * r * s


@MANY
@given(data=st.data())
def test_a_verdict_depends_on_no_other_row(data, verifier, single):
    """The same rows in two orders, by one worker and by two: some are equal, some are not, some are hostile."""
    rows = data.draw(
        st.lists(
            st.one_of(*FORMS.values()).flatmap(lambda forms: st.tuples(st.sampled_from(forms), st.sampled_from(forms))),
            min_size=2,
            max_size=12,
        )
    )
    rows += data.draw(st.sampled_from([[], [("7x^2", "9^{9^{9^{9}}}"), ("x+1", "\ud800"), (r"\ldots", "4")]]))
    rows += [(reference, f"{answer}+1") for reference, answer in rows]
    order = data.draw(st.permutations(range(len(rows))))
    references, completions = zip(*[(reference, rf"\boxed{{{answer}}}") for reference, answer in rows], strict=True)
    verdicts = verifier(completions, references)
    shuffled = single([completions[row] for row in order], [references[row] for row in order])
    assert shuffled == [verdicts[row] for row in order]


@MANY
@given(reference=st.text(max_size=60), answer=st.text(max_size=60))
def test_any_text_is_decided_quickly_or_not_at_all(reference, answer):
    with contextlib.suppress(UndecidedError):
        assert quick_verdict(reference, answer) in (1.0, 0.0, None)


@MANY
@given(text=st.text(st.characters(exclude_categories=()), max_size=200))
def test_any_text_may_be_a_completion_and_a_reference_answer(text, verifier):
    assert verifier([text, rf"\boxed{{{text}}}"], [text, "7x^2+q"])[1] in (0.0, None)


def test_every_worker_has_one_hash_seed_and_a_process_group_of_its_own(verifier):
    verifier([r"\boxed{2x}"], ["x+x"])
    for worker in verifier._grader.pool:
        assert b"PYTHONHASHSEED=0" in Path(f"/proc/{worker.process.pid}/environ").read_bytes()
        assert os.getpgid(worker.process.pid) != os.getpgid(0)
