"""A run killed anywhere and resumed ends as the one that was not: weights, metrics, order of the data.

Real processes (`kill_worker.py`), which end themselves with SIGKILL at a named point.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from vllm_server import free_port

WORKER = Path(__file__).parent / "kill_worker.py"
TIMES = ("runtime", "per_second", "step_time")
OF_THE_CALL = ("train_loss",)  # as the parent has it: of the steps since the run was resumed
BASE = {
    "max_steps": 6,
    "num_generations": 2,
    "generation_kwargs": None,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-8,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 4,
    "teacher_phase_steps": 4,
    "teacher_phase_fraction": 0.5,
}
# twelve rows: an epoch has three steps, and each checkpoint but the first lies within a later one. Where rollouts are
# buffered, one generation serves four steps: its two halves, each trained on twice
SCENARIOS = {
    "fresh": {"save_total_limit": 1},
    "buffered": {
        "steps_per_generation": 4,
        "num_iterations": 2,
        "save_steps": 1,
        "logging_steps": 3,
        "log_completions": True,
    },
    "full": {"estimator": "full", "steps_per_generation": 4, "save_steps": 1, "logging_steps": 3},
}
# name: scenario, point, its n-th passing, the checkpoint it must leave as the last whole one
KILLS = {
    "generation": ("fresh", "generation", 30, 2),
    "proposal": ("fresh", "proposal", 4, 2),
    "grading": ("fresh", "grading", 5, 4),
    "scoring": ("fresh", "scoring", 4, 2),
    "backward": ("fresh", "backward", 9, 4),
    "update": ("fresh", "update", 6, 4),
    "weights": ("fresh", "weights", 2, 2),
    "unsealed": ("fresh", "unsealed", 2, 2),
    "rotation": ("fresh", "rotation", 2, 4),
    "buffered": ("buffered", "update", 4, 3),
    "full": ("full", "backward", 8, 3),
    "first": ("fresh", "scoring", 1, 0),
}
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer, make_model, dataset):
    """A folder with a student, a teacher and twelve problems."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    dataset.select(range(12)).to_json(folder / "data.jsonl")
    return folder


def launch(models, out, backend, jobs, limit=280):
    """Run the worker's jobs and return their exit codes; of a launch of two processes, its own."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {"student": str(models / "student"), "teacher": str(models / "teacher"), "data": str(models / "data.jsonl")}
    (out / "jobs.json").write_text(json.dumps({"backend": backend, "out": str(out), "jobs": jobs, **paths}))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *([] if backend == "single" else torchrun), str(WORKER), str(out / "jobs.json")]
    with (out / "launch.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **SETTINGS})
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which are in sessions of their own
            process.wait(60)
            raise
    if backend != "single":
        return code
    assert code == 0, (out / "launch.log").read_text()[-4000:]
    return json.loads((out / "codes.json").read_text())


def job(name, folder, scenario, **more):
    return {"name": name, "folder": folder, "settings": {**BASE, **SCENARIOS[scenario]}, "resume": False, **more}


@pytest.fixture(scope="session")
def killed(models, tmp_path_factory):
    """Every scenario whole, and every kill with what the checkpoints were then, and resumed; in one worker."""
    out = tmp_path_factory.mktemp("killed")
    jobs = [job(f"whole-{name}", f"whole-{name}", name) for name in SCENARIOS]
    for name, (scenario, point, n, _) in KILLS.items():
        jobs.append(job(f"{name}-killed", name, scenario, kill=[point, n]))
        jobs.append(job(f"{name}-resumed", name, scenario, resume=True))
    return out, launch(models, out, "single", jobs)


def steps_logged(folder, ignored=TIMES + OF_THE_CALL):
    """As texts, in which NaN equals itself."""
    log = json.loads((folder / "log.json").read_text())
    return [
        json.dumps({k: v for k, v in e.items() if not any(part in k for part in ignored)}, sort_keys=True) for e in log
    ]


def told(out, name):
    return (out / f"{name}-resumed.log").read_text()[-3000:]


def rows_seen(folder, rank=0):
    """Prompts, rollouts and their sources by step and micro-batch, the last time that each was generated."""
    lines = (folder / f"rows{rank}.jsonl").read_text().splitlines()
    return {(step, micro): rest for step, micro, *rest in map(json.loads, lines)}


def assert_same_run(folder, whole, ranks=1):
    assert steps_logged(folder) == steps_logged(whole)
    for rank in range(ranks):
        assert rows_seen(folder, rank) == rows_seen(whole, rank)
    weights, expected = (torch.load(path / "weights.pt") for path in (folder, whole))
    assert weights.keys() == expected.keys()
    for name in expected:
        assert weights[name].equal(expected[name]), name


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_is_not_killed(name, killed):
    out, codes = killed
    scenario, _, _, last = KILLS[name]
    assert codes[f"{name}-killed"] == -9
    assert codes[f"{name}-resumed"] == codes[f"whole-{scenario}"] == 0, told(out, name)
    assert_same_run(out / name, out / f"whole-{scenario}")
    said = (out / f"{name}-resumed.log").read_text()
    assert ("is passed over" in said) == (name in ("weights", "unsealed"))
    lines = (out / name / "rows0.jsonl").read_text().splitlines()
    again = [json.loads(line)[0] for line in lines]
    if last:  # what came before is not done again
        assert again.count(0) == 1
    if scenario == "buffered":
        tables = [sorted((out / f / "completions").glob("*.parquet")) for f in (name, "whole-buffered")]
        assert len(tables[0]) == len(tables[1]) > 0
        for ours, theirs in zip(*tables, strict=True):
            pd.testing.assert_frame_equal(pd.read_parquet(ours), pd.read_parquet(theirs))


def test_the_runs_are_not_trivial(killed):
    """Teacher rows, several epochs, and prompts in an order of their own in each."""
    rows = rows_seen(killed[0] / "whole-fresh")
    assert any(any(teachers) for _, _, teachers in rows.values())
    prompts = [rows[key][0] for key in sorted(rows)]
    assert len(prompts) == 6
    assert sorted(itertools.chain(*prompts[:3])) == sorted(itertools.chain(*prompts[3:]))
    assert prompts[:3] != prompts[3:]
