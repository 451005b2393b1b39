"""What the study's records say: `study.json`, the plots beside it, and the tables of docs/results.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from design import LINE, PLANE, WHOLE
from pages import filled, with_span

from sg_opd.evaluation.comparison import compare, values_by_id
from sg_opd.evaluation.figures import Interval, mean_interval
from sg_opd.evaluation.results import EvaluationResult, provenance, write_json

# means over a run's last third of the steps, and over its whole teacher phase
AT_THE_END = (
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "gate/consensus",
    "gate/conflict",
    "delta/p05",
    "delta/p95",
    "delta/clipped",
    "grad_norm",
)
IN_THE_PHASE = ("teacher/endorsed",)
RATIOS = {"opdvr": 0.0, "no-phase": 1 / 1.8, "opd": 1.0}  # the arms that are points of the line
LIKE = "minus_opd_with_the_same_settings"
WIDEST = 8  # points shown to both sides of OPD
SPENT = ("student_rollouts", "teacher_rollouts", "teacher_scored")


def figures_of(results: Sequence[EvaluationResult]) -> dict[str, dict[str, float]]:
    """Every figure with its interval over runs and questions."""
    ids = [question.id for question in results[0].questions]
    table = np.array([values_by_id(result, ids) for result in results])
    return {name: as_dict(mean_interval(table[..., i])) for i, name in enumerate(results[0].figures)}


def differences(baseline: Sequence[EvaluationResult], results: Sequence[EvaluationResult]) -> dict[str, dict]:
    """Every figure's paired difference to the baseline's runs with the same seeds."""
    shared = min(len(baseline), len(results))
    figures = compare(baseline[:shared], results[:shared]).figures
    return {name: as_dict(row.difference) for name, row in figures.items()}


def as_dict(interval: Interval) -> dict[str, float]:
    return {name: round(value, 3) for name, value in interval._asdict().items()}


def curve(histories: Sequence[list[dict]]) -> dict[str, list[float]]:
    """The share of the student's own training rollouts that are correct, in per cent, by step, a mean over runs."""
    by_step: dict[int, list[float]] = {}
    for history in histories:
        for entry in history:
            correct = entry.get("verdict/correct", entry.get("reward"))
            if correct is not None:
                by_step.setdefault(entry["step"], []).append(100 * correct)
    return {"step": list(by_step), "correct": [round(statistics.fmean(values), 2) for values in by_step.values()]}


