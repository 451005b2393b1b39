"""The study's worlds: where questions, golds, the student and the teacher come from, at two scales.

`small` runs on a CPU with the checkpoints of this repository. `large` is for one GPU: longer chains, and models of
millions of parameters that are made on first use (`World.make_models`). `tiny` tries the path of `large` on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples" / "arithmetic"))

import equations
import problems as arithmetic
from make_models import BATCH, pretrain
from make_models import SIZES as ARITHMETIC_SIZES

TEST, VALIDATION, TRAIN = 1_000, 300, 4_000  # questions
STUDY_SEED = 40_001
RATES = 5e-5, 1e-4, 2e-4  # for the larger models
FOUR_OR_FIVE, EIGHT_TO_TWELVE = (4, 5), (8, 12)  # operations: harder than the demo's three to five


@dataclass(frozen=True)
class World:
    """One kind of problem with its two models.

    Attributes:
        draw: the questions of all splits, test first, validation next; none of them was shown to the models.
        models: folder with `student` and `teacher`.
        max_completion_length: in tokens; the longest worked solution is shorter.
        steps: optimizer steps of a run.
        rates: learning rates between which an arm chooses.
        sizes: of models to be made on first use, by role, as `make_models.SIZES`; empty where they are there.
        teach: `(count, seed, exclude, **habits)` -> worked solutions for these models; habits are in their sizes.
        tokenizer: of these models.
        habit: gold -> whether the teacher errs by habit on its question; `None` where it has none.
        teacher_folder: of a teacher that is not in `models`.
    """

    name: str
    draw: Callable[[], list[dict]]
    models: Path
    max_completion_length: int
    steps: int
    rates: tuple[float, ...]
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    teach: Callable[..., list[dict]] = arithmetic.make_problems
    tokenizer: Callable[[], Any] = arithmetic.make_tokenizer
    habit: Callable[[str], bool] | None = None
    teacher_folder: Path | None = None

    def __hash__(self) -> int:
        return hash((self.name, self.models))

    @property
    def student(self) -> str:
        return str(self.models / "student")

    @property
    def reader(self) -> str:
        """The student, which also reads a worked solution before a question; of arithmetic's committed models only."""
        return str(self.models / "reader")

    @property
    def teacher(self) -> str:
        return str(self.teacher_folder or self.models / "teacher")

    def split(self, name: str, count: int | None = None, hinted: bool = False) -> Dataset:
        """`test`, `validation` or `train`, or its first `count` rows: columns `prompt` and `solution`.

        `hinted` adds `teacher_prompt`: the worked solution, then the question.
        """
        bounds = {
            "test": slice(TEST),
            "validation": slice(TEST, TEST + VALIDATION),
            "train": slice(TEST + VALIDATION, None),
        }
        form = arithmetic.as_hinted_row if hinted else arithmetic.as_row
        return Dataset.from_list([form(row) for row in _questions(self)[bounds[name]][:count]])

    def make_models(self) -> None:
        """Make the models that are not there yet; no question of a split is among what they are taught."""
        for role, size in self.sizes.items():
            if not (self.models / role / "config.json").is_file():
                asked = frozenset(row["question"] for row in _questions(self))
                rows = self.teach(size["steps"] * BATCH, size["seed"], asked, **size["habits"])
                pretrain(size, self.tokenizer(), rows, str(self.models / role))


@cache
def _questions(world: World) -> list[dict]:
    return world.draw()


def hard_arithmetic() -> list[dict]:
    """Chains that the embedded models, whose training questions are drawn here again, were not shown."""
    shown = set(arithmetic.held_out_questions())
    for size in ARITHMETIC_SIZES.values():
        taught = size["steps"] * BATCH, arithmetic.PRETRAIN_SEED, arithmetic.held_out_questions()
        shown.update(row["question"] for row in arithmetic.make_problems(*taught, slip=size["slip"]))
    count = TEST + VALIDATION + TRAIN
    return arithmetic.make_problems(count, STUDY_SEED, frozenset(shown), operations=FOUR_OR_FIVE)


def held_out_equations() -> list[dict]:
    """The equations that no model was taught, and others to train on."""
    asked = equations.held_out_questions()
    train = equations.make_problems(TRAIN, equations.TRAIN_SEED, asked)
    return [*equations.make_problems(equations.HELD_OUT, equations.TEST_SEED), *train]


def small(folder: Path) -> list[World]:
    """The two worlds with their committed models."""
    return [
        World("arithmetic", hard_arithmetic, ROOT / "examples" / "arithmetic", 64, 60, (2e-4, 5e-4)),
        World(
            "equations",
            held_out_equations,
            equations.MODELS,
            48,
            60,
            (2e-4, 5e-4),
            teach=equations.make_problems,
            habit=equations.negative,
        ),
    ]


def large(folder: Path) -> list[World]:
    """Longer chains, and models of 27 and 11 million parameters, made below a folder."""
    teacher = {"hidden": 512, "layers": 8, "heads": 16, "intermediate": 1536, "steps": 6000, "rate": 5e-4, "seed": 1}
    student = {"hidden": 384, "layers": 6, "heads": 12, "intermediate": 1024, "steps": 3000, "rate": 5e-4, "seed": 2}
    chains = {"operations": EIGHT_TO_TWELVE}

    def long_chains() -> list[dict]:
        return arithmetic.make_problems(TEST + VALIDATION + TRAIN, STUDY_SEED, **chains)

    def sizes(teachers: dict[str, Any], students: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"teacher": {**teacher, "habits": teachers}, "student": {**student, "habits": students}}

    careless = {"slip": 0.1, **chains}
    models = {name: folder / "models" / name for name in ("arithmetic", "equations")}
    return [
        World("arithmetic", long_chains, models["arithmetic"], 160, 200, RATES, sizes(chains, careless)),
        World(
            "equations",
            held_out_equations,
            models["equations"],
            48,
            200,
            RATES,
            sizes(equations.HABITS["teacher"], equations.HABITS["student"]),
            equations.make_problems,
            lambda: arithmetic.make_tokenizer(equations.WORDS, equations.PHRASES),
            equations.negative,
        ),
    ]


def tiny(folder: Path) -> list[World]:
    """The path of `large` in no time: students that know nothing, made below a folder, and the committed teachers."""
    size = {"hidden": 32, "layers": 1, "heads": 1, "intermediate": 32, "steps": 2, "seed": 1, "habits": {}}
    return [
        replace(
            world,
            models=folder / "models" / world.name,
            teacher_folder=world.models / "teacher",
            sizes={"student": size},
            tokenizer=lambda world=world: AutoTokenizer.from_pretrained(world.teacher),
        )
        for world in small(folder)
    ]


SCALES = {"small": small, "large": large, "tiny": tiny}
