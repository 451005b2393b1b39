"""Figures by hand, by brute force and by simulation; results written, read and compared, with their provenance."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from documents import ROOT

from sg_opd import MathVerifier
from sg_opd.evaluation import results
from sg_opd.evaluation.comparison import compare
from sg_opd.evaluation.figures import QuestionResult, Sample, by_question, majority, mean_interval, pass_at_k
from sg_opd.evaluation.results import EvaluationResult


def test_pass_at_k_by_hand():
    """n=4, c=1, k=2: 1 - C(3,2)/C(4,2) = 1 - 3/6 = 1/2."""
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 0, 2) == 0.0
    assert pass_at_k(4, 3, 2) == 1.0


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_counts_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_is_undefined(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ("aab", "yyn", 1.0),
        ("abb", "ynn", 0.0),
        ("ab", "yn", 1 / 2),  # a tie of two
        ("abc", "ynn", 1 / 3),  # of three
        ("aabbc", "yynny", 1.0),  # c is correct too, so it votes with a: three of five
        ("aabbcc", "nnnnnn", 0.0),
        ("--b", "nnn", 0.0),
        ("a--", "ynn", 1.0),  # who has no answer does not vote
        ("---", "nnn", 0.0),  # nobody votes
    ],
)
def test_majority_by_hand(answers, correct, expected):
    votes = [None if letter == "-" else letter for letter in answers]
    assert majority(votes, [letter == "y" for letter in correct]) == pytest.approx(expected)


def test_votes_are_counted_by_the_verifiers_own_notion_of_the_same_answer():
    """q0: five ways to write a half against two thirds; q1: expressions, no answer, and texts that nobody can read."""
    halves = [r"\frac{1}{2}", "0.5", "2/3", "50\\%", r"\frac{2}{4}", "$0.50$", None]
    others = ["x+1", "1+x", "9" * 5000, "x+2", "9" * 4999, r"(x^2-1)/(x-1)", r"x + 1\,", None]
    verifier = MathVerifier()
    votes = verifier.votes([halves, others])
    assert votes == [[0, 0, 2, 0, 0, 0, None], [0, 0, 2, 3, 4, 0, 0, None]]
    verdicts = [0.0, 0.0, 1.0, 0.0]
    samples = [
        replace(sample("q", place, verdict), answer=answer)
        for place, (verdict, answer) in enumerate(zip(verdicts, ["0.5", r"\frac12", "2/3", "0.4"], strict=True))
    ]
    # two votes for a half, one for 2/3, which is correct, one for 0.4; by their texts it is a tie of four
    assert [by_question(samples, 4, given)[0].majority for given in (verifier, None)] == [0.0, 0.25]
    verifier.close()


def test_votes_have_a_bounded_number_of_time_outs(monkeypatch):
    """Five hard answers have ten pairs; the second comparison that times out is the last. Others vote as ever."""
    hard, asked = [f"h+{number}" for number in range(5)], []

    def run(tasks):
        asked.extend(tasks.values())
        return {
            row: None if {*pair} & {*hard} else float(sorted(pair[0]) == sorted(pair[1])) for row, pair in tasks.items()
        }

    verifier = MathVerifier(workers=1)
    monkeypatch.setattr(verifier._grader, "run", run)
    assert verifier.votes([[hard[0], "x+1", "5", "1+x", hard[1], "5.0", hard[1]]]) == [[0, 1, 2, 1, 4, 2, 4]]
    asked.clear()
    assert verifier.votes([hard]) == [[0, 1, 2, 3, 4]]
    assert asked == [(hard[0], other) for other in hard[1:]] + [(hard[1], other) for other in hard[2:]]


def test_an_interval_by_hand():
    """Values 0 and 100: sd = sqrt(5000), error 50; t(0.975, 1 df) = 12.7062."""
    interval = mean_interval([0.0, 100.0])
    assert interval == pytest.approx((50.0, 50.0, 50 - 635.31, 50 + 635.31), abs=0.01)


def test_what_has_no_interval():
    assert math.isnan(mean_interval([3.0]).standard_error)
    assert math.isnan(mean_interval([[3.0], [4.0]]).low)  # of one question nothing is known about others
    assert mean_interval([5.0, 5.0, 5.0]) == (5.0, 0.0, 5.0, 5.0)
    for wrong in ([], np.zeros((2, 2, 2)), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="shape"):
            mean_interval(wrong)


def test_two_runs_by_hand():
    """[[1, 3], [2, 8]]: means 2 and 5 by run, 1.5 and 5.5 by question, 3.5 in all; residuals +-1.

    MS_runs = 2 * 4.5 = 9, MS_questions = 2 * 8 = 16, MS_residual = 4; (9 + 16 - 4) / 4 = 5.25, and by Satterthwaite
    21^2 / (81 + 256 + 16) = 1.2493 degrees of freedom; the density summed numerically from -8.036 to 8.036 is 0.95.
    """
    mean, error, _, high = mean_interval([[1.0, 3.0], [2.0, 8.0]])
    assert (mean, error) == (3.5, pytest.approx(math.sqrt(5.25)))
    assert (high - mean) / error == pytest.approx(8.036, abs=0.001)


def test_several_runs_are_never_surer_than_one_factor_alone():
    """Runs that agree on average but not by question, and the other way round: the larger factor's variance stays."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        table = rng.normal(size=(3, 7))
        error = mean_interval(table).standard_error
        assert error >= table.mean(0).std(ddof=1) / math.sqrt(7) - 1e-12
        assert error >= table.mean(1).std(ddof=1) / math.sqrt(3) - 1e-12


