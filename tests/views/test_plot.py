"""The plots of runs: what is drawn is what the log says, in the PNG's figure and in the page, which fetches nothing."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape

import pytest
from documents import ROOT

from sg_opd import SGOPDConfig, SGOPDTrainer
from sg_opd.checkpoints.folders import SEAL, seal
from sg_opd.evaluation import EvaluationCallback
from sg_opd.training import METRICS
from sg_opd.views.curves import DEFINITIONS, PANELS, RunLog, charts
from sg_opd.views.plot import interactive_figures, page, plot_runs, static_figure

NAN = math.nan
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# of a run without evaluation or phase, as TRL's GRPOTrainer or DistillationTrainer logs one
BARE = [
    {"step": step, "epoch": 0.1, "loss": loss, "entropy": 0.5, "completions/clipped_ratio": 0.25, "reward": 0.5}
    for step, loss in ((1, 0.3), (2, 0.2))
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, pair, tokenizer, dataset):
    """A real run of four steps: a teacher phase, evaluations, checkpoints of steps 2 and 4; its folder and its log."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    trainer = SGOPDTrainer(
        model=str(pair / "student"),
        teacher_model=str(pair / "teacher"),
        args=SGOPDConfig(
            output_dir=str(folder),
            max_steps=4,
            teacher_phase_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_steps=2,
            report_to="none",
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.add_callback(EvaluationCallback(trainer, dataset.select(range(2)), num_samples=4, every_steps=2))
    trainer.train()
    return folder, trainer.state.log_history


def logged(history, metric):
    points = {entry["step"]: entry[metric] for entry in history if metric in entry}
    return list(points), list(points.values())


def matplotlib_lines(runs):
    """By title and label, the points of each line."""
    return {
        (axes.get_title(), line.get_label()): tuple(map(list, line.get_data()))
        for axes in static_figure(runs).axes
        for line in axes.get_lines()
    }


def plotly_lines(runs):
    return {
        (chart.title, trace.name): (list(trace.x), list(trace.y))
        for chart, figure in zip(charts(runs), interactive_figures(runs), strict=True)
        for trace in figure.data
    }


# what a run with everything must show: panel and label, and the metric in the log
SHOWN = {
    ("Correct rollouts", "in training"): "verdict/correct",
    ("Held-out questions", "avg@4"): "eval_avg@4",
    ("Held-out questions", "pass@2"): "eval_pass@2",
    ("Held-out questions", "pass@4"): "eval_pass@4",
    ("Held-out questions", "maj@4"): "eval_maj@4",
    ("Gate", "consensus"): "gate/consensus",
    ("Gate", "conflict"): "gate/conflict",
    ("Gate", "neutral"): "gate/neutral",
    ("Gate by log-ratio", "consensus"): "gate/consensus_delta",
    ("Gate by log-ratio", "conflict"): "gate/conflict_delta",
    ("Log-ratio of teacher to student", "median, with 5 % to 95 %"): "delta/p50",
    ("Tails of the log-ratio", "99 %"): "delta/p99",
    ("Tails of the log-ratio", "1 %"): "delta/p01",
    ("Largest 1 % of log-ratios", "delta/top_share"): "delta/top_share",
    ("Teacher phase", "slots, of all rollouts"): "teacher/slot_share",
    ("Teacher phase", "endorsed, of the slots"): "teacher/endorsed",
    ("Entropy", "entropy"): "entropy",
    ("Completion length", "all"): "completions/mean_length",
    ("Completion length", "ended by themselves"): "completions/mean_terminated_length",
    ("Cut-off completions", "completions/clipped_ratio"): "completions/clipped_ratio",
    ("Loss", "loss"): "loss",
    ("Gradient norm", "grad_norm"): "grad_norm",
}


def test_both_figures_show_the_values_of_the_log(run):
    folder, history = run
    expected = {place: logged(history, metric) for place, metric in SHOWN.items()}
    assert expected["Correct rollouts", "in training"][0] == [1, 2, 3, 4]
    assert expected["Held-out questions", "avg@4"][0] == [2, 4]
    runs = [RunLog.read(folder)]
    assert matplotlib_lines(runs) == expected
    drawn = plotly_lines(runs)
    for edge, metric in (("95 %", "delta/p95"), ("5 %", "delta/p05")):
        title = "Log-ratio of teacher to student"
        assert drawn.pop((title, f"median, with 5 % to 95 %, {edge}")) == logged(history, metric)
    assert drawn == expected


def test_the_band_is_between_the_quantiles(run):
    folder, history = run
    (axes,) = [a for a in static_figure([RunLog.read(folder)]).axes if a.get_title().startswith("Log-ratio")]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    edges = [zip(*logged(history, metric), strict=True) for metric in ("delta/p05", "delta/p95")]
    assert corners == {point for edge in edges for point in edge}


@pytest.mark.parametrize("missing", [[], ["delta/p05"], ["delta/p05", "delta/p95"]])
def test_a_band_has_both_edges_at_every_step(missing):
    """The second step lacks some quantiles: the median's line is whole, and a band has two edges of one length."""
    first = {"step": 1, "delta/p05": -1.0, "delta/p50": 0.0, "delta/p95": 1.0}
    second = {name: value for name, value in first.items() if name not in missing} | {"step": 2}
    (chart,) = charts([RunLog.of([first, second], "run")])
    (curve,) = chart.curves
    assert curve.points == ((1, 2), (0.0, 0.0))
    expected = {0: (((1, 2), (-1.0, -1.0)), ((1, 2), (1.0, 1.0))), 1: None, 2: (((1,), (-1.0,)), ((1,), (1.0,)))}
    assert curve.band == expected[len(missing)]
    assert chart.legend == (curve.band is not None)


def test_consensus_conflict_and_neutral_have_their_colours_everywhere(run):
    runs = [RunLog.read(run[0])]
    colours = {"consensus": "#0072B2", "conflict": "#D55E00", "neutral": "#7F7F7F"}
    (axes,) = [a for a in static_figure(runs).axes if a.get_title() == "Gate"]
    assert {line.get_label(): line.get_color() for line in axes.get_lines()} == colours
    (figure,) = [f for c, f in zip(charts(runs), interactive_figures(runs), strict=True) if c.title == "Gate"]
    assert {trace.name: trace.line.color for trace in figure.data} == colours


def test_every_line_of_a_panel_has_its_own_colour(run):
    for chart in charts([RunLog.read(run[0])]):
        assert len({curve.colour for curve in chart.curves}) == len(chart.curves), chart.title


def test_several_runs_have_a_line_each_where_they_have_the_metric(run):
    folder, history = run
    runs = [RunLog.read(folder, "ours"), RunLog.of(BARE, "GRPO")]
    drawn = matplotlib_lines(runs)
    assert drawn == {place: v for place, v in plotly_lines(runs).items() if not place[1].endswith(" %")}
    assert drawn["Entropy", "ours"] == logged(history, "entropy")
    assert drawn["Entropy", "GRPO"] == ([1, 2], [0.5, 0.5])
    assert drawn["Gate: conflict", "ours"] == logged(history, "gate/conflict")
    assert ("Gate: conflict", "GRPO") not in drawn
    # the reward stands for the accuracy where not every run logs verdicts
    assert drawn["Mean reward", "GRPO"] == ([1, 2], [0.5, 0.5])
    assert ("Mean reward", "ours") in drawn
    styles = {
        (line.get_label(), line.get_color(), line.get_linestyle())
        for axes in static_figure(runs).axes
        for line in axes.get_lines()
    }
    assert styles == {("ours", "#0072B2", "-"), ("GRPO", "#D55E00", "--")}
    assert [text.get_text() for text in static_figure(runs).legends[0].get_texts()] == ["ours", "GRPO"]
    assert re.findall(r'class="key">.*?</svg>(\w+)', page(runs)) == ["ours", "GRPO"]


def test_panels_without_metrics_are_left_out():
    assert [chart.title for chart in charts([RunLog.of(BARE, "GRPO")])] == [
        "Mean reward", "Entropy", "Cut-off completions", "Loss",
    ]  # fmt: skip
    phase_off = [{"step": 1, "teacher/slot_share": 0.0, "loss": 1.0}]
    assert [chart.title for chart in charts([RunLog.of(phase_off, "opd")])] == ["Loss"]
    with pytest.raises(ValueError, match="log of late has no metric to plot"):
        charts([RunLog.of([{"step": 3, "train_runtime": 2.0}], "late")])


def test_evaluations_of_several_datasets_have_a_line_each():
    history = [{"step": 1, "verdict/correct": 0.1, "eval_math_verdict/correct": 0.2, "eval_verdict/correct": 0.3}]
    (chart,) = charts([RunLog.of(history, "run")])
    assert {curve.label: curve.points.values for curve in chart.curves} == {
        "in training": (0.1,), "in evaluation math": (0.2,), "in evaluation": (0.3,),
    }  # fmt: skip


def test_repeated_steps_gaps_and_words():
    """Steps 2 and 4 were logged, lost in a kill, and 2 logged again. TRL logs None for no value, others NaN."""
    history = [
        {"step": 1, "loss": 4.0, "entropy": None, "note": "x", "flag": True},
        {"step": 2, "loss": 3.0, "entropy": None},
        {"step": 4, "loss": NAN, "epoch": 1},
        {"step": 2, "loss": 2.5},
        {"step": 3, "loss": 2.0},
    ]
    log = RunLog.of(json.loads(json.dumps(history)), "run")
    assert log.series.keys() == {"loss"}
    assert log.series["loss"].steps == (1, 2, 3, 4)
    assert log.series["loss"].values == pytest.approx((4.0, 2.5, 2.0, NAN), nan_ok=True)
    (_, values) = plotly_lines([log])["Loss", "loss"]
    assert values == pytest.approx([4.0, 2.5, 2.0, NAN], nan_ok=True)


def test_a_single_step_is_a_point_that_is_seen(tmp_path):
    runs = [RunLog.of([{"step": 5, "loss": 1.0}], "short")]
    axes = static_figure(runs).axes[0]
    (line,) = axes.get_lines()
    assert line.get_marker() == "o"
    assert axes.get_xlim() == (4.5, 5.5)
    (figure,) = interactive_figures(runs)
    assert figure.data[0].mode == "lines+markers"
    assert figure.layout.xaxis.range == (4.5, 5.5)
    assert plot_runs(runs, tmp_path / "curves")[0].stat().st_size > 1000


def test_the_log_of_the_highest_step_counts(run, tmp_path):
    """The newest whole checkpoint; a later one that was not sealed is passed over; then what `save_state` wrote."""
    folder, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert max(RunLog.read(copy).series["loss"].steps) == 4
    (copy / "checkpoint-4" / SEAL).unlink()
    assert max(RunLog.read(copy).series["loss"].steps) == 2
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    (copy / "trainer_state.json").write_text(json.dumps(state | {"log_history": [{"step": 4, "loss": 9.0}]}))
    assert RunLog.read(copy).series["loss"] == ((4,), (9.0,))
    (copy / "trainer_state.json").write_text(json.dumps(state | {"log_history": [], "global_step": 1}))
    assert max(RunLog.read(copy).series["loss"].steps) == 2


def test_checkpoints_of_another_trainer_have_no_seal(tmp_path):
    for step, value in ((2, 1.0), (10, 2.0)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        content = {"global_step": step, "log_history": [{"step": step, "loss": value}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(content))
    (tmp_path / "checkpoint-11").mkdir()  # killed before its log was written
    assert RunLog.read(tmp_path).series["loss"] == ((10,), (2.0,))
    seal(tmp_path / "checkpoint-2", {})  # one is sealed, so the others should be
    assert RunLog.read(tmp_path).series["loss"] == ((2,), (1.0,))


def test_folders_without_a_log_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        RunLog.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no log.*trainer\.save_state\(\)"):
        RunLog.read(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3, "log_hist')
    with pytest.raises(ValueError, match=r"trainer_state\.json is no log of a trainer: Unterminated"):
        RunLog.read(tmp_path)
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="has no `log_history`"):
        RunLog.read(tmp_path)


def test_arguments_that_do_not_fit(run, tmp_path):
    log = RunLog.of(BARE, "one")
    with pytest.raises(ValueError, match="Two runs are called 'one'"):
        plot_runs([log, log], tmp_path / "curves")
    with pytest.raises(ValueError, match="`names` has 1 for 2 runs"):
        plot_runs([log, log], tmp_path / "curves", names=["one"])
    with pytest.raises(ValueError, match="Set `output`"):
        plot_runs([log])
    with pytest.raises(ValueError, match="`runs` is empty"):
        plot_runs([], tmp_path / "curves")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ("matplotlib", r'need matplotlib, which is not installed: pip install "sg-opd\[plot\]"'),
        ("plotly", r'need plotly, which is not installed: pip install "sg-opd\[plot\]"'),
        ("_plotly_utils", "No module named '_plotly_utils'"),  # a broken plotly, which the extra would not mend
    ],
)
def test_a_missing_library_is_named_with_its_extra(hidden, message, tmp_path):
    """In a process that cannot find it, as where it is not installed."""
    code = f"""
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from sg_opd.views import plot_runs
from sg_opd.views import RunLog
plot_runs([RunLog.of([{{"step": 1, "loss": 1.0}}], "one")], "curves")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert re.search(message, done.stderr.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_the_command(run, tmp_path):
    """A real process: by default into the folder; several runs with names; an error in one line."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    command = [sys.executable, "-m", "sg_opd.views.plot"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.stdout.split() == ["written:", f"{folder}/curves.png", "written:", f"{folder}/curves.html"], done.stderr
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    several = [*command, folder, run[0], "--names", "a", "b", "--output", tmp_path / "new" / "run-0.5"]
    assert subprocess.run(several, capture_output=True).returncode == 0
    assert (tmp_path / "new" / "run-0.5.png").exists()
    assert "<h1>a, b</h1>" in (tmp_path / "new" / "run-0.5.html").read_text()
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"python -m sg_opd.views.plot: error: {tmp_path} has no log")


