"""What a step costs: SGOPDTrainer beside TRL's DistillationTrainer and GRPOTrainer, and beside the floor.

    python benchmarks/cost.py                  # all sizes, about half an hour on two CPU cores
    python benchmarks/cost.py --quick          # tiny sizes, two repetitions: only tries the script
    python benchmarks/cost.py --device cuda    # the same on a GPU, in bf16

All trainers step in turn on the same models, prompts and completions, in one process: figures are medians over
repetitions, ratios those of one repetition. Writes benchmarks/results/cost.json and the tables of docs/cost.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from cost_report import page_of
from floor import Floor, floor_seconds, heads_alone, loss_memory, memory_slope
from grading import grading
from steps import Size, Step, Variant
from targets import targets_of

from sg_opd.evaluation.results import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "cost.md"
BASE = Size("base")
SIZES = (
    BASE,
    replace(BASE, name="256 tokens", tokens=256),
    replace(BASE, name="1,024 tokens, smaller models", tokens=1024, student=(2, 128), teacher=(4, 192)),
    replace(BASE, name="vocabulary 152k", vocab=151_936),
    replace(BASE, name="32 completions", batch=32),
    replace(BASE, name="teacher as large", teacher=(4, 256)),
    replace(BASE, name="teacher 8 times", teacher=(8, 512)),
    replace(BASE, name="deeper", student=(8, 512), teacher=(8, 512)),
    replace(BASE, name="8 rollouts a prompt", generations=8),
)
NO_PHASE = {"teacher_phase_steps": 0}  # what the phase costs is measured by itself
MAIN = (
    Variant("sampled", settings=NO_PHASE),
    Variant("full", settings={"estimator": "full", **NO_PHASE}),
    Variant("distillation", trainer="distillation"),
    Variant("grpo", trainer="grpo"),
)
PRESET_VARIANTS = tuple(
    Variant(f"{preset}, {estimator}", settings={"preset": preset, "estimator": estimator, **NO_PHASE})
    for preset in ("opd", "exopd", "opdvr")
    for estimator in ("sampled", "full")
)
BESIDE = (*PRESET_VARIANTS, Variant("sampled, teacher_offload", settings={"teacher_offload": True, **NO_PHASE}))
SWEEP = {"tokens": (4096, 8192), "vocabularies": (32_768, 65_536, 98_304), "hidden": 8}
QUICK_SIZES = tuple(
    Size(name, vocab=512, student=(1, 64), teacher=(1, 64), prompt=8, tokens=8) for name in ("base", "vocabulary 152k")
)
QUICK_SWEEP = {"tokens": (16, 32), "vocabularies": (64, 128), "hidden": 8}
IMPORTS = 10


def measure(size: Size, variants: Sequence[Variant], repetitions: int, device: str) -> dict[str, Any]:
    """One size: each variant's seconds by phase and memory, and the plain models' seconds, by repetition."""
    bf16 = device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        steps = {v.name: Step(size, v, device, Path(folder), bf16) for v in variants}
        floor = Floor(size, device, bf16)
        names = list(steps)
        seconds: dict[str, list] = {name: [] for name in [*names, "plain"]}
        for repetition in range(repetitions + 1):  # the first one warms up
            for turn in range(len(names)):  # another one first each time
                name = names[(turn + repetition) % len(names)]
                seconds[name].append(steps[name].once())
            seconds["plain"].append(floor.once())
        return {
            "size": asdict(size),
            "seconds": {name: some[1:] for name, some in seconds.items()},
            "memory": {name: step.memory() for name, step in steps.items()},
            "flops": floor.flops(),
            "generate": generation(steps, variants, size),
        }


def generation(steps: dict[str, Step], variants: Sequence[Variant], size: Size) -> dict[str, float]:
    """Seconds of one generation by each trainer, at sizes where that is quick."""
    if size.batch * size.tokens > BASE.batch * BASE.tokens:
        return {}
    found = {}
    for variant in variants:
        steps[variant.name].trainer.generates = True
        found[variant.name] = steps[variant.name].once()["generate"]
        steps[variant.name].trainer.generates = False
    return found


def without_generation(seconds: dict[str, float]) -> float:
    return sum(value for name, value in seconds.items() if name != "generate")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": round(float(median), 5), "q25": round(float(low), 5), "q75": round(float(high), 5)}


def row_of(raw: dict[str, Any]) -> dict[str, Any]:
    """A size's figures: seconds by phase, ratios of the same repetition, bytes, shares."""
    seconds, counts = raw["seconds"], raw["flops"]
    step = {name: np.array([without_generation(s) for s in some]) for name, some in seconds.items() if name != "plain"}
    plain = seconds["plain"]
    teacher = np.array([s["teacher"] for s in plain])
    scored = np.array([s["score teacher"] for s in seconds["sampled"]])
    ratios = {
        "sampled_vs_floor": step["sampled"] / [floor_seconds(s, counts, recomputed=False) for s in plain],
        "sampled_vs_chunked_floor": step["sampled"] / [floor_seconds(s, counts, recomputed=True) for s in plain],
        "sampled_vs_plain": step["sampled"] / [sum(s.values()) for s in plain],
        "sampled_vs_distillation": step["sampled"] / step["distillation"],
        "full_vs_distillation": step["full"] / step["distillation"],
        "gate_share": np.array([s["gate"] for s in seconds["sampled"]]) / step["sampled"],
        "gate_share, full": np.array([s["gate"] for s in seconds["full"]]) / step["full"],
        "teacher_forward_vs_plain": scored / teacher,
    }
    if "grpo" in step:
        ratios["sampled_vs_grpo_plus_teacher"] = step["sampled"] / (step["grpo"] + scored)
    total = {name: memory["resident"] + memory["peak"] for name, memory in raw["memory"].items()}
    return {
        "size": raw["size"],
        "repetitions": len(plain),
        "heads_share": round(counts["heads"] / (counts["student"] + counts["teacher"]), 3),
        "flops": counts,
        "step_seconds": {name: spread(values) for name, values in step.items()},
        "phase_seconds": {
            name: {phase: round(float(np.median([s[phase] for s in some])), 5) for phase in some[0]}
            for name, some in seconds.items()
        },
        "generate_seconds": raw["generate"],
        "ratios": {name: spread(values) for name, values in ratios.items()},
        "memory_bytes": {name: {**raw["memory"][name], "total": total[name]} for name in total},
        "memory_vs_distillation": {name: round(total[name] / total["distillation"], 4) for name in total},
    }


