"""How many answers a second `MathVerifier` judges, in steady state."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np

from sg_opd import MathVerifier

DRAW = random.Random(0)


def plain_pairs(count: int) -> list[tuple[str, str]]:
    """Integers and decimals, half of them right, as (completion, gold)."""
    pairs = []
    for i in range(count):
        gold = str(DRAW.randint(-9999, 9999)) if i % 2 else f"{DRAW.uniform(-99, 99):.2f}"
        answer = gold if i % 4 < 2 else str(DRAW.randint(-9999, 9999))
        pairs.append((f"So the result is \\boxed{{{answer}}}.", gold))
    return pairs


def latex_pairs(count: int) -> list[tuple[str, str]]:
    """Roots, fractions of roots, sums, polynomials and intervals that need sympy, no two alike."""
    pairs = []
    for i in range(count):
        a, b, c = DRAW.randint(2, 99), DRAW.randint(2, 99), DRAW.randint(2, 99)
        gold, same = (
            (rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}", rf"{a}\sqrt{{{b}}}/{c}"),
            (rf"{a}\pi+{b}", rf"{b}+{a}\pi"),
            (rf"x^2+{a}x+{b}", rf"{b}+{a}x+x^2"),
            (rf"({a},{a + b}]", rf"({a}, {a + b}]"),
            (rf"{a}^{{{b % 5}}}-\sqrt{{{c}}}", rf"-\sqrt{{{c}}}+{a}^{{{b % 5}}}"),
        )[i % 5]
        answer = same if i % 2 else f"{same}+1".replace("]+1", "+1]")
        pairs.append((f"So the result is \\boxed{{{answer}}}.", gold))
    return pairs


def grading(count: int, repetitions: int) -> dict[str, Any]:
    """Answers a second, medians over repetitions with fresh answers each; the workers are up before the first."""
    verifier = MathVerifier()
    found: dict[str, Any] = {"workers": verifier.workers}
    for name, pairs, some in (("plain", plain_pairs, count), ("latex", latex_pairs, max(10, count // 10))):
        rates = []
        for _ in range(repetitions + 1):  # the first one starts the workers
            completions, golds = zip(*pairs(some), strict=True)
            start = time.perf_counter()
            verdicts = verifier(completions, golds)
            rates.append(some / (time.perf_counter() - start))
            if None in verdicts:
                raise RuntimeError(
                    "An answer of the benchmark was not judged; the machine is too slow or a form unknown."
                )
        found[f"{name}_per_s"] = round(float(np.median(rates[1:])), 1)
    verifier.close()
    return found
