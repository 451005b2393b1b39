"""The curves of training runs: reads their logs, and decides which lines both plots show.

`RunLog` has the metrics of a run, `PANELS` is the table of what is drawn, and `charts` fills it from one run or more.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.folders import SEAL, last_whole
from ..training.metrics import METRICS

STATE = "trainer_state.json"


class Series(NamedTuple):
    """A metric over the steps."""

    steps: tuple[int, ...]  #: optimizer steps, ascending, each once
    values: tuple[float, ...]  #: as logged; NaN where the log has a NaN or nothing


@dataclass(frozen=True)
class RunLog:
    """The metrics of a run by name."""

    name: str  #: how the run is called in plots
    series: dict[str, Series]  #: by the metric's name in the log; only metrics with at least one number

    @classmethod
    def of(cls, log_history: Iterable[Mapping[str, Any]], name: str) -> RunLog:
        """From `trainer.state.log_history`; of a step that was logged twice, the later value counts.

        Args:
            log_history: entries with `step` and metrics.
            name: of the run.
        """
        found: dict[str, dict[int, float]] = {}
        for entry in log_history:
            for metric, value in entry.items():
                number = math.nan if value is None else value  # None is how TRL logs a mean of nothing
                if metric not in ("step", "epoch") and isinstance(number, int | float) and not isinstance(number, bool):
                    found.setdefault(metric, {})[int(entry["step"])] = float(number)
        logged = {metric: points for metric, points in found.items() if not all(map(math.isnan, points.values()))}
        return cls(name, {name: Series(*zip(*sorted(points.items()), strict=True)) for name, points in logged.items()})

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> RunLog:
        """From a run's output folder, or one of its checkpoints.

        The log of the highest step is taken: that of `trainer.save_state()`, or of the newest whole checkpoint.

        Args:
            folder: `output_dir` of a run of `SGOPDTrainer` or another trainer of TRL.
            name: of the run; default: the folder's.

        Raises:
            FileNotFoundError: no such folder, or none of its files holds a log.
            ValueError: a file that is no log.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} (looked in {Path.cwd()}).")
        newest = max(states(folder), key=lambda state: state["global_step"], default=None)
        if newest is None:
            raise FileNotFoundError(
                f"{folder} has no log: neither a {STATE} nor a whole checkpoint with one. Call `trainer.save_state()` "
                "after training, or train with save_strategy='steps'; then plot that folder."
            )
        return cls.of(newest["log_history"], folder.resolve().name if name is None else name)


def states(folder: Path) -> Iterator[dict[str, Any]]:
    """The trainer's states that may hold the folder's log: its own, and its newest whole checkpoint's."""
    files = [folder / STATE] if (folder / STATE).is_file() else []
    checkpoint, passed_over = last_whole(folder)
    if checkpoint is None and not any((path / SEAL).exists() for path in passed_over):
        # another trainer's, which seals none: its log is written after the weights
        checkpoint = next((path for path in passed_over if (path / STATE).is_file()), None)
    elif not files:
        for path, reason in passed_over.items():
            logging.getLogger(__name__).warning("%s is passed over: %s.", path, reason)
    for path in files if checkpoint is None else [*files, checkpoint / STATE]:
        fault = f"{path} is no log of a trainer"
        try:
            state = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{fault}: {error}. Delete it, or copy it again from the run.") from None
        if not isinstance(state, dict) or not {"log_history", "global_step"} <= state.keys():
            raise ValueError(f"{fault}: it has no `log_history` and `global_step`.")
        yield state


# the palette of Okabe and Ito, which the colour-blind can tell apart, without its yellow, which is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, VERMILION, GREEN, PURPLE, _, _, BLACK, GREY = (*PALETTE, "#7F7F7F")
# by plotly's names, matplotlib's and SVG's; with the colours, 21 lines that differ
DASHES = {"solid": ("-", "none"), "dash": ("--", "9 5"), "dot": (":", "3 4")}


