"""The family of gates: its plan, its runs on two machines, where it finds conflict, and its tables."""

import json
import re
import tarfile
from concurrent.futures import Future
from dataclasses import asdict, fields

import arms
import conflicts
import family
import family_report
import numpy as np
import pytest
import report
import worlds
from design import PLANS, Cell, Run
from documents import ROOT
from pages import filled
from test_study import result

from sg_opd import SGOPDConfig

SMALL = family.SIZES["small"]
LOGGED = {"step": 5, "verdict/correct": 0.5, "entropy": 0.1, "gate/uniform_groups": 0.25}
LOGGED |= {"completions/mean_length": 30.0, "completions/clipped_ratio": 0.0}
RECORD = {"cpu_seconds": 90.0, "history": [LOGGED]}


def names(plan=SMALL, folder=ROOT / "runs" / "nowhere"):
    return [name for _, name, *_ in family.Family(folder, "small", plan).jobs()]


def test_the_plan_has_the_arms_and_seeds_that_were_asked_for():
    """Five seeds for the first four arms, three for the others, in both worlds; every run once a part."""
    counts = {}
    for part in family.parts(SMALL):
        for cell in part.cells:
            counts.setdefault(part.name, {})[cell.arm, cell.world] = cell.seeds
    assert counts[family.FIRST] == {(arm, world): 5 for arm in family.MAIN for world in family.BOTH}
    assert counts[family.OTHER] == {(arm, world): 3 for arm in family.OTHERS for world in family.BOTH}
    used = {cell.arm for part in family.parts(SMALL) for cell in part.cells}
    assert counts[family.ESTIMATOR] == {(arm, world): 5 for arm in family.ESTIMATORS for world in family.BOTH}
    assert counts[family.SELF] == {(arm, "arithmetic"): 3 for arm in family.SELVES}
    assert used == set(arms.FAMILY)
    runs = [name for name in names() if "lr=" in name]
    # OPD's choosing seeds are the main arm's first two, and the other rate's; of the estimators two are there already
    assert len(set(runs)) == 8 + 36 + 48 + 14 + 12 + 8 + (4 + 20) + 6
    assert all("num_generations=8" in run for run in runs)


def test_a_cut_leaves_whole_comparisons():
    """The main arms' first seed is done for all of them before any has a second."""
    runs = [name for name in names() if "lr=0.0002,seed=" in name and "steps=60" in name]
    first = max(runs.index(run) for run in runs if "seed=0" in run and run.split("/")[1].split(",")[0] in family.MAIN)
    later = min(runs.index(run) for run in runs if "seed=1" in run and "/sg-opd," in run)
    assert first < later


def test_gated_and_not_gated_factors():
    settings = [dict(changes) for changes in family.factors()]
    pairs = [(s["gate_extrapolation"], s["gate_interpolation"], s.get("gate_signal")) for s in settings]
    assert sorted(pairs, key=str) == [
        (1.0, 1.0, None),
        (1.25, 1.0, "group"),
        (1.25, 1.25, None),
        (1.8, 1.0, "group"),
        (1.8, 1.8, None),
        (2.5, 1.0, "group"),
        (2.5, 2.5, None),
    ]


@pytest.mark.parametrize("arm", [name for name, arm in arms.FAMILY.items() if arm.trainer != "grpo"])
def test_every_arm_is_a_configuration(arm, tmp_path):
    settings = {"estimator": "full", "num_generations": 8, **arms.FAMILY[arm].settings}
    config = SGOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert config.estimator == family_report.estimator(arm)
    assert family_report.estimator("grpo") == "sampled"


def test_the_arms_without_a_name_of_their_own_are_what_they_say(tmp_path):
    """`sign` is sg-opd-lite without its phase."""
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    sign = SGOPDConfig(**common, **arms.FAMILY["sign"].settings)
    lite = SGOPDConfig(**common, preset="sg-opd-lite", teacher_phase_steps=0)
    apart = {field.name for field in fields(sign) if getattr(sign, field.name) != getattr(lite, field.name)}
    assert apart == {"preset"}
    assert lite.gate_signal == "verdict"
    assert lite.reference_policy == "current"


