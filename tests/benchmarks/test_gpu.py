"""benchmarks/gpu_check.py on a machine without a GPU: it refuses, and a dry run goes the same way in bf16."""

import json
import subprocess
import sys

import pytest
import torch
from documents import ROOT


def check(*arguments):
    command = [sys.executable, "benchmarks/gpu_check.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs here")
def test_it_refuses_without_a_gpu():
    run = check()
    assert run.returncode == 1
    assert "needs a CUDA device" in run.stderr
    assert "--device cpu" in run.stderr


def test_a_dry_run_needs_a_place_for_its_result():
    run = check("--device", "cpu")
    assert run.returncode == 1
    assert "--output" in run.stderr


def test_a_dry_run_agrees_with_fp32_and_says_what_it_is(tmp_path):
    """bf16 differs from fp32, or nothing was compared; agreement is what was written in the benchmark's tolerances."""
    before = set((ROOT / "benchmarks").rglob("*.json"))
    run = check("--device", "cpu", "--steps", 2, "--output", tmp_path / "result.json")
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device"] == "cpu, a dry run"
    assert result["versions"]["torch"] == torch.__version__
    kinds = {"full/sampled", "full/full", "lora/sampled", "lora/full"}
    assert result["agreement"].keys() == result["memory"].keys() == kinds
    for measured in result["agreement"].values():
        assert measured["agrees"]
        assert len(measured["losses"]) == 2
        for loss, reference in zip(measured["losses"], measured["losses_cpu_fp32"], strict=True):
            assert loss != reference
            assert abs(loss - reference) <= 0.005 + 0.02 * abs(reference)
    assert all(measured["estimate_gib"] > 0 for measured in result["memory"].values())
    assert set((ROOT / "benchmarks").rglob("*.json")) == before
