"""MathVerifier: a table of verdicts, hostile answers, its workers, and the reward-function form."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hostile import HANGING, ITS_REFERENCE

from sg_opd import MathVerifier
from sg_opd.verifiers.answers import extract_answer, last_box
from sg_opd.verifiers.mathematics import symbols
from sg_opd.verifiers.verdicts import checked_verdicts
from sg_opd.verifiers.worker import judge_of_tasks

EXAMPLES = Path(__file__).parents[2] / "examples" / "arithmetic" / "data"

# reference answer, what stands in the box, verdict
SAME_OR_NOT = [
    # integers
    ("42", "42", 1.0),
    ("42", "43", 0.0),
    ("42", "042", 1.0),
    ("42", "+42", 1.0),
    ("-7", "7", 0.0),
    ("-7", "-7", 1.0),
    ("1,234", "1234", 1.0),
    ("1{,}234", "1234", 1.0),
    ("12345678901234567890", "12345678901234567891", 0.0),
    ("1024", "2^{10}", 1.0),
    ("3628800", "10!", 1.0),
    ("10", r"\binom{5}{2}", 1.0),
    ("3", r"\log_2 8", 1.0),
    ("2", r"\sqrt[3]{8}", 1.0),
    ("0", "-0", 1.0),
    ("12", "1 2", 0.0),
    ("12", "1  2", 0.0),
    ("12", r"1\quad 2", 0.0),
    ("11/2", "1 1/2", 0.0),
    ("100,200", "200,100", 0.0),
    ("100, 200", "200,100", 1.0),
    (r"\{100, 200\}", "200,100", 1.0),
    ("100,200", "100,300", 0.0),
    ("1, 234", "1234", 0.0),
    ("1{,}000{,}000", "1,000,000", 1.0),
    # decimals
    ("0.5", ".5", 1.0),
    ("0.5", "0.50", 1.0),
    ("12", "12.0", 1.0),
    ("0.333333", "0.333334", 0.0),
    ("0.001", "10^{-3}", 1.0),
    ("0.0000001", "0", 0.0),
    ("0.1234567", "0.1234568", 0.0),
    (r"1.6\times10^{-19}", r"1.7\times10^{-19}", 0.0),
    (r"1.6\times10^{-19}", r"16\cdot10^{-20}", 1.0),
    (r"\pi", "3.141592653589793", 1.0),
    # fractions
    (r"\frac{1}{2}", "0.5", 1.0),
    (r"\frac12", "1/2", 1.0),
    (r"\frac{1}{3}", r"\dfrac{2}{6}", 1.0),
    (r"\frac{1}{3}", "0.33", 0.0),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", 1.0),
    (r"3\frac{1}{2}", "3.5", 1.0),
    (r"\frac{a}{b}", "a/b", 1.0),
    # radicals and constants
    (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
    (r"\sqrt{8}", r"2\sqrt{3}", 0.0),
    (r"2\pi", r"\pi \cdot 2", 1.0),
    (r"2\pi", "6.28", 0.0),
    ("3+4i", "4i+3", 1.0),
    (r"\infty", r"\infty", 1.0),
    # tuples, sets, intervals
    ("(1,2)", "(1, 2)", 1.0),
    ("(1,2)", "(2,1)", 0.0),
    (r"\left(1,2\right)", "(1,2)", 1.0),
    ("(1,2,3)", "(1,2,3)", 1.0),
    ("(1,2,3)", "(1,3,2)", 0.0),
    (r"\{1,2\}", r"\{2,1\}", 1.0),
    (r"\{1,2\}", r"\{1,3\}", 0.0),
    ("1,2", "2, 1", 1.0),
    (r"\pm 2", "2,-2", 1.0),
    ("[0,1)", "[0, 1)", 1.0),
    ("[0,1)", "[0,1]", 0.0),
    (r"(-\infty, 3]", r"(-\infty,3]", 1.0),
    (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)", 1.0),
    # expressions and relations
    ("x^2+2x+1", "(x+1)^2", 1.0),
    ("x^2-1", "(x-1)^2", 0.0),
    ("x=5", "5", 1.0),
    ("5", "x=5", 1.0),
    ("x<3", r"(-\infty,3)", 1.0),
    ("m/M", "M/m", 0.0),
    ("m/M", r"\frac{m}{M}", 1.0),
    ("R-r", "r-R", 0.0),
    ("R-r", "-r+R", 1.0),
    ("2M+m", "2m+M", 0.0),
    ("x", "X", 0.0),
    (r"\delta+1", r"\Delta+1", 0.0),
    (r"2\Pi", r"2\pi", 0.0),
    (r"\Delta+\delta", r"\delta+\Delta", 1.0),
    ("x-y", "-y+x", 1.0),
    ("a-b", "-(b-a)", 1.0),
    ("xyz", "zxy", 1.0),
    ("abc", "cab", None),
    ("xyz", r"x\cdot y\cdot z", 1.0),
    ("abc", "abd", 0.0),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0.0),
    # units and decorations
    ("5", r"5\text{ cm}", 1.0),
    (r"5\text{ cm}", "5", 1.0),
    (r"5\text{ cm}", r"5\text{ m}", 0.0),
    (r"5\text{ km}", r"5\text{ kg}", 0.0),
    (r"5\text{ cm}", r"5\text{ centimeters}", 1.0),
    (r"\[5\]", "5", 1.0),
    ("25", "25 dollars", 1.0),
    ("25", r"25~\text{eggs}", 1.0),
    ("25", r"\text{25 dollars}", 1.0),
    ("25 dollars", "25", 1.0),
    ("25", "26 dollars", 0.0),
    ("5", "€5", 1.0),
    (r"5\text{ m}^2", r"5\text{ m}^3", 0.0),
    (r"5\text{ cm}^2", r"5\text{ m}^2", 0.0),
    (r"5\text{ m}^2", r"5\text{ m}^{2}", 1.0),
    (r"4\frac{2}{3}", "4 2/3", 1.0),
    ("1 1/2", "1.5", 1.0),
    ("22/7", "3 1/7", 1.0),
    ("-1 1/2", r"-\frac{3}{2}", 1.0),
    (r"\frac{25}{2}\%", r"12.5\%", 1.0),
    (r"33\frac{1}{3}\%", r"\frac{100}{3}\%", 1.0),
    (r"12.5\text{ percent}", r"12.5\%", 1.0),
    ("1,234", r"1\,234", 1.0),
    (r"60^\circ", "60°", 1.0),
    (r"\frac12", "½", 1.0),
    (r"\sqrt{2}", "√2", 1.0),
    ("17", r"\approx 17", 1.0),
    ("204", r"204 \\", 1.0),
    (r"\emptyset", r"\varnothing", 1.0),
    (r"(2,\infty)", "x>2", 1.0),
    ("[1,5)", r"1\leq x<5", 1.0),
    ("[1,5)", r"1\leq x\leq 5", 0.0),
    ("5", r"\$5", 1.0),
    (r"50\%", "50", 1.0),
    (r"90^\circ", "90", 1.0),
    ("42", "$42$", 1.0),
    ("42", "42.", 1.0),
    # reference answers in words
    ("A", "A", 1.0),
    ("A", r"\text{(A)}", 1.0),
    ("A", "B", 0.0),
    ("yes", "Yes", 1.0),
    ("yes", "no", 0.0),
    ("No", "no", 1.0),
    ("yes", "3", 0.0),
    ("minimum", "3", 0.0),
    (r"\text{was}", "saw", 0.0),
    ("A", "a", 1.0),
    (r"\text{Monday}", "Monday", 1.0),
    ("Monday", "Tuesday", 0.0),
    (r"\text{north east}", r"\text{North East}", 1.0),
    (r"\text{north east}", "north west", 0.0),
    ("blue", r"\mathbf{blue}.", 1.0),
]

# reference answer, completion, verdict
WHOLE_COMPLETIONS = [
    ("4", r"first \boxed{3}, no: \boxed{4}", 1.0),
    ("4", r"first \boxed{4}, no: \boxed{3}", 0.0),
    ("4", r"on one line \boxed{3} and \boxed{4}", 0.0),
    ("3, 4", r"on one line \boxed{3} and \boxed{4}", 1.0),
    ("4", r"\boxed{\boxed{4}}", 1.0),
    ("4", r"\fbox{4}", 1.0),
    ("4", r"\boxed {4}", 1.0),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", 1.0),
    (r"\{1,2\}", r"\boxed{\{1,2\}}", 1.0),
    ("4", "the answer is 4", 0.0),
    ("4", "", 0.0),
    ("4", r"\boxed{}", 0.0),
    ("4", r"\boxed{4", 0.0),
    ("4", r"<think>\boxed{3}</think>\boxed{4}", 1.0),
    ("4", r"<think>\boxed{4}</think>I am not sure", 0.0),
    ("4", r"<think>so it is \boxed{4}", 0.0),
    ("4", r"\boxed{3}</think>\boxed{4}", 1.0),
    ("4", r"<think>a</think>\boxed{3}<think>b</think>\boxed{4}", 1.0),
    (r"We add: $2+2=4$, so the answer is $\boxed{4}$.", r"\boxed{4}", 1.0),
    (r"First \boxed{3}, then \boxed{4}", r"\boxed{3}", 0.0),
    (4, r"\boxed{4}", 1.0),
    (0.5, r"\boxed{1/2}", 1.0),
    (None, r"\boxed{4}", None),
    ("", r"\boxed{4}", None),
    (float("nan"), r"\boxed{4}", None),
    (r"\ldots", r"\boxed{4}", None),
]


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(timeout=5.0, workers=2)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(("reference", "answer", "verdict"), SAME_OR_NOT)
def test_answers(verifier, reference, answer, verdict):
    assert verifier([rf"so it is \boxed{{{answer}}}."], [reference]) == [verdict]


@pytest.mark.parametrize(("reference", "completion", "verdict"), WHOLE_COMPLETIONS)
def test_completions(verifier, reference, completion, verdict):
    assert verifier([completion], [reference]) == [verdict]


def test_a_batch_is_judged_row_by_row_whatever_its_order_and_workers(verifier):
    rows = [(rf"\boxed{{{answer}}}", reference, verdict) for reference, answer, verdict in SAME_OR_NOT]
    for order in (rows, rows[::-1]):
        completions, references, verdicts = zip(*order, strict=True)
        assert verifier(completions, references) == list(verdicts)
        single = MathVerifier(workers=1)
        assert single(completions, references) == list(verdicts)
        single.close()


def test_conversational_completions(verifier):
    messages = [{"role": "assistant", "content": r"\boxed{4}"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{4}"}]}]
    empty = [{"role": "assistant", "content": None}]
    assert verifier([messages, parts, empty, [], None], ["4"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_other_columns_and_extras_are_ignored(verifier):
    assert verifier(prompts=["p"], completions=[r"\boxed{4}"], solution=["4"], source=["x"], trainer_state=None) == [
        1.0
    ]


def test_every_embedded_reference_answer_verifies_against_itself(verifier):
    lines = [line for name in ("train", "test") for line in (EXAMPLES / f"{name}.jsonl").read_text().splitlines()]
    references = [json.loads(line)["solution"] for line in lines]
    assert len(references) > 4000
    assert verifier([rf"\boxed{{{reference}}}" for reference in references], references) == [1.0] * len(references)
    assert verifier.unparseable(references) == []


def test_every_reference_answer_of_the_table_verifies_against_itself(verifier):
    references = [reference for reference, _, _ in SAME_OR_NOT]
    assert verifier([rf"\boxed{{{reference}}}" for reference in references], references) == [1.0] * len(references)
    assert verifier.unparseable(references) == []


HOSTILE = {
    "power tower": "9^{9^{9^{9^9}}}",
    "huge exponent": "2^{99999999999}",
    "huge factorial": "100000!",
    "factorials of factorials": "((9!)!)!",
    "long sum": r"\sum_{i=1}^{1000000000} i^i",
    "hard integral": r"\int_0^1 e^{-x^2}\sin(\cos(x^x)) dx",
    "expansion": "(x+y+z)^{300}",
    "a megabyte of digits": "9" * 1_000_000,
    "open braces": "{" * 5_000,
    "open fractions": r"\frac{" * 2_000,
    "many boxes": r"\boxed{1}\boxed{" * 2_000,
    "control characters": "\x00\x01\x1b[2J",
    "a lone surrogate": "\ud800",
    "newlines": "1\n2\n3",
    "look-alikes": "４２",  # noqa: RUF001
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_return_within_the_limit_and_are_never_correct(answer):
    verifier = MathVerifier(timeout=1.0, workers=1)
    verifier([r"\boxed{x}"], ["x+y"])  # a worker is up, so that its start is not counted
    start = time.monotonic()
    assert verifier([rf"\boxed{{{answer}}}"], ["7x^2"]) in ([0.0], [None])
    assert time.monotonic() - start < 1.0 + 1.0
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]  # works on, in a new worker where the old one was killed
    verifier.close()


def test_a_time_out_abstains_and_leaves_no_process():
    before = [p.pid for p in psutil.Process().children()]
    verifier = MathVerifier(timeout=0.5, workers=2)
    verdicts = verifier([HANGING, r"\boxed{2x}"] * 3, [ITS_REFERENCE, "x+x"] * 3)
    assert verdicts == [None, 1.0] * 3
    ours = [worker.process.pid for worker in verifier._grader.pool]
    assert len(ours) <= 2
    others = [p.pid for p in psutil.Process().children() if "worker.py" in str(p.cmdline()) and p.pid not in ours]
    assert not [pid for pid in others if pid not in before]  # those that timed out are gone already
    verifier.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ours)


def test_a_worker_found_dead_is_replaced():
    verifier = MathVerifier(workers=1)
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    verifier._grader.pool[0].process.kill()
    verifier._grader.pool[0].process.wait()
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    verifier.close()


def test_a_worker_that_dies_at_its_task_abstains():
    verifier = MathVerifier(timeout=30.0, workers=1)
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    pid = verifier._grader.pool[0].process.pid
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    start = time.monotonic()
    assert verifier([HANGING, r"\boxed{2x}"], [ITS_REFERENCE, "x+x"]) == [None, 1.0]
    assert time.monotonic() - start < 25
    verifier.close()


def test_closing_waits_for_a_call_in_another_thread():
    verifier = MathVerifier(timeout=1.0, workers=2)
    batch = [r"\boxed{2x}"] * 40, ["x+x"] * 40
    for _ in range(5):
        with ThreadPoolExecutor() as pool:
            call = pool.submit(verifier, *batch)
            time.sleep(0.05)
            verifier.close()
            assert call.result() == [1.0] * 40


def test_workers_have_a_session_of_their_own_and_end_with_their_verifier():
    """Ctrl-C goes to the caller's session; workers are killed by the finalizer, not when they next read."""
    verifier = MathVerifier(workers=1)
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    process = verifier._grader.pool[0].process
    assert os.getsid(process.pid) == process.pid
    os.kill(process.pid, signal.SIGTERM)  # as a scheduler sends it to all processes of a job
    assert verifier([r"\boxed{3x}"], ["x+2x"]) == [1.0]
    assert verifier._grader.pool[0].process is process
    del verifier
    gc.collect()
    assert process.returncode == -signal.SIGKILL


