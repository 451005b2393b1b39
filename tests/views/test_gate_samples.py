"""Rollouts kept by a real run: what is in the files, against forwards of both models, and after a resume."""

import copy
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate.utils import send_to_device
from documents import ROOT
from trainers import MIXED, Recorder, coin_verifier, make_config, plain_logits

from sg_opd import SGOPDTrainer, SignGatedLoss, load_gate_samples
from sg_opd.views import gate_samples
from sg_opd.views.gate_samples import GateSamples
from sg_opd.views.gate_view import inspect_rollout


def train(make_model, tokenizer, dataset, tmp_path, cls=Recorder, resume=None, **settings):
    args = make_config(tmp_path, **{"log_gate_samples": 2, "learning_rate": 0.05, **settings})
    trainer = cls(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps_on_page(path):
    return [int(step) for step in re.findall(r'class="rollouts" data-step="(\d+)"', path.read_text())]


def rows_of(batch):
    """What identifies each row of a micro-batch: its completion's ids."""
    pairs = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return [tuple(ids[kept].tolist()) for ids, kept in pairs]


@pytest.mark.parametrize("reference_policy", ["current", "initial"])
@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_what_is_kept_is_what_both_models_say(estimator, reference_policy, make_model, tokenizer, dataset, tmp_path):
    """Three of eight rows of two micro-batches: log-probs from plain forwards of unpatched copies at temperature 0.8,
    decisions as trained on, the row's verdict and reference answer; the student's and the teacher's in turn."""
    clip = {"log_ratio_clip": 1.0} if estimator == "sampled" else {}
    settings = {"estimator": estimator, "reference_policy": reference_policy, "gate_dead_zone": 0.1, **clip, **MIXED}
    copies = {"student": make_model(1), "teacher": make_model(2)}
    settings["gate_interpolation"] = 0.6
    trainer = train(make_model, tokenizer, dataset, tmp_path, log_gate_samples=3, **settings)
    views = load_gate_samples(tmp_path)
    assert [view.source for view in views] == ["student", "teacher", "student"]
    by_prompt = {}
    for row in dataset:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        by_prompt[tokenizer.decode(ids)] = row["solution"]
    for view in views:
        assert view.step == 1
        assert view.gold == by_prompt[view.prompt]
        assert view.verdict == coin_verifier(None, None, [view.token_ids])[0]
        assert (view.settings.extrapolation, view.settings.interpolation) == (1.8, 0.6)
        (batch, row) = next(
            (b, rows_of(b).index(view.token_ids)) for b in trainer.batches if view.token_ids in rows_of(b)
        )
        kept = batch["completion_mask"][row].bool()
        for whose, model in copies.items():
            with torch.no_grad():
                logps = (plain_logits(model, batch)[row].float() / 0.8).log_softmax(-1)[kept]
            expected = logps.gather(1, torch.tensor(view.token_ids)[:, None]).squeeze(1).tolist()
            assert getattr(view, f"{whose}_logps") == pytest.approx(expected, abs=2e-5)
        assert (view.reference_logps is not None) == (estimator == "sampled" and reference_policy == "initial")
        if view.reference_logps is not None:  # the student before training, in its first step
            assert view.reference_logps == pytest.approx(view.student_logps, abs=2e-5)
    assert steps_on_page(tmp_path / "gate_samples.html") == [1]


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_decisions_are_kept_as_they_were_trained_on(estimator, make_model, tokenizer, dataset, tmp_path):
    """Two micro-batches a step, four a generation, each generation twice: a step shows rows of its own two
    micro-batches, and the second time the decisions of the first."""
    settings = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 5, "log_gate_samples": 6}
    decisions = {}

    class Keeping(Recorder):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            for row, ids in enumerate(rows_of(inputs)):
                decisions.setdefault(ids, []).append([part[row][: len(ids)] for part in inputs["decision"].values()])
            return loss

    trainer = train(make_model, tokenizer, dataset, tmp_path, cls=Keeping, estimator=estimator, **settings)
    views = load_gate_samples(tmp_path)
    assert [view.step for view in views] == [step for step in range(1, 6) for _ in range(6)]
    for view in views:
        window = trainer.batches[2 * (view.step - 1) : 2 * view.step]
        assert view.token_ids in [ids for batch in window for ids in rows_of(batch)]
        for kept, trained in zip(view.decision, decisions[view.token_ids][0], strict=True):
            assert kept[0].equal(trained)
    first, third = ([view for view in views if view.step == step] for step in (1, 3))
    assert [view.student_logps for view in first] == [view.student_logps for view in third]