class Panel(NamedTuple):
    """Metrics that are drawn together."""

    title: str
    axis: str
    kind: str = "number"  #: or "amount" (from 0 on), or "share" (of 1, shown in per cent, from 0 on)
    unless: str | None = None  #: left out where every run has this metric
    zeros: bool = True  #: whether a panel is drawn that has nothing but zeros


class Line(NamedTuple):
    """A metric of a panel."""

    metric: str  #: a pattern that the whole name in the log matches
    label: str = ""  #: in the legend; may name the pattern's groups; empty: the metric's name
    colour: str | None = None
    band: tuple[str, ...] = ()  #: two metrics to shade between
    alone: bool = False  #: left out of comparisons


PANELS = {
    Panel("Correct rollouts", "share of rollouts", "share"): (
        Line("verdict/correct", "in training", GREEN),
        Line(r"eval_(?:(.+)_)?verdict/correct", r"in evaluation \1"),
    ),
    Panel("Held-out questions", "%", "amount"): (
        Line(r"eval_(avg@\d+)", r"\1", GREEN),
        Line(r"eval_(pass@(?!1$)\d+)", r"\1"),
        Line(r"eval_(maj@\d+)", r"\1", alone=True),
    ),
    Panel("Mean reward", "reward", unless="verdict/correct"): (Line("reward"),),
    Panel("Gate", "share of tokens", "share"): (
        Line("gate/consensus", "consensus", BLUE),
        Line("gate/conflict", "conflict", VERMILION),
        Line("gate/neutral", "neutral", GREY),
    ),
    Panel("Gate by log-ratio", "share of the sum of |delta|", "share"): (
        Line("gate/consensus_delta", "consensus", BLUE),
        Line("gate/conflict_delta", "conflict", VERMILION),
    ),
    Panel("Log-ratio of teacher to student", "delta in nats"): (
        Line("delta/p50", "median, with 5 % to 95 %", BLUE, band=("delta/p05", "delta/p95")),
    ),
    Panel("Tails of the log-ratio", "delta in nats"): (
        Line("delta/p99", "99 %", BLUE),
        Line("delta/p01", "1 %", VERMILION),
    ),
    Panel("Largest 1 % of log-ratios", "share of the sum of |delta|", "share"): (Line("delta/top_share"),),
    Panel("Teacher phase", "share", "share", zeros=False): (
        Line("teacher/slot_share", "slots, of all rollouts", PURPLE),
        Line("teacher/endorsed", "endorsed, of the slots", BLACK),
    ),
    Panel("Entropy", "nats a token", "amount"): (Line("entropy"),),
    Panel("Completion length", "tokens", "amount"): (
        Line("completions/mean_length", "all"),
        Line("completions/mean_terminated_length", "ended by themselves", alone=True),
    ),
    Panel("Cut-off completions", "share of rollouts", "share"): (Line("completions/clipped_ratio"),),
    Panel("Loss", "loss"): (Line("loss"),),
    Panel("Gradient norm", "norm", "amount"): (Line("grad_norm"),),
}
DEFINITIONS = METRICS | {  # of every line above, by its pattern
    r"eval_(?:(.+)_)?verdict/correct": "share of the evaluation's completions that the verifier calls correct",
    r"eval_(avg@\d+)": "mean verdict of the samples of a question",
    r"eval_(pass@(?!1$)\d+)": "share of questions solved at least once in k samples",
    r"eval_(maj@\d+)": "share of questions whose most frequent answer is correct",
    "reward": "mean reward of the rollouts",
    "entropy": "mean entropy of the student's distributions on trained tokens, in nats",
    "completions/mean_length": "mean tokens of a completion of the student",
    "completions/mean_terminated_length": "the same over those that ended with EOS (0: none did)",
    "completions/clipped_ratio": "share of the student's completions that did not end with EOS",
    "loss": "mean of the logged steps; not comparable between estimators",
    "grad_norm": "norm of the gradient before clipping",
}