def test_an_interrupt_does_not_shift_later_verdicts():
    """Ctrl-C while a worker computes: its late answer must not be read as that of the next task."""
    verifier = MathVerifier(timeout=30.0, workers=2)
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        verifier([HANGING, r"\boxed{3x}"] * 2, [ITS_REFERENCE, "x+x"] * 2)
    for _ in range(3):
        assert verifier([r"\boxed{2x}", r"\boxed{3x}"], ["x+x", "x+x"]) == [1.0, 0.0]
    verifier.close()


def test_threads_may_share_a_verifier():
    verifier = MathVerifier(workers=2)
    with ThreadPoolExecutor(4) as executor:
        jobs = [executor.submit(verifier, [rf"\boxed{{{n % 3 + 2}x}}"] * 3, ["x+x", "x+2x", "x+3x"]) for n in range(12)]
        for n, job in enumerate(jobs):
            assert job.result() == [float(n % 3 == m) for m in range(3)]
    verifier.close()


def test_unparseable_reference_answers(verifier):
    assert verifier.unparseable(["1", r"\ldots", None, "", r"\frac12", "yes", "9^{9^{9^9}}"]) == [1, 2, 3, 6]


def test_last_box_is_linear_in_the_text():
    start = time.monotonic()
    assert last_box(r"\boxed{" * 200_000) is None
    assert time.monotonic() - start < 2.0


