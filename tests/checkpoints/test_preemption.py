"""SIGTERM writes a checkpoint and ends with code 143; Ctrl-C leaves no worker behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from documents import ROOT
from launching import SETTINGS, gone
from resuming import OF_THE_CALL, TIMES, assert_same_run, job, launch
from trainers import coin_verifier, make_config
from transformers import TrainerCallback

from sg_opd import SGOPDTrainer
from sg_opd.checkpoints.folders import flaw, last_whole
from sg_opd.checkpoints.stops import EXIT_CODE


def test_sigterm_finishes_the_step_saves_and_ends_with_143(pair, tmp_path):
    """Sent while the third step is scored, of a run saved at each second: it is resumed from step 3."""
    jobs = [
        job("whole", "whole", "fresh"),
        job("ended", "run", "fresh", kill=["scoring", 3], gently=True),
    ]
    codes = launch(pair, tmp_path, "single", jobs)
    assert codes == {"whole": 0, "ended": EXIT_CODE}
    assert EXIT_CODE == 143
    assert last_whole(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-3"
    assert "SIGTERM: saving step 3, then ending with code 143." in (tmp_path / "ended.log").read_text()
    codes = launch(pair, tmp_path, "single", [job("resumed", "run", "fresh", resume=True)])
    assert codes == {"resumed": 0}
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.integration
def test_sigterm_to_one_rank_ends_both(pair, tmp_path):
    """Rank 1 alone gets it, in the third step; both save, and the launcher fails with the code's name."""
    asked = job("ended", "run", "fresh", kill=["scoring", 3], gently=True)
    assert launch(pair, tmp_path, "ddp", [asked]) != 0
    folder = tmp_path / "run" / "checkpoint-3"
    assert flaw(folder) is None
    files = json.loads((folder / "complete.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "run_state_0.pt", "run_state_1.pt"} <= files.keys()
    assert "exitcode  : 143" in (tmp_path / "launch.log").read_text()


def build(make_model, tokenizer, dataset, tmp_path, cls=SGOPDTrainer, held_out=None, **settings):
    models, args = (make_model(1), make_model(2)), make_config(tmp_path, **settings)
    return cls(*models, coin_verifier, args, dataset, held_out, processing_class=tokenizer)


class Sent(TrainerCallback):
    """SIGTERM while a step is in progress; the handler asks from a thread of its own."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.trainer.stop.manager.is_checkpoint_requested:
                time.sleep(0.01)


class Falling(SGOPDTrainer):
    """Each evaluation is worse than the one before; calls are noted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def _determine_best_metric(self, metrics, trial):
        metrics["eval_reward"] = -self.state.global_step
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self):
        self.calls.append("best")
        super()._load_best_model()

    def evaluate(self, *args, **kwargs):
        self.calls.append(f"evaluate {self.state.global_step}")
        return super().evaluate(*args, **kwargs)


@pytest.fixture
def stopping(make_model, tokenizer, dataset, tmp_path):
    """`stopping(folder, step, resume, **settings)`: three rows, a step each, evaluated on two; SIGTERM in `step`."""

    def stopping(folder, step=None, resume=None, **settings):
        known = {"gradient_accumulation_steps": 1, "max_completion_length": 4, "per_device_eval_batch_size": 4}
        known |= {"metric_for_best_model": "eval_reward", "greater_is_better": True, "learning_rate": 1e-2}
        parts = dataset.select(range(3)), tmp_path / folder, Falling, dataset.select(range(3, 5))
        trainer = build(make_model, tokenizer, *parts, **{**known, **settings})
        if step is None:
            trainer.train(resume_from_checkpoint=resume)
        else:
            trainer.add_callback(Sent(trainer, step))
            with pytest.raises(SystemExit) as end:
                trainer.train(resume_from_checkpoint=resume)
            assert end.value.code == EXIT_CODE
        return trainer

    return stopping


def checkpoints_in(folder):
    assert all(flaw(path) is None for path in folder.glob("checkpoint-*"))
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_checkpoint_stays_beside_the_best_one(stopping, tmp_path):
    """At the end of a run transformers deletes all but the best, which it loads: this run is not at its end."""
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    settings |= {"load_best_model_at_end": True, "save_total_limit": 1}
    trainer = stopping("run", 3, **settings)
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-1", "checkpoint-3"]
    assert "best" not in trainer.calls
    assert trainer.args.load_best_model_at_end
    assert trainer.args.save_total_limit == 1
    trainer = stopping("run", resume=True, **settings)
    assert trainer._resumed.name == "checkpoint-3"
    assert trainer.calls == ["evaluate 4", "best"]
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-1"]


@pytest.mark.parametrize("save", ["best", "no"])
def test_the_checkpoint_is_written_whatever_the_strategy(save, stopping, tmp_path):
    stopping("run", 2, save_strategy=save, eval_strategy="steps", eval_steps=1, max_steps=4)
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"][-1 if save == "no" else 0 :]


def test_a_run_without_a_handler_ends_as_the_parents(stopping, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    settings |= {"load_best_model_at_end": True, "save_total_limit": 1, "enable_jit_checkpoint": False}
    assert "best" in stopping("run", **settings).calls
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-1"]


def told(trainer):
    kept = [
        {name: value for name, value in entry.items() if not any(part in name for part in (*TIMES, *OF_THE_CALL))}
        for entry in trainer.state.log_history
    ]
    return [json.dumps(entry, sort_keys=True) for entry in kept if len(entry) > 2]


# two epochs of three steps: within the second one, and with the last step of the first
@pytest.mark.parametrize("step", [5, 3])
@pytest.mark.parametrize("save", ["epoch", "steps"])
def test_stopped_with_evaluation_at_the_end_of_epochs(save, step, stopping, tmp_path):
    """No evaluation more than the run that was not stopped, none less, and the same weights."""
    settings = {"eval_strategy": "epoch", "save_strategy": save, "save_steps": 2, "max_steps": -1}
    settings |= {"num_train_epochs": 2, "metric_for_best_model": None, "logging_strategy": "epoch"}
    whole = stopping("whole", **settings)
    stopped = stopping("run", step, **settings)
    assert stopped.calls == ["evaluate 3"]
    assert f"checkpoint-{step}" in checkpoints_in(tmp_path / "run")
    resumed = stopping("run", resume=True, **settings)
    assert resumed._resumed.name == f"checkpoint-{step}"
    assert resumed.calls == ["evaluate 6"]
    assert told(resumed) == told(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_the_signal_is_the_callers_but_while_training(make_model, tokenizer, dataset, tmp_path):
    seen = []

    class Look(SGOPDTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(signal.getsignal(signal.SIGTERM))
            return super()._compute_loss(model, inputs)

    before = signal.getsignal(signal.SIGTERM)
    args = make_config(tmp_path)
    trainer = Look(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    assert signal.getsignal(signal.SIGTERM) == before
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert all(handler not in (before, signal.SIG_DFL) for handler in seen)
    seen.clear()
    trainer = build(make_model, tokenizer, dataset, tmp_path, enable_jit_checkpoint=False)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_trainer_in_a_thread_says_that_it_cannot_listen(make_model, tokenizer, dataset, tmp_path, caplog):
    done = []
    thread = threading.Thread(target=lambda: done.append(build(make_model, tokenizer, dataset, tmp_path).train()))
    thread.start()
    thread.join()
    assert done
    assert done[0].global_step == 1
    assert "SIGTERM" in caplog.text


INTERRUPTED = """
import os, signal, threading
from pathlib import Path
from datasets import load_dataset
from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from hostile import HANGING, ITS_REFERENCE
from soak import ARITHMETIC

class Hanging(MathVerifier):
    def __call__(self, completions, solution, **kwargs):
        verdicts = super().__call__(completions, [rf"\\\\sqrt{{{int(gold) ** 2}}}" for gold in solution])
        def interrupt():
            pids = [str(worker.process.pid) for worker in self._grader.pool]
            Path("pids").write_text(" ".join(pids))
            os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(1.0, interrupt).start()
        super().__call__([HANGING], [ITS_REFERENCE])
        return verdicts

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = SGOPDConfig(
        "run", max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=24,
        bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
    )
    data = load_dataset("json", data_files=str(ARITHMETIC / "data" / "train.jsonl"), split="train[:64]")
    verifier = Hanging(timeout=60.0, workers=2)
    SGOPDTrainer(str(ARITHMETIC / "student"), str(ARITHMETIC / "teacher"), verifier, args, data).train()
"""


def test_ctrl_c_leaves_no_worker(tmp_path):
    """Sent while a worker hangs on an answer: the trainer ends at once, and every worker with it."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED.replace("\\\\", "\\"))
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "interrupted.py"],
        cwd=tmp_path, env={**os.environ, **SETTINGS, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "KeyboardInterrupt" in run.stderr
    assert run.returncode in (130, -signal.SIGINT), run.stderr[-2000:]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert pids
    assert all(gone(pid) for pid in pids)