def covered(draw, truth, times=2000):
    rng = np.random.default_rng(1)
    intervals = [mean_interval(draw(rng)) for _ in range(times)]
    return sum(interval.low <= truth <= interval.high for interval in intervals) / times


def test_coverage_over_questions():
    """30 questions of random difficulty, 8 samples each: about 95 % of the intervals cover the true accuracy."""

    def draw(rng):
        return rng.binomial(8, rng.beta(2, 3, 30)) / 8

    assert 0.93 <= covered(draw, 2 / 5) <= 0.97


@pytest.mark.parametrize(("runs", "questions", "rest"), [(2.0, 5.0, 10.0), (5.0, 1.0, 1.0), (0.5, 10.0, 5.0)])
def test_coverage_over_runs_and_questions(runs, questions, rest):
    """5 runs on 40 questions with known standard deviations of both effects and of the rest."""

    def draw(rng):
        by_run, by_question = rng.normal(0, runs, (5, 1)), rng.normal(0, questions, (1, 40))
        return by_run + by_question + rng.normal(0, rest, (5, 40))

    assert 0.93 <= covered(draw, 0.0) <= 0.99

    def over_questions_only(rng):
        return draw(rng).mean(0)

    assert covered(over_questions_only, 0.0) < covered(draw, 0.0)


def sample(question, number, verdict, answer="1", reason="stop", tokens=10):
    return Sample(question, number, 0, tokens, reason, verdict, answer, "")


def result(verdicts, seed=0, **settings):
    """A result from verdicts by question: y correct, n incorrect (each with an answer of its own), - abstained."""
    marks = {"y": 1.0, "n": 0.0, "-": None}
    samples = [
        sample(question, i, marks[mark], "1" if mark == "y" else f"wrong{i}")
        for question, row in verdicts.items()
        for i, mark in enumerate(row)
    ]
    number = len(next(iter(verdicts.values())))
    return EvaluationResult.of(samples, number, {"model": "m", "seed": seed, "dataset_sha256": "d", **settings}, {})


def test_known_samples_give_the_known_figures():
    """Two questions of four samples, c = 2 and 0: by hand.

    pass@2 of the first: 1 - C(2,2)/C(4,2) = 5/6; its majority: two correct against 7 and 8 once each, so 1.
    """
    samples = [
        sample("a", 0, 1.0, "5", tokens=2),
        sample("a", 1, 0.0, "7", tokens=4),
        sample("a", 2, 1.0, "5.0", tokens=6),
        sample("a", 3, 0.0, "8", tokens=8),
        sample("b", 0, None, "3", tokens=20),
        sample("b", 1, 0.0, None, "length", 20),
        sample("b", 2, 0.0, None, "length", 20),
        sample("b", 3, 0.0, "4", tokens=20),
    ]
    means = EvaluationResult.of(samples, 4, {}, {}).means()
    assert means == pytest.approx(
        {
            "avg@4": 25.0,
            "pass@1": 25.0,
            "pass@2": 100 * 5 / 12,
            "pass@4": 50.0,
            "maj@4": 50.0,
            "parsed": 75.0,
            "abstained": 12.5,
            "truncated": 25.0,
            "tokens": 12.5,
        }
    )
    assert [name for name in QuestionResult("q", 7, *[0] * 6).figures() if "pass" in name] == [
        "pass@1",
        "pass@2",
        "pass@4",
    ]
    assert list(means)[:5] == ["avg@4", "pass@1", "pass@2", "pass@4", "maj@4"]