def test_rows_without_a_gate_are_passed_over(make_model, tokenizer, dataset, tmp_path):
    """Teacher rows trained by maximum likelihood, and with `mask_truncated_completions` those that were cut off."""
    train(make_model, tokenizer, dataset, tmp_path / "nll", teacher_rollout_loss="nll", log_gate_samples=8, **MIXED)
    views = load_gate_samples(tmp_path / "nll")
    assert {view.source for view in views} == {"student"}
    train(make_model, tokenizer, dataset, tmp_path / "cut", mask_truncated_completions=True, log_gate_samples=8)
    ended = load_gate_samples(tmp_path / "cut")
    assert ended
    assert all(view.token_ids[-1] == tokenizer.eos_token_id for view in ended)


def test_no_samples_change_nothing_and_samples_change_no_weight(make_model, tokenizer, dataset, tmp_path):
    trainers = [
        train(make_model, tokenizer, dataset, tmp_path / str(n), log_gate_samples=n, max_steps=2, **MIXED)
        for n in (0, 2)
    ]
    assert not list((tmp_path / "0").glob("gate_samples*"))
    assert not any("gate_logps" in batch for batch in trainers[0].batches)
    weights = [trainer.model.state_dict() for trainer in trainers]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_a_resumed_run_continues_its_files(make_model, tokenizer, dataset, tmp_path, caplog):
    """Resumed from within a generation, with steps in the file that will be trained again and half a line after them:
    the files end as those of the run that was not interrupted."""
    settings = {
        "steps_per_generation": 4, "num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1,
        "teacher_phase_fraction": 0.5, "teacher_phase_steps": 10, "teacher_candidates": 32,
    }  # fmt: skip
    train(make_model, tokenizer, dataset, tmp_path, cls=SGOPDTrainer, **settings)
    file, page = tmp_path / "gate_samples.jsonl", tmp_path / "gate_samples.html"
    whole = file.read_text(), page.read_text()
    assert steps_on_page(page) == [1, 2, 3, 4, 5, 6]
    with file.open("a") as stream:
        stream.write(whole[0][:100])
    page.write_text("half")
    resumed = {**settings, "log_gate_samples": 2}
    train(make_model, tokenizer, dataset, tmp_path, cls=SGOPDTrainer, resume=str(tmp_path / "checkpoint-3"), **resumed)
    assert (file.read_text(), page.read_text()) == whole
    resumed["log_gate_samples"] = 1  # no setting that alters the run
    caplog.clear()
    train(make_model, tokenizer, dataset, tmp_path, cls=SGOPDTrainer, resume=str(tmp_path / "checkpoint-5"), **resumed)
    assert "other settings" not in caplog.text
    assert [view.step for view in load_gate_samples(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    # a new run: none of its steps is done
    train(make_model, tokenizer, dataset, tmp_path, cls=SGOPDTrainer, max_steps=1)
    assert [view.step for view in load_gate_samples(tmp_path)] == [1, 1]
    assert not list(tmp_path.glob("*.part"))


def test_logging_steps_epochs_and_other_processes(make_model, tokenizer, dataset, tmp_path):
    train(make_model, tokenizer, dataset, tmp_path / "two", max_steps=4, logging_steps=2)
    assert [view.step for view in load_gate_samples(tmp_path / "two")] == [2, 2, 4, 4]
    epoch = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1, "log_gate_samples": 1}
    trainer = train(make_model, tokenizer, dataset.select(range(4)), tmp_path / "epoch", **epoch)
    assert [view.step for view in load_gate_samples(tmp_path / "epoch")] == [trainer.state.global_step]
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GateSamples))
    before = (tmp_path / "epoch" / "gate_samples.jsonl").read_bytes()
    state = copy.copy(trainer.state)
    state.is_world_process_zero, state.global_step = False, 99
    trainer.control.should_log = True
    callback.on_step_end(trainer.args, state, trainer.control)
    assert (tmp_path / "epoch" / "gate_samples.jsonl").read_bytes() == before


