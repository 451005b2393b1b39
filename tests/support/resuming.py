"""Runs that are killed and resumed, and their comparison with one that was not."""

import json

import torch
from launching import SUPPORT, run_worker

WORKER = SUPPORT / "kill_worker.py"


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


SCENARIOS = {
    # three phases: held at steps 0 and 1, a cosine at 2 and 3, none at 4 and 5
    "fresh": {"preset": "sg-opd", "save_total_limit": 1},
    "buffered": {
        "steps_per_generation": 4,
        "num_iterations": 2,
        "save_steps": 1,
        "logging_steps": 3,
        "log_completions": True,
    },
    "full": {"estimator": "full", "steps_per_generation": 4, "save_steps": 1, "logging_steps": 3},
    # what the rows' teachers said waits in the checkpoint; one is the student before training
    "several": {
        "several": True,
        "estimator": "top_k",
        "teacher_top_k": 4,
        "steps_per_generation": 4,
        "save_steps": 1,
        "logging_steps": 3,
    },
}


def launch(pair, out, backend, jobs, limit=280):
    """Run the worker's jobs and return their exit codes; of a launch of two processes, its own."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {"student": str(pair / "student"), "teacher": str(pair / "teacher"), "data": str(pair / "data.jsonl")}
    (out / "jobs.json").write_text(json.dumps({"backend": backend, "out": str(out), "jobs": jobs, **paths}))
    code = run_worker(WORKER, out / "jobs.json", backend, out / "launch.log", limit)
    if backend != "single":
        return code
    assert code == 0, (out / "launch.log").read_text()[-4000:]
    return json.loads((out / "codes.json").read_text())


def job(name, folder, scenario, **more):
    return {"name": name, "folder": folder, "settings": {**BASE, **SCENARIOS[scenario]}, "resume": False, **more}


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
