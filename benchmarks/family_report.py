"""What the records of the family say: `family.json`, the curves beside it, and its tables of docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from arms import FAMILY
from conflicts import PLACES, SIZES
from design import Cell
from family import BOTH, ESTIMATOR, FACTOR, FIRST, LONG, OTHER, RATE, READER, RETRY, SELF, SIGNAL, Family, Part, parts
from pages import filled, table, with_span
from report import differences, figures_of, habitual, only, signs

from sg_opd.evaluation.results import EvaluationResult, provenance, read_json, write_json

AVERAGE, PASS = "avg@8", "pass@4"  # of eight samples: pass@k is to be trusted up to half of them
CURVES = {
    "verdict/correct": "right training rollouts (share)",
    "entropy": "entropy (nats)",
    "completions/mean_length": "length (tokens)",
    "completions/clipped_ratio": "cut rollouts (share)",
}
SEEN = (
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "gate/consensus",
    "gate/conflict",
    "gate/uniform_groups",
    "gate/factor",
    "delta/p05",
    "delta/p95",
)


def estimator(arm: str) -> str:
    """The estimator that an arm has; GRPO's is that of the sampled token."""
    return "sampled" if FAMILY[arm].trainer == "grpo" else FAMILY[arm].settings.get("estimator", "full")


def baseline(arm: str) -> str:
    """OPD with the arm's estimator where that is the sampled one; else, and of OPD itself, OPD with the full one."""
    return "opd-sampled" if estimator(arm) == "sampled" and arm != "opd-sampled" else "opd"


class Content:
    """All of family.json, from records.

    Args:
        family: with its records.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.parts = family, parts(family.plan)
        self.habits = {name: habitual(world) for name, world in family.worlds.items()}
        self.opd = {
            (cell.arm, cell.world, part.chosen): family.results(part, cell)
            for part in self.parts
            if part.name in (FIRST, OTHER, RETRY)
            for cell in part.cells
        }

    def entry(self, part: Part, cell: Cell, against: dict[int, EvaluationResult]) -> dict[str, Any] | None:
        """One cell's figures and what its training logged, with differences to a baseline; `None` without runs."""
        found = self.family.results(part, cell)
        if not found:
            return None
        results = list(found.values())
        records = [read_json(folder / "train.json") for folder in self.family.folders(part, cell).values()]
        histories = [record["history"] for record in records]
        before = self.end(cell.world, "reader" if part.name == SELF else "student").figures[AVERAGE].mean
        ids = self.habits[cell.world]
        there = [only(result, ids) for result in results] if ids else []
        shared = sorted(found.keys() & against.keys())  # differences are paired by seed
        pairs = [[side[seed] for seed in shared] for side in (against, found)]
        pairs_there = [[only(result, ids) for result in side] for side in pairs if ids]
        return {
            "arm": cell.arm,
            "world": cell.world,
            "title": FAMILY[cell.arm].title,
            "changes": dict(cell.changes),
            "seeds": list(found),
            "shared_seeds": shared,
            "learning_rate": records[0]["run"]["learning_rate"],
            "steps": records[0]["run"]["steps"],
            **figures_of(results),
            "collapsed": sum(result.figures[AVERAGE].mean < before for result in results),
            **({"minus_opd": differences(*pairs)} if shared else {}),
            **({"under_habit": figures_of(there)} if there else {}),
            **({"minus_opd_under_habit": differences(*pairs_there)} if shared and ids else {}),
            "cpu_minutes": round(statistics.fmean(record["cpu_seconds"] for record in records) / 60, 2),
            "signs": signs(histories, SEEN),
            "curves": {name: curve(histories, name) for name in CURVES},
        }

    def against(self, part: Part, cell: Cell) -> dict[int, EvaluationResult]:
        """What a cell is compared with: OPD with its estimator, or the factor 1; itself with nothing."""
        if part.name == FACTOR:
            return {} if cell is part.cells[0] else self.family.results(part, part.cells[0])
        if part.name == SELF:  # another student
            return {}
        return {} if cell.arm == "opd" else self.opd[baseline(cell.arm), cell.world, part.chosen]

    def minus_sampled(self, part: Part, cell: Cell) -> dict[str, Any]:
        """What an estimator gains over the sampled one."""
        against = self.family.results(part, replace(cell, arm="opd-sampled"))
        found = self.family.results(part, cell)
        shared = sorted(found.keys() & against.keys())
        if cell.arm == "opd-sampled" or not shared:
            return {}
        return {"minus_sampled": differences([against[seed] for seed in shared], [found[seed] for seed in shared])}

    def end(self, world: str, role: str) -> EvaluationResult:
        """The test result of one of a world's two models as it was."""
        return EvaluationResult.from_json(self.family.output / world / role / "test.json")

    def rates(self, world: str) -> dict[str, float]:
        """OPD's avg@8 on the validation questions by learning rate, a mean over its choosing seeds."""
        found = {}
        for part in (part for part in self.parts if part.name == RATE):
            for cell in (cell for cell in part.cells if cell.world == world):
                results = self.family.results(part, cell, "validation.json").values()
                rate = self.family.run(part, cell, 0).learning_rate
                if len(results) == cell.seeds:
                    found[f"{rate:g}"] = round(statistics.fmean(r.figures[AVERAGE].mean for r in results), 3)
        return found

    def conflicts(self, world: str) -> dict[str, Any]:
        """Where the gate finds conflict, of the student before training and after OPD."""
        part = next(part for part in self.parts if part.name == FIRST)
        cell = next(cell for cell in part.cells if (cell.arm, cell.world) == ("opd", world))
        after = self.family.output / self.family.run(part, cell, 0).name
        files = {"before training": self.family.output / world / "student", "after OPD": after}
        files = {name: folder / "conflicts.json" for name, folder in files.items()}
        return {name: read_json(file) for name, file in files.items() if file.is_file()}

    def content(self) -> dict[str, Any]:
        """All of it."""
        made: dict[str, list[dict]] = {name: [] for name in (FIRST, OTHER, FACTOR, SIGNAL, RETRY, ESTIMATOR, SELF)}
        for part in self.parts:
            for cell in part.cells if part.name in made else ():
                entry = self.entry(part, cell, self.against(part, cell))
                if entry and part.name == ESTIMATOR:
                    entry |= self.minus_sampled(part, cell)
                made[part.name] += [entry] if entry else []
        return {
            "provenance": provenance(),
            "worlds": {
                world: {role: figures_of([self.end(world, role)]) for role in ("student", "teacher")} for world in BOTH
            },
            "rates": {world: self.rates(world) for world in BOTH},
            "reader": {
                name: figures_of([self.end("arithmetic", role)])
                for name, role in zip(("before", "before, with the worked solution"), READER, strict=True)
                if (self.family.output / "arithmetic" / role / "test.json").is_file()
            },
            "conflicts": {world: self.conflicts(world) for world in BOTH},
            **made,
        }


