"""Turns graded samples into figures: counts by question, avg@k, pass@k, maj@k, and means with their intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """One completion of a question: a line of `samples.jsonl`."""

    question_id: str
    sample_id: int  #: 0 to num_samples - 1 within its question.
    seed: int  #: Of the generator it was drawn with: its own (vLLM), or its batch's (transformers).
    num_tokens: int  #: The completion's, with its EOS.
    finish_reason: str  #: "stop" at an EOS, "length" where the limit cut it off.
    verdict: float | None  #: 1.0 correct, 0.0 incorrect, `None` abstained.
    answer: str | None  #: The final answer as it was written; `None` where none was found.
    completion: str  #: The text, without special tokens.


@dataclass(frozen=True)
class QuestionResult:
    """Counts over the samples of one question."""

    id: str
    samples: int
    correct: int
    abstained: int
    truncated: int
    parsed: int
    tokens: int
    majority: float  #: The chance that a majority vote over all samples is correct, in [0, 1].

    @classmethod
    def of(cls, samples: Sequence[Sample], votes: Sequence[Hashable | None] | None = None) -> QuestionResult:
        """The counts over one question's samples; `votes` are equal where answers are (default: their texts)."""
        votes = [sample.answer for sample in samples] if votes is None else votes
        return cls(
            id=samples[0].question_id,
            samples=len(samples),
            correct=sum(s.verdict == 1.0 for s in samples),
            abstained=sum(s.verdict is None for s in samples),
            truncated=sum(s.finish_reason == "length" for s in samples),
            parsed=sum(s.answer is not None for s in samples),
            tokens=sum(s.num_tokens for s in samples),
            majority=majority(votes, [s.verdict == 1.0 for s in samples]),
        )

    def figures(self) -> dict[str, float]:
        """This question's contribution to each figure: per cent, but `tokens`, which is the mean length."""
        n = self.samples
        shares = {"parsed": self.parsed, "abstained": self.abstained, "truncated": self.truncated}
        return {
            f"avg@{n}": 100 * self.correct / n,
            **{f"pass@{k}": 100 * pass_at_k(n, self.correct, k) for k in (1 << i for i in range(n.bit_length()))},
            f"maj@{n}": 100 * self.majority,
            **{name: 100 * count / n for name, count in shares.items()},
            "tokens": self.tokens / n,
        }


def by_question(
    samples: Sequence[Sample], num_samples: int, verifier: Callable[..., Any] | None = None
) -> tuple[QuestionResult, ...]:
    """The counts by question of samples that lie question by question, `num_samples` each.

    Answers are one vote where the verifier says so in its method `votes` (see `MathVerifier.votes`), else where their
    texts are the same.
    """
    rows = [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]
    count = getattr(verifier, "votes", lambda questions: questions)
    votes = count([[sample.answer for sample in row] for row in rows])
    return tuple(QuestionResult.of(row, vote) for row, vote in zip(rows, votes, strict=True))


def figures_over(questions: Sequence[QuestionResult]) -> dict[str, Interval]:
    """Each figure by name, with its interval over questions."""
    rows = [question.figures() for question in questions]
    return {name: mean_interval([row[name] for row in rows]) for name in rows[0]}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct, from c correct ones of n.

    `1 - C(n - c, k) / C(n, k)`, as a product (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}.")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """The chance that a majority vote is correct, a tie being broken at random; in [0, 1].

    Correct samples vote together, however their answers are written; the others vote by their answer. A sample whose
    answer is `None` does not vote, and a vote without voters is lost.
    """
    votes = Counter(
        (good, None if good else answer) for answer, good in zip(answers, correct, strict=True) if answer is not None
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [good for (good, _), count in votes.items() if count == most]
    return sum(winners) / len(winners)


class Interval(NamedTuple):
    """A mean with its standard error and confidence interval, which are NaN where they are undefined."""

    mean: float
    standard_error: float
    low: float
    high: float


def mean_interval(values: Any, confidence: float = CONFIDENCE) -> Interval:
    """The mean of `values` with Student's interval, over questions or over runs and questions.

    One run: the questions are a random sample, Q - 1 degrees of freedom. Several runs on the same questions: runs and
    questions are crossed random effects, so that the interval holds for other seeds and other questions. The variance
    of the mean is then (MS_runs + MS_questions - MS_residual) / (R Q), never less than one factor alone gives, with
    Satterthwaite's degrees of freedom.

    Args:
        values: one run's values by question, (Q,), or those of several, (R, Q).
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: no values, or an array of another shape.
    """
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"`values` must be of shape (questions,) or (runs, questions), got {np.shape(values)}.")
    mean = float(table.mean())
    if table.shape[1] == 1:
        return Interval(mean, math.nan, math.nan, math.nan)
    independent = table.var(ddof=1) / table.size, table.size - 1
    variance, freedom = independent if len(table) == 1 else _crossed(table)
    if variance == 0:
        return Interval(mean, 0.0, mean, mean)
    error = math.sqrt(variance)
    return Interval(mean, error, *map(float, stats.t.interval(confidence, freedom, mean, error)))


def _crossed(table: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of a (runs, questions) table with both effects random, and its degrees of freedom."""
    runs, questions = table.shape
    by_run, by_question = table.mean(1), table.mean(0)
    residual = table - by_run[:, None] - by_question[None, :] + table.mean()
    squares = questions * by_run.var(ddof=1), runs * by_question.var(ddof=1)
    freedom = runs - 1, questions - 1
    rest = (residual**2).sum() / (freedom[0] * freedom[1])
    both = squares[0] + squares[1] - rest
    larger = int(squares[1] > squares[0])
    if both <= squares[larger]:  # the other factor adds nothing that the residual does not explain
        return float(squares[larger]) / table.size, freedom[larger]
    parts = [(squares[0], freedom[0]), (squares[1], freedom[1]), (rest, freedom[0] * freedom[1])]
    return float(both) / table.size, float(both**2 / sum(square**2 / free for square, free in parts))