def test_names_are_text_to_the_page_and_to_the_picture(tmp_path):
    """A folder may be called anything; metrics come from a file."""
    hostile = "<img src=x onerror=alert(1)></script>$x_$"
    history = [{"step": 1, "loss": 1.0, "eval_<b>_verdict/correct": 0.5, "verdict/correct": 0.5}]
    runs = [RunLog.of(history, hostile), RunLog.of(history, "<a href='http://a.b'>other</a>")]
    text = page(runs)
    own = text.replace(library(), "")
    assert not re.search(r"<(img|a|b)\b", own)
    assert own.count("</script>") == 1 + len(charts(runs))  # the library's, and one a chart
    assert "&lt;img src=x onerror=alert(1)&gt;" in own
    static_figure(runs).savefig(tmp_path / "curves.png")  # a $ alone would be read as a formula, and fail


def library():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_the_page_names_nothing_outside_of_it(run):
    own = page([RunLog.read(run[0])]).replace(library(), "")
    assert not re.search(r"""(?:https?:)?//\w|<link|<iframe|\ssrc=|@import|url\(""", own)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', own)
    directives = dict(part.split(maxsplit=1) for part in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    assert {source for sources in directives.values() for source in sources.split()} == {
        "'none'", "'unsafe-inline'", "data:", "blob:",
    }  # fmt: skip
    assert "<code>gate/conflict</code>: " + METRICS["gate/conflict"].replace("<", "&lt;") in own


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_draws_the_page_from_the_file_alone(run, tmp_path):
    """Under the page's policy: no refusal, no error on its console, and in each panel its lines and the legend's words,
    one of which would be markup to plotly."""
    log = RunLog.read(run[0])
    odd = {"eval_<b>odd</b>_verdict/correct": log.series["eval_avg@4"]}
    runs = [replace(log, series=log.series | odd)]
    (tmp_path / "curves.html").write_text(page(runs))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "curves.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    sections = done.stdout.split("<section>")[1:]
    assert len(sections) == len(charts(runs))
    for chart, section in zip(charts(runs), sections, strict=True):
        lines = re.findall(r'class="js-line"[^>]* d="M[^"]+"|<path class="point"', section)
        assert len(lines) >= len(chart.curves), chart.title
        buttons = re.findall(r'data-title="([^"]*)"', section)  # none of them shares the chart with plotly's cloud
        assert buttons == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]
        legend = re.findall(r'class="legendtext"[^>]*>(.*?)</text>', section)
        assert [unescape(text) for text in legend] == ([curve.label for curve in chart.curves] if chart.legend else [])


def test_the_panels_to_pin_are_metrics_of_ours_or_plotted():
    """The integrations of transformers put `train/` or `eval/` in front."""
    from transformers.integrations.integration_utils import rewrite_logs

    text = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`((?:train|eval)/[\w/@]+)`", text))
    known = {*DEFINITIONS, "eval_avg@8", "eval_pass@8"}
    assert len(named) > 10
    assert named <= rewrite_logs(dict.fromkeys(known, 0.0)).keys()


def test_each_line_has_one_definition():
    """Of this package's metrics or of the plots' own, which have no others; a band's edges are metrics of ours."""
    lines = [line for lines in PANELS.values() for line in lines]
    assert {line.metric for line in lines} - METRICS.keys() == DEFINITIONS.keys() - METRICS.keys()
    assert METRICS.items() <= DEFINITIONS.items()
    assert {edge for line in lines for edge in line.band} <= METRICS.keys()