def curve(histories: Sequence[list[dict]], name: str) -> dict[str, list[float]]:
    """A logged figure by step, a mean over runs; GRPO logs the share of right rollouts as its reward."""
    by_step: dict[int, list[float]] = {}
    for history in histories:
        for entry in history:
            value = entry.get(name, entry.get("reward") if name == "verdict/correct" else None)
            if value is not None:
                by_step.setdefault(entry["step"], []).append(value)
    return {"step": list(by_step), "value": [round(statistics.fmean(values), 4) for values in by_step.values()]}


def arms_table(content: dict[str, Any], world: str) -> str:
    """Every arm's figures, and their differences to OPD with the same estimator."""
    rows = [
        [f"{role}{' before' * (role == 'student')}", "", *(with_span(ends[f]) for f in (AVERAGE, PASS)), "", "", "", ""]
        for role, ends in content["worlds"][world].items()
    ]
    for entry in every(content, world):
        apart = [with_span(entry["minus_opd"][f], "+") if "minus_opd" in entry else "" for f in (AVERAGE, PASS)]
        own = [with_span(entry[f]) for f in (AVERAGE, PASS)]
        rows.append(
            [
                entry["title"],
                estimator(entry["arm"]),
                *own,
                *apart,
                str(len(entry["seeds"])),
                f"{entry['cpu_minutes']:.1f}",
            ]
        )
    apart_heads = [f"{f} minus OPD" for f in (AVERAGE, PASS)]
    heads = ["arm", "estimator", f"{AVERAGE} %", f"{PASS} %", *apart_heads, "seeds", "CPU minutes a run"]
    return table(heads, rows, left=2)


def every(content: dict[str, Any], world: str) -> list[dict[str, Any]]:
    return [entry for part in (FIRST, OTHER) for entry in content[part] if entry["world"] == world]