def phase_cost(device: str, size: Size) -> dict[str, float]:
    """The teacher's generations in a step within its phase and in one after it, and the seconds of the mixing."""
    variant = Variant("phase", settings={"teacher_phase_steps": 2, "teacher_phase_fraction": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        step = Step(size, variant, device, Path(folder))
        trainer, calls = step.trainer, []
        propose = trainer.teacher.propose
        trainer.teacher.propose = lambda ids, candidates=1: calls.append(len(ids)) or propose(ids, candidates)
        step.clock.wrap(trainer, "_mix", "generate")
        found = {}
        for name, at in (("within", 0), ("after", 2)):
            trainer.state.global_step, calls[:] = at, []
            took = step.once()["generate"]
            found |= {f"{name}_generations": len(calls), f"{name}_rows": sum(calls), f"{name}_seconds": round(took, 6)}
        return found


def import_seconds() -> dict[str, float]:
    """Seconds that `import sg_opd` and its verifier add to a Python process, and whether that brings torch in."""

    def took(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    lines = {"package": "import sg_opd", "verifier": "from sg_opd import MathVerifier"}
    found: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(IMPORTS):
        nothing = took("pass")
        for name, line in lines.items():
            found[name].append(took(line) - nothing)
    check = f"import sys; {lines['verifier']}; sys.exit('torch' in sys.modules)"
    torch_free = subprocess.run([sys.executable, "-c", check]).returncode == 0
    return {**{name: round(float(np.median(some)), 4) for name, some in found.items()}, "without_torch": torch_free}


def ranks(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The base size, this script's main variants, on `count` processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rank0.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*command, __file__, "--rank_output", str(output), "--device", options.device]
        command += ["--repetitions", str(options.repetitions)] + ["--quick"] * options.quick
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment)
        return json.loads(output.read_text())


def on_a_rank(options: argparse.Namespace) -> None:
    """What `ranks` starts: every process steps, the first one writes."""
    raw = measure(sizes(options)[0], MAIN, options.repetitions, options.device)
    if int(os.environ["RANK"]) == 0:
        write_json(options.rank_output, row_of(raw))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sizes(options: argparse.Namespace) -> tuple[Size, ...]:
    return QUICK_SIZES if options.quick else SIZES


def one_size(size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """A size's figures, with where they come from: a size may be measured anew."""
    start = time.perf_counter()
    variants = MAIN + (BESIDE if size.name == BASE.name else ())
    row = row_of(measure(size, variants, options.repetitions, options.device))
    print(f"{size.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {**row, "provenance": provenance()}


def everything(options: argparse.Namespace) -> dict[str, Any]:
    """All of cost.json but the targets."""
    content: dict[str, Any] = {"provenance": provenance(), "threads": torch.get_num_threads(), "rows": []}
    for size in sizes(options):
        content["rows"].append(one_size(size, options))
    content["heads_alone"] = heads_alone(sizes(options)[0], options.device, options.repetitions)
    sweep = QUICK_SWEEP if options.quick else SWEEP
    content["loss_memory"] = [
        row for estimator in ("sampled", "full") for row in loss_memory(estimator, **sweep, device=options.device)
    ]
    content["loss_memory_slope"] = {
        estimator: memory_slope([row for row in content["loss_memory"] if row["estimator"] == estimator])
        for estimator in ("sampled", "full")
    }
    content["phase"] = phase_cost(options.device, sizes(options)[0])
    content["grading"] = grading(50 if options.quick else 2000, options.repetitions)
    content["import"] = import_seconds()
    counts = [1, 2] if options.device == "cpu" else [n for n in (1, 2) if n <= torch.cuda.device_count()]
    content["ranks"] = {str(count): ranks(count, options) for count in counts}
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=None, help="default: 10")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two repetitions: only tries the script")
    parser.add_argument("--output", type=Path, default=None, help="default: below benchmarks/results")
    parser.add_argument("--sizes", nargs="+", choices=[size.name for size in SIZES], help="measure these anew, only")
    parser.add_argument("--report", action="store_true", help="measure nothing, judge and write what is there")
    parser.add_argument("--rank_output", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.repetitions = options.repetitions or (2 if options.quick else 10)
    if options.rank_output is not None:
        on_a_rank(options)
        return
    if options.output is None and options.quick:
        sys.exit("--quick says nothing about cost: give --output, so that it does not take the place of real results.")
    output = options.output or RESULTS / ("cost.json" if options.device == "cpu" else "cost_cuda.json")
    if options.report or options.sizes:
        content = json.loads(output.read_text())
        for index, size in enumerate(SIZES):
            if size.name in (options.sizes or ()):
                content["rows"][index] = one_size(size, options)
    else:
        content = everything(options)
    content["targets"] = targets_of(content)
    write_json(output, content)
    for target in content["targets"]:
        print(f"{target['name']}: {target['measured']:.4g} (target {target['target']}): {target['met']}")
    if options.output is None and options.device == "cpu":
        quantised = json.loads((RESULTS / "quantised_teacher.json").read_text())
        PAGE.write_text(page_of(PAGE.read_text(), content, quantised))


if __name__ == "__main__":
    main()