def test_runs_of_a_second_machine_are_taken_over_but_never_mixed(tmp_path):
    """Of three runs there one is new, one is there already, one was begun here: only the new one comes over."""
    there, here = tmp_path / "there", tmp_path / "here"
    for run in ("new", "known", "begun"):
        (there / run).mkdir(parents=True)
        for file in ("train.json", "test.json"):
            (there / run / file).write_text(json.dumps({"from": "there"}))
        for file in ("model.safetensors", "config.json"):
            (there / run / file).write_text("of the model")
    for run, files in (("known", ("train.json", "test.json")), ("begun", ("train.json",))):
        (here / run).mkdir(parents=True)
        for file in files:
            (here / run / file).write_text(json.dumps({"from": "here"}))
    assert family.pack(there, tmp_path / "records.tar.gz") == 6
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        assert not [name for name in archive.getnames() if not name.endswith(("train.json", "test.json"))]
    assert family.unpack(tmp_path / "records.tar.gz", here) == 2
    origins = {path.relative_to(here).as_posix(): json.loads(path.read_text())["from"] for path in here.rglob("*.json")}
    assert origins == {
        "new/train.json": "there",
        "new/test.json": "there",
        "known/train.json": "here",
        "known/test.json": "here",
        "begun/train.json": "here",
    }


def test_results_by_seed_and_differences_over_shared_seeds(tmp_path):
    """OPD has the seeds 0 and 2, of 8 samples 4 and 2 right; R2-OPD 2 and 3, of 8 samples 6: +50 from seed 2 alone."""
    runs, part = family.Family(tmp_path, "small", SMALL), family.parts(SMALL)[2]
    for arm, known in (("opd", {0: 4, 2: 2}), ("r2-opd", {2: 6, 3: 6})):
        for seed, right in known.items():
            folder = tmp_path / runs.run(part, Cell("equations", arm, 5, family.GROUP), seed).name
            folder.mkdir(parents=True)
            (folder / "train.json").write_text(json.dumps({"run": {"learning_rate": 0.1, "steps": 1}} | RECORD))
            result([[i < right for i in range(8)]] * 9).to_json(folder / "test.json")
    for world in family.BOTH:
        (tmp_path / world / "student").mkdir(parents=True, exist_ok=True)
        result([[1] * 8]).to_json(tmp_path / world / "student" / "test.json")
    content = family_report.Content(runs)
    opd, r2_opd = (runs.results(part, Cell("equations", arm, 5, family.GROUP)) for arm in ("opd", "r2-opd"))
    assert {seed: one.figures["avg@8"].mean for seed, one in opd.items()} == {0: 50.0, 2: 25.0}
    entry = content.entry(part, Cell("equations", "r2-opd", 5, family.GROUP), opd)
    assert list(r2_opd) == entry["seeds"] == [2, 3]
    assert entry["shared_seeds"] == [2]
    assert entry["minus_opd"]["avg@8"]["mean"] == 50.0


def test_a_second_machine_begins_elsewhere(monkeypatch, tmp_path):
    """And goes round; nothing is left out."""
    done = []
    monkeypatch.setattr(family, "ProcessPoolExecutor", lambda *args, **kwargs: AtOnce(done))
    runs = family.Family(tmp_path, "small", SMALL)
    assert runs.go(1, 1.0, begin=family.OTHER) == []
    assert done[0].startswith("equations/opdvr,")
    assert set(done) == set(names())


class AtOnce:
    """Executes nothing, at once, and leaves the files of a run's name."""

    def __init__(self, done):
        self.done = done

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, job, *given):
        files, folder = given[1], given[-1] / (given[0].name if job is family.finish else f"{given[0]}/{given[1]}")
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("train.json", *(files if job is family.finish else ("test.json", "conflicts.json"))):
            (folder / file).write_text("{}")
        self.done.append(str(folder.relative_to(given[-1])))
        future = Future()
        future.set_result("done")
        return future


def test_no_run_begins_after_the_time(tmp_path):
    runs = family.Family(tmp_path, "small", SMALL)
    assert runs.go(1, -1.0) == []
    assert list(tmp_path.rglob("*.json")) == []


