"""The family of gates in one table: every preset in both worlds of the study, and two questions of their own.

    python benchmarks/family.py              # about five hours of one core; resumable
    python benchmarks/family.py --quick      # every arm, small, in a few minutes
    python benchmarks/family.py --report     # train nothing, write the results from what is there

Every prompt has eight rollouts. A run's record lies below `--output` as soon as it ends, and is not made again. A
second machine can begin elsewhere in the plan and hand its records over in one file:

    python benchmarks/family.py --begin "other arms" --workers 12 --minutes 4 --pack records.tar.gz    # there
    python benchmarks/family.py --unpack records.tar.gz                                                # here
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from conflicts import QUESTIONS, scored, shares
from design import QUICK, Cell, Plan, Run
from study import PAGE, RESULTS, ROLES, ROOT, one_thread, test, test_end, train, validate, worlds_of

from sg_opd.evaluation.results import EvaluationResult, write_json

GROUP = (("num_generations", 8),)
RATES = (2e-4, 5e-4)
CHOSEN = 2e-4  # by OPD's validation, a mean of both worlds and two seeds; a test compares it with the records
RECORDS = ("train.json", "validation.json", "test.json", "conflicts.json")
LONG = 200  # steps of the question about factors
FACTORS = (1.0, 1.8, 2.5, 1.25)
SIZES = {
    "small": Plan(main_seeds=5, other_seeds=3, plane_seeds=1),
    "quick": replace(QUICK, rates=RATES),
}
MAIN = ("opd", "sg-opd", "sg-opd-lite", "r2-opd")
OTHERS = ("opdvr", "grpd", "rg-opd", "opd-sampled", "power-opd", "opd-grpo", "opd-grpo-1", "grpo")
ESTIMATORS = ("opd-sampled", "opd-top-4", "opd-top-16", "opd")
SELVES = ("reader-opd", "reader-lite")
READER = ("reader", "reader-hinted")  # the student that is to teach itself, as it was
BOTH = ("equations", "arithmetic")
RATE, FIRST, FACTOR, OTHER, SIGNAL, RETRY, ESTIMATOR, SELF = (
    "OPD's learning rate",
    "main arms",
    "factors against the initial policy",
    "other arms",
    "sign of the verdict or of the group",
    "main arms at the other rate",
    "estimators",
    "a student that teaches itself",
)


@dataclass(frozen=True)
class Part:
    """Cells that are run seed by seed, so that a part which is cut short has whole comparisons.

    Attributes:
        chosen: whether with the learning rate that OPD chose, or the other one.
        files: records that a run leaves.
    """

    name: str
    cells: tuple[Cell, ...]
    chosen: bool = True
    steps: int | None = None
    files: tuple[str, ...] = ("test.json",)


def factors() -> Iterator[tuple[tuple[str, object], ...]]:
    """The settings of the question about factors: each not gated and gated; with 1 they are the same."""
    for factor in FACTORS:
        for interpolation, signal in ((factor, ()), (1.0, (("gate_signal", "group"),))):
            if factor > 1 or not signal:
                yield (*GROUP, *signal, ("gate_extrapolation", factor), ("gate_interpolation", interpolation))


def parts(plan: Plan) -> list[Part]:
    """What is compared."""

    def cells(arms: Sequence[str], seeds: int) -> tuple[Cell, ...]:
        return tuple(Cell(world, arm, seeds, GROUP) for arm in arms for world in BOTH)

    choice, both = cells(("opd",), plan.choosing_seeds), ("validation.json", "test.json")
    signals = GROUP, (*GROUP, ("gate_signal", "group"))
    turns = {world: tuple(Cell(world, "factors", plan.plane_seeds, at) for at in factors()) for world in BOTH}
    return [
        Part(RATE, choice, files=both),
        Part(RATE, choice, chosen=False, files=both),
        Part(FIRST, cells(MAIN, plan.main_seeds)),
        Part(FACTOR, turns["equations"], steps=LONG),
        Part(OTHER, cells(OTHERS, plan.other_seeds)),
        Part(FACTOR, turns["arithmetic"], steps=LONG),
        Part(SIGNAL, tuple(Cell(w, "sign", plan.other_seeds, signal) for signal in signals for w in BOTH)),
        Part(RETRY, cells(("opd", "sg-opd", "r2-opd"), plan.choosing_seeds), chosen=False),
        Part(ESTIMATOR, cells(ESTIMATORS, plan.main_seeds)),
        Part(SELF, tuple(Cell("arithmetic", arm, plan.other_seeds, GROUP) for arm in SELVES)),
    ]


def order(plan: Plan) -> list[tuple[Part, range]]:
    """The plan's runs, parts with their seeds, the most important first."""
    rate, other_rate, first, factor, other, second_factor, signal, retry, estimator, taught_by_itself = parts(plan)
    every = range(plan.main_seeds)
    return [  # what an earlier line has done is passed over
        *((part, every) for part in (rate, other_rate)),
        (first, range(3)),
        (other, range(1)),
        (signal, range(1)),
        (factor, every),
        *((part, range(seeds)) for part, seeds in ((signal, 2), (other, 2), (retry, 1))),
        *((part, every) for part in (first, other, signal, retry, second_factor, estimator, taught_by_itself)),
    ]


