"""A run killed anywhere and resumed ends as the one that was not: weights, metrics, order of the data.

Real processes (`kill_worker.py`), which end themselves with SIGKILL at a named point.
"""

import itertools
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_trainer import coin_verifier
from transformers import TrainerCallback
from vllm_server import free_port

from sg_opd import SGOPDConfig, SGOPDTrainer
from sg_opd.checkpoints import flaw, last_whole, settings_of
from sg_opd.faults import CheckpointError

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
    "buffered": ("buffered", "update", 3, 2),
    "full": ("full", "backward", 8, 3),
    "first": ("fresh", "scoring", 1, 0),
}
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def launch(pair, out, backend, jobs, limit=280):
    """Run the worker's jobs and return their exit codes; of a launch of two processes, its own."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {"student": str(pair / "student"), "teacher": str(pair / "teacher"), "data": str(pair / "data.jsonl")}
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
def killed(pair, tmp_path_factory):
    """Every scenario whole, and every kill with what the checkpoints were then, and resumed; in one worker."""
    out = tmp_path_factory.mktemp("killed")
    jobs = [job(f"whole-{name}", f"whole-{name}", name) for name in SCENARIOS]
    for name, (scenario, point, n, _) in KILLS.items():
        jobs.append(job(f"{name}-killed", name, scenario, kill=[point, n]))
        jobs.append(job(f"{name}-resumed", name, scenario, resume=True))
    return out, launch(pair, out, "single", jobs)


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


BROKEN = {
    "no seal": lambda folder: (folder / "complete.json").unlink(),
    "a file is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "a file is cut off": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.fixture
def train(make_model, tokenizer, dataset, tmp_path):
    """`train(folder, resume, **settings)`: four steps in this process, saved at each second."""

    def train(folder="run", resume=None, teacher=None, data=dataset, **settings):
        known = {"output_dir": str(tmp_path / folder), "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
        known |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "use_cpu": True}
        known |= {"bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
        args = SGOPDConfig(**{**known, **settings})
        teacher = teacher or make_model(2)
        trainer = SGOPDTrainer(make_model(1), teacher, coin_verifier, args, data, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_passed_over_and_named(name, train, tmp_path, caplog):
    train()
    BROKEN[name](tmp_path / "run" / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4 is no whole checkpoint: its? .*True` takes the last whole one"):
        train(resume=str(tmp_path / "run" / "checkpoint-4"))
    with caplog.at_level(logging.WARNING):
        trainer = train(resume=True)
    (said,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert f"{tmp_path}/run/checkpoint-4 is passed over: it" in said
    assert trainer._resumed == tmp_path / "run" / "checkpoint-2"
    assert flaw(tmp_path / "run" / "checkpoint-4") is None  # written anew


def test_the_oldest_goes_only_when_the_new_one_is_whole(train, tmp_path, monkeypatch):
    def full(*_):
        assert (tmp_path / "run" / "checkpoint-2").is_dir()
        raise OSError(28, "No space left on device")

    train(save_total_limit=1, max_steps=2)
    monkeypatch.setattr("sg_opd.resume.seal", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written: .*No space left.* GB are free"):
        train(resume=True, save_total_limit=1)
    assert last_whole(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-2"
    monkeypatch.undo()
    train(resume=True, save_total_limit=1)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("kilobytes", [4, 60, 110])
def test_a_full_disk_names_the_checkpoint_and_keeps_the_one_before(kilobytes, train, tmp_path):
    """A limit on the size of a file, at which the system fails as on a full disk: for all files, the weights (100 kB),
    the optimizer's states (200 kB)."""
    trainer = train(max_steps=2)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert sizes["model.safetensors"] < 110_000 < sizes["optimizer.pt"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.add_callback(Limit(kilobytes * 1000))
    trainer.args.max_steps = 4
    try:
        with pytest.raises(CheckpointError, match="checkpoint-4 could not be written"):
            trainer.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last_whole(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-2"


class Limit(TrainerCallback):
    def __init__(self, size):
        self.size = size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_other_settings_are_named(train, tmp_path, caplog):
    train(max_steps=2)
    with caplog.at_level(logging.WARNING):
        train(resume=True)
    assert "`max_steps` was 2 and is 4." in caplog.text
    caplog.clear()
    changed = {"preset": "opd", "seed": 7, "teacher_phase_steps": 2, "gate_extrapolation": 1.5, "learning_rate": 2e-3}
    with caplog.at_level(logging.WARNING):
        train(resume=str(tmp_path / "run" / "checkpoint-2"), **changed)
    (said,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    for words in (
        "`preset` was 'sg-opd' and is 'opd'",
        "`seed` was 42 and is 7",
        "`teacher_phase_steps` was 0.1 and is 2",
    ):
        assert words in said
    for name in ("gate_extrapolation", "learning_rate"):
        assert f"`{name}` was" in said
    assert "output_dir" not in said


def test_another_teacher_or_dataset_is_named(train, dataset, make_model, tokenizer, tmp_path, caplog):
    for seed in (2, 3):
        make_model(seed).save_pretrained(tmp_path / f"teacher{seed}")
        tokenizer.save_pretrained(tmp_path / f"teacher{seed}")
    train(max_steps=2, teacher=str(tmp_path / "teacher2"))
    with caplog.at_level(logging.WARNING):
        train(max_steps=2, resume=True, teacher=str(tmp_path / "teacher3"), data=dataset.shuffle(seed=1))
    (said,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert f"`teacher_model` was '{tmp_path}/teacher2' and is '{tmp_path}/teacher3'" in said
    assert "`train_dataset` was '16 rows, " in said
    assert said.count("` was ") == 2


@pytest.mark.parametrize("steps", [4, 16, 20])
def test_a_run_killed_after_its_last_step_trains_no_more(steps, train):
    """Its last checkpoint is whole, the process did not live to say so: within an epoch, at its end, in the next."""
    settings = {"max_steps": steps, "save_steps": steps, "max_completion_length": 2}
    whole, resumed = train(**settings), train(resume=True, **settings)
    assert resumed.state.global_step == whole.state.global_step == steps
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_other_batches_begin_anew(train, tmp_path, caplog):
    """The two micro-batches that wait in the checkpoint are of four rows; the resumed run's are of eight."""
    train(max_steps=1, save_steps=1, steps_per_generation=2)
    folder = tmp_path / "run" / "checkpoint-1"
    assert len(torch.load(folder / "run_state_0.pt", weights_only=True)["buffered"]) == 2
    with caplog.at_level(logging.WARNING):
        trainer = train(max_steps=2, resume=True, steps_per_generation=2, per_device_train_batch_size=8)
    assert "Batches are not what they were" in caplog.text
    assert trainer.state.global_step == 2


def test_a_checkpoint_keeps_no_settings_that_may_hold_a_token(train, tmp_path):
    trainer = train(max_steps=1, save_steps=1)
    kept = settings_of(tmp_path / "run" / "checkpoint-1")
    assert kept == trainer.run_settings()
    assert {"preset", "seed", "teacher_model", "verifier", "processes", "gate_dead_zone"} <= kept.keys()
    assert not [name for name in kept if "server" in name or "init_kwargs" in name or "token" in name]


# a rank of two dies, the launcher ends the other, and both go on together
LAUNCHED = {"ddp": ("buffered", "backward", 5), "zero3": ("fresh", "weights", 2)}


@pytest.mark.integration
@pytest.mark.parametrize("backend", LAUNCHED)
def test_two_processes_killed_and_resumed(backend, pair, tmp_path):
    scenario, point, n = LAUNCHED[backend]
    assert launch(pair, tmp_path, backend, [job("whole", "whole", scenario)]) == 0
    assert launch(pair, tmp_path, backend, [job("killed", "run", scenario, kill=[point, n])]) != 0
    assert launch(pair, tmp_path, backend, [job("resumed", "run", scenario, resume=True)]) == 0, (
        tmp_path / "launch.log"
    ).read_text()[-4000:]
    assert_same_run(tmp_path / "run", tmp_path / "whole", ranks=2)
    again = [json.loads(line)[0] for line in (tmp_path / "run" / "rows1.jsonl").read_text().splitlines()]
    assert again.count(0) == 1
