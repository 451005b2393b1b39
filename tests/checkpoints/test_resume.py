"""A run killed anywhere and resumed ends as the one that was not: weights, metrics, order of the data.

Real processes (`kill_worker.py`), which end themselves with SIGKILL at a named point.
"""

import itertools
import json
import logging
import os
import resource
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from resuming import SCENARIOS, assert_same_run, job, launch, rows_seen, told
from trainers import coin_verifier
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import GRPOTrainer

from sg_opd import SGOPDConfig, SGOPDTrainer
from sg_opd.checkpoints.folders import (
    GRPO_SETTINGS,
    SEAL,
    UNFINISHED,
    fingerprint,
    flaw,
    last_whole,
    loading,
    rotate,
    seal,
    settings_of,
)
from sg_opd.checkpoints.stops import CheckpointError

# twelve rows: an epoch has three steps, and each checkpoint but the first lies within a later one. Where rollouts are
# buffered, one generation serves four steps: its two halves, each trained on twice
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
    "several": ("several", "backward", 7, 3),
    "first": ("fresh", "scoring", 1, 0),
}


@pytest.fixture(scope="session")
def killed(pair, tmp_path_factory):
    """Every scenario whole, and every kill with what the checkpoints were then, and resumed; in one worker."""
    out = tmp_path_factory.mktemp("killed")
    jobs = [job(f"whole-{name}", f"whole-{name}", name) for name in SCENARIOS]
    for name, (scenario, point, n, _) in KILLS.items():
        jobs.append(job(f"{name}-killed", name, scenario, kill=[point, n]))
        jobs.append(job(f"{name}-resumed", name, scenario, resume=True))
    return out, launch(pair, out, "single", jobs)


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
    "a seal is cut off": lambda folder: os.truncate(folder / "complete.json", 50),
    "a seal of something else": lambda folder: (folder / "complete.json").write_text("[]"),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.fixture
