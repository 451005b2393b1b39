"""The short form of benchmarks/torture.py: two hundred steps that must leave memory and descriptors as they were."""

import json
import os
import subprocess
import sys

import pytest
from documents import ROOT
from soak import figures, growth
from torture import PARTS

STEPS = 200


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    out = tmp_path_factory.mktemp("soak")
    command = [sys.executable, "benchmarks/soak.py", "--steps", STEPS, "--rows", 4, "--tokens", 48, "--output_dir", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((out / "soak.json").read_text())


def test_a_long_run_holds_on_to_nothing(soaked):
    """After the warm-up memory within 5 %, no descriptor or process more; a hung worker is killed each 25 steps."""
    assert soaked["soak_steps"] == STEPS
    assert soaked["worker_kills"] >= STEPS // 25  # on a busy machine others reach their limit too
    assert abs(soaked["rss_growth_percent"]) < 5
    assert abs(soaked["worker_rss_growth_percent"]) < 5
    assert soaked["descriptors_more"] <= 0
    assert soaked["processes_more"] <= 0
    assert soaked["processes_left"] == 0


def test_the_soaks_figures_are_those_of_the_parts(soaked):
    assert set(PARTS["soak"][1]) <= soaked.keys()


def test_growth_is_of_medians_of_quarters():
    """Medians 2 and 3 of the first and the last four of sixteen: 50 %."""
    assert growth([1, 2, 2, 9, *[5] * 8, 3, 3, 3, 0]) == pytest.approx(50.0)


def test_figures_leave_out_the_warm_up_and_hung_steps():
    """Forty steps: memory doubles within the first four, each step holds one descriptor more, a hung step is slow."""
    seen = [
        {
            "seconds": 9.0 if i % 5 == 0 else 0.2,
            "calibration": 0.1,
            "rss": 1e6 if i < 4 else 2e6,
            "workers": 0 if i < 6 else 1e6,
        }
        | {"descriptors": i, "children": 2, "hung": i % 5 == 0}
        for i in range(40)
    ]
    found = figures(seen, worker_kills=8)
    assert found["rss_growth_percent"] == found["step_time_growth_percent"] == 0.0
    assert found["descriptors_more"] == 27  # the last one is 39, the last of the first quarter of 36 is 12
    assert (found["worker_kills"], found["step_seconds"], found["processes_more"]) == (8, 0.2, 0)