def test_conflicts_by_hand():
    """Two rollouts of one question, a right and a wrong one, and a question whose only rollout is wrong."""

    def rollout(question, right, delta):
        delta = np.array(delta)
        return conflicts.Scored(question, right, delta, np.sign((1 if right else -1) * delta).astype(int))

    found = conflicts.shares(
        [
            rollout(0, True, [0.5, -0.5, 0.0005, 2.0, 2.0]),  # conflict: the second
            rollout(0, False, [0.5, -2.0]),  # the first
            rollout(1, False, [0.05, 0.05, -0.05, -0.05, -0.05]),  # the first two, in a uniform group
        ]
    )
    assert found["rollouts"] == 3
    assert found["right"] == pytest.approx(1 / 3)
    assert found["uniform_groups"] == 0.5
    every = found["all"]
    assert every["conflict"] == pytest.approx(4 / 12, abs=1e-4)
    assert every["conflict_right"] == pytest.approx(1 / 5)
    assert every["conflict_wrong"] == pytest.approx(3 / 7, abs=1e-4)
    assert every["conflict_group"] == pytest.approx(2 / 12, abs=1e-4)
    assert every["conflict_mass"] == pytest.approx(1.1 / 7.7505, abs=1e-4)
    sizes = found["size"]  # under 0.001: one token; 0.01 to 0.1: five; 0.1 to 1: three; over 1: three
    assert [round(12 * cell["tokens"]) for cell in sizes] == [1, 0, 5, 3, 3]
    assert [cell["conflict"] for cell in sizes] == [0.0, None, 0.4, pytest.approx(2 / 3, abs=1e-4), 0.0]
    # of five parts the rollout of two tokens has its tokens in the first and the third
    assert [round(12 * cell["tokens"]) for cell in found["place"]] == [3, 2, 3, 2, 2]


def test_scored_rollouts_are_the_models_own():
    """A model that is its own teacher has no preference, so no conflict; its rollouts are graded as in training."""
    world = next(world for world in worlds.small(ROOT) if world.name == "equations")
    found = conflicts.scored(world, world.teacher, questions=2)
    assert len(found) == 2 * conflicts.GROUP
    assert {rollout.question for rollout in found} == {0, 1}
    assert all(np.abs(rollout.delta).max() < 1e-5 for rollout in found)
    assert any(rollout.right for rollout in found)


def test_the_results_page_has_the_tables_of_the_committed_family():
    page = (ROOT / "docs" / "results.md").read_text()
    made = family_report.tables(json.loads((family.RESULTS / "family.json").read_text()))
    assert filled(page, made, whole=False) == page
    study = report.tables(json.loads((family.RESULTS / "study.json").read_text()))
    assert sorted(re.findall(r"<!-- table: (.+?) -->", page)) == sorted([*made, *study])


def test_a_page_of_two_benchmarks_keeps_the_other_ones_tables():
    page = "<!-- table: a -->\nold\n<!-- end -->\n<!-- table: b -->\nold\n<!-- end -->"
    assert filled(page, {"a": "new"}, whole=False) == page.replace("old", "new", 1)
    assert filled(page, {"a": "new"}) == page.replace("old", "new", 1).replace("old", "Not run yet.")


def test_the_rate_is_the_one_that_opd_chose():
    content = json.loads((family.RESULTS / "family.json").read_text())
    means = {rate: sum(content["rates"][world][f"{rate:g}"] for world in family.BOTH) / 2 for rate in family.RATES}
    assert max(means, key=means.__getitem__) == family.CHOSEN


def test_baselines_have_the_same_estimator():
    expected = {
        "sg-opd": "opd",
        "power-opd": "opd-sampled",
        "grpo": "opd-sampled",
        "opd-sampled": "opd",
        "r2-opd": "opd",
        "opd-top-4": "opd",
        "reader-lite": "opd",
    }
    assert {arm: family_report.baseline(arm) for arm in expected} == expected


def recorded(folder, right):
    """Records of a whole quick study below a folder: `right(name)` samples of eight are right in each question."""
    runs = family.Family(folder, "small", family.SIZES["quick"])
    for _, name, files, _, given in runs.jobs():
        files[0].parent.mkdir(parents=True, exist_ok=True)
        run = asdict(given[0]) if "lr=" in name else {}
        (files[0].parent / "train.json").write_text(json.dumps({"run": run} | RECORD))
        for file in ("test.json", "validation.json"):
            result([[i < right(name) for i in range(8)]] * 9).to_json(files[0].parent / file)
        one = conflicts.Scored(0, True, np.array([0.5, -0.5]), np.array([1, -1]))
        (files[0].parent / "conflicts.json").write_text(json.dumps(conflicts.shares([one])))
    return runs