class Family:
    """Runs and records below one folder.

    Args:
        output: the folder.
        scale: of `worlds.SCALES`.
        plan: how large.
    """

    def __init__(self, output: Path, scale: str, plan: Plan) -> None:
        self.output, self.scale, self.plan = output, scale, plan
        self.worlds = worlds_of(scale, output)

    def run(self, part: Part, cell: Cell, seed: int) -> Run:
        """One of a cell's runs."""
        rate = CHOSEN if part.chosen else next(rate for rate in RATES if rate != CHOSEN)
        steps = self.plan.steps or part.steps or self.worlds[cell.world].steps
        return Run(cell.world, cell.arm, cell.changes, rate, seed, steps)

    def results(self, part: Part, cell: Cell, file: str = "test.json") -> dict[int, EvaluationResult]:
        """The cell's results that are there, by seed."""
        return {seed: EvaluationResult.from_json(path / file) for seed, path in self.folders(part, cell).items()}

    def folders(self, part: Part, cell: Cell) -> dict[int, Path]:
        """The folders of the cell's runs that are whole, by seed."""
        found = {seed: self.output / self.run(part, cell, seed).name for seed in range(cell.seeds)}
        files = "train.json", *part.files
        return {seed: folder for seed, folder in found.items() if all((folder / file).is_file() for file in files)}

    def jobs(self) -> Iterator[tuple[str, str, tuple[Path, ...], Callable[..., str], tuple]]:
        """In the plan's order: its part, a name, the files that it leaves, a function and its arguments."""
        given = self.scale, self.plan, self.output
        for world in BOTH:
            for role in (*ROLES, *READER * (world == "arithmetic")):
                folder, files = self.output / world / role, ("test.json", "conflicts.json")[: 1 + (role == "student")]
                yield "", f"{world}/{role}", tuple(folder / f for f in files), end, (world, role, *given)
        for part, seeds in order(self.plan):
            for seed in seeds:
                for run in (self.run(part, cell, seed) for cell in part.cells if seed < cell.seeds):
                    seen = (part.name, part.chosen, seed) == (RATE, True, 0)
                    files = (*part.files, "conflicts.json") if seen else part.files
                    paths = tuple(self.output / run.name / file for file in ("train.json", *files))
                    yield part.name, run.name, paths, finish, (run, files, *given)

    def go(self, workers: int, minutes: float, begin: str = "") -> list[str]:
        """Do what is not there yet, from a part on and round, and begin nothing after so many minutes.

        Returns:
            The names of what failed.
        """
        jobs = list(self.jobs())
        first = next(place for place, job in enumerate(jobs) if job[0] == begin)
        jobs = jobs[first:] + jobs[:first]
        failed: list[str] = []
        start, running = time.perf_counter(), {}
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
            for _, name, files, job, given in jobs:
                if len(running) == workers:
                    failed += ended(running, start)
                if time.perf_counter() - start > 60 * minutes:
                    break
                if name not in running.values() and not all(file.is_file() for file in files):
                    running[pool.submit(job, *given)] = name
            while running:
                failed += ended(running, start)
        return failed


