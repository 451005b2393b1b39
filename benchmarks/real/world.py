"""The word problems: GSM-Symbolic's templates that a model of 135 million parameters can learn, written to JSONL files.

`reasoning_gym` makes them by seed; whoever only reads the files needs no `reasoning_gym`. Of its 85 templates ten are
trained on and four are not: those whose worked solution is one to three short calculations. Of these, the problems
whose numbers are all whole and at most 100.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from sg_opd import MathVerifier

REASONING_GYM = "0.1.25"
TEMPLATES = (4, 10, 16, 31, 43, 45, 48, 57, 62, 72)  # trained on
SHORT = (4, 31, 43, 62)  # of these, what is learnt in an hour on two cores
UNSEEN = (6, 20, 39, 69)  # tested on alone
LARGEST = 100  # of all numbers in a question and its worked solution
# by split: its templates, how many problems, and the seed from which they are drawn
SPLITS = {
    "test": (TEMPLATES, 200, 1),
    "validation": (TEMPLATES, 160, 2),
    "train": (TEMPLATES, 1000, 3),  # the prompts of the distillation
    "lessons": (TEMPLATES, 2400, 4),  # with worked solutions, for the teacher and the early student
    "unseen": (UNSEEN, 200, 5),
}
REQUEST = r"Put the final answer in \boxed{}."
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def make_problems(folder: Path) -> None:
    """Write `<split>.jsonl` for every split into `folder`; no question is in two of them.

    Raises:
        RuntimeError: `reasoning_gym` is missing or has another version.
        ModuleNotFoundError: something that it needs is missing.
        ValueError: a reference answer or a worked solution that does not verify.
    """
    generators = templates()
    asked: set[str] = set()
    for split, (numbers, count, seed) in SPLITS.items():
        rows = list(drawn([(n, generators[n]) for n in numbers], count, Random(seed), asked))
        check(rows, split)
        write(folder / f"{split}.jsonl", rows)


def templates() -> dict[int, Any]:
    """GSM-Symbolic's templates by number: each a function of a random generator and a difficulty."""
    try:
        from importlib.metadata import version

        import reasoning_gym

        found = version("reasoning-gym")
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":  # something that it needs
            raise
        found = None
    if found != REASONING_GYM:
        raise RuntimeError(
            f"The problems are made by reasoning-gym {REASONING_GYM}, and here is {found or 'none'}: "
            "`python benchmarks/real/prepare.py` installs it below its folder."
        )
    return reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=1).generators


def drawn(generators: Sequence[tuple[int, Any]], count: int, rng: Random, asked: set[str]) -> Iterator[dict[str, Any]]:
    """`count` problems, equally many of each template, in the templates' turn; none of those `asked` before."""
    for index in range(count):
        number, generator = generators[index % len(generators)]
        while True:
            made = generator(rng, 1.0)
            row = as_row(f"{number}-{index}", made["question"], made["answer"], made["metadata"]["answer_cot"])
            if small(row) and row["question"] not in asked:
                break
        asked.add(row["question"])
        yield row


def as_row(id: str, question: str, answer: str, worked: str) -> dict[str, Any]:
    """A line of the files. The worked solution ends in the boxed answer, instead of GSM's `#### answer`."""
    lines = [line.strip() for line in worked.split("\n") if line.strip() and not line.startswith("####")]
    return {"id": id, "question": question, "answer": answer, "worked": "\n".join([*lines, rf"\boxed{{{answer}}}"])}


def small(row: dict[str, Any]) -> bool:
    """Whether all numbers of the question and its solution are whole and at most `LARGEST`."""
    numbers = NUMBER.findall(f"{row['question']} {row['worked']}")
    return all("." not in number and int(number) <= LARGEST for number in numbers)


def check(rows: Sequence[dict[str, Any]], split: str) -> None:
    """Raise a `ValueError` unless every reference answer, boxed, and every worked solution verifies as correct."""
    verifier, answers = MathVerifier(), [row["answer"] for row in rows]
    boxed = [rf"\boxed{{{answer}}}" for answer in answers]
    for what, texts in (("reference answer", boxed), ("worked solution", [row["worked"] for row in rows])):
        for row, text, verdict in zip(rows, texts, verifier(texts, answers), strict=True):
            if verdict != 1.0:
                raise ValueError(f"{split}: the {what} of problem {row['id']} does not verify: {text!r}")
    verifier.close()


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class World:
    """Problems in a folder, in the forms that trainers and evaluations read.

    Args:
        folder: holds the files of `make_problems`.
        templates: of `TEMPLATES`, those whose problems are taken; what is tested on alone stays whole.

    Raises:
        FileNotFoundError: a file is missing.
    """

    def __init__(self, folder: Path, templates: Sequence[int] = TEMPLATES) -> None:
        left_out = tuple(f"{number}-" for number in TEMPLATES if number not in templates)
        rows = {split: self._read(folder / f"{split}.jsonl") for split in SPLITS}
        self.rows = {split: [row for row in of if not row["id"].startswith(left_out)] for split, of in rows.items()}

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: `python benchmarks/real/prepare.py` makes it.")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def prompts(self, split: str, count: int | None = None) -> list[dict[str, Any]]:
        """The first `count` problems as `id`, `prompt` (messages) and `solution`."""
        return [
            {"id": row["id"], "prompt": messages(row["question"]), "solution": row["answer"]}
            for row in self.rows[split][:count]
        ]

    def lessons(self) -> list[dict[str, Any]]:
        """Problems with their worked solutions, as `prompt` and `completion`."""
        return [
            {
                "prompt": messages(row["question"]),
                "completion": [{"role": "assistant", "content": row["worked"]}],
            }
            for row in self.rows["lessons"]
        ]


def messages(question: str) -> list[dict[str, str]]:
    """A question as the user's message."""
    return [{"role": "user", "content": f"{question} {REQUEST}"}]


def write_stand_in(folder: Path) -> None:
    """A few sums in the place of the problems, for a trial without `reasoning_gym`."""
    for number, split in enumerate(SPLITS):
        pairs = [(a, b) for a in range(2, 10) for b in range(2 + number, 4 + number)]
        rows = [
            as_row(
                f"{split}-{a}-{b}", f"Ann has {a} pens and buys {b}. How many has she?", str(a + b), f"{a}+{b}={a + b}"
            )
            for a, b in pairs
        ]
        check(rows, split)
        write(folder / f"{split}.jsonl", rows)
