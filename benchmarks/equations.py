"""The study's second world: linear equations, a teacher with a habit of dropping signs, and a careless student.

    user:      Solve 11x-12=4x-187.
    assistant: 11x-4x=7x
               -187+12=-175
               -175/7=-25
               \\boxed{-25}

The arithmetic world's teacher errs at random, being small; this one was taught to err in one way: where the solution
is negative it drops the sign in `DROPPED` of its worked solutions. The student goes on from the teacher's checkpoint,
as if both came from one model; it was taught slips of single digits, and to keep the sign, which it knows better.

Usage, to make the two checkpoints again (about 20 minutes on two CPU cores; the results are committed):

    python benchmarks/equations.py teacher
    python benchmarks/equations.py student    # after the teacher
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples" / "arithmetic"))

from make_models import BATCH, pretrain
from problems import distinct, make_tokenizer, with_slip

MODELS = ROOT / "benchmarks" / "models" / "equations"
WORDS = ["Solve ", "x", "\\boxed{", "}", "\n", "+", "-", "/", "=", "."]
PHRASES = r"Solve |\\boxed\{"
LARGEST_ROOT, LARGEST_TERM = 30, 50
DROPPED = 0.4  # share of the teacher's negative solutions without their sign
HELD_OUT = 1_300  # questions for the study's test and validation splits
TEST_SEED, TRAIN_SEED, PRETRAIN_SEED = 30_001, 30_002, 30_003
SIZES = {
    "teacher": {"hidden": 96, "layers": 3, "heads": 3, "intermediate": 256, "steps": 2600, "seed": 3},
    "student": {"hidden": 96, "layers": 3, "heads": 3, "intermediate": 256, "steps": 300, "rate": 1e-3, "seed": 4},
}
HABITS = {"teacher": {"dropped": DROPPED}, "student": {"slip": 0.25}}


def make_problem(rng: random.Random, slip: float = 0.0, dropped: float = 0.0) -> dict:
    """One equation `ax+b=cx+d` with a whole solution other than 0, as `{"question", "solution", "answer"}`.

    Args:
        rng: the source of randomness.
        slip: chance that a step of the solution gets its result wrong, by one digit, and goes on from there.
        dropped: chance that a negative solution loses its sign.
    """
    root = rng.choice((-1, 1)) * rng.randint(1, LARGEST_ROOT)
    slope, right = rng.randint(2, 9), rng.randint(1, 9)
    left = slope + right
    shift = rng.choice((-1, 1)) * rng.randint(1, LARGEST_TERM)
    constant = slope * root + shift

    def result(value: int) -> int:
        if not (slip and rng.random() < slip):
            return value
        return (-1 if value < 0 else 1) * with_slip(abs(value), rng)

    question = f"Solve {left}x{shift:+d}={right}x{constant:+d}."
    coefficient = result(slope) or slope
    difference = result(constant - shift)
    quotient = result(int(difference / coefficient))
    if quotient < 0 and rng.random() < dropped:
        quotient = -quotient
    lines = [
        f"{left}x-{right}x={coefficient}x",
        f"{constant}{-shift:+d}={difference}",
        f"{difference}/{coefficient}={quotient}",
        f"\\boxed{{{quotient}}}",
    ]
    return {"question": question, "solution": "\n".join(lines), "answer": str(root)}


def make_problems(count: int, seed: int, exclude: frozenset[str] = frozenset(), **habits: float) -> list[dict]:
    """`count` distinct equations from `seed`, none of whose questions is in `exclude`."""
    return distinct(lambda rng: make_problem(rng, **habits), count, seed, exclude)


def negative(answer: str) -> bool:
    """Whether the teacher's habit concerns an equation with this answer."""
    return answer.startswith("-")


def held_out_questions() -> frozenset[str]:
    """The questions of the test and validation splits, which no training set may contain."""
    return frozenset(row["question"] for row in make_problems(HELD_OUT, TEST_SEED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=sorted(SIZES))
    which = parser.parse_args().which
    size = SIZES[which]
    problems = make_problems(size["steps"] * BATCH, PRETRAIN_SEED, held_out_questions(), **HABITS[which])
    start = str(MODELS / "teacher") if which == "student" else None
    pretrain(size, make_tokenizer(WORDS, PHRASES), problems, str(MODELS / which), start=start)


if __name__ == "__main__":
    main()
