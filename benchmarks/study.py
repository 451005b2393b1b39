"""The study: what the gate and the teacher phase contribute, arm by arm, in two synthetic worlds.

    python benchmarks/study.py                  # all of it, about six hours on two CPU cores; resumable
    python benchmarks/study.py --quick          # every arm and both worlds, small, in 10 minutes
    python benchmarks/study.py --scale large    # longer chains, models of tens of millions of parameters: one GPU

Every run writes its record below `--output` as soon as it ends, and a run that is there is not done again: stop the
study when you like and start it again with the same command. Of a world's learning rates an arm takes the one whose
runs with the first two seeds do best on the validation split; the test split is seen once, by the chosen runs. At the
end `study.json` and the plots are written from the records (`--report` does only that).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from arms import ARMS, FAMILY, budget, load, trainer_of, verifier
from design import PLANS, QUICK, Cell, Plan, Run, groups
from transformers import PrinterCallback
from worlds import SCALES

from sg_opd.evaluation.evaluator import evaluate_model
from sg_opd.evaluation.results import EvaluationResult, provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
SAMPLES = 8  # completions a test question
AVERAGE = f"avg@{SAMPLES}"
ROLES = ("student", "teacher")
JOBS = {"train": "train.json", "validate": "validation.json", "test": "test.json"}  # what each leaves when done
KEPT = ("verdict/correct", "entropy", "gate/", "delta/", "teacher/", "completions/", "reward", "grad_norm", "loss")


class Study:
    """Runs and records below one folder.

    Args:
        output: the folder.
        scale: of `worlds.SCALES`.
        plan: how large.
        workers: processes, of one thread each.
    """

    def __init__(self, output: Path, scale: str, plan: Plan, workers: int) -> None:
        self.output, self.scale, self.plan, self.workers = output, scale, plan, workers
        self.worlds = worlds_of(scale, output)

    def path(self, run: Run, job: Callable) -> Path:
        """The file that a job leaves when it is done."""
        return self.output / run.name / JOBS[job.__name__]

    def run(self, cell: Cell, learning_rate: float, seed: int) -> Run:
        """One of a cell's runs."""
        steps = self.plan.steps or self.worlds[cell.world].steps
        return Run(cell.world, cell.arm, cell.changes, learning_rate, seed, steps)

    def rates(self, cell: Cell) -> tuple[float, ...]:
        """The learning rates between which a cell chooses."""
        return self.plan.rates or self.worlds[cell.world].rates

    def choosing(self, cell: Cell) -> dict[float, list[Run]]:
        """By learning rate, the runs between which a cell chooses."""
        seeds = range(cell.choosing)
        return {rate: [self.run(cell, rate, seed) for seed in seeds] for rate in self.rates(cell)}

    def validation(self, cell: Cell) -> dict[float, float]:
        """By learning rate, avg@k on the validation split, a mean over the first seeds."""
        if cell.rate_of is not None:
            return self.validation(cell.rate_of)

        def average(run: Run) -> float:
            return EvaluationResult.from_json(self.path(run, validate)).figures[AVERAGE].mean

        return {rate: statistics.fmean(map(average, runs)) for rate, runs in self.choosing(cell).items()}

    def rate(self, cell: Cell) -> float:
        """The learning rate that did best on the validation split."""
        figures = self.validation(cell)
        return max(figures, key=figures.__getitem__)

    def test_files(self, cell: Cell) -> list[Path]:
        """The test results of a cell that are there, by seed; none before its learning rate is chosen."""
        if not self._choosable(cell):
            return []
        return [path for run in self.chosen(cell) if (path := self.path(run, test)).is_file()]

    def title(self, cell: Cell) -> str:
        """The arm's, as tables and plots name it."""
        return ARMS[cell.arm].title

    def ends(self, world: str) -> dict[str, EvaluationResult]:
        """The test results of the student before and of the teacher, by role."""
        files = {role: self.output / world / role / JOBS["test"] for role in ROLES}
        return {role: EvaluationResult.from_json(file) for role, file in files.items() if file.is_file()}

    def chosen(self, cell: Cell) -> list[Run]:
        """The cell's runs with its learning rate, by seed."""
        rate = self.rate(cell)
        return [self.run(cell, rate, seed) for seed in range(cell.seeds)]

    def go(self, only: str | None = None) -> list[str]:
        """Do what is not there yet, in the groups whose name contains `only`; the names of runs that failed."""
        failed: list[str] = []
        for world in self.worlds.values():
            world.make_models()
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
            ends = [
                pool.submit(test_end, world, role, self.scale, self.plan, self.output)
                for world in self.worlds
                for role in ROLES
            ]
            for name, cells in groups(self.plan, list(self.worlds)):
                if only and only not in name:
                    continue
                print(f"# {name}", flush=True)
                choosing = [self.choosing(cell) for cell in cells if cell.rate_of is None]
                first = [run for by_rate in choosing for runs in by_rate.values() for run in runs]
                failed += self._all(pool, train, first)
                failed += self._all(pool, validate, first, after=train)
                runs = [run for cell in cells if self._choosable(cell) for run in self.chosen(cell)]
                failed += self._all(pool, train, runs)
                failed += self._all(pool, test, runs, after=train)
            for end in ends:
                end.result()
        return failed

    def _choosable(self, cell: Cell) -> bool:
        try:
            self.rate(cell)
        except FileNotFoundError as missing:
            print(f"  left out for now: {cell.world}/{cell.arm} ({missing.filename} is not there)", flush=True)
            return False
        return True

    def _all(
        self, pool: ProcessPoolExecutor, job: Callable, runs: list[Run], after: Callable | None = None
    ) -> list[str]:
        """Do a job for the runs that lack it, and have been through the job `after`; the names of those that failed."""
        todo = [run for run in dict.fromkeys(runs) if not self.path(run, job).is_file()]
        todo = [run for run in todo if after is None or self.path(run, after).is_file()]
        futures = {pool.submit(job, run, self.scale, self.plan, self.output): run for run in todo}
        failed, start = [], time.perf_counter()
        for count, future in enumerate(as_completed(futures), 1):
            run, error = futures[future], future.exception()
            if error is not None:
                traceback.print_exception(error)
                failed.append(run.name)
            line = future.result() if error is None else f"FAILED: {error!r}"
            minutes = (time.perf_counter() - start) / 60
            print(f"  {job.__name__} {count}/{len(todo)} after {minutes:.1f} min: {run.name}: {line}", flush=True)
        return failed


