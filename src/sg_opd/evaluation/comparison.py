"""Compares results of evaluations: paired by question, with what besides the model differs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..teachers.sampling import NEUTRAL
from .figures import CONFIDENCE, Interval, mean_interval
from .results import EvaluationResult, as_table, span

logger = logging.getLogger(__name__)

# settings that may differ between two results which are compared: what is compared, chance, and how it was computed
MAY_DIFFER = frozenset({"model", "weights", "seed", "batch_size"})
# settings that shape a completion; one that an older result lacks may have come from the checkpoint's own file
SHAPING = frozenset({*NEUTRAL, "temperature", "max_completion_length", "chat_template_kwargs"})


class Difference(NamedTuple):
    """A figure of two sides, and the paired difference (other minus baseline) with its interval."""

    baseline: float
    other: float
    difference: Interval


@dataclass(frozen=True)
class Comparison:
    """Two sides on the same questions, figure by figure."""

    num_questions: int
    num_runs: int  #: Runs of each side; with several the intervals are over runs and questions.
    figures: dict[str, Difference]
    differing: tuple[str, ...]
    """Settings besides the model and the seed in which the sides differ, so that it is not the model alone."""
    sampling: dict[str, tuple[str, ...]]
    """Of these, what shapes a completion: by name the values found, in the order of the results."""

    def __str__(self) -> str:
        """A table, with a note where the settings differ, and a warning above it where these are of the sampling."""
        rows = [
            (name, f"{row.baseline:.1f}", f"{row.other:.1f}", f"{row.difference.mean:+.1f}", span(row.difference))
            for name, row in self.figures.items()
        ]
        heads = ("", "baseline", "other", "difference", f"{CONFIDENCE:.0%} interval")
        note = f"\nThe settings differ in {', '.join(self.differing)}." if self.differing else ""
        over = "questions" if self.num_runs == 1 else f"{self.num_runs} runs and questions"
        head = f"{self.num_questions} questions, paired; intervals over {over}"
        warning = f"WARNING: {sampled_apart(self.sampling)}\n" if self.sampling else ""
        return f"{warning}{head}\n{as_table(heads, rows)}{note}"


def sampled_apart(sampling: dict[str, tuple[str, ...]]) -> str:
    """Says by which settings results were sampled differently, and what follows from it."""
    named = "; ".join(f"{name}: {' against '.join(values)}" for name, values in sampling.items())
    return f"the results were sampled differently, so the difference is not the model's alone. {named}."


def compare(
    baseline: EvaluationResult | Sequence[EvaluationResult], other: EvaluationResult | Sequence[EvaluationResult]
) -> Comparison:
    """Other minus baseline, paired by question.

    Each side is one result or several runs of one thing (training seeds, sampling seeds), equally many on both sides;
    intervals are then over runs and questions (see `mean_interval`). Results that were sampled differently are compared
    with a warning, which names the settings and their values.

    Raises:
        ValueError: no results, other questions, or other numbers of samples or runs, by name.
    """
    sides = [[side] if isinstance(side, EvaluationResult) else list(side) for side in (baseline, other)]
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise ValueError(f"Both sides need equally many runs, at least one; got {len(sides[0])} and {len(sides[1])}.")
    first, *rest = (result for side in sides for result in side)
    for result in rest:
        check_comparable(first, result)
    ids = [question.id for question in first.questions]
    tables = np.array([[values_by_id(result, ids) for result in side] for side in sides])  # (2, R, Q, figures)
    means = tables.mean((1, 2))
    figures = {
        name: Difference(float(means[0, i]), float(means[1, i]), mean_interval(tables[1, ..., i] - tables[0, ..., i]))
        for i, name in enumerate(first.figures)
    }
    names = sorted(set().union(*(result.settings for result in (first, *rest))) - MAY_DIFFER)
    differing = tuple(n for n in names if any(r.settings.get(n) != first.settings.get(n) for r in rest))
    apart = {n: values_of(n, [first, *rest]) for n in differing if n in SHAPING}
    if apart:
        logger.warning("%s", sampled_apart(apart))
    return Comparison(len(ids), len(sides[0]), figures, differing, apart)


def values_of(name: str, results: Sequence[EvaluationResult]) -> tuple[str, ...]:
    """The values of a setting in results, each once."""
    return tuple(dict.fromkeys(repr(r.settings[name]) if name in r.settings else "not recorded" for r in results))


def check_comparable(a: EvaluationResult, b: EvaluationResult) -> None:
    """Raise a `ValueError` unless two results have the same questions and numbers of samples."""
    if a.num_samples != b.num_samples:
        raise ValueError(f"Different numbers of samples a question: {a.num_samples} and {b.num_samples}.")
    apart = sorted({q.id for q in a.questions} ^ {q.id for q in b.questions})
    if apart:
        raise ValueError(f"Different questions: {len(apart)} are on one side only, such as {apart[0]!r}.")
    if a.settings.get("dataset_sha256") != b.settings.get("dataset_sha256"):
        raise ValueError("Different questions: the ids are the same, but `dataset_sha256` differs.")


def values_by_id(result: EvaluationResult, ids: Sequence[str]) -> list[list[float]]:
    """Figures by question, in the order of `ids`."""
    rows = {question.id: list(question.figures().values()) for question in result.questions}
    return [rows[id] for id in ids]
