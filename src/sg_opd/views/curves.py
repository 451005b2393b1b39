"""What the plots of a run show: one table of panels, and the curves that it makes of logs."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.folders import SEAL, last_whole
from ..training.metrics import METRICS

# the palette of Okabe and Ito, which the colour-blind can tell apart, without its yellow, which is faint on white
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000"),
)
GREY = "#7F7F7F"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("solid", "dash", "dot")  # as plotly calls them; with the colours, 21 lines that differ


@dataclass(frozen=True)
class Line:
    """A metric of a panel."""

    metric: str
    """A pattern that the whole name in the log matches."""
    label: str = ""
    """In the legend; may name the pattern's groups. Empty: the metric's name."""
    colour: str | None = None
    about: str | None = None
    """Its definition, where `METRICS` has none."""
    band: tuple[str, str] | None = None
    """Two metrics to shade between."""
    alone: bool = False
    """Left out of comparisons."""


@dataclass(frozen=True)
class Panel:
    """Metrics that are drawn together."""

    title: str
    axis: str
    lines: tuple[Line, ...]
    kind: str = "number"
    """"share" (of 1, shown in per cent, from 0 on), "amount" (from 0 on) or "number"."""
    unless: str | None = None
    """Left out where every run has this metric."""
    zeros: bool = True
    """Whether a panel is drawn that has nothing but zeros."""


PANELS = (
    Panel(
        "Correct rollouts",
        "share of rollouts",
        (
            Line("verdict/correct", "in training", GREEN),
            Line(
                r"eval_(?:(.+)_)?verdict/correct",
                r"in evaluation \1",
                about="share of the evaluation's completions that the verifier calls correct",
            ),
        ),
        "share",
    ),
    Panel(
        "Held-out questions",
        "%",
        (
            Line(r"eval_(avg@\d+)", r"\1", GREEN, about="mean verdict of the samples of a question"),
            Line(r"eval_(pass@(?!1$)\d+)", r"\1", about="share of questions solved at least once in k samples"),
            Line(
                r"eval_(maj@\d+)", r"\1", about="share of questions whose most frequent answer is correct", alone=True
            ),
        ),
        "amount",
    ),
    Panel("Mean reward", "reward", (Line("reward", about="mean reward of the rollouts"),), unless="verdict/correct"),
    Panel(
        "Gate",
        "share of tokens",
        (
            Line("gate/consensus", "consensus", BLUE),
            Line("gate/conflict", "conflict", VERMILION),
            Line("gate/neutral", "neutral", GREY),
        ),
        "share",
    ),
    Panel(
        "Log-ratio of teacher to student",
        "delta in nats",
        (Line("delta/p50", "median, with 5 % to 95 %", BLUE, band=("delta/p05", "delta/p95")),),
    ),
    Panel(
        "Teacher phase",
        "share",
        (
            Line("teacher/slot_share", "slots, of all rollouts", PURPLE),
            Line("teacher/endorsed", "endorsed, of the slots", BLACK),
        ),
        "share",
        zeros=False,
    ),
    Panel(
        "Entropy",
        "nats a token",
        (Line("entropy", about="mean entropy of the student's distributions on trained tokens, in nats"),),
        "amount",
    ),
    Panel(
        "Completion length",
        "tokens",
        (
            Line("completions/mean_length", "all", about="mean tokens of a completion of the student"),
            Line(
                "completions/mean_terminated_length",
                "ended by themselves",
                about="the same over those that ended with EOS (0: none did)",
                alone=True,
            ),
        ),
        "amount",
    ),
    Panel(
        "Cut-off completions",
        "share of rollouts",
        (Line("completions/clipped_ratio", about="share of the student's completions that did not end with EOS"),),
        "share",
    ),
    Panel("Loss", "loss", (Line("loss", about="mean of the logged steps; not comparable between estimators"),)),
    Panel("Gradient norm", "norm", (Line("grad_norm", about="norm of the gradient before clipping"),), "amount"),
)


class Curve(NamedTuple):
    """A line as it is drawn."""

    label: str
    colour: str
    dash: str
    points: Series
    band: tuple[Series, Series] | None
    """Lower and upper edge, at the same steps."""


class Chart(NamedTuple):
    """A panel as it is drawn; both the PNG and the page draw just these."""

    title: str
    axis: str
    kind: str
    curves: list[Curve]
    about: dict[str, str]
    """Definitions by metric."""
    legend: bool
    """Whether it needs one of its own."""


def charts(runs: Sequence[RunLog]) -> list[Chart]:
    """The panels that the runs have metrics for: with one run a line a metric, with several a panel a metric.

    Raises:
        ValueError: no run, two of one name, or no metric that a panel shows.
    """
    names = [run.name for run in runs]
    if not runs:
        raise ValueError("`runs` is empty: give at least one run.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two runs are called {twice!r}: give them different `names`.")
    wanted = [panel for panel in PANELS if shown(panel, runs)]
    drawn = [
        chart for panel in wanted for chart in (of_one(panel, runs[0]) if len(runs) == 1 else of_each(panel, runs))
    ]
    if not drawn:
        raise ValueError(f"The log of {', '.join(names)} has no metric to plot: no optimizer step was logged yet.")
    return drawn


def shown(panel: Panel, runs: Sequence[RunLog]) -> bool:
    """Whether the runs' metrics ask for a panel."""
    if panel.unless is not None and all(panel.unless in run.series for run in runs):
        return False
    return panel.zeros or any(any(run.series[metric].values) for run in runs for metric, _, _ in matches(panel, run))