def test_extraction_looks_at_a_bounded_tail():
    assert extract_answer(r"\boxed{4}" + " " * 30_000) is None


def test_lengths_must_match(verifier):
    with pytest.raises(ValueError, match="2 completions but 1"):
        verifier(["a", "b"], ["1"])


@pytest.mark.parametrize("kwargs", [{"timeout": 0}, {"timeout": float("inf")}, {"workers": 0}])
def test_bad_arguments_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        MathVerifier(**kwargs)


def test_import_is_light_and_a_script_needs_no_main_guard(tmp_path):
    """A user's script without `if __name__ == "__main__"`: runs once, and neither torch nor TRL is imported."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom sg_opd import MathVerifier\n"
        "print('once', MathVerifier()([r'\\boxed{2x}'], ['x+x']))\n"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "once [1.0]\n"), run.stderr


def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import os, sys\nfrom sg_opd import MathVerifier\nv = MathVerifier(workers=1)\nv([r'\\boxed{2x}'], ['x+x'])\n"
        "print(v._grader.pool[0].process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    worker = Path(f"/proc/{int(run.stdout)}")
    deadline = time.monotonic() + 10
    while worker.exists() and "zombie" not in (worker / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not worker.exists() or "zombie" in (worker / "status").read_text()


def test_any_reward_function_of_1_0_and_none_is_a_verifier():
    def plain(prompts, completions, **kwargs):
        return [1, 0, None, True]

    async def asynchronous(prompts, completions, **kwargs):
        return [1.0, 0.0, None, True]

    for verifier in (plain, asynchronous):
        assert checked_verdicts(verifier, list("abcd"), list("abcd")) == [1.0, 0.0, None, 1.0]


@pytest.mark.parametrize(
    "value", [0.5, -1, "1", "correct", float("nan"), float("inf"), [1], {}, np.array([1, 0]), torch.tensor([1.0, 0.0])]
)
def test_another_value_is_refused_with_its_row(value):
    def graded(prompts, completions, **kwargs):
        return [1, value]

    with pytest.raises(ValueError, match=r"graded answered .* for row 1"):
        checked_verdicts(graded, ["a", "b"], ["a", "b"])


def test_another_number_of_values_is_refused():
    with pytest.raises(ValueError, match="1 values for 2"):
        checked_verdicts(lambda prompts, completions: [1], ["a", "b"], ["a", "b"])


@pytest.mark.parametrize(
    "answer", [None, 1.0, "1", b"1", {0: "a"}, {1}, iter([1])], ids=lambda answer: type(answer).__name__
)
def test_a_verifier_that_answers_no_list_is_refused(answer):
    with pytest.raises(ValueError, match="it must return a list"):
        checked_verdicts(lambda prompts, completions: answer, ["a"], ["a"])


@pytest.mark.parametrize("answer", [np.array([1.0, 0.0]), torch.tensor([1, 0]), (True, False)], ids=repr)
def test_arrays_and_tuples_of_verdicts_are_taken(answer):
    assert checked_verdicts(lambda prompts, completions: answer, ["a", "b"], ["a", "b"]) == [1.0, 0.0]


def test_a_verifier_that_raises_is_named_with_its_own_error():
    def raises(prompts, completions, **kwargs):
        raise KeyError("solution")

    async def raises_later(prompts, completions, **kwargs):
        raise KeyError("solution")

    for verifier in (raises, raises_later):
        with pytest.raises(KeyError, match="solution") as caught:
            checked_verdicts(verifier, ["a", "b"], ["a", "b"])
        assert caught.value.__notes__ == [
            f"It came from the verifier {verifier.__name__}, asked for 2 verdicts, given prompts, completions."
        ]


def test_works_in_a_thread():
    verifier = MathVerifier(workers=1)
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(verifier, [r"\boxed{2x}"], ["x+x"]).result() == [1.0]
    verifier.close()


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("-1417", r"\infty^{\infty}", 0.0),
        ("7x^2+3", r"\infty^{\infty}", 0.0),
        (r"\infty", r"\infty+1", 1.0),
        (r"-\infty", r"\infty+1", 0.0),
        (r"\infty", r"\lim_{x \to 0} \frac{1}{x^2}", 1.0),
        ("x>5", r"(5,\infty)", 1.0),
        (r"\sqrt{4}", "2", 1.0),
    ],
)
def test_what_is_infinite_equals_nothing_finite(reference, answer, verdict, monkeypatch):
    """Even where sympy, as it does now and then, says so: here it says yes to everything."""
    monkeypatch.setattr("sg_opd.verifiers.mathematics.symbols.verify", lambda *_, **__: True)
    assert judge_of_tasks()(reference, answer) == verdict


@pytest.mark.parametrize("error", [Exception, RecursionError, AttributeError])
def test_a_crash_of_the_parser_is_no_verdict(error, monkeypatch):
    """By a bare `Exception` it says that formulas have no meaning, and their signs differ; of all else none comes."""

    def parser(latex, **_):
        raise error(latex)

    monkeypatch.setattr("sg_opd.verifiers.mathematics.symbols.latex2sympy", parser)
    symbols.parse.cache_clear()
    judge = judge_of_tasks()
    if error is Exception:
        assert judge("1917x+y", "y+1918x") == 0.0
    else:
        with pytest.raises(error, match="1917x"):
            judge("1917x+y", "y+1918x")
