"""Draws the curves of one run or several, as a PNG and as a page that needs no network.

The command `python -m sg_opd.views.plot out/` and `plot_runs` write both; matplotlib draws the PNG, plotly the page.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from .curves import DASHES, Chart, RunLog, charts, style

COLUMNS = 3
PANEL_INCHES = (4.6, 3.1)
PANEL_PIXELS = 330
BAND_OPACITY = 0.18
FEW_POINTS = 60  # up to here each point is seen
# plotly's own choice of buttons has one that sends the data to its cloud
CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]]}
# how plotly shows a panel's values, by its kind
PLOTLY_AXES = {
    "number": {"rangemode": "normal", "hoverformat": ".4g"},
    "amount": {"rangemode": "tozero", "hoverformat": ".4g"},
    "share": {"rangemode": "tozero", "tickformat": ".3~%", "hoverformat": ".1%"},
}


def static_figure(runs: Sequence[RunLog]) -> Any:
    """All panels as one `matplotlib.figure.Figure`.

    Args:
        runs: one, or several to compare.

    Raises:
        ModuleNotFoundError: matplotlib (for the page, plotly) is not installed.
        ValueError: no run, two of one name, or none of their metrics is one that is plotted.
    """
    drawn = charts(runs)
    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    size = PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows
    figure = needed("matplotlib.figure").Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for place, chart in enumerate(drawn, 1):
        draw(figure.add_subplot(rows, columns, place), chart)
    if len(runs) > 1:
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=min(len(runs), 4))
    else:
        figure.suptitle(literal(runs[0].name))
    return figure


def draw(axes: Any, chart: Chart) -> None:
    """One chart with matplotlib."""
    ticker = needed("matplotlib.ticker")
    for label, colour, dash, points, band in chart.curves:
        size = 3.0 if len(points.steps) <= FEW_POINTS else 1.5  # never none: a point between gaps has no line
        look = {"color": colour, "linestyle": DASHES[dash][0], "marker": "o", "markersize": size}
        axes.plot(*points, label=literal(label), linewidth=1.5, **look)
        if band:
            axes.fill_between(*band[0], band[1].values, color=colour, alpha=BAND_OPACITY, linewidth=0)
    axes.set(title=literal(chart.title), xlabel="optimizer step", ylabel=chart.panel.axis, xlim=chart.steps)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if chart.panel.kind == "share":
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    if chart.panel.kind != "number":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.legend:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "frameon": False}
        axes.legend(ncols=min(len(chart.curves), 3), fontsize="small", **below)


def literal(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def interactive_figures(runs: Sequence[RunLog]) -> list[Any]:
    """Each panel as a `plotly.graph_objects.Figure`, of the same charts and with the same errors as `static_figure`.

    Args:
        runs: one, or several to compare.
    """
    return [interactive(chart) for chart in charts(runs)]


def interactive(chart: Chart) -> Any:
    """One chart with plotly."""
    figure = needed("plotly.graph_objects").Figure()
    for label, colour, dash, points, band in chart.curves:
        name = escape(label)  # markup to plotly
        if band:
            (x, low), (_, high) = band
            edge = {"x": x, "mode": "lines", "line_color": colour, "line_width": 0, "showlegend": False}
            shade = f"rgba{(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)), BAND_OPACITY)}"
            figure.add_scatter(y=high, name=f"{name}, 95 %", legendgroup=name, **edge)
            edge |= {"fill": "tonexty", "fillcolor": shade}
            figure.add_scatter(y=low, name=f"{name}, 5 %", legendgroup=name, **edge)
        look = {"mode": "lines+markers", "marker_size": 4 if len(points.steps) <= FEW_POINTS else 2, "line_dash": dash}
        figure.add_scatter(x=points.steps, y=points.values, name=name, legendgroup=name, line_color=colour, **look)
    figure.update_layout(
        template="plotly_white",
        height=PANEL_PIXELS,
        hovermode="x unified",
        showlegend=chart.legend,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    figure.update_xaxes(title_text="optimizer step", automargin=True, range=chart.steps)
    figure.update_yaxes(title_text=chart.panel.axis, automargin=True, **PLOTLY_AXES[chart.panel.kind])
    return figure


def page(runs: Sequence[RunLog]) -> str:
    """All panels as an HTML page with each metric's definition; plotly.js is within it, nothing is fetched.

    Args:
        runs: one, or several to compare; errors as `static_figure`.
    """
    # its policy has a browser refuse whatever lies outside of this file
    return Template((files(__package__) / "plot.html").read_text("utf-8")).substitute(
        title=escape(", ".join(run.name for run in runs)),
        library=needed("plotly.offline").get_plotlyjs(),
        keys="\n".join(key(run.name, *style(place)) for place, run in enumerate(runs) if len(runs) > 1),
        sections="\n".join(section(chart, place) for place, chart in enumerate(charts(runs))),
    )


def section(chart: Chart, place: int) -> str:
    """A chart of the page, with the definitions of its metrics."""
    by_text: dict[str, list[str]] = {}
    for metric, text in chart.about.items():
        by_text.setdefault(text, []).append(f"<code>{escape(metric)}</code>")
    about = "\n".join(f"<p>{', '.join(names)}: {escape(text)}</p>" for text, names in by_text.items())
    plot = interactive(chart).to_html(CONFIG, full_html=False, include_plotlyjs=False, div_id=f"panel{place}")
    return f"<section>\n<h2>{escape(chart.title)}</h2>\n{plot}\n{about}\n</section>"


def key(name: str, colour: str, dash: str) -> str:
    """A run's entry in the page's legend."""
    line = f'<path d="M0 6H32" stroke="{colour}" stroke-width="3" stroke-dasharray="{DASHES[dash][1]}"/>'
    return f'<span class="key"><svg width="32" height="12" aria-hidden="true">{line}</svg>{escape(name)}</span>'


def plot_runs(
    runs: Sequence[str | Path | RunLog], output: str | Path | None = None, names: Sequence[str] | None = None
) -> tuple[Path, Path]:
    """Write the plots of one run, or of several to compare.

    Args:
        runs: output folders, or logs as `RunLog.of(trainer.state.log_history, "name")`.
        output: the files to write, without their endings; default: `curves` in the first run's folder.
        names: of the runs, one each; default: their folders'.

    Returns:
        The PNG and the HTML page.

    Raises:
        FileNotFoundError: a folder that is not there, or holds no log.
        ModuleNotFoundError: matplotlib or plotly is not installed.
        ValueError: a log that cannot be read or has nothing to plot; runs of one name; no `output` for a `RunLog`.
    """
    if names is not None and len(names) != len(runs):
        raise ValueError(f"`names` has {len(names)} for {len(runs)} runs: give each run one.")
    logs = [run if isinstance(run, RunLog) else RunLog.read(run) for run in runs]
    logs = [replace(log, name=name) for log, name in zip(logs, names, strict=True)] if names else logs
    if output is None:
        if not runs or isinstance(runs[0], RunLog):
            raise ValueError("Set `output`: a log without a folder has no place for its plots.")
        output = Path(runs[0]) / "curves"
    base = Path(output)
    base = base.with_suffix("") if base.suffix in (".png", ".html") else base
    picture, html = base.with_name(f"{base.name}.png"), base.with_name(f"{base.name}.html")
    figure, text = static_figure(logs), page(logs)
    base.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    html.write_text(text, encoding="utf-8")
    return picture, html


def needed(module: str) -> Any:
    """A module of the extra `plot`; where it is not installed, the error says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name != library:
            raise
        message = f'Plots need {library}, which is not installed: pip install "sg-opd[plot]".'
        raise ModuleNotFoundError(message, name=library) from None


def command_line() -> argparse.ArgumentParser:
    """The options of `python -m sg_opd.views.plot`."""
    parser = argparse.ArgumentParser(
        prog="python -m sg_opd.views.plot",
        description="Plot the metrics of a run, or compare several: a PNG, and a page that needs no network.",
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="folder", help="a run's output_dir, or one of its checkpoints")
    add("--output", metavar="PATH", help="write PATH.png and PATH.html; default: `curves` in the first folder")
    add("--names", nargs="+", metavar="NAME", help="of the runs, one each; default: the folders' names")
    return parser


def main() -> None:
    """Plot what the command line names."""
    parser = command_line()
    options = parser.parse_args()
    try:
        written = plot_runs(options.folders, options.output, options.names)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(*(f"written: {path}" for path in written), sep="\n")


if __name__ == "__main__":
    main()