def test_a_result_survives_its_file(tmp_path):
    """Also what is undefined: the interval of a single question."""
    for verdicts in ({"a": "yn", "b": "yy"}, {"a": "yn"}):
        before = result(verdicts)
        before.to_json(tmp_path / "result.json")
        after = EvaluationResult.from_json(tmp_path / "result.json")
        assert str(after) == str(before)
        assert after.questions == before.questions
        assert json.loads((tmp_path / "result.json").read_text())["figures"]["avg@2"]["mean"] == before.means()["avg@2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("settings"), r"a EvaluationResult lacks 'settings'"),
        (lambda c: c.update(extra=1), r"a EvaluationResult has the unknown 'extra'"),
        (lambda c: c.update(schema_version=0), r"expected `schema_version` 1, found 0"),
        (lambda c: c["questions"][0].pop("correct"), r"a QuestionResult lacks 'correct'"),
    ],
)
def test_another_file_is_refused_by_name(change, words, tmp_path):
    path = tmp_path / "result.json"
    result({"a": "yn"}).to_json(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"result\.json: {words}"):
        EvaluationResult.from_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: not JSON"):
        EvaluationResult.from_json(path)


def test_compare_is_paired():
    """Differences 50, 0, 50 per question: mean 100/3, sd 28.87, error 16.67; unpaired it would be larger."""
    comparison = compare(
        result({"a": "nn", "b": "yy", "c": "yn"}), result({"c": "yy", "a": "yn", "b": "yy"}, model="other", seed=5)
    )
    row = comparison.figures["avg@2"]
    assert (row.baseline, row.other) == pytest.approx((50.0, 250 / 3))
    assert row.difference.mean == pytest.approx(100 / 3)
    assert row.difference.standard_error == pytest.approx(50 / 3)
    assert comparison.differing == ()
    assert "+33.3" in str(comparison)
    assert "differ" not in str(comparison).splitlines()[-1]


def test_compare_over_seeds():
    """Two seeds a side, differences [[50, 0], [100, 50]]: MS 2500, 2500, 0, so error sqrt(5000 / 4)."""
    baseline = [result({"a": "yn", "b": "nn"}, seed=s) for s in (0, 1)]
    other = [result({"a": "yy", "b": "nn"}), result({"a": "yy", "b": "nn"})]
    other[1] = result({"a": "yy", "b": "yn"})
    baseline[1] = result({"a": "nn", "b": "nn"})
    comparison = compare(baseline, other)
    difference = comparison.figures["avg@2"].difference
    assert difference[:2] == pytest.approx((50.0, math.sqrt(1250)))
    assert comparison.num_runs == 2
    assert "2 runs and questions" in str(comparison)


def test_compare_names_what_differs():
    some = result({"a": "yn", "b": "yy"}, temperature=1.0, chat_template_sha256="x")
    other = result({"a": "yn", "b": "yy"}, temperature=0.6, chat_template_sha256="y", batch_size=3)
    comparison = compare(some, other)
    assert comparison.differing == ("chat_template_sha256", "temperature")
    assert "The settings differ in chat_template_sha256, temperature." in str(comparison)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: result({"a": "yn", "c": "yy"}), r"Different questions: 2 are on one side only, such as 'b'"),
        (lambda: result({"a": "ynn", "b": "yyy"}), r"numbers of samples a question: 2 and 3"),
        (lambda: result({"a": "yn", "b": "yy"}, dataset_sha256="e"), r"the same, but `dataset_sha256` differs"),
        (lambda: [result({"a": "yn", "b": "yy"})] * 2, r"equally many runs.*got 1 and 2"),
        (lambda: [], r"got 1 and 0"),
    ],
)
def test_compare_refuses_what_is_not_paired(other, words):
    with pytest.raises(ValueError, match=words):
        compare(result({"a": "yn", "b": "yy"}), other())


def test_counts_of_a_question():
    counts = QuestionResult.of([sample("q", 0, 1.0), replace(sample("q", 1, None), finish_reason="length")])
    assert (counts.correct, counts.abstained, counts.truncated, counts.parsed, counts.tokens) == (1, 1, 1, 2, 20)


def git(folder, *arguments):
    run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_a_checkout_gives_its_commit():
    told = results.provenance()
    assert told["commit"] == git(ROOT, "rev-parse", "HEAD")
    assert told["dirty"] == bool(git(ROOT, "status", "--porcelain", "-uno"))
    assert told["python"] == sys.version.split()[0]
    assert {"torch", "transformers", "trl", "math-verify"} <= told["versions"].keys()


def test_a_copy_within_another_checkout_has_no_commit(tmp_path, monkeypatch):
    """As site-packages of an environment within somebody's repository; then committed there, with a change."""
    path = tmp_path / "provenance.py"
    path.write_text("x = 1\n")
    monkeypatch.setattr(results, "__file__", str(path))
    assert results.checkout() == {"commit": None}
    git(tmp_path, "init", "-q")
    assert results.checkout() == {"commit": None}
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    assert results.checkout() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    path.write_text("x = 2\n")
    assert results.checkout()["dirty"] is True