def test_the_tables_of_known_records(tmp_path):
    """The student had 2 of 8 right, SG-OPD 6, GRPO 1, top_k 4 3, OPD 5 (with the other rate 3), all others 4."""

    def right(name):
        known = {"student": 2, "sg-opd": 6, "grpo": 1, "opd-top-4": 3, "opd": 5 if "lr=0.0002" in name else 3}
        return known.get(name.split("/")[1].split(",")[0], 4)

    made = family_report.tables(family_report.Content(recorded(tmp_path, right)).content())

    def row(table, *start):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in made[table].splitlines()]
        (found,) = (cells[len(start) :] for cells in lines if tuple(cells[: len(start)]) == start)
        return found

    everywhere = "{0:+.1f} [{0:+.1f}, {0:+.1f}]".format
    exact = "75.0 [75.0, 75.0]", "100.0 [100.0, 100.0]"
    assert row("family, equations", "SG-OPD", "full") == [*exact, everywhere(12.5), everywhere(0), "1", "1.5"]
    assert row("family, arithmetic", "GRPO, verifier alone", "sampled")[2] == everywhere(-37.5)  # OPD, sampled has 4
    assert row("family, arithmetic", "OPD", "full")[2:4] == ["", ""]
    assert row("family, learning rate", "equations") == ["62.5", "37.5"]
    assert row("family, learning rate", "mean") == ["62.5", "37.5"]
    assert row("family, other rate", "arithmetic", "SG-OPD", "rate 0.0005")[4:] == ["0.25", "", "", "0", "1"]
    assert row("family, other rate", "arithmetic", "SG-OPD", "rate 0.0005")[2] == everywhere(37.5)  # OPD has 3 there
    assert row("family, signal", "equations", "sign gate", "group sign")[2] == everywhere(-12.5)
    assert row("family, estimators, arithmetic", "top_k, k = 4")[2:] == [everywhere(-12.5), everywhere(-25), "1", "1.5"]
    assert row("family, estimators, arithmetic", "full")[2:4] == [everywhere(12.5), ""]
    assert row("family, estimators, equations", "sampled")[2:4] == ["", everywhere(-12.5)]
    assert row("family, self", "after, SG-OPD lite")[0] == everywhere(50).replace("+", "")
    factor = row("family, factors, equations", "1.8", "group sign")
    assert factor[2:] == [everywhere(0), everywhere(0), "0.1", "30", "0", "no"]
    conflict = row("family, conflicts by size, equations", "after OPD", "0.1 to 1")
    assert conflict == ["100 %", "100 %", "50 %", "50 %", "50 %", "", "0 %"]
    assert "family, habit, equations" in made
    assert "family, habit, arithmetic" not in made


def test_a_run_below_the_student_before_has_collapsed(tmp_path):
    content = family_report.Content(recorded(tmp_path, lambda name: 4 if "/student" in name else 3)).content()
    assert {entry["collapsed"] for entry in content[family.FACTOR]} == {1}
    assert all(line.endswith("| yes |") for line in family_report.factors_table(content, "equations").splitlines()[2:])


def test_a_run_is_trained_and_evaluated_in_one_go(tmp_path):
    """And not again; without its weights, as after `unpack`, what is missing is made anew."""
    worlds.tiny(tmp_path)[1].make_models()
    run = Run("equations", "opd-grpo", family.GROUP, 5e-4, 0, 1)
    given = run, ("validation.json", "test.json"), "tiny", PLANS["tiny"], tmp_path
    line = family.finish(*given)
    folder = tmp_path / run.name
    assert line.count("avg@8") == 2
    record = json.loads((folder / "train.json").read_text())
    assert record["run"]["changes"] == {"num_generations": 8}
    assert "avg@8" not in family.finish(*given)
    (folder / "model.safetensors").unlink()
    (folder / "test.json").unlink()
    assert family.finish(*given).count("avg@8") == 1
    assert json.loads((folder / "train.json").read_text())["seconds"] != record["seconds"]