def train(make_model, tokenizer, dataset, tmp_path):
    """`train(folder, resume, **settings)`: four steps in this process, saved at each second."""

    def train(folder="run", resume=None, teacher=None, data=dataset, config=SGOPDConfig, peft=None, **settings):
        known = {"output_dir": str(tmp_path / folder), "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
        known |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "use_cpu": True}
        known |= {"bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
        args = config(**{**known, **settings})
        models = make_model(1), teacher or make_model(2)
        trainer = SGOPDTrainer(*models, coin_verifier, args, data, processing_class=tokenizer, peft_config=peft)
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
    monkeypatch.setattr("sg_opd.checkpoints.folders.seal", full)
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


def test_a_checkpoint_of_the_same_step_stays_until_the_new_one_is_whole(train, tmp_path, monkeypatch):
    """As where a run begins anew, or an earlier checkpoint is taken by its path."""

    def full(*_):
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    train()
    monkeypatch.setattr("sg_opd.checkpoints.folders.seal", full)
    with pytest.raises(CheckpointError):
        train(resume=str(run / "checkpoint-2"))
    assert last_whole(run)[0] == run / "checkpoint-4.former"
    monkeypatch.undo()
    trainer = train(resume=True)
    assert trainer.state.global_step == 4
    assert trainer._resumed == run / "checkpoint-4"
    assert flaw(run / "checkpoint-4") is None
    train(resume=str(run / "checkpoint-2"))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_only_whole_checkpoints_are_counted_and_only_our_parts_deleted(train, tmp_path):
    """A part of a later checkpoint displaces no whole one; what plain transformers wrote is left alone."""
    run = tmp_path / "run"
    train(max_steps=4, save_steps=2)
    (run / "checkpoint-4" / SEAL).rename(run / "checkpoint-4" / UNFINISHED)
    for step in (1, 9):
        shutil.copytree(run / "checkpoint-2", run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}" / SEAL).unlink()
    train(resume=True, max_steps=3, save_steps=3, save_total_limit=1)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3", "checkpoint-9"]
    assert flaw(run / "checkpoint-3") is None


def test_rotation_keeps_the_last_written_and_the_best(tmp_path):
    """By the time of sealing, not by step: a run that began anew writes lower steps."""
    for i, step in enumerate((8, 2, 4, 6)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        seal(tmp_path / f"checkpoint-{step}", {})
        os.utime(tmp_path / f"checkpoint-{step}" / SEAL, ns=(i, i))

    damaged = tmp_path / "checkpoint-9"  # sealed, then a file was lost: it counts for none
    damaged.mkdir()
    (damaged / "weights").touch()
    seal(damaged, {})
    (damaged / "weights").unlink()

    def left():
        return sorted(path.name for path in tmp_path.iterdir() if path != damaged)

    for limit in (None, 0, 4):
        rotate(tmp_path, limit, None, tmp_path / "checkpoint-6")
        assert len(left()) == 4
    rotate(tmp_path, 3, None, tmp_path / "checkpoint-6")
    assert left() == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    rotate(tmp_path, 1, "elsewhere/checkpoint-2", tmp_path / "checkpoint-6")  # the folder was moved
    assert left() == ["checkpoint-2", "checkpoint-6"]
    rotate(tmp_path, 1, None, tmp_path / "checkpoint-6")
    assert left() == ["checkpoint-6"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.distributed.DistBackendError])
def test_an_error_of_the_device_is_not_one_of_the_disk(error, train, monkeypatch):
    def fail(*_):
        raise error("failed")

    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", fail)
    with pytest.raises(error, match=r"^failed"):
        train(max_steps=1, save_steps=1)


def test_a_rank_that_comes_first_makes_the_folder(train, tmp_path, monkeypatch):
    """With `save_only_model` GRPOTrainer has the main process alone write, perhaps later or on another node."""
    folder = tmp_path / "run" / "checkpoint-1"
    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", lambda *_: shutil.rmtree(folder, ignore_errors=True))
    train(max_steps=1, save_steps=1)
    assert (folder / "run_state_0.pt").is_file()


def test_a_checkpoint_of_the_model_alone_says_what_it_lacks(train, caplog):
    train(max_steps=2, save_only_model=True)
    with caplog.at_level(logging.WARNING):
        train(resume=True, save_only_model=True)
    (said,) = [record.getMessage() for record in caplog.records if "save_only_model" in record.getMessage()]
    for words in ("checkpoint-2", "optimizer", "learning rate", "random states"):
        assert words in said
    caplog.clear()
    train(folder="whole", max_steps=2)
    train(folder="whole", resume=True)
    assert "save_only_model" not in caplog.text


@pytest.mark.parametrize(("strategy", "name"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")])
def test_what_is_uploaded_is_whole(strategy, name, train, tmp_path, monkeypatch):
    seen = []

    class Hub:
        def create_repo(self, *_, **__):
            return SimpleNamespace(repo_id="me/mine")

        def upload_folder(self, folder_path, path_in_repo=None, **_):
            if path_in_repo:
                seen.append((path_in_repo, flaw(Path(folder_path)), (Path(folder_path) / "run_state_0.pt").is_file()))

    monkeypatch.setattr("transformers.trainer.hf_api", lambda *_, **__: Hub())
    monkeypatch.setattr("transformers.trainer.PushInProgress", lambda jobs: mock.Mock(is_done=lambda: True))
    hub = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/mine", "hub_token": "hf_s3cret"}
    trainer = train(max_steps=2, save_total_limit=1, **hub)
    assert trainer.args.hub_token == "hf_s3cret"
    assert seen == [(name, None, True)]
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        assert torch.load(folder / "training_args.bin", weights_only=False).save_total_limit == 1
        assert b"hf_s3cret" not in (folder / "training_args.bin").read_bytes()


def test_ranks_that_find_different_checkpoints_are_named(train, tmp_path, monkeypatch):
    """As where `output_dir` is a folder of each node's own."""
    train(max_steps=2)
    monkeypatch.setattr("sg_opd.checkpoints.resume.gather_object", lambda mine: [*mine, "none"])
    with pytest.raises(ValueError, match=r"checkpoint-2 \(rank 0\), none \(rank 1\).*`output_dir`"):
        train(resume=True)
    monkeypatch.setattr("sg_opd.checkpoints.resume.gather_object", lambda mine: [*mine, *mine])
    train(max_steps=2, resume=True)


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
        "`gate_signal` was 'group' and is 'verdict'",
        "`teacher_phase_steps` was 0.6666666666666666 and is 2",
    ):
        assert words in said
    for name in ("gate_extrapolation", "learning_rate"):
        assert f"`{name}` was" in said
    assert "output_dir" not in said


@dataclass(repr=False)
class Own(SGOPDConfig):
    """A user's configuration with a field of its own."""

    mine: int = 3
    derived: int = field(init=False, default=7)  # which transformers leaves out of `to_dict`


def test_a_configuration_of_ones_own_is_compared_too(train, tmp_path, caplog):
    train(max_steps=2, config=Own)
    assert settings_of(tmp_path / "run" / "checkpoint-2")["mine"] == 3
    with caplog.at_level(logging.WARNING):
        train(max_steps=2, config=Own, resume=True, gate_dead_zone=0.5, mine=4)
    assert "`gate_dead_zone` was 0.0 and is 0.5" in caplog.text
    assert "`mine` was 3 and is 4" in caplog.text


def test_another_adapter_is_named(train, caplog):
    def adapter(rank):
        return LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"], task_type="CAUSAL_LM")

    train(max_steps=2, peft=adapter(2))
    with caplog.at_level(logging.WARNING):
        train(max_steps=2, peft=adapter(2), resume=True)
    assert "other settings" not in caplog.text
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="size mismatch"):
        train(max_steps=2, peft=adapter(4), resume=True)
    assert "`peft` was " in caplog.text


def test_loading_is_compared_by_a_digest_without_secrets():
    first = loading({"dtype": "float32", "rope_scaling": {"factor": 2}, "token": "hf_A", "device_map": "auto"})
    assert first == loading({"rope_scaling": {"factor": 2}, "dtype": "float32", "token": "hf_B", "hub_token": "hf_C"})
    assert first != loading({"dtype": "float32", "rope_scaling": {"factor": 4}})
    assert "dtype, rope_scaling" in first
    assert loading({"use_auth_token": "hf_A", "proxies": {"https": "http://me:secret@host"}}) == loading({}) is None
    quantised = [loading({"quantization_config": BitsAndBytesConfig(load_in_8bit=yes)}) for yes in (True, True, False)]
    assert quantised[0] == quantised[1] != quantised[2]


@pytest.mark.parametrize("rows", [1, 100, 101, 199, 200, 1050])
def test_a_fingerprint_reads_at_most_a_hundred_rows(rows):
    seen = []

    class Rows:
        def __len__(self):
            return rows

        def __getitem__(self, row):
            seen.append(row)
            return {"prompt": row}

    assert fingerprint(Rows()).startswith(f"{rows} rows, ")
    assert min(rows, 50) <= len(seen) <= 100
    assert seen[0] == 0
    assert max(seen) < rows


def test_what_alters_a_run_is_compared(train):
    """Each of GRPO's settings that are compared exists; none is compared that only says where and when."""
    known = {field.name for field in fields(SGOPDConfig)}
    assert set(GRPO_SETTINGS) <= known
    kept = train(max_steps=1).run_settings()
    assert {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "top_entropy_quantile"} <= kept.keys()
    assert {"off_policy_mask_threshold", "model_init_kwargs", "teacher_model_init_kwargs", "peft"} <= kept.keys()
    assert not {"output_dir", "save_steps", "logging_steps", "report_to", "save_total_limit"} & kept.keys()


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
    secret = {"token": "hf_SECRET", "dtype": "float32"}
    trainer = train(max_steps=1, save_steps=1, model_init_kwargs=secret)
    kept = settings_of(tmp_path / "run" / "checkpoint-1")
    assert kept == trainer.run_settings()
    assert {"preset", "seed", "teacher_model", "verifier", "processes", "gate_dead_zone"} <= kept.keys()
    assert not [name for name in kept if "server" in name or "token" in name]
    assert "SECRET" not in json.dumps(kept)
    assert kept["model_init_kwargs"] == loading({"dtype": "float32"})
    trainer._sources = [replace(source, init_kwargs=secret) for source in trainer._sources]
    assert "SECRET" not in json.dumps(trainer.run_settings())
    assert trainer.run_settings()["teacher_model_init_kwargs"] == loading({"dtype": "float32"})


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