@pytest.mark.parametrize("long", ["tokens", "prompt"])
def test_the_page_is_bounded(long, tokenizer, tmp_path, monkeypatch):
    """The file keeps all, the page the newest steps of no more than `PAGE_SIZE` characters, and one step at least."""
    callback = GateSamples(tmp_path, 1, tokenizer, SignGatedLoss(), trained=list)
    tokens = 500 if long == "tokens" else 1
    prompt = None if long == "tokens" else "p" * 5000
    view = inspect_rollout(["a"] * tokens, [-1.0] * tokens, [-1.0] * tokens, 1.0, step=1, prompt=prompt)
    line = len(view.to_json()) + 1
    assert line > 5000
    monkeypatch.setattr(gate_samples, "PAGE_SIZE", 3 * line)
    with (tmp_path / "all.jsonl").open("w") as stream:
        for _ in range(5):
            callback._keep([view], stream)
        assert len(callback._steps) == 3
        callback._keep([view] * 5, stream)
    assert [step.size for step in callback._steps] == [5 * line]
    assert len((tmp_path / "all.jsonl").read_text()) == 10 * line


def test_a_skipped_step_is_not_kept(make_model, tokenizer, dataset, tmp_path):
    """The teacher's score is NaN in the second of three steps, which `skip` leaves out."""

    class Poisoned(SGOPDTrainer):
        def _decide(self, inputs, **logps):
            if self.state.global_step == 1:
                logps["teacher"] = logps["teacher"].index_fill(1, torch.tensor([0]), float("nan"))
            return super()._decide(inputs, **logps)

    train(make_model, tokenizer, dataset, tmp_path, cls=Poisoned, max_steps=3, non_finite_log_probs="skip")
    assert [view.step for view in load_gate_samples(tmp_path)] == [1, 1, 3, 3]


def test_what_a_checkpoint_keeps_comes_to_the_device():
    """Log-probabilities within too, which are indexed by a mask that is there."""
    inputs = {"completion_mask": torch.ones(1, 2), "gate_logps": {"student": torch.zeros(1, 2)}, "gold": ["4"]}
    moved = send_to_device(inputs, torch.device("meta"))
    assert moved["completion_mask"].device.type == moved["gate_logps"]["student"].device.type == "meta"
    assert moved["gold"] == ["4"]


def test_negative_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`log_gate_samples` must be >= 0, got -1"):
        make_config(tmp_path, log_gate_samples=-1)


def test_tensorboard_gets_text(make_model, tokenizer, dataset, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(make_model, tokenizer, dataset, tmp_path, max_steps=2, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"tensors": 0}).Reload()
    logged = events.Tensors("gate_samples/text_summary")
    assert [event.step for event in logged] == [1, 2]
    text = logged[1].tensor_proto.string_val[0].decode()
    lines = [view.headline() for view in load_gate_samples(tmp_path) if view.step == 2]
    assert len(lines) == 2
    assert all(f"    {line[:60]}" in text for line in lines)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_get_the_page_of_the_step(tracker, tmp_path):
    """`examples/train.py` with a tracker that keeps its files here: two steps, a page each."""
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"no {tracker}: `pip install {tracker}`")
    here = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}
    settings = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 8, "output_dir": tmp_path / "out"}
    settings |= {"report_to": tracker, "log_gate_samples": 2}
    command = [sys.executable, "examples/train.py", "--config", "examples/configs/arithmetic.yaml"]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | here, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    pages = [path.read_text() for path in tmp_path.rglob("*.html") if "out" not in path.parts]
    assert sorted(step for page in pages for step in re.findall(r'data-step="(\d+)"', page)) == ["1", "2"]
