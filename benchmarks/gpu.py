"""One command for a GPU: does training agree with the CPU, what does a step cost and hold, what does a model learn?

    python benchmarks/gpu.py                                             # needs a GPU; writes benchmarks/results/gpu
    python benchmarks/gpu.py --device cpu --tiny --output X              # a dry run of the same code, in a minute
    python benchmarks/gpu.py --judge                                     # measures nothing, judges what is there

Each part is a process with a time limit, and its JSON is written after each case: what was measured before a failure or
a limit stays. No network is needed; benchmarks/gpu_bundle.py makes the wheels for a machine without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_targets import agreement, targets_of, without

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / folder) for folder in ("examples", "examples/arithmetic")]
RESULTS, REAL = ROOT / "benchmarks" / "results" / "gpu", ROOT / "benchmarks" / "real" / "run.py"
PARTS = {"agreement": 200, "cost": 240, "memory": 120, "real": 330}  # seconds each may take, imports included
REAL_MINUTES, REAL_REST = 4, 60  # of training and evaluation; seconds to load, and to write
REFERENCE = "reference"  # the CPU's side of the agreement, at the same time
THREADS = str(max(1, min(4, (os.cpu_count() or 1) // 4)))  # of each process: two run at a time, others import
LEAST = 20  # seconds, below which no part is begun


class Worker:
    """A part in a process of its own: it imports at once, and measures when told to go."""

    def __init__(self, part: str, options: argparse.Namespace) -> None:
        self.part = part
        command = [sys.executable, __file__, "--worker", part, "--device", options.device]
        command += ["--output", str(options.output), "--commit", options.commit or ""] + ["--tiny"] * options.tiny
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_NUM_THREADS", THREADS)
        if part == REFERENCE:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.log = options.output / f"{part}.log"
        with self.log.open("w") as log:
            both = {"stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True, **both)

    def go(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.close()
        except BrokenPipeError:  # it ended as it was importing; `finish` tells
            pass

    def finish(self, until: float) -> str:
        """Wait for it, and stop it at `until`; in words, how it ended."""
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "stopped at its time limit"
        return ending(code, self.log)


def ending(code: int, log: Path) -> str:
    """How a process ended, in words; of one that failed with the last it said."""
    if code == 0:
        return "finished"
    return f"ended with exit code {code}: {' | '.join(log.read_text(errors='replace').splitlines()[-3:])}"


def about(commit: str | None) -> dict[str, Any]:
    """Device, driver, versions and commit."""
    import torch

    from sg_opd.evaluation.results import installed, provenance

    found = provenance()
    found["commit"] = commit or found["commit"]
    found["versions"] |= {name: installed(name) for name in ("triton", "accelerate", "peft", "datasets")}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            found["driver"] = f"unknown: {error}"
        found |= {"cuda": torch.version.cuda, "gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a process may be killed as it writes."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def work(part: str, options: argparse.Namespace) -> None:
    """What a `Worker` runs: the cases of a part one after another, written after each."""
    import gpu_agreement
    import gpu_cost
    import torch

    all_cases = {"agreement": gpu_agreement.agreement_cases, REFERENCE: gpu_agreement.reference_cases}
    all_cases |= {"cost": gpu_cost.cost_cases, "memory": gpu_cost.memory_cases}
    if options.device == "cuda" and not torch.cuda.is_available() and part != REFERENCE:
        raise SystemExit("gpu.py needs a CUDA device, and torch sees none. A dry run: --device cpu --tiny --output X")
    if sys.stdin.readline() != "go\n":
        return  # whoever started it is gone
    content: dict[str, Any] = {"about": about(options.commit) | {"tiny": options.tiny}, "cases": {}}
    if options.device == "cpu":
        content["about"]["device"] = "cpu, a dry run"
    for name, measure in all_cases[part](options.device, options.tiny):
        start = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # the other cases can still be measured
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        content["cases"][name] = {**found, "case_seconds": round(time.perf_counter() - start, 2)}
        write(options.output / f"{part}.json", content)
        del found
        gc.collect()
        if options.device == "cuda" and part != REFERENCE:
            torch.cuda.empty_cache()


def real(options: argparse.Namespace, seconds: float) -> str:
    """The part that trains a real model on word problems, as benchmarks/real does it."""
    if not REAL.exists():
        return f"skipped: there is no {REAL.relative_to(ROOT)}"
    if options.data is None and not options.tiny:
        return "skipped: --data names no folder with its model and problems"
    command = [sys.executable, str(REAL), "--device", options.device]
    command += ["--tiny"] if options.tiny else ["--data", str(options.data.resolve())]
    minutes = min(REAL_MINUTES, (seconds - REAL_REST) / 60)
    if minutes < 1:
        return f"not begun: {seconds:.0f} s are left"
    command += ["--minutes", f"{minutes:.2f}", "--output", str(options.output / "real.json")]
    with (options.output / "real.log").open("w") as log:
        both = {"stdout": log, "stderr": subprocess.STDOUT}
        try:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            code = subprocess.run(command, env=environment, timeout=seconds, **both).returncode
        except subprocess.TimeoutExpired:
            return "stopped at its time limit"
    return ending(code, options.output / "real.log")


def remarks_of(folder: Path) -> list[dict[str, Any]]:
    """Figures of a folder that are no results: part, case, names, and why; `remarks.json` is written by hand."""
    path = folder / "remarks.json"
    return json.loads(path.read_text()) if path.exists() else []


def judge(folder: Path) -> dict[str, Any]:
    """What the JSON in a folder says of the targets, without what its remarks call invalid."""
    remarks = remarks_of(folder)

    def cases(part: str) -> dict[str, Any]:
        path = folder / f"{part}.json"
        found = json.loads(path.read_text())["cases"] if path.exists() else {}
        return without(found, [remark for remark in remarks if remark["part"] == part])

    return {
        "agrees": agreement(cases("agreement"), cases(REFERENCE)),
        "targets": targets_of(cases("cost") | cases("memory")),
        "not judged": remarks,
        "failed": {
            f"{part}: {name}": case["error"]
            for part in ("agreement", REFERENCE, "cost", "memory")
            for name, case in cases(part).items()
            if "error" in case
        },
    }


def measure(options: argparse.Namespace) -> dict[str, str]:
    """Run the parts in order; how each ended. Remarks on what they measured before go."""
    if remarks := remarks_of(options.output):
        left = [remark for remark in remarks if remark["part"] not in options.parts]
        (options.output / "remarks.json").write_text(json.dumps(left, indent=1) + "\n")
    end = time.monotonic() + options.limit
    names = [part for part in options.parts if part != "real"]
    names += [REFERENCE] * ("agreement" in names)
    workers = {part: Worker(part, options) for part in names}
    ended = {}
    try:
        for part in options.parts:
            start = time.monotonic()
            until = end if options.device == "cpu" else min(start + PARTS[part], end)
            if until - start < LEAST:
                ended[part] = "not begun: the time was up"
            elif part == "real":
                ended[part] = real(options, until - start)
            else:
                of_part = [part] + [REFERENCE] * (part == "agreement")
                for name in of_part:
                    workers[name].go()
                ended |= {name: workers[name].finish(until) for name in of_part}
            print(f"{part}: {ended[part]}, {time.monotonic() - start:.0f} s", flush=True)
    finally:
        for worker in workers.values():
            if worker.process.poll() is None:
                worker.process.kill()
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order; default: all")
    parser.add_argument("--limit", type=float, default=720, help="seconds in all; default: 720")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps: only tries the program")
    parser.add_argument("--data", type=Path, help="folder of benchmarks/real with its model and problems")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    parser.add_argument("--output", type=Path, help="folder; default on a GPU: benchmarks/results/gpu")
    parser.add_argument("--judge", action="store_true", help="measure nothing, judge what is there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options)
    options.parts = [part for part in PARTS if part in options.parts.split(",")]
    if options.output is None and (options.tiny or options.device == "cpu"):
        raise SystemExit("A dry run is no result: say with --output where it may be written.")
    options.output = (options.output or RESULTS).resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    ended = {} if options.judge else measure(options)
    if ended:
        write(options.output / "parts.json", ended)
    found = judge(options.output)
    write(options.output / "judged.json", found)
    for remark in found["not judged"]:
        print(f"not judged: {remark['case']}: {', '.join(remark['figures'])}: {remark['why']}")
    for target in found["targets"]:
        print(f"{target['name']}: {target['measured']:.4g} (target {target['target']}): {target['met']}")
    print(f"agree: {sum(found['agrees'].values())} of {len(found['agrees'])} cases")
    for name in [name for name, agrees in found["agrees"].items() if not agrees]:
        print(f"does not agree: {name}")
    for name, error in found["failed"].items():
        print(f"failed: {name}: {error[:300]}")
    whole = all(how == "finished" or how.startswith("skipped") for how in ended.values())
    if not whole or not all(found["agrees"].values()) or found["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
