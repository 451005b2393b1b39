"""SIGTERM writes a checkpoint and ends with code 143; Ctrl-C leaves no worker behind."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from test_launch import gone
from test_package import ROOT
from test_resume import SETTINGS, assert_same_run, job, launch
from test_trainer import coin_verifier, make_config

from sg_opd import SGOPDTrainer
from sg_opd.checkpoints import flaw, last_whole
from sg_opd.preemption import EXIT_CODE


def test_sigterm_finishes_the_step_saves_and_ends_with_143(pair, tmp_path):
    """Sent while the third step is scored, of a run saved at each second: it goes on from step 3."""
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


def build(make_model, tokenizer, dataset, tmp_path, **settings):
    args = make_config(tmp_path, **settings)
    return SGOPDTrainer(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)


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
from soak import ARITHMETIC, HANGING, ITS_GOLD

class Hanging(MathVerifier):
    def __call__(self, completions, solution, **kwargs):
        verdicts = super().__call__(completions, [rf"\\\\sqrt{{{int(gold) ** 2}}}" for gold in solution])
        def interrupt():
            pids = [str(worker.process.pid) for worker in self._grader.pool]
            Path("pids").write_text(" ".join(pids))
            os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(1.0, interrupt).start()
        super().__call__([HANGING], [ITS_GOLD])
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