def ended(running: dict[Future[str], str], start: float) -> list[str]:
    """Wait until something ends and take it out; the names of what failed."""
    failed = []
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        name, error = running.pop(future), future.exception()
        if error is not None:
            traceback.print_exception(error)
            failed.append(name)
        line = future.result() if error is None else f"FAILED: {error!r}"
        print(f"  {(time.perf_counter() - start) / 60:.1f} min: {name}: {line}", flush=True)
    return failed


def finish(run: Run, files: Sequence[str], scale: str, plan: Plan, output: Path) -> str:
    """Train a run's student and evaluate it, as far as the records are not there."""
    folder, clock = output / run.name, time.perf_counter()
    if not (folder / "train.json").is_file() or not (folder / "model.safetensors").is_file():
        train(run, scale, plan, output)
    lines = []
    for job, file in ((validate, "validation.json"), (test, "test.json")):
        if file in files and not (folder / file).is_file():
            lines.append(job(run, scale, plan, output))
    if "conflicts.json" in files and not (folder / "conflicts.json").is_file():
        find_conflicts(run.world, str(folder), folder, scale, plan, output)
    return f"{', '.join(lines)}, {time.perf_counter() - clock:.0f} s"


def end(world: str, role: str, scale: str, plan: Plan, output: Path) -> str:
    """One of a world's two models as it was."""
    test_end(world, role, scale, plan, output)
    folder = output / world / role
    if role == "student" and not (folder / "conflicts.json").is_file():
        find_conflicts(world, worlds_of(scale, output)[world].student, folder, scale, plan, output)
    return "as it was"


def find_conflicts(world: str, model: str, folder: Path, scale: str, plan: Plan, output: Path) -> None:
    """Keep where the gate finds conflict in a model's rollouts."""
    rollouts = scored(worlds_of(scale, output)[world], model, min(QUESTIONS, plan.validation_questions or QUESTIONS))
    write_json(folder / "conflicts.json", shares(rollouts))


def pack(output: Path, file: Path) -> int:
    """Put all records, without weights, into one file; how many."""
    records = sorted(path for path in output.rglob("*.json") if path.name in RECORDS)
    with tarfile.open(file, "w:gz") as archive:
        for path in records:
            archive.add(path, path.relative_to(output))
    return len(records)


def unpack(file: Path, output: Path) -> int:
    """Take over the records of a file, but none that is there; how many.

    A run's records stay together: where one is there, the others are left out as well.
    """
    taken = 0
    with tarfile.open(file) as archive:
        by_folder: dict[str, list[tarfile.TarInfo]] = {}
        for member in archive.getmembers():
            by_folder.setdefault(str(Path(member.name).parent), []).append(member)
        for folder, members in by_folder.items():
            if any((output / folder / name).is_file() for name in RECORDS):
                continue
            archive.extractall(output, members, filter="data")
            taken += len(members)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="records; default: runs/family/<small or quick>")
    parser.add_argument("--quick", action="store_true", help="every arm in both worlds, small")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    names = dict.fromkeys(part.name for part in parts(SIZES["small"]))
    parser.add_argument("--begin", choices=("", *names), default="", help="with this part, for a second machine")
    parser.add_argument("--pack", type=Path, default=None, help="put the records into this .tar.gz at the end")
    parser.add_argument("--unpack", type=Path, default=None, help="take over this file's records, train nothing")
    parser.add_argument("--report", action="store_true", help="train nothing, write results from what is there")
    options = parser.parse_args()
    size = "quick" if options.quick else "small"
    family = Family(options.output or ROOT / "runs" / "family" / size, "small", SIZES[size])
    family.output.mkdir(parents=True, exist_ok=True)
    if options.unpack:
        print(f"{unpack(options.unpack, family.output)} records taken over")
        return
    failed = [] if options.report else family.go(options.workers, options.minutes, options.begin)
    if options.pack:
        print(f"{pack(family.output, options.pack)} records in {options.pack}")
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}. Start the same command again to try them again.")
    if not options.pack:
        from family_report import report

        results = family.output if options.quick else RESULTS
        report(family, results, None if options.quick else PAGE)
        print(f"written: {results / 'family.json'} and the plot beside it")


if __name__ == "__main__":
    main()
