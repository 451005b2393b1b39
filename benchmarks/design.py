"""What the study compares: its runs, the cells they belong to, and how many of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from arms import ARMS


@dataclass(frozen=True)
class Plan:
    """How large the study is.

    Attributes:
        steps: optimizer steps of a run; `None` is what the world says, and so it is for `rates`.
        rates: learning rates between which an arm chooses.
        main_seeds, other_seeds, plane_seeds: runs of a main arm, of another one, of a point of the plane.
        choosing_seeds: seeds over which a main arm chooses; the others choose with the first.
        test_questions, validation_questions: how many; `None` is all.
        plane: values of both factors.
        ratios: of interpolation to extrapolation, beside those of the arms (0, 1/1.8 and 1).
        clips: values of `log_ratio_clip`.
    """

    steps: int | None = None
    rates: tuple[float, ...] | None = None
    main_seeds: int = 5
    other_seeds: int = 2
    choosing_seeds: int = 2
    test_questions: int | None = None
    validation_questions: int | None = None
    plane_seeds: int = 1
    plane: tuple[float, ...] = (0.6, 1.0, 1.4, 1.8)
    ratios: tuple[float, ...] = (0.25, 2.0, 4.0)
    clips: tuple[float | None, ...] = (None, 2.0)


PLANS = {
    "small": Plan(),
    "large": Plan(main_seeds=3),
    "tiny": Plan(2, (5e-4,), 2, 1, 1, 4, 2, 1, (1.0, 1.8), (0.5,), (2.0,)),  # two of a thing where one may go unnoticed
}
QUICK = Plan(
    steps=5,
    rates=(5e-4,),
    main_seeds=1,
    other_seeds=1,
    choosing_seeds=1,
    test_questions=40,
    validation_questions=20,
    plane=(1.0, 1.8),
    ratios=(0.5,),
    clips=(2.0,),
)


@dataclass(frozen=True)
class Run:
    """One training: its world, arm, further settings, learning rate, seed and number of optimizer steps."""

    world: str
    arm: str
    changes: tuple[tuple[str, Any], ...]
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """A folder's name."""
        changes = "".join(f",{name}={value}" for name, value in self.changes)
        return f"{self.world}/{self.arm}{changes}/lr={self.learning_rate:g},seed={self.seed},steps={self.steps}"


@dataclass(frozen=True)
class Cell:
    """What the study compares: an arm in a world with some settings, over seeds.

    Attributes:
        changes: settings over the arm's own.
        choosing: seeds whose validation chooses the learning rate.
        rate_of: another cell, whose learning rate it takes over instead of choosing its own.
    """

    world: str
    arm: str
    seeds: int
    changes: tuple[tuple[str, Any], ...] = ()
    choosing: int = 1
    rate_of: Cell | None = None


LINE, PLANE = "line in the factors' ratio", "plane of the factors"
WHOLE = ("main arms", "other arms")  # begin the names of groups of arms as they are


def groups(plan: Plan, worlds: list[str]) -> Iterator[tuple[str, list[Cell]]]:
    """The study in the order in which it is done, the most important first."""
    second = worlds[-1]
    main = {
        (arm, world): Cell(world, arm, plan.main_seeds, choosing=plan.choosing_seeds)
        for world in reversed(worlds)
        for arm in ARMS
        if ARMS[arm].main
    }
    others = {
        (arm, world): Cell(world, arm, plan.other_seeds)
        for world in reversed(worlds)
        for arm in ARMS
        if not ARMS[arm].main and (ARMS[arm].everywhere or world == second)
    }
    for world in reversed(worlds):
        yield f"main arms, {world}", [cell for cell in main.values() if cell.world == world]
    for world in reversed(worlds):
        cells = [replace(cell, rate_of=main["opd", world]) for cell in main.values() if cell.world == world]
        yield f"at OPD's learning rate, {world}", cells
    sampled = [(("estimator", "sampled"), ("log_ratio_clip", clip)) for clip in plan.clips]
    cells = [Cell(second, arm, plan.other_seeds, changes) for changes in sampled for arm in ("opd", "sg-opd-lite")]
    yield "estimators and clip", cells
    for world in reversed(worlds):
        yield f"other arms, {world}", [cell for cell in others.values() if cell.world == world]
    single = (("num_generations", 1),)
    for world in reversed(worlds):
        arms = [cell.arm for cell in main.values() if cell.world == world]
        cells = [Cell(world, arm, plan.main_seeds, single, rate_of=main["opd", world]) for arm in arms]
        yield f"one rollout a prompt, {world}", cells
    line = [(("gate_extrapolation", 1.0), ("gate_interpolation", ratio)) for ratio in plan.ratios]
    without_phase = main["no-phase", second]
    cells = [Cell(second, "no-phase", plan.other_seeds, changes, rate_of=without_phase) for changes in line]
    yield LINE, cells
    plane = [(("gate_extrapolation", up), ("gate_interpolation", down)) for up in plan.plane for down in plan.plane]
    extrapolated = main["exopd", second]
    yield PLANE, [Cell(second, "exopd", plan.plane_seeds, at, rate_of=extrapolated) for at in plane]
