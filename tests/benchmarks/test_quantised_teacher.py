"""benchmarks/quantised_teacher.py: its figures against loops over tokens, and the path of its command."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import quantised_teacher
import torch
from documents import ROOT
from quantised_teacher import BATCH, COMPARED, QUICK, ROLLOUTS, Rollouts, compared, loaded, logps, ratio
from scoring import COMPLETIONS, PROMPTS, expected_logps


def made_up(seed, lengths):
    torch.manual_seed(seed)
    return [-torch.rand(length) for length in lengths]


def test_the_shares_are_a_loops():
    """Forty rollouts of 1 to 9 tokens, verdicts of all three kinds, teachers half a nat apart at most."""
    lengths = [1 + i % 9 for i in range(40)]
    labels = torch.tensor([(1.0, 0.0, math.nan)[i % 3] for i in range(40)])
    student, against = made_up(1, lengths), made_up(2, lengths)
    teacher = [row + 0.5 * apart for row, apart in zip(against, made_up(3, lengths), strict=True)]
    row = compared(student, teacher, against, labels, seed=0)
    tokens = changed = weight = changed_weight = 0
    apart = []
    for i, length in enumerate(lengths):
        sign = (1, -1, 0)[i % 3]
        for t in range(length):
            deltas = [(it[i][t] - student[i][t]).item() for it in (teacher, against)]
            flips = sign != 0 and (deltas[0] > 0) != (deltas[1] > 0)
            tokens, changed = tokens + 1, changed + flips
            weight, changed_weight = weight + abs(deltas[1]), changed_weight + flips * abs(deltas[1])
            apart.append(abs((teacher[i][t] - against[i][t]).item()))
    assert row["tokens"] == tokens == sum(lengths)
    assert 0.05 < changed / tokens < 0.5
    assert row["changed"] == pytest.approx(changed / tokens)
    assert row["changed_by_delta"] == pytest.approx(changed_weight / weight, rel=1e-5)
    assert row["mean_abs_logp"] == pytest.approx(np.mean(apart), rel=1e-5)
    assert row["p99_abs_logp"] == pytest.approx(np.quantile(apart, 0.99), rel=1e-5)
    assert row["interval"][0] < row["changed"] < row["interval"][1]


def test_a_teacher_against_itself_changes_nothing():
    student, teacher = made_up(1, [3, 5]), made_up(2, [3, 5])
    row = compared(student, teacher, teacher, torch.tensor([1.0, 0.0]), seed=0)
    assert [row[name] for name in ("changed", "changed_by_delta", "mean_abs_logp", "p99_abs_logp")] == [0.0] * 4
    assert row["interval"] == row["interval_by_delta"] == [0.0, 0.0]
    assert row["median_abs_delta_changed"] is None


def test_the_interval_is_that_of_a_ratio_over_rollouts():
    """As wide as 1.96 standard errors of the linearised ratio, sum (p - r w)^2 / (sum w)^2, to a tenth."""
    rng = np.random.default_rng(0)
    wholes = rng.integers(20, 60, 800).astype(float)
    parts = rng.binomial(wholes.astype(int), rng.beta(1, 20, 800)).astype(float)
    share, (low, high) = ratio(torch.tensor(parts), torch.tensor(wholes), seed=0)
    assert share == pytest.approx(parts.sum() / wholes.sum())
    error = math.sqrt(((parts - share * wholes) ** 2).sum()) / wholes.sum()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_log_probs_are_the_models_and_the_layers_in_their_bits():
    """Rows of unequal length in one batch against each by itself; fp32, and the types that hold the others' weights."""
    scored = logps(loaded("teacher", "fp32"), Rollouts(PROMPTS, COMPLETIONS, torch.ones(3)))
    for got, prompt, completion in zip(scored, PROMPTS, COMPLETIONS, strict=True):
        expected = expected_logps(loaded("teacher", "fp32"), prompt, completion)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    kinds = {"fp32": "Linear", "bf16": "Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}
    for precision, kind in kinds.items():
        model = loaded("teacher", precision)
        assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
        assert model.model.norm.weight.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)


def test_the_quick_form_from_its_command(tmp_path):
    """The same rollouts when sampled again here, and the coarser teacher is the farther one."""
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/quantised_teacher.py", "--quick", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text())
    check(result, QUICK)
    assert re.search(r"^nf4 +bf16 +\d", run.stdout, re.M)
    rollouts = quantised_teacher.sampled(QUICK, seed=0)
    assert result["rows"][0]["tokens"] == sum(map(len, rollouts.completions))
    assert result["verdicts"]["correct"] == rollouts.labels.sum()
    assert len(rollouts.prompts) > BATCH  # more than one batch


def check(result, count):
    assert [(row["teacher"], row["against"]) for row in result["rows"]] == COMPARED
    assert result["rollouts"] == sum(result["verdicts"].values()) == count
    assert min(result["verdicts"][name] for name in ("correct", "incorrect")) > count / 10
    by_name = {(row["teacher"], row["against"]): row for row in result["rows"]}
    coarser = [by_name[name, "fp32"] for name in ("bf16", "int8", "nf4")]
    for name in ("changed", "mean_abs_logp", "p99_abs_logp"):
        values = [row[name] for row in coarser]
        assert values == sorted(values)
        assert values[0] > 0
    for row in result["rows"]:
        assert row["interval"][0] <= row["changed"] <= row["interval"][1] < 1
    assert {"torch", "bitsandbytes"} <= result["provenance"]["versions"].keys()


def test_the_committed_result_is_of_the_full_form():
    result = json.loads((ROOT / "benchmarks" / "results" / "quantised_teacher.json").read_text())
    check(result, ROLLOUTS)
    assert result["provenance"]["commit"]
    assert result["provenance"]["dirty"] is False
