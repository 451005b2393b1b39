"""What runs of the real world say: the tables of docs/real.md and, with the demo's, of the README; and the curves.

python benchmarks/real/report.py benchmarks/results/real/cpu.json    # and further results with the same models
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from pages import filled, table, with_span
from real.arms import ARMS

from sg_opd.evaluation.figures import mean_interval, pass_at_k
from sg_opd.evaluation.results import read_json

PAGES = (ROOT / "docs" / "real.md", ROOT / "docs" / "getting-started.md", ROOT / "README.md")
DEMO = ROOT / "benchmarks" / "results" / "demo.json"  # runs/demo/result.json of a `make demo`
DEMO_ROWS = {"student before": "student_before", "OPD": "opd", "SG-OPD lite": "student_after", "teacher": "teacher"}
SETS = {"test": "the same templates", "unseen": "templates never trained on"}
SAMPLES = 8  # of a question
PASSED = (4, 8)  # the k of pass@k
LOGGED = {
    "delta/p01": 3,
    "delta/p05": 4,
    "delta/p95": 4,
    "delta/p99": 3,
    "delta/top_share": 2,
    "gate/consensus": 2,
    "gate/conflict": 2,
    "gate/neutral": 2,
    "gate/uniform_groups": 2,
    "entropy": 3,
    "completions/mean_length": 1,
    "completions/clipped_ratio": 3,
}
CURVES = {
    "verdict/correct": "right rollouts (share)",
    "entropy": "entropy (nats)",
    "completions/mean_length": "length (tokens)",
    "gate/conflict": "conflict (share of tokens)",
}
Correct = dict[str, int]  # right answers by question


def by_question(counts: Sequence[Correct], tries: int = 1) -> list[list[float]]:
    """pass@k of each question, in per cent, by run, with k = `tries`; that of one is avg@8."""
    return [[100 * pass_at_k(SAMPLES, run[id], tries) for id in counts[0]] for run in counts]


def arms_of(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs by the title of their arm, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(content["arms"], key=lambda run: run["seed"]):
        found.setdefault(run["title"], []).append(run)
    return found


def figures_table(content: dict[str, Any]) -> str:
    """Both ends and every arm on both test sets, with the difference to OPD of the same seeds and questions."""
    ends = [(name, [found]) for name, found in content["before"].items()]
    arms = arms_of(content)
    rows = []
    for questions, words in SETS.items():
        opd = {run["seed"]: run["after"][questions]["correct"] for run in arms.get("OPD", [])}
        asked = content["arms"][0]["after"][questions]["correct"]
        for title, results in [*ends, *((title, [run["after"] for run in runs]) for title, runs in arms.items())]:
            counts = [common(result[questions]["correct"], asked) for result in results]
            cells = [with_span(mean_interval(by_question(counts, tries))._asdict()) for tries in (1, *PASSED)]
            rows.append([words, title, str(len(counts)), *cells, minus(opd, arms.get(title, []), questions)])
    passed = (f"pass@{tries} %" for tries in PASSED)
    heads = ["test set", "model", "runs", f"avg@{SAMPLES} %", *passed, f"avg@{SAMPLES} minus OPD"]
    return table(heads, rows, left=2)


def common(correct: Correct, asked: Correct) -> Correct:
    """What concerns the questions that the arms were asked: both ends may have been asked more."""
    return {id: correct[id] for id in asked}


def minus(opd: dict[int, Correct], runs: Sequence[dict[str, Any]], questions: str) -> str:
    """The paired difference to OPD's runs with the same seeds; nothing for OPD itself and for the ends."""
    pairs = [(opd[run["seed"]], run["after"][questions]["correct"]) for run in runs if run["seed"] in opd]
    if not pairs or runs[0]["title"] == "OPD":
        return ""
    before, after = (by_question(side) for side in zip(*pairs, strict=True))
    apart = [[b - a for a, b in zip(*run, strict=True)] for run in zip(before, after, strict=True)]
    return with_span(mean_interval(apart)._asdict(), "+")


def logged_table(content: dict[str, Any]) -> str:
    """What training logged by arm, the mean of the first third of the steps and of the last."""
    histories = {
        title: [[entry for entry in run["history"] if "loss" in entry] for run in runs]
        for title, runs in arms_of(content).items()
    }
    rows = []
    for name, digits in LOGGED.items():
        cells = [
            " → ".join(mean_of(of_arm, name, first, digits) for first in (True, False)) for of_arm in histories.values()
        ]
        rows.append([f"`{name}`", *cells])
    return table(["metric", *histories], rows, left=1)