def habit_table(content: dict[str, Any], world: str) -> str:
    """Accuracy where the teacher errs by habit; empty in a world without one."""
    rows = [
        [
            entry["title"],
            with_span(entry["under_habit"][AVERAGE]),
            with_span(entry["minus_opd_under_habit"][AVERAGE], "+") if "minus_opd_under_habit" in entry else "",
        ]
        for entry in every(content, world)
        if "under_habit" in entry
    ]
    return table(["arm", f"{AVERAGE} % there", "minus OPD"], rows) if rows else ""


def signs_table(content: dict[str, Any], world: str) -> str:
    """What training looked like in the last third of the steps."""
    rows = [[entry["title"], *(number(entry["signs"].get(name)) for name in SEEN)] for entry in every(content, world)]
    return table(["arm", *SEEN], rows)


def factors_table(content: dict[str, Any], world: str) -> str:
    """The question about factors: where each run ended."""
    rows = []
    entries = [entry for entry in content[FACTOR] if entry["world"] == world]
    for entry in sorted(entries, key=lambda entry: entry["changes"]["gate_extrapolation"]):
        factor, gated = entry["changes"]["gate_extrapolation"], "gate_signal" in entry["changes"]
        last = [number(entry["curves"][name]["value"][-1]) for name in list(CURVES)[1:]]
        own = [with_span(entry[f]) for f in (AVERAGE, PASS)]
        for name in ("minus_opd", "minus_opd_under_habit"):
            own.append(with_span(entry[name][AVERAGE], "+") if name in entry else "")
        rows.append([f"{factor:g}", "group sign" * gated, *own, *last, "yes" if entry["collapsed"] else "no"])
    heads = [
        "factor",
        "gate",
        f"{AVERAGE} %",
        f"{PASS} %",
        f"{AVERAGE} minus factor 1",
        "and under the habit",
        "entropy",
        "length",
        "cut",
        "collapsed",
    ]
    return table(heads, rows, left=2) if rows else "Not run."


def settings_table(content: dict[str, Any], name: str) -> str:
    """A part beside the arms: figures and differences to OPD, with what the gate saw."""
    rows = []
    for entry in content[name]:
        signal = f"{entry['changes'].get('gate_signal', 'verdict')} sign"
        settings = signal if name == SIGNAL else f"rate {entry['learning_rate']:g}"
        own = [with_span(entry[f]) for f in (AVERAGE, PASS)]
        own += [with_span(entry["minus_opd"][f], "+") if "minus_opd" in entry else "" for f in (AVERAGE, PASS)]
        seen = [number(entry["signs"].get(f"gate/{name}")) for name in ("uniform_groups", "consensus", "conflict")]
        counts = [str(entry["collapsed"]), str(len(entry["seeds"]))]
        rows.append([entry["world"], entry["title"], settings, *own, *seen, *counts])
    apart = [f"{f} minus OPD" for f in (AVERAGE, PASS)]
    heads = ["world", "arm", "settings", f"{AVERAGE} %", f"{PASS} %", *apart, "uniform groups", "consensus", "conflict"]
    return table([*heads, "collapsed", "seeds"], rows, left=3) if rows else "Not run."


def estimators_table(content: dict[str, Any], world: str) -> str:
    """What each estimator reaches, and its differences to the sampled and to the full one."""
    rows = []
    for entry in (entry for entry in content[ESTIMATOR] if entry["world"] == world):
        k = FAMILY[entry["arm"]].settings.get("teacher_top_k")
        own = [with_span(entry[f]) for f in (AVERAGE, PASS)]
        for name in ("minus_sampled", "minus_opd"):
            own.append(with_span(entry[name][AVERAGE], "+") if name in entry else "")
        name = estimator(entry["arm"]) + (f", k = {k}" if k else "")
        rows.append([name, *own, str(len(entry["seeds"])), f"{entry['cpu_minutes']:.1f}"])
    heads = ["estimator", f"{AVERAGE} %", f"{PASS} %", f"{AVERAGE} minus sampled", f"{AVERAGE} minus full"]
    return table([*heads, "seeds", "CPU minutes a run"], rows) if rows else "Not run."


def selves_table(content: dict[str, Any]) -> str:
    """What a student reaches that teaches itself, and what it knew before, without and with the worked solution."""
    rows = [
        [name, *(with_span(figures[f]) for f in (AVERAGE, PASS)), *[""] * 5]
        for name, figures in content["reader"].items()
    ]
    for entry in content[SELF]:
        own = [with_span(entry[f]) for f in (AVERAGE, PASS)]
        seen = [number(entry["signs"].get(name)) for name in ("gate/consensus", "gate/conflict", "entropy")]
        rows.append([f"after, {entry['title']}", *own, *seen, str(entry["collapsed"]), str(len(entry["seeds"]))])
    heads = ["the student", f"{AVERAGE} %", f"{PASS} %", "consensus", "conflict", "entropy", "collapsed", "seeds"]
    return table(heads, rows) if content[SELF] else "Not run."


