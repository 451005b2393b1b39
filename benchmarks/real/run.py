"""The real world: SmolLM2-135M distilled on GSM-Symbolic's word problems, before and after, within given minutes.

    python benchmarks/real/prepare.py                                                 # once, with a network
    python benchmarks/real/run.py --device cuda --data runs/real --minutes 5 --output OUT.json
    python benchmarks/real/run.py --device cpu --minutes 55 --arms opd sg-opd --output runs/real/demo.json  # demo-real
    python benchmarks/real/run.py --device cpu --reuse runs/real/demo.json --seeds 0 1 --output OUT.json    # more arms
    python benchmarks/real/run.py --device cpu --tiny --output OUT.json               # a trial of every part

A teacher and a student are made of the language model; then every arm trains the student for equally many steps, as
many as the minutes allow, once with each seed. What is known is written after each part, so that a run that is ended
keeps what it has. Each arm leaves rollouts with the gate's view of them below DATA/models.
"""

from __future__ import annotations

import time

START = time.perf_counter()  # imports take a tenth of five minutes

import argparse
import gc
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch
import transformers
from real import model, prepare, world
from real.arms import (
    ARMS,
    ESTIMATORS,
    GENERATIONS,
    LORA,
    RATE,
    Arm,
    Pair,
    Size,
    evaluated,
    load,
    run_arm,
    train,
    trainer_of,
)
from real.taught import LEARNING_RATE, ROWS, Lesson, teach

from sg_opd import MathVerifier
from sg_opd.evaluation import provenance
from sg_opd.evaluation.results import installed, read_json, write_json


@dataclass(frozen=True)
class Plan:
    """What is done on a kind of machine.

    Attributes:
        size: of steps and evaluations.
        lessons: of the teacher and of the student.
        rows: of one forward of a lesson.
        most: steps of an arm, at the most.
        templates: whose problems are taught.
    """

    size: Size
    lessons: tuple[Lesson, Lesson]
    rows: int = ROWS
    most: int = 60
    templates: tuple[int, ...] = world.TEMPLATES


GPU = Plan(
    Size(rollouts=256, batch=128, questions=200, unseen=200, at_once=1600),
    (Lesson("teacher", 80.0, 240, 60, 30, 64, seed=1), Lesson("student", 28.0, 60, 12, 4, 64, seed=2)),
)
CPU = Plan(
    Size(rollouts=16, batch=16, questions=28, unseen=8, at_once=128),
    (Lesson("teacher", 70.0, 60, 36, 8, 64, seed=1), Lesson("student", 25.0, 40, 12, 4, 64, seed=2)),
    templates=world.SHORT,
)
TINY = Plan(
    Size(rollouts=16, batch=8, questions=2, unseen=2, at_once=16, length=8),
    (Lesson("teacher", 99.0, 2, 1, 1, 2, seed=1), Lesson("student", 99.0, 1, 1, 1, 2, seed=2)),
    rows=8,
    most=2,
)


class Record:
    """What is known so far, written to a file after each part."""

    def __init__(self, path: Path, device: str, earlier: dict[str, Any] | None) -> None:
        self.path = path
        gpu = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
        packages = ("peft", "accelerate", "datasets", "gguf")
        versions = {name: installed(name) for name in packages}
        about = {**provenance(), "machine": gpu or {"name": f"cpu ({platform.machine()})"}, "packages": versions}
        self.content: dict[str, Any] = earlier or {"about": about, "seconds": {}, "arms": []}
        if earlier is not None:  # the arms that are added may be of another commit
            self.content.setdefault("continued", []).append({**about, "from_arm": len(earlier["arms"])})

    def add(self, part: str, value: Any) -> None:
        """Keep a part, and when it was known."""
        if part == "arm":
            self.content["arms"].append(value)
            part = f"arm {value['title']}, seed {value['seed']}"
        else:
            self.content[part] = value
        self.content["seconds"][part] = round(time.perf_counter() - START, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, plain(self.content))
        print(f"[{self.content['seconds'][part]:6.1f} s] {part}", flush=True)