def of_one(panel: Panel, run: RunLog) -> Iterator[Chart]:
    """The panel with a line a metric, if there is any."""
    curves: list[Curve] = []
    about: dict[str, str] = {}
    for metric, label, line in matches(panel, run):
        dash = DASHES[len(curves) % len(DASHES)]
        curves.append(Curve(label, line.colour or unused(curves), dash, run.series[metric], band(line, run)))
        about |= definitions(metric, line)
    if curves:
        yield Chart(panel.title, panel.axis, panel.kind, curves, about, len(curves) > 1 or curves[0].band is not None)


def of_each(panel: Panel, runs: Sequence[RunLog]) -> Iterator[Chart]:
    """A chart for each metric of the panel, with a line a run, in the run's colour."""
    found = {metric: (label, line) for run in runs for metric, label, line in matches(panel, run) if not line.alone}
    for metric in sorted(found, key=lambda metric: panel.lines.index(found[metric][1])):
        label, line = found[metric]
        curves = [
            Curve(run.name, *style(place), run.series[metric], band(line, run))
            for place, run in enumerate(runs)
            if metric in run.series
        ]
        title = f"{panel.title}: {label}" if len(found) > 1 else panel.title
        yield Chart(title, panel.axis, panel.kind, curves, definitions(metric, line), False)


def matches(panel: Panel, run: RunLog) -> Iterator[tuple[str, str, Line]]:
    """The run's metrics that the panel shows, in the panel's order, each with its label."""
    for line in panel.lines:
        for metric in run.series:
            if match := re.fullmatch(line.metric, metric):
                yield metric, match.expand(line.label).strip() or metric, line


def band(line: Line, run: RunLog) -> tuple[Series, Series] | None:
    """The line's band, where the run has both of its edges."""
    if line.band is None or not set(line.band) <= run.series.keys():
        return None
    low, high = (dict(zip(*run.series[metric], strict=True)) for metric in line.band)
    steps = tuple(sorted(low.keys() & high.keys()))
    return Series(steps, tuple(low[step] for step in steps)), Series(steps, tuple(high[step] for step in steps))


def definitions(metric: str, line: Line) -> dict[str, str]:
    """What the line's metrics mean, by name."""
    low, high = line.band or (metric, metric)
    return {name: METRICS.get(name) or line.about or "" for name in (low, metric, high)}


def unused(curves: Sequence[Curve]) -> str:
    """A colour of the palette that none of the curves has, as long as there is one."""
    taken = {curve.colour for curve in curves}
    return next((colour for colour in PALETTE if colour not in taken), PALETTE[len(curves) % len(PALETTE)])


def style(place: int) -> tuple[str, str]:
    """Colour and dash of the run at a place: the first runs differ in both."""
    return PALETTE[place % len(PALETTE)], DASHES[place % len(DASHES)]


def step_range(drawn: Sequence[Chart]) -> tuple[float, float]:
    """The steps from the first to the last of all charts, with a margin."""
    steps = [step for chart in drawn for curve in chart.curves for step in curve.points.steps]
    margin = max(0.5, 0.03 * (max(steps) - min(steps)))
    return min(steps) - margin, max(steps) + margin


STATE = "trainer_state.json"
logger = logging.getLogger(__name__)


class Series(NamedTuple):
    """A metric over the steps."""

    steps: tuple[int, ...]
    """Optimizer steps, ascending, each once."""
    values: tuple[float, ...]
    """As logged; NaN where the log has a NaN or nothing."""


@dataclass(frozen=True)
class RunLog:
    """The metrics of a run by name."""

    name: str
    """How the run is called in plots."""
    series: dict[str, Series]
    """By the metric's name in the log; only metrics with at least one number."""

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
                if metric in ("step", "epoch") or isinstance(value, (bool, str)):
                    continue
                if value is None or isinstance(value, (int, float)):  # None is how TRL logs a mean of nothing
                    found.setdefault(metric, {})[int(entry["step"])] = math.nan if value is None else float(value)
        return cls(
            name,
            {
                metric: Series(*zip(*sorted(points.items()), strict=True))
                for metric, points in found.items()
                if not all(map(math.isnan, points.values()))
            },
        )

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
        logs = [read_state(path) for path in states(folder)]
        if not logs:
            raise FileNotFoundError(
                f"{folder} has no log: neither a {STATE} nor a whole checkpoint with one. Call `trainer.save_state()` "
                "after training, or train with save_strategy='steps'; then plot that folder."
            )
        newest = max(logs, key=lambda state: state["global_step"])
        return cls.of(newest["log_history"], folder.resolve().name if name is None else name)


def states(folder: Path) -> list[Path]:
    """The files that may hold the folder's log: its own, and its newest whole checkpoint's."""
    own = [folder / STATE] if (folder / STATE).is_file() else []
    checkpoint, passed_over = last_whole(folder)
    if checkpoint is None and not any((path / SEAL).exists() for path in passed_over):
        # another trainer's, which seals none: its log is written after the weights
        checkpoint = next((path for path in passed_over if (path / STATE).is_file()), None)
    elif not own:
        for path, reason in passed_over.items():
            logger.warning("%s is passed over: %s.", path, reason)
    return own if checkpoint is None else [*own, checkpoint / STATE]


def read_state(path: Path) -> dict[str, Any]:
    """A trainer's state as JSON; a file that is none is named in the error."""
    try:
        state = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no log of a trainer: {error}. Delete it, or copy it again from the run.") from None
    if not isinstance(state, dict) or not {"log_history", "global_step"} <= state.keys():
        raise ValueError(f"{path} is no log of a trainer: it has no `log_history` and `global_step`.")
    return state
