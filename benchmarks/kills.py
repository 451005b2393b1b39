"""Runs of the arithmetic world killed at random moments, resumed, and compared with those that were not.

    python benchmarks/kills.py --kills 24 --output_dir runs/kills    # writes runs/kills/kills.json

Each chain is one run that is killed with SIGKILL several times and then left to end. Its weights, its log (times apart)
and the order of its data must be those of the run that nobody killed, bit for bit, and no process of it may be left.
torch and TRL are imported once: every process is forked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import psutil
import torch
from datasets import load_dataset
from transformers import TrainerCallback

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from sg_opd.evaluation.results import write_json

ARITHMETIC = Path(__file__).resolve().parent.parent / "examples" / "arithmetic"
PATIENCE = 15.0  # seconds in which what a killed process leaves must end
OF_A_CALL = ("runtime", "per_second", "step_time", "train_loss")
KILLS_A_CHAIN = 4
LONGEST_LIFE = 0.6  # of the seconds that the whole run trains
STARTING = 0.1  # share of the kills whose moment is counted from the start of the process
CHUNK = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
SCENARIOS: dict[str, dict[str, Any]] = {
    "sampled": {"log_ratio_clip": 2.0, "save_steps": 3, "logging_steps": 4},
    "buffered": {"estimator": "full", "save_steps": 1, "logging_steps": 5, "log_completions": True, **CHUNK},
    "initial": {"reference_policy": "initial", "log_ratio_clip": 2.0, "save_steps": 2, "save_total_limit": 1},
}


class Noted(SGOPDTrainer):
    """Writes down the prompts and rollouts of each generation."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        seen = [self.state.global_step, self._step, [row["solution"] for row in inputs]]
        with (Path(self.args.output_dir) / "rows.jsonl").open("a") as file:
            file.write("\n" + json.dumps([*seen, output["completion_ids"].tolist()]))  # a kill may cut a line off
        return output


class RootVerifier(MathVerifier):
    """Golds written as roots, so that answers go through a worker."""

    def __call__(self, completions: list, solution: list, **kwargs: Any) -> list[float | None]:
        return super().__call__(completions, [rf"\sqrt{{{int(gold) ** 2}}}" for gold in solution])


class Begun(TrainerCallback):
    """Writes a byte when the first step is about to begin."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        os.write(self.pipe, b"!")


def train(folder: Path, scenario: str, steps: int, pipe: int) -> None:
    """One process's life: begin, or go on from the last whole checkpoint."""
    args = SGOPDConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=8, num_generations=4, max_completion_length=32,
        learning_rate=3e-4, teacher_phase_steps=steps // 2, teacher_phase_fraction=0.5, report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, num_completions_to_print=0, **SCENARIOS[scenario],
    )  # fmt: skip
    data = load_dataset("json", data_files=str(ARITHMETIC / "data" / "train.jsonl"), split="train[:24]")
    models = str(ARITHMETIC / "student"), str(ARITHMETIC / "teacher")
    trainer = Noted(*models, RootVerifier(timeout=5.0, workers=1), args, data, callbacks=[Begun(pipe)])
    trainer.train(resume_from_checkpoint=True)
    torch.save(trainer.model.state_dict(), folder / "weights.pt")
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def run(
    folder: Path, scenario: str, steps: int, lifetime: float | None = None, starting: bool = False
) -> tuple[int, float]:
    """Fork a process that trains, and kill it after so many seconds of training.

    Args:
        starting: count its lifetime from its start, most of which is loading, instead.

    Returns:
        its exit code and its seconds of training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun, pipe = os.pipe()
    os.set_blocking(begun, False)
    begin = time.monotonic() if starting else math.inf
    child = os.fork()
    if child == 0:
        os.chdir(folder)  # by which whatever it starts can be told
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            train(folder, scenario, steps, pipe)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    os.close(pipe)
    pid = 0
    while pid == 0:
        if begin == math.inf and select.select([begun], [], [], 0)[0]:
            begin = time.monotonic()
        if lifetime is not None and time.monotonic() - begin > lifetime:
            os.kill(child, signal.SIGKILL)
            pid, status = os.waitpid(child, 0)
        else:
            time.sleep(0.002)
            pid, status = os.waitpid(child, os.WNOHANG)
    os.close(begun)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begin


def left_over(folder: Path) -> list[int]:
    """Processes of a chain that live although it was killed, after some patience; told by their working folder."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = [p.pid for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def outcome(folder: Path) -> tuple[str, dict, dict]:
    """The log without times, the rows by step, and the weights of a run that ended."""
    log = json.loads((folder / "log.json").read_text())
    log = [{k: v for k, v in entry.items() if not any(part in k for part in OF_A_CALL)} for entry in log]
    rows = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        try:
            step, micro, *rest = json.loads(line)
        except json.JSONDecodeError:  # empty, or cut off by a kill
            continue
        rows[step, micro] = rest
    return json.dumps(log, sort_keys=True), rows, torch.load(folder / "weights.pt")


def same(folder: Path, whole: Path) -> bool:
    """Whether two runs ended alike, bit for bit."""
    (log, rows, weights), (their_log, their_rows, their_weights) = outcome(folder), outcome(whole)
    equal = weights.keys() == their_weights.keys() and all(weights[k].equal(their_weights[k]) for k in weights)
    return log == their_log and rows == their_rows and equal


def kills(count: int, steps: int, folder: Path) -> dict[str, Any]:
    """At least so many kills in chains over all scenarios; a chain's kills are survived where it ends as it should."""
    rng = random.Random(0)
    seconds = {}
    for scenario in SCENARIOS:
        shutil.rmtree(folder / scenario, ignore_errors=True)
        code, seconds[scenario] = run(folder / scenario, scenario, steps)
        if code != 0:
            raise RuntimeError(f"The run that nobody kills ended with {code}: see {folder / scenario / 'log.txt'}.")
    tried, survived, passed_over, orphans, failed = 0, 0, 0, 0, []
    chain = 0
    while tried < count:
        scenario = list(SCENARIOS)[chain % len(SCENARIOS)]
        at = folder / f"chain-{chain}"
        shutil.rmtree(at, ignore_errors=True)
        here, code = 0, -signal.SIGKILL
        while code == -signal.SIGKILL:
            lifetime = rng.uniform(0.0, LONGEST_LIFE) * seconds[scenario] if here < KILLS_A_CHAIN else None
            code, _ = run(at, scenario, steps, lifetime, starting=rng.random() < STARTING)
            if code == -signal.SIGKILL:
                here += 1
                orphans += len(left_over(at))
        tried += here
        if code == 0 and same(at, folder / scenario):
            survived += here
        else:
            failed.append(at.name)
        passed_over += (at / "log.txt").read_text().count("is passed over")
        chain += 1
    return {
        "kills_tried": tried, "kills_survived": survived, "chains": chain, "chains_failed": failed,
        "half_written_passed_over": passed_over, "orphans": orphans,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result = kills(options.kills, options.steps, folder)
    write_json(folder / "kills.json", result)
    print(result)


if __name__ == "__main__":
    main()