def plain(value: Any) -> Any:
    """`value` with `None` for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def made_world(data: Path, tiny: bool, templates: tuple[int, ...]) -> tuple[world.World, Path]:
    """The problems of some templates and the base model below `data`, the latter made where it is not there yet."""
    if tiny:
        world.write_stand_in(data / "problems")
        problems = world.World(data / "problems")
        texts = [row["question"] + row["worked"] for rows in problems.rows.values() for row in rows]
        return problems, model.make_tiny(data / "base", texts)
    prepare.use_site(data)
    file = next(data.rglob("test.jsonl"), data / "problems" / "test.jsonl")
    problems = world.World(file.parent, templates)
    return problems, model.make_base(data)


def affordable(record: Record, pair: Pair, plan: Plan, arms: list[Arm], runs: int, where: tuple, spare: float) -> int:
    """How many steps each arm can have until the deadline, by the second step of a trial of the last arm.

    Args:
        record: gets what was found.
        pair: whom to train.
        plan: how large.
        arms: of which the last one, which costs the most, is tried.
        runs: between which the time is divided.
        where: whether on the CPU, the output folder, the deadline.
        spare: seconds an arm needs besides its steps.
    """
    on_cpu, output, deadline = where
    trial = trainer_of(pair, arms[-1], plan.size, 2, 0, on_cpu, output / "trial")
    step = train(trial)["step_seconds"][-1]
    left = deadline - time.perf_counter() - 10  # to end in time
    steps = max(2, min(plan.most, int((left / runs - spare) / step)))
    record.add("trial", {"seconds_a_step": step, "seconds_left": left, "steps": steps})
    return steps


def run(args: argparse.Namespace, data: Path) -> None:
    """All parts, in order; of an earlier result, only the arms that it lacks."""
    plan = TINY if args.tiny else GPU if args.device == "cuda" else CPU
    plan = replace(plan, size=replace(plan.size, learning_rate=args.learning_rate))
    earlier = read_json(args.reuse) if args.reuse else None
    known = None if earlier is None else args.steps or steps_of(earlier, args.reuse)
    on_cpu, record = args.device == "cpu", Record(args.output, args.device, earlier)
    output, size, verifier = data / "models" / args.device, plan.size, MathVerifier()
    arms = [arm for arm in (*ARMS, *ESTIMATORS) if arm.name in args.arms]
    problems, base = made_world(data, args.tiny, plan.templates)
    pair = Pair(output / "student", output / "teacher", problems)
    runs = [(arm, seed) for seed in args.seeds for arm in arms]  # a run that is ended has whole comparisons
    if earlier is None:
        steps = prepared(args, plan, record, base, pair, runs, verifier)
    else:
        had = {(done["title"], done["seed"]) for done in earlier["arms"]}
        runs = [(arm, seed) for arm, seed in runs if (arm.title, seed) not in had]
        steps = known
    for arm, seed in runs:
        free()
        folder = output / f"{arm.name}-{seed}"
        record.add("arm", run_arm(pair, arm, size, steps, seed, on_cpu, folder, verifier))
        print(f"the gate on its rollouts: {folder / 'gate_samples.html'}")
    print(table(record.content))


def steps_of(earlier: dict[str, Any], path: Path) -> int:
    """How many steps the arms of an earlier result had, which further ones get too."""
    if not earlier["arms"]:
        raise SystemExit(f"{path} has no arm yet, whose number of steps further ones would get: state it by --steps.")
    return earlier["arms"][0]["steps"]


def prepared(
    args: argparse.Namespace,
    plan: Plan,
    record: Record,
    base: Path,
    pair: Pair,
    runs: list[tuple[Arm, int]],
    verifier: MathVerifier,
) -> int:
    """Teach teacher and student, evaluate both, and find out how many steps each run can have."""
    on_cpu, size, deadline = args.device == "cpu", plan.size, START + 60 * args.minutes
    about = {"lora": LORA, "generations": GENERATIONS, "sft_learning_rate": LEARNING_RATE}
    record.add("plan", {**asdict(plan), **about})
    record.add("world", {"templates": plan.templates, "unseen": world.UNSEEN, "largest_number": world.LARGEST})
    folders = {"teacher": pair.teacher, "student": pair.student}
    for lesson in plan.lessons:
        lengths = size.length, on_cpu, plan.rows
        record.add(f"lesson {lesson.name}", teach(base, pair.world, lesson, folders[lesson.name], *lengths))
        free()
    before, spare = {}, 0.0
    for name, folder in folders.items():
        since = time.perf_counter()
        before[name] = evaluated(*load(folder, on_cpu), pair.world, size, verifier)
        spare = time.perf_counter() - since + 8  # for a trainer's loading and merging
        record.add("before", before)
    free()
    if args.steps:
        return args.steps
    where = on_cpu, pair.student.parent, deadline
    return affordable(record, pair, plan, [arm for arm, _ in runs], len(runs), where, spare)


def free() -> None:
    """Give back what a trainer held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(content: dict[str, Any]) -> str:
    """avg@8 and pass@4 of both ends and every arm, on both test sets."""
    arms = ((f"{arm['title']}, {arm['seed']}", arm["after"]) for arm in content["arms"])
    rows = [*content["before"].items(), *arms]
    lines = [f"{'':14}{'test avg@8':>20}{'pass@4':>8}{'unseen avg@8':>22}{'pass@4':>8}"]
    for title, sets in rows:
        cells = []
        for name in ("test", "unseen"):
            average, passed = (sets[name]["figures"][figure] for figure in ("avg@8", "pass@4"))
            cells += [
                f"{average['mean']:.1f} [{average['low'] or 0:.1f}, {average['high'] or 0:.1f}]",
                f"{passed['mean']:.1f}",
            ]
        lines.append(f"{title:14}{cells[0]:>20}{cells[1]:>8}{cells[2]:>22}{cells[3]:>8}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--data", type=Path, default=prepare.DATA, help="what prepare.py made; models are kept there too"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything, teacher included; default 5")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--tiny", action="store_true", help="a random model and two steps, in a folder of its own")
    parser.add_argument("--steps", type=int, help="of every arm; default: as many as the minutes allow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="every arm is trained with each; default: 0")
    parser.add_argument("--learning-rate", type=float, default=RATE, help=f"of LoRA; default {RATE:g}")
    presets, others = ([arm.name for arm in arms] for arms in (ARMS, ESTIMATORS))
    parser.add_argument("--arms", nargs="+", choices=presets + others, default=presets, help="default: the presets")
    parser.add_argument("--reuse", type=Path, metavar="RESULT", help="an earlier result, which gets further arms")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("run.py needs a CUDA device, and torch sees none; --device cpu does without.")
    transformers.utils.logging.disable_progress_bar()
    if not args.tiny:
        print(f"This takes about {args.minutes:g} minutes: a teacher and a student are taught first.", flush=True)
        return run(args, args.data)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
