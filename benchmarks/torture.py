"""The full form of what the tests try in short: random kills, a long run, hostile answers.

    make torture                              # all parts, under forty minutes on two quiet CPU cores
    python benchmarks/torture.py --parts soak # one of them; the others' last figures stay

Every part is a program of its own and keeps its figures in runs/torture; a part that ended on this commit is not run
again unless it is named. Writes benchmarks/results/torture.json, with the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sg_opd.evaluation.results import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULT, RUNS = ROOT / "benchmarks" / "results" / "torture.json", ROOT / "runs" / "torture"
# part: its program, which writes <output_dir>/<part>.json, and the figures that must be in there
PARTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "kills": (["benchmarks/kills.py", "--kills", "24"], ("kills_tried", "kills_survived")),
    "soak": (
        ["benchmarks/soak.py", "--steps", "2000"],
        ("soak_steps", "rss_growth_percent", "step_time_growth_percent"),
    ),
    "answers": (["benchmarks/torture_answers.py"], ("answers_tried", "hangs", "slowest_verdict_s")),
}


def run(part: str, commit: str | None, again: bool) -> dict[str, Any]:
    """The figures of a part, from its last run on this commit, or from one now."""
    program, names = PARTS[part]
    folder = RUNS / part
    kept = folder / "with_commit.json"
    if kept.exists() and not again:
        known = json.loads(kept.read_text())
        if known["commit"] == commit:
            return known["figures"]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    print(f"{part}: {' '.join(program)}", flush=True)
    subprocess.run([sys.executable, *program, "--output_dir", str(folder)], cwd=ROOT, env=environment, check=True)
    figures = json.loads((folder / f"{part}.json").read_text())
    missing = [name for name in names if name not in figures]
    if missing:
        raise KeyError(f"{folder / part}.json lacks {', '.join(missing)}.")
    write_json(kept, {"commit": commit, "figures": figures})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="run these again (default: what was not run yet)")
    options = parser.parse_args()
    source = provenance()
    result = json.loads(RESULT.read_text()) if RESULT.exists() and options.parts else {}
    for part in options.parts or PARTS:
        result[part] = run(part, source["commit"], again=bool(options.parts))
    flat = {name: result[part][name] for part, (_, names) in PARTS.items() if part in result for name in names}
    write_json(RESULT, {**result, **flat, **source})
    print(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