def mean_of(histories: list[list[dict[str, Any]]], name: str, first: bool, digits: int) -> str:
    """The mean of a metric over the first or the last third of some histories; a dash where it was not logged."""
    entries = [entry for history in histories for entry in part(history, first)]
    values = [entry[name] for entry in entries if entry.get(name) is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else "-"


def part(history: list[dict[str, Any]], first: bool) -> list[dict[str, Any]]:
    """The first or the last third of a history, at least one entry."""
    count = max(1, len(history) // 3)
    return history[:count] if first else history[-count:]


def lessons_table(content: dict[str, Any]) -> str:
    """How teacher and student came about."""
    rows = []
    for name in ("teacher", "student"):
        lesson = content[f"lesson {name}"]
        trials = ", ".join(f"{step}: {accuracy:.0f}" for step, accuracy in lesson["trials"])
        rows.append([name, trials, f"{lesson['kept'][0]}", f"{lesson['seconds'] / 60:.1f}"])
    heads = ["model", "step: right greedily, %, of validation questions", "kept step", "minutes"]
    return table(heads, rows, left=2)


def show(content: dict[str, Any], path: Path) -> None:
    """Curves over the steps, a line for each run."""
    plot, axes = plt.subplots(1, len(CURVES), figsize=(3.4 * len(CURVES), 2.8), constrained_layout=True)
    for axis, (name, label) in zip(axes, CURVES.items(), strict=True):
        for number, (title, runs) in enumerate(arms_of(content).items()):
            for run in runs:
                entries = [entry for entry in run["history"] if name in entry]
                steps, values = ([entry[key] for entry in entries] for key in ("step", name))
                label_of = title if run is runs[0] else None
                axis.plot(steps, values, color=f"C{number}", linewidth=1, label=label_of)
        axis.set(ylabel=label, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    plot.savefig(path, dpi=100)
    plt.close(plot)


def short_table(content: dict[str, Any], demo: dict[str, Any]) -> str:
    """avg@8 of the demo, and of the presets on the templates that were trained on; an ended run may have no arm."""
    asked = next((run["after"] for run in content["arms"]), content["before"]["student"])["test"]["correct"]
    opd = {run["seed"]: run["after"]["test"]["correct"] for run in arms_of(content).get("OPD", [])}
    ends = {name: [found] for name, found in content["before"].items()}
    presets = {arm.title for arm in ARMS}
    arms = {t: [run["after"] for run in runs] for t, runs in arms_of(content).items() if t in presets}
    rows = []
    for title, results in {"student before": ends["student"], **arms, "teacher": ends["teacher"]}.items():
        figure = mean_interval(by_question([common(result["test"]["correct"], asked) for result in results]))._asdict()
        toy = f"{demo[DEMO_ROWS[title]]['avg@8']:.1f}" if title in DEMO_ROWS else ""
        rows.append([title, toy, with_span(figure), minus(opd, arms_of(content).get(title, []), "test")])
    return table(["", "`make demo`", "SmolLM2-135M", "minus OPD"], rows)


def demo_table(demo: dict[str, Any]) -> str:
    """What the demo printed, without the gate's shares."""
    figures = ("avg@8", "pass@8")
    rows = [[name, *(f"{demo[key][figure]:.1f}" for figure in figures)] for name, key in DEMO_ROWS.items()]
    return table(["", *(f"{figure} %" for figure in figures)], rows)


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of several results with the same models, and the runs that only the others have."""
    first, *others = results
    runs = {(run["title"], run["seed"]): run for result in reversed(results) for run in result["arms"]}
    for other in others:
        if other["before"] != first["before"]:
            raise SystemExit("report.py joins results with one teacher and student; these have others.")
    return {**first, "arms": list(runs.values())}


def tables(content: dict[str, Any], demo: dict[str, Any]) -> dict[str, str]:
    """All tables as Markdown, by name."""
    return {
        "demo": demo_table(demo),
        "in short": short_table(content, demo),
        "real, lessons": lessons_table(content),
        "real, figures": figures_table(content),
        "real, logged": logged_table(content),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what run.py wrote")
    parser.add_argument("--page", type=Path, nargs="+", default=PAGES, help="with these tables; default: those above")
    args = parser.parse_args()
    content = joined([read_json(path) for path in args.results])
    show(content, args.results[0].with_suffix(".png"))
    for page in args.page:
        page.write_text(filled(page.read_text(), tables(content, read_json(DEMO)), whole=False))


if __name__ == "__main__":
    main()