def one_thread() -> None:
    """The processes share the cores: one thread each."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def worlds_of(scale: str, output: Path) -> dict[str, Any]:
    """The worlds of a scale, by name; models that are yet to be made lie below `output`."""
    return {world.name: world for world in SCALES[scale](output)}


def train(run: Run, scale: str, plan: Plan, output: Path) -> str:
    """Train the run's student; its weights are kept, and a record of how the training went."""
    world, arm, folder = worlds_of(scale, output)[run.world], (ARMS | FAMILY)[run.arm], output / run.name
    clock, cpu = time.perf_counter(), time.process_time()
    trainer = trainer_of(world, arm, dict(run.changes), run.steps, run.learning_rate, run.seed, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
    history = [
        {name: value for name, value in entry.items() if name == "step" or name.startswith(KEPT)}
        for entry in trainer.state.log_history
    ]
    trainer.model.save_pretrained(folder)
    record = {
        "run": asdict(run) | {"changes": dict(run.changes)},
        **seconds,
        **budget(arm, trainer, history),
        "history": history,
        "provenance": provenance(),
    }
    write_json(folder / "train.json", record)
    return f"{seconds['seconds']:.0f} s"


def validate(run: Run, scale: str, plan: Plan, output: Path) -> str:
    """The run's student on the validation split, which chooses the learning rate."""
    world, folder = worlds_of(scale, output)[run.world], output / run.name
    return measured(str(folder), world, "validation", plan.validation_questions, run.seed, folder)


def test(run: Run, scale: str, plan: Plan, output: Path) -> str:
    """The run's student on the test split."""
    world, folder = worlds_of(scale, output)[run.world], output / run.name
    return measured(str(folder), world, "test", plan.test_questions, run.seed, folder)


def test_end(world: str, role: str, scale: str, plan: Plan, output: Path) -> None:
    """One of a world's models as it was, on the test split; `reader-hinted` has the worked solution before its eyes."""
    folder, place = output / world / role, worlds_of(scale, output)[world]
    name, _, hinted = role.partition("-")
    if not (folder / JOBS["test"]).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        measured(getattr(place, name), place, "test", plan.test_questions, 0, folder, bool(hinted))


def measured(
    model: str, world: Any, split: str, count: int | None, seed: int, folder: Path, hinted: bool = False
) -> str:
    """Evaluate the model of a folder on one split, and keep the result; the figures in a line."""
    questions = world.split(split, count, hinted)
    if hinted:
        questions = questions.remove_columns("prompt").rename_column("teacher_prompt", "prompt")
    result = evaluate_model(
        load(model)[0],
        load(world.student)[1],
        questions,
        verifier(),
        SAMPLES,
        world.max_completion_length,
        batch_size=400,
        seed=seed,
        progress=False,
    )
    result.to_json(folder / f"{split}.json")
    return f"{AVERAGE} {result.figures[AVERAGE].mean:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="records; default: runs/study/<scale or 'quick'>")
    parser.add_argument("--scale", choices=("small", "large", "tiny"), default="small")
    parser.add_argument("--quick", action="store_true", help="every arm in both worlds, small, in 10 minutes")
    parser.add_argument("--only", default=None, help="only groups whose name contains this")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing, write results from what is there")
    options = parser.parse_args()
    output = options.output or ROOT / "runs" / "study" / ("quick" if options.quick else options.scale)
    plan = QUICK if options.quick else PLANS[options.scale]
    study = Study(output, options.scale, plan, options.workers)
    failed = [] if options.report else study.go(options.only)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}. Start the same command again to try them again.")
    if not options.only:
        from report import report

        whole = plan == PLANS["small"] and options.scale == "small"
        results = RESULTS if whole else output
        report(study, dict(groups(plan, list(study.worlds))), results, PAGE if whole else None)
        print(f"written: {results / 'study.json'} and the plots beside it")


if __name__ == "__main__":
    main()
