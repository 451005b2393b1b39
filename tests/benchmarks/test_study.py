"""The study: its worlds, the arms that only it has, its plan, and what its report makes of known results."""

import json
import os
import re
import subprocess
import sys
from random import Random

import arms
import design
import equations
import pytest
import report
import study
import torch
import worlds
from documents import ROOT
from pages import filled

from sg_opd import MathVerifier
from sg_opd.evaluation.figures import Sample
from sg_opd.evaluation.results import EvaluationResult
from sg_opd.method.teacher_phase import Proposal

SMALL = worlds.small(ROOT)


def graded(problems):
    completions = [[{"role": "assistant", "content": p["solution"]}] for p in problems]
    return MathVerifier()(completions=completions, solution=[p["answer"] for p in problems])


def test_equations_are_solved_by_their_answers():
    """Put into both sides, the answer makes them equal; the worked solution is graded correct."""
    problems = equations.make_problems(200, seed=1)
    for problem in problems:
        left, right = re.fullmatch(r"Solve (.*)=(.*)\.", problem["question"]).groups()
        x = f"*({problem['answer']})"
        assert eval(left.replace("x", x)) == eval(right.replace("x", x))
    assert graded(problems) == [1.0] * 200


def test_the_equations_teacher_drops_the_sign_of_negative_solutions_only():
    problems = equations.make_problems(200, seed=1, dropped=1.0)
    assert graded(problems) == [float(int(problem["answer"]) > 0) for problem in problems]
    slips = graded(equations.make_problems(200, seed=1, slip=0.5))
    assert 0.02 < sum(slips) / 200 < 0.35  # 0.5 ** 3, and slips that are undone


@pytest.mark.parametrize("world", SMALL, ids=lambda w: w.name)
def test_no_question_is_in_two_splits_or_was_taught(world):
    splits = {
        name: {row["prompt"][0]["content"] for row in world.split(name)} for name in ("test", "validation", "train")
    }
    assert [len(split) for split in splits.values()] == [1000, 300, 4000]
    assert len(set().union(*splits.values())) == 5300
    if world.name == "equations":
        size = equations.SIZES["teacher"]
        taught = equations.make_problems(
            size["steps"] * 128, equations.PRETRAIN_SEED, equations.held_out_questions(), dropped=equations.DROPPED
        )
        assert not (splits["test"] | splits["validation"]) & {row["question"] for row in taught}


def test_the_studys_arithmetic_is_longer_than_the_demos():
    counts = {row["prompt"][0]["content"].count(",") for row in SMALL[0].split("test")}
    assert counts == {4, 5}


def test_a_gate_per_entry_against_a_loop():
    """Each entry of the vocabulary has its own factor; the gradient is that of the weights held fixed."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 2, 5, dtype=torch.float64).log_softmax(-1)
    labels = torch.tensor([1.0, 0.0, float("nan")])
    loss = arms.entry_gated(logits.log_softmax(-1), teacher, labels, 1.8, 0.5)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    own = logits.log_softmax(-1)
    for row, sign in enumerate((1, -1, 0)):
        for t in range(2):
            for v in range(5):
                delta = (teacher[row, t, v] - own[row, t, v]).item()
                factor = 1.0 if sign == 0 else (1.8 if sign * delta > 0 else 0.5)
                weight = own[row, t, v].exp().item() * factor * delta
                expected[row, t] = expected[row, t] - weight * own[row, t, v]
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_with_one_factor_the_gate_per_entry_is_the_divergence():
    """Both factors 1.3: the gradient of 1.3 KL(student || teacher)."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    own, teacher = logits.log_softmax(-1), torch.randn(2, 3, 5, dtype=torch.float64).log_softmax(-1)
    loss = arms.entry_gated(own, teacher, torch.tensor([1.0, 0.0]), 1.3, 1.3)
    divergence = 1.3 * (own.exp() * (own - teacher)).sum()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss.sum(), divergence)]
    torch.testing.assert_close(*gradients)


def test_the_unendorsed_phase_takes_wrong_rollouts_and_notes_their_verdicts():
    verdicts = {}
    phase = arms.EndorseAll(1.0, 10, verdicts=verdicts)
    wrong, cut = Proposal([3, 1], "3", True), Proposal([3], "3", False)
    taken = phase.fill([4, 7, 9], lambda rows, n: [[wrong], [cut], [wrong]], lambda rows, proposals: [0.0, None])
    assert taken == {4: wrong, 9: wrong}
    assert verdicts == {4: 0.0, 9: None}


def test_the_plan_has_every_arm_in_both_worlds_and_no_two_runs_of_one_name():
    cells = dict(design.groups(design.Plan(), ["arithmetic", "equations"]))
    done = {(c.arm, c.world): c.seeds for group, some in cells.items() for c in some if group.startswith(design.WHOLE)}
    assert {arm for arm, _ in done} == set(arms.ARMS)
    main = {"opd", "exopd", "opdvr", "sg-opd-lite", "no-gate", "no-phase"}
    expected = {(a, w): 5 if a in main else 2 for a in arms.ARMS for w in ("arithmetic", "equations")}
    del expected["entry-gate", "arithmetic"]
    assert done == expected
    assert len(cells["plane of the factors"]) == 16
    compared = [(c.world, c.arm, c.changes) for some in cells.values() for c in some]
    assert len({design.Run(*of, 1.0, 0, 1).name for of in compared}) == len(set(compared))


