"""benchmarks/rounding.py: its tokens and shares by hand, the path of its command, and the table in the docs."""

import json
import math
import subprocess
import sys

import pytest
import torch
from documents import ROOT
from rounding import EDGES, QUICK, TOKENS, VOCABULARY, WAYS, documented, drawn, log_softmax, sides


def test_the_tokens_have_their_odds():
    """log p = -log(1 + u) in float64, u to a hundredth."""
    generator = torch.Generator().manual_seed(1)
    odds, ids = torch.tensor([1e-7, 1e-4, 0.3, 1.0]), torch.tensor([5, 0, 299, 5])
    of = drawn(odds, ids, 300, 128, generator).to(torch.float64)
    expected = -torch.log1p(odds.double())
    torch.testing.assert_close(log_softmax(of, torch.float64), expected, rtol=1e-2, atol=0)


def test_the_sides_by_hand():
    """Of three between 1e-6 and 1e-5 one has the other sign and one none; 0 of an exact -0.5 is neutral."""
    exact = torch.tensor([2e-6, -3e-6, 4e-6, -0.5, 0.0])
    delta = torch.tensor([-1e-9, 0.0, 1.0, 0.0, 0.0])
    found = {(row["from"], row["to"]): (row["tokens"], row["wrong"], row["neutral"]) for row in sides(delta, exact)}
    assert found[1e-6, 1e-5] == (3, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found[0.1, None] == (1, 0.0, 1.0)
    assert found[0.0, 1e-6] == (1, 0.0, 1.0)
    assert found[1e-3, 1e-2][0] == 0


def check(result, count):
    for ways in result["distances"].values():
        assert ways.keys() == WAYS.keys()
        for way in ways.values():
            assert sum(row["tokens"] for row in way["sides"]) == count
            assert len(way["sides"]) == len(EDGES) - 1
        places = range(len(EDGES) - 1)
        by_way = {
            name: [(way["sides"][i]["wrong"], way["sides"][i]["neutral"]) for i in places] for name, way in ways.items()
        }
        assert by_way["fp32, sampled"] == by_way["fp32, full"]  # one way of rounding
        assert by_way["bf16, sampled, fp32 head"] == by_way["bf16, full"]
        for alike in ("fp32, full", "bf16, full"):
            assert max(wrong for wrong, _ in by_way[alike][1:]) < 0.01  # none from 1e-6 on, or hardly one
        assert all(wrong + neutral < 0.01 for wrong, neutral in by_way["fp32, full"][2:])
    assert ways["bf16, sampled"]["error"]["p99"] > 100 * ways["fp32, full"]["error"]["p99"]  # models near each other


def test_the_quick_form_from_its_command(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/rounding.py", "--quick", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    check(json.loads(output.read_text()), QUICK[0])
    assert run.stdout.count("below 1e-06") == 2


def test_the_documentation_has_the_committed_results_table():
    result = json.loads((ROOT / "benchmarks" / "results" / "rounding.json").read_text())
    check(result, TOKENS)
    assert result["settings"]["vocabulary"] == VOCABULARY
    assert result["provenance"]["dirty"] is False
    assert not any(math.isnan(row["wrong"]) for row in result["distances"]["0.1"]["fp32, full"]["sides"])
    text = (ROOT / "docs" / "method.md").read_text()
    for row in documented(result):
        assert row in text