class Curve(NamedTuple):
    """A line as it is drawn."""

    label: str
    colour: str
    dash: str
    points: Series
    band: tuple[Series, Series] | None  #: lower and upper edge, at the same steps


class Chart(NamedTuple):
    """A panel as it is drawn; the PNG and the page draw exactly these."""

    title: str
    panel: Panel
    curves: list[Curve]
    about: dict[str, str]  #: definitions by metric
    legend: bool  #: whether it needs one of its own
    steps: tuple[float, float] = (0.0, 1.0)  #: from the first to the last of all charts, with a margin


def charts(runs: Sequence[RunLog]) -> list[Chart]:
    """The panels that the runs have metrics for; an error says why there is nothing to draw, or who share a name."""
    names = [run.name for run in runs]
    if not runs:
        raise ValueError("`runs` is empty: give at least one run.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two runs are called {twice!r}: give them different `names`.")
    drawn = [chart for panel in PANELS for chart in panel_charts(panel, runs)]
    if not drawn:
        raise ValueError(f"The log of {', '.join(names)} has no metric to plot: no optimizer step was logged yet.")
    steps = [step for chart in drawn for curve in chart.curves for step in curve.points.steps]
    margin = max(0.5, 0.03 * (max(steps) - min(steps)))
    return [chart._replace(steps=(min(steps) - margin, max(steps) + margin)) for chart in drawn]


def panel_charts(panel: Panel, runs: Sequence[RunLog]) -> Iterator[Chart]:
    """The panel's charts: of one run one, with a line a metric; of several one a metric, with a line a run."""
    several, found = len(runs) > 1, matches(panel, runs)
    zeros = not any(any(run.series[metric].values) for run in runs for metric in found if metric in run.series)
    if not found or (zeros and not panel.zeros) or all(panel.unless in run.series for run in runs):
        return
    for group in [{metric: line} for metric, line in found.items()] if several else [found]:
        curves: list[Curve] = []
        about: dict[str, str] = {}
        for (metric, line), (place, run) in product(group.items(), enumerate(runs)):
            names = (*line.band[:1], metric, *line.band[1:])
            about |= {name: DEFINITIONS.get(name) or DEFINITIONS[line.metric] for name in names}
            if metric in run.series:
                label, (colour, dash) = (run.name, style(place)) if several else (line.label, style(len(curves)))
                if not several:
                    unused = (other for other in PALETTE if other not in {curve.colour for curve in curves})
                    colour = line.colour or next(unused, colour)
                curves.append(Curve(label, colour, dash, run.series[metric], band(line, run)))
        title = f"{panel.title}: {line.label}" if several and len(found) > 1 else panel.title
        yield Chart(title, panel, curves, about, not several and (len(curves) > 1 or curves[0].band is not None))


def matches(panel: Panel, runs: Sequence[RunLog]) -> dict[str, Line]:
    """The lines of the panel by the metrics that the runs have for them, in the panel's order and with their labels."""
    found = {}
    for line in PANELS[panel]:
        for metric in () if line.alone and len(runs) > 1 else chain(*(run.series for run in runs)):
            if match := re.fullmatch(line.metric, metric):
                found[metric] = line._replace(label=match.expand(line.label).strip() or metric)
    return found


def band(line: Line, run: RunLog) -> tuple[Series, Series] | None:
    """The line's band, where the run has both of its edges, which are logged together."""
    edges = [run.series[metric] for metric in line.band if metric in run.series]
    return (edges[0], edges[1]) if len(edges) == 2 and edges[0].steps == edges[1].steps else None


def style(place: int) -> tuple[str, str]:
    """Colour and dash at a place: the first ones differ in both."""
    return PALETTE[place % len(PALETTE)], [*DASHES][place % len(DASHES)]