def test_each_cells_settings_are_a_configuration(tmp_path):
    """Those that only some groups have too, which are not run below."""
    plan = design.groups(design.Plan(), ["arithmetic", "equations"])
    cells = {(cell.arm, cell.changes) for _, some in plan for cell in some}
    made = [
        arms.config_of(
            SMALL[0], arms.common(SMALL[0], 2, 1e-4, 0, tmp_path), {**arms.ARMS[arm].settings, **dict(changes)}
        )
        for arm, changes in cells
        if arms.ARMS[arm].trainer not in ("grpo", "distillation", "sft")
    ]
    assert {(config.gate_extrapolation, config.gate_interpolation) for config in made} >= {(1.4, 0.6), (1.0, 4.0)}
    assert {config.num_generations for config in made} == {1, arms.GENERATIONS}


def samples(correct):
    """One question a row, its samples' verdicts."""
    return [
        Sample(str(q), i, 0, 10, "stop", float(v), "1" if v else "2", "")
        for q, row in enumerate(correct)
        for i, v in enumerate(row)
    ]


def result(correct):
    return EvaluationResult.of(samples(correct), len(correct[0]), {}, {})


def test_the_rate_is_the_one_that_does_best_in_validation(tmp_path):
    """Over both choosing seeds: 2.0 solves 5 + 3 of 8 samples, 3.0 has the best single run but 6 + 1."""
    runs = study.Study(tmp_path, "small", design.Plan(rates=(1.0, 2.0, 3.0)), 1)
    cell = design.Cell("equations", "opd", 2, choosing=2)
    for rate, solved in ((1.0, (2, 2)), (2.0, (5, 3)), (3.0, (6, 1))):
        for seed in range(2):
            path = runs.path(runs.run(cell, rate, seed), study.validate)
            path.parent.mkdir(parents=True)
            result([[i < solved[seed] for i in range(8)]]).to_json(path)
    assert runs.rate(cell) == 2.0
    assert runs.validation(cell) == {1.0: 25.0, 2.0: 50.0, 3.0: 43.75}
    other = design.Cell("equations", "no-phase", 2, (("gate_interpolation", 0.0),), rate_of=cell)
    assert [run.learning_rate for run in runs.chosen(other)] == [2.0, 2.0]
    assert runs.test_files(cell) == []


def test_figures_and_differences_by_hand():
    """Two runs, two questions, two samples: avg@2 75 and 25 against 50 and 0; the differences are 25 everywhere."""
    ours = [result([[1, 1], [1, 0]]), result([[1, 0], [0, 0]])]
    base = [result([[1, 0], [1, 0]]), result([[0, 0], [0, 0]])]
    assert report.figures_of(ours)["avg@2"]["mean"] == 50.0
    assert report.figures_of(ours)["pass@2"]["mean"] == 75.0
    apart = report.differences(base, ours)["avg@2"]
    assert apart["mean"] == 25.0
    assert report.differences(base, base)["avg@2"] == {"mean": 0.0, "standard_error": 0.0, "low": 0.0, "high": 0.0}


def test_figures_where_the_teacher_errs_by_habit(tmp_path):
    """Of two questions the second has a negative answer; only it counts."""
    given = result([[1, 1], [1, 0]])
    assert report.figures_of([report.only(given, frozenset({"1"}))])["avg@2"]["mean"] == 50.0
    ids = report.habitual(SMALL[1])
    golds = SMALL[1].split("test")["solution"]
    assert {golds[int(id)][0] for id in ids} == {"-"}
    assert len(ids) == sum(gold.startswith("-") for gold in golds)


def test_curves_and_signs_are_means_over_runs():
    histories = [
        [{"step": 5, "verdict/correct": 0.1, "entropy": 9.0}, {"step": 10, "verdict/correct": 0.3, "entropy": 1.0}],
        [{"step": 5, "reward": 0.2, "entropy": 9.0}, {"step": 10, "reward": 0.5, "entropy": 2.0}],
    ]
    assert report.curve(histories) == {"step": [5, 10], "correct": [15.0, 40.0]}
    assert report.signs(histories) == {"entropy": 1.5}


def test_the_results_page_has_the_tables_of_the_committed_study():
    page = (ROOT / "docs" / "results.md").read_text()
    content = json.loads((study.RESULTS / "study.json").read_text())
    assert filled(page, report.tables(content), whole=False) == page
    assert {name for name in report.tables(content) if f"<!-- table: {name} -->" not in page} == set()


@pytest.mark.integration
def test_the_study_from_its_command_and_again(tmp_path):
    """With tiny models, made by the study itself: all arms end in both worlds, a second start trains nothing."""
    command = [sys.executable, str(ROOT / "benchmarks" / "study.py"), "--scale", "tiny", "--output", str(tmp_path)]
    arms_alone = [*command, "--only", " arms, "]
    # the only one that runs: on one thread it would leave half of two cores alone for minutes
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "2"}, "capture_output": True, "text": True, "check": True}
    assert "train 1/" in subprocess.run(arms_alone, **options).stdout
    again = subprocess.run(arms_alone, **options)
    assert "train 1/" not in again.stdout
    assert "test 1/" not in again.stdout
    subprocess.run([*command, "--report"], **options)
    content = json.loads((tmp_path / "study.json").read_text())
    assert set(content["arms"]) == set(arms.ARMS)
    assert all("equations" in arm for arm in content["arms"].values())
    assert sum("arithmetic" in arm for arm in content["arms"].values()) == len(arms.ARMS) - 1
    budget = content["arms"]["sg-opd-lite"]["equations"]["budget"]
    assert budget["student_rollouts"] == budget["teacher_scored"] == 2 * arms.ROLLOUTS
    assert content["arms"]["sft"]["equations"]["budget"]["teacher_rollouts"] == 2 * arms.ROLLOUTS


def test_a_draw_of_the_world_is_the_same_each_time():
    assert equations.make_problem(Random(3)) == equations.make_problem(Random(3))