def rates_table(content: dict[str, Any]) -> str:
    """How OPD's learning rate was chosen."""
    rates = list(content["rates"][BOTH[0]])
    rows = [[world, *(number(found.get(rate)) for rate in rates)] for world, found in content["rates"].items()]
    both = [[found[rate] for found in content["rates"].values() if rate in found] for rate in rates]
    rows.append(["mean", *(number(statistics.fmean(values)) for values in both)])
    return table(["world", *(f"{AVERAGE} % with {rate}" for rate in rates)], rows)


def conflicts_table(content: dict[str, Any], world: str, name: str) -> str:
    """The share of conflict tokens by place in the rollout or by size of delta."""
    edges = ["0", *(f"{size:g}" for size in SIZES), ""]
    classes = {
        "place": [f"{100 * i // PLACES} to {100 * (i + 1) // PLACES} %" for i in range(PLACES)],
        "size": [f"{low} to {high}" if high else f"over {low}" for low, high in pairwise(edges)],
    }[name]
    columns = "tokens", "mass", "conflict", "conflict_mass", "conflict_right", "conflict_wrong", "conflict_group"
    rows = []
    for when, found in content["conflicts"][world].items():
        for label, cell in [("all", found["all"]), *zip(classes, found[name], strict=True)]:
            rows.append([when, label, *(percent(cell[column]) for column in columns)])
    kind = {"place": "part of the rollout", "size": "size of delta (nats)"}[name]
    heads = ["student", kind, "tokens", "of abs(delta)"]
    heads += ["conflict", "conflict of abs(delta)", "in right rollouts", "in wrong rollouts", "by group sign"]
    return table(heads, rows, left=2)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def tables(content: dict[str, Any]) -> dict[str, str]:
    """All tables as Markdown, by name."""
    found = {"family, learning rate": rates_table(content)}
    for world in BOTH:
        found[f"family, {world}"] = arms_table(content, world)
        found[f"family, habit, {world}"] = habit_table(content, world)
        found[f"family, training, {world}"] = signs_table(content, world)
        found[f"family, factors, {world}"] = factors_table(content, world)
        found[f"family, estimators, {world}"] = estimators_table(content, world)
        for name in ("place", "size"):
            found[f"family, conflicts by {name}, {world}"] = conflicts_table(content, world, name)
    found["family, signal"] = settings_table(content, SIGNAL)
    found["family, other rate"] = settings_table(content, RETRY)
    found["family, self"] = selves_table(content)
    return {name: made for name, made in found.items() if made}


def show_factors(content: dict[str, Any], path: Path) -> None:
    """The question about factors: accuracy, entropy, length and cut rollouts over the steps."""
    plot, axes = plt.subplots(len(CURVES), 2, figsize=(11, 2.6 * len(CURVES)), squeeze=False, constrained_layout=True)
    for column, world in enumerate(BOTH):
        entries = [entry for entry in content[FACTOR] if entry["world"] == world]
        levels = sorted({entry["changes"]["gate_extrapolation"] for entry in entries})
        for axis, (name, label) in zip(axes[:, column], CURVES.items(), strict=True):
            for entry in entries:
                factor, gated = entry["changes"]["gate_extrapolation"], "gate_signal" in entry["changes"]
                axis.plot(
                    *entry["curves"][name].values(),
                    color=plt.get_cmap("viridis")(levels.index(factor) / len(levels)),
                    linestyle="--" if gated else "-",
                    label=f"{factor:g}{', gated' * gated}",
                    linewidth=1.2,
                )
            axis.set(title=f"{world}, {LONG} steps" if axis is axes[0, column] else None, ylabel=label)
            axis.grid(alpha=0.3)
        axes[-1, column].set_xlabel("optimizer step")
    axes[0, 0].legend(fontsize=7, ncols=2)
    plot.savefig(path, dpi=100)
    plt.close(plot)


def report(family: Family, folder: Path, page: Path | None) -> None:
    """Write family.json and the curves into a folder, and the tables into a page that has places for them."""
    content = Content(family).content()
    write_json(folder / "family.json", content)
    show_factors(content, folder / "family_factors.png")
    if page is not None:
        page.write_text(filled(page.read_text(), tables(content), whole=False))
    else:
        for name, made in tables(content).items():
            print(f"\n{name}\n\n{made}")