def signs(histories: Sequence[list[dict]], at_the_end: Sequence[str] = AT_THE_END) -> dict[str, float]:
    """What training logged of the gate, the log-ratios, entropy and length: means over runs."""
    found: dict[str, float] = {}
    last = [entry for history in histories for entry in history[-max(1, len(history) // 3) :]]
    everywhere = [entry for history in histories for entry in history]
    for names, entries in ((at_the_end, last), (IN_THE_PHASE, everywhere)):
        for name in names:
            values = [entry[name] for entry in entries if entry.get(name) is not None]
            if values:
                found[name] = round(statistics.fmean(values), 4)
    return found


def habitual(world: Any) -> frozenset[str]:
    """The ids of the test questions that the teacher's habit concerns."""
    if world.habit is None:
        return frozenset()
    return frozenset(str(index) for index, row in enumerate(world.split("test")) if world.habit(row["solution"]))


def only(result: EvaluationResult, ids: frozenset[str]) -> EvaluationResult:
    """A result's questions of these ids."""
    return replace(result, questions=tuple(question for question in result.questions if question.id in ids))


class Report:
    """The results of a study's records.

    Args:
        study: a `study.Study`.
        cells: of its groups, by group.
    """

    def __init__(self, study: Any, cells: dict[str, list[Any]]) -> None:
        self.study, self.cells = study, cells
        self.opd = {world: self.results("opd", world) for world in study.worlds}
        self.habit = {name: habitual(world) for name, world in study.worlds.items()}

    def results(self, arm: str, world: str) -> list[EvaluationResult]:
        cell = next(c for some in self.cells.values() for c in some if (c.arm, c.world, c.changes) == (arm, world, ()))
        return [EvaluationResult.from_json(path) for path in self.study.test_files(cell)]

    def entry(self, cell: Any, group: Sequence[Any]) -> dict[str, Any] | None:
        """One cell's figures, differences to OPD, seeds, learning rate, budget and signs; `None` without runs.

        Where its group has an OPD with the same further settings, so has the entry the differences to that.
        """
        files = self.study.test_files(cell)
        if not files:
            return None
        results = [EvaluationResult.from_json(path) for path in files]
        records = [json.loads((path.parent / "train.json").read_text()) for path in files]
        histories = [record["history"] for record in records]
        like = [other for other in group if (other.arm, other.changes) == ("opd", cell.changes) and cell.changes]
        opd_like = [EvaluationResult.from_json(path) for other in like for path in self.study.test_files(other)]
        return {
            "title": self.study.title(cell),
            "changes": dict(cell.changes),
            "seeds": [record["run"]["seed"] for record in records],
            "learning_rate": records[0]["run"]["learning_rate"],
            "validation": self.study.validation(cell),
            **figures_of(results),
            "minus_opd": differences(self.opd[cell.world], results),
            **({LIKE: differences(opd_like, results)} if opd_like else {}),
            **self.under_habit(cell.world, results),
            "budget": {name: records[0][name] for name in SPENT}
            | {"cpu_hours": round(sum(record["cpu_seconds"] for record in records) / 3600, 3)},
            "signs": signs(histories),
            "curve": curve(histories),
        }

    def under_habit(self, world: str, results: Sequence[EvaluationResult]) -> dict[str, Any]:
        """Figures, and differences to OPD, on the questions that the teacher's habit concerns; empty without one."""
        ids = self.habit[world]
        if not ids:
            return {}
        own, opd = ([only(result, ids) for result in some] for some in (results, self.opd[world]))
        return {"under_habit": figures_of(own) | {"minus_opd": differences(opd, own)}}

    def content(self) -> dict[str, Any]:
        """All of study.json."""
        arms: dict[str, dict] = {}
        others: dict[str, list] = {}
        for group, cells in self.cells.items():
            for cell in cells:
                entry = self.entry(cell, cells)
                if entry is None:
                    continue
                if group.startswith(WHOLE):
                    arms.setdefault(cell.arm, {})[cell.world] = entry
                else:
                    others.setdefault(group, []).append({"arm": cell.arm, "world": cell.world, **entry})
        return {
            "provenance": provenance(),
            "worlds": {
                name: {
                    role: figures_of([result]) | self.under_habit(name, [result])
                    for role, result in self.study.ends(name).items()
                }
                for name in self.study.worlds
            },
            "arms": arms,
            **others,
        }


def show_arms(content: dict[str, Any], path: Path) -> None:
    """Each arm's difference to OPD in both worlds, with intervals."""
    worlds, figures = list(content["worlds"]), headline(content)
    plot, axes = plt.subplots(
        len(worlds), len(figures), figsize=(11, 3.6 * len(worlds)), squeeze=False, constrained_layout=True
    )
    for row, world in zip(axes, worlds, strict=True):
        names = [name for name, entry in content["arms"].items() if world in entry and name != "opd"][::-1]
        for axis, figure in zip(row, figures, strict=True):
            rows = [content["arms"][name][world]["minus_opd"][figure] for name in names]
            means = np.array([r["mean"] for r in rows])
            errors = np.array([[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]])
            axis.errorbar(means, range(len(names)), xerr=np.nan_to_num(errors), fmt="o", capsize=3)
            axis.axvline(0, color="grey", linewidth=1)
            axis.set_yticks(range(len(names)), [content["arms"][name][world]["title"] for name in names])
            axis.set(title=f"{world}: {figure} minus OPD's", xlabel="points, with 95 % intervals")
            axis.set_xlim(-WIDEST, WIDEST)
            axis.grid(alpha=0.3)
    plot.savefig(path, dpi=100)
    plt.close(plot)


def show_curves(content: dict[str, Any], path: Path) -> None:
    """The student's accuracy on its training rollouts, over the steps."""
    worlds = list(content["worlds"])
    plot, axes = plt.subplots(1, len(worlds), figsize=(6 * len(worlds), 4.2), squeeze=False, constrained_layout=True)
    for axis, world in zip(axes[0], worlds, strict=True):
        for place, arm in enumerate(content["arms"].values()):
            shown = arm[world]["curve"] if world in arm else {"step": []}
            if shown["step"]:
                colour = plt.get_cmap("tab20")(place)
                axis.plot(shown["step"], shown["correct"], color=colour, label=arm[world]["title"], linewidth=1.2)
        axis.set(title=world, xlabel="optimizer step", ylabel="correct training rollouts of the student (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    plot.savefig(path, dpi=100)
    plt.close(plot)


def show_factors(content: dict[str, Any], path: Path) -> None:
    """The line in the factors' ratio (current reference) and the plane of both (initial reference)."""
    plane, figures = content[PLANE], headline(content)
    world = content[LINE][0]["world"]
    line = [(entry["changes"]["gate_interpolation"], entry) for entry in content[LINE]]
    line += [(ratio, content["arms"][arm][world]) for arm, ratio in RATIOS.items()]
    line.sort(key=lambda point: point[0])
    plot, axes = plt.subplots(2, len(figures), figsize=(10, 8), squeeze=False, constrained_layout=True)
    for axis, figure in zip(axes[0], figures, strict=True):
        rows = [entry[figure] for _, entry in line]
        errors = [[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]]
        axis.errorbar(range(len(rows)), [r["mean"] for r in rows], yerr=np.nan_to_num(errors), fmt="o-", capsize=3)
        axis.set_xticks(range(len(rows)), [f"{ratio:.2g}" for ratio, _ in line])
        axis.set(title=f"{figure}, current reference", xlabel="interpolation / extrapolation", ylabel="%")
        axis.grid(alpha=0.3)
    for axis, figure in zip(axes[1], figures, strict=True):
        values = sorted({entry["changes"]["gate_extrapolation"] for entry in plane})
        at = {
            (e["changes"]["gate_interpolation"], e["changes"]["gate_extrapolation"]): e[figure]["mean"] for e in plane
        }
        grid = np.array([[at.get((down, up), np.nan) for up in values] for down in values])
        axis.imshow(grid, origin="lower", cmap="viridis")
        for (i, j), value in np.ndenumerate(grid):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="white")
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set_yticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set(title=f"{figure} (%), initial reference", xlabel="extrapolation", ylabel="interpolation")
    plot.savefig(path, dpi=100)
    plt.close(plot)


def headline(content: dict[str, Any]) -> list[str]:
    """The names of the two figures that matter: avg@k and pass@k with the largest k."""
    names = next(iter(next(iter(content["arms"].values())).values()))
    average = next(name for name in names if name.startswith("avg@"))
    return [average, average.replace("avg", "pass")]


def arms_table(content: dict[str, Any], world: str) -> str:
    """The headline table of a world, as Markdown."""
    figures = headline(content)
    heads = ["arm", *(f"{f} %" for f in figures), *(f"{f} minus OPD" for f in figures), "seeds", "learning rate"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for role in ("student", "teacher"):
        cells = [with_span(content["worlds"][world][role][figure]) for figure in figures]
        lines.append(f"| {role}{' before' * (role == 'student')} | {' | '.join(cells)} | | | | |")
    for entry in (arm[world] for arm in content["arms"].values() if world in arm):
        own = [with_span(entry[figure]) for figure in figures]
        apart = [with_span(entry["minus_opd"][figure], "+") for figure in figures]
        if entry["title"] == "OPD":
            apart = ["", ""]
        last = [str(len(entry["seeds"])), f"{entry['learning_rate']:g}"]
        lines.append(f"| {' | '.join([entry['title'], *own, *apart, *last])} |")
    return "\n".join(lines)


def habit_table(content: dict[str, Any], world: str) -> str:
    """Accuracy where the teacher errs by habit and on all questions, as Markdown; empty in a world without habit."""
    average = headline(content)[0]
    rows = [(arm[world]["title"], arm[world]) for arm in content["arms"].values() if world in arm]
    rows = [(role, content["worlds"][world][role]) for role in ("student", "teacher")] + rows
    if "under_habit" not in rows[0][1]:
        return ""
    lines = [f"| arm | {average} % there | minus OPD | {average} % on all questions |", "| --- | ---: | ---: | ---: |"]
    for name, entry in rows:
        there = entry["under_habit"]
        apart = "" if name == "OPD" else with_span(there["minus_opd"][average], "+")
        lines.append(f"| {name} | {with_span(there[average])} | {apart} | {with_span(entry[average])} |")
    return "\n".join(lines)


def others_table(content: dict[str, Any], group: str) -> str:
    """The table of a group beside the arms, as Markdown."""
    figures = headline(content)
    like = any(LIKE in entry for entry in content[group])
    heads = ["arm", "settings", *(f"{f} %" for f in figures), *(f"{f} minus OPD" for f in figures)]
    heads += [f"{f} minus OPD so set" for f in figures] if like else []
    heads += ["seeds", "learning rate"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for entry in content[group]:
        changes = ", ".join(f"{name} {value}" for name, value in entry["changes"].items())
        own = [with_span(entry[figure]) for figure in figures]
        apart = [
            "" if entry["arm"] == "opd" and not changes else with_span(entry["minus_opd"][f], "+") for f in figures
        ]
        if like:
            apart += ["" if entry["arm"] == "opd" else with_span(entry[LIKE][f], "+") for f in figures]
        cells = [entry["title"], changes, *own, *apart, str(len(entry["seeds"])), f"{entry['learning_rate']:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def budget_table(content: dict[str, Any], world: str) -> str:
    """What each arm spent and what its training looked like at the end, as Markdown."""
    names = ("entropy", "completions/mean_length", "gate/consensus", "gate/conflict", "delta/p05", "delta/p95")
    heads = ["arm", *(name.replace("_", " ") for name in SPENT), "CPU hours", *names, "teacher/endorsed"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for entry in (arm[world] for arm in content["arms"].values() if world in arm):
        spent = [str(entry["budget"][name]) for name in SPENT] + [f"{entry['budget']['cpu_hours']:.2f}"]
        seen = [entry["signs"].get(name) for name in (*names, "teacher/endorsed")]
        cells = [entry["title"], *spent, *("" if value is None else f"{value:.3g}" for value in seen)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(content: dict[str, Any]) -> dict[str, str]:
    """All tables as Markdown, by name."""
    found = {}
    for world in content["worlds"]:
        found[f"figures, {world}"] = arms_table(content, world)
        found[f"habit, {world}"] = habit_table(content, world)
        found[f"budgets, {world}"] = budget_table(content, world)
    found.update({name: others_table(content, name) for name, part in content.items() if isinstance(part, list)})
    return {name: table for name, table in found.items() if table}


def report(study: Any, cells: dict[str, list[Any]], folder: Path, page: Path | None) -> None:
    """Write study.json and the plots into a folder, and the tables into a page that has places for them."""
    content = Report(study, cells).content()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", content)
    show_arms(content, folder / "arms.png")
    show_curves(content, folder / "curves.png")
    if LINE in content and PLANE in content:
        show_factors(content, folder / "factors.png")
    if page is not None:
        page.write_text(filled(page.read_text(), tables(content), whole=False))
    else:
        for name, table in tables(content).items():
            print(f"\n{name}\n\n{table}")
