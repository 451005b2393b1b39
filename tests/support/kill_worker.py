"""Run by test_resume.py, alone or under torchrun: trains, and ends itself with SIGKILL where its job says.

    [torchrun --nproc_per_node 2] kill_worker.py JOBS.json

Without torchrun each job runs in a forked process of its own, one after another, and `<out>/codes.json` gets their exit
codes; torch and TRL are imported once. A job has `name`, `folder` (shared by a killed run and the one that goes on),
`settings`, `resume`, and `kill`: `[point, n]`, at the n-th passing of that point.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from distributed_worker import BACKEND, JOB, OUT, coin_verifier, configuration, prepare, whole_weights
from leaving import leave
from transformers import TrainerCallback

import sg_opd.checkpoints.folders
from sg_opd import SGOPDTrainer


class Reaper:
    """Kills this process at the n-th passing of one point."""

    def __init__(self, point: str | None, n: int, how: int = signal.SIGKILL) -> None:
        self.point, self.left, self.how = point, n, how

    def pass_by(self, point: str) -> None:
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.how)
                time.sleep(0.2)  # SIGTERM's handler asks from a thread of its own


class Doomed(SGOPDTrainer):
    """Notes each generation's rows in a file, and passes by all points of a step."""

    def __init__(self, reaper: Reaper, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reaper, self.generating = reaper, False
        self.record = Path(self.args.output_dir) / f"rows{self.accelerator.process_index}.jsonl"
        self.model.register_forward_pre_hook(lambda *_: reaper.pass_by("generation") if self.generating else None)
        scores = {"sampled": "score_batch", "full": "states", "top_k": "top_batch"}[self.args.estimator]
        for teacher in self.teachers.by_name.values():
            for point, name in (("scoring", scores), ("proposal", "propose")):
                setattr(teacher, name, self.passing(point, getattr(teacher, name)))
        next(self.model.parameters()).register_hook(lambda _: reaper.pass_by("backward"))
        self.add_callback(AtUpdate(reaper))

    def passing(self, point: str, method: Callable) -> Callable:
        def passed(*args: Any) -> Any:
            self.reaper.pass_by(point)
            return method(*args)

        return passed

    def _generate(self, prompts: list) -> tuple:
        self.generating = True
        output = super()._generate(prompts)
        self.generating = False
        return output

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self.reaper.pass_by("grading")
        return super()._calculate_rewards(*args)

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            seen = [self.state.global_step, self._step, [row["prompt"][-1]["content"] for row in inputs]]
            seen += [output["completion_ids"].tolist(), output["from_teacher"].tolist()]
            with self.record.open("a") as file:
                file.write(json.dumps(seen) + "\n")
        return output

    def _save_rng_state(self, output_dir: str) -> None:
        self.reaper.pass_by("weights")  # written, with the optimizer's states, but nothing else
        super()._save_rng_state(output_dir)


class AtUpdate(TrainerCallback):
    def __init__(self, reaper: Reaper) -> None:
        self.reaper = reaper

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.reaper.pass_by("update")


def of_two_teachers(row: dict[str, Any], place: int) -> dict[str, Any]:
    """The row with its teacher's name, in turn, and a prompt of the teacher's own in two of three."""
    own = [{"role": "user", "content": "3*4=12"}, *row["prompt"]]
    return {"teacher": "ab"[place % 2], "teacher_prompt": own if place % 3 else None}


def run(job: dict[str, Any]) -> None:
    """Train one job and write this rank's log and the weights."""
    reaper = Reaper(*job.get("kill") or (None, 0), *([signal.SIGTERM] if job.get("gently") else []))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank != world - 1:  # one rank dies, not the one that seals
        reaper = Reaper(None, 0)
    seal, rotate = sg_opd.checkpoints.folders.seal, sg_opd.checkpoints.folders.rotate

    def sealed(*args: Any) -> None:
        reaper.pass_by("unsealed")
        seal(*args)

    def rotated(*args: Any, **kwargs: Any) -> None:
        reaper.pass_by("rotation")
        rotate(*args, **kwargs)

    sg_opd.checkpoints.folders.seal, sg_opd.checkpoints.folders.rotate = sealed, rotated
    folder = OUT / job["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    several = job["settings"].pop("several", False)
    args = configuration(folder, world, job["settings"])
    data = load_dataset("json", data_files=JOB["data"], split="train")
    data = data.map(of_two_teachers, with_indices=True) if several else data
    teachers = {"a": JOB["teacher"], "b": "initial"} if several else JOB["teacher"]
    trainer = Doomed(reaper, JOB["student"], teachers, coin_verifier, args, data)
    for teacher in trainer.teachers.by_name.values():
        teacher.generation_config.do_sample = True
    assert trainer.accelerator.num_processes == world
    trainer.train(resume_from_checkpoint=job["resume"])
    if rank == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    weights = whole_weights(trainer.accelerator.unwrap_model(trainer.model))
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    prepare()
    if BACKEND != "single":
        try:
            for job in JOB["jobs"]:
                run(job)
        except SystemExit as stop:
            leave(stop.code)
        torch.distributed.destroy_process_group()
        leave()
    codes = {}
    for job in JOB["jobs"]:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with (OUT / f"{job['name']}.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                run(job)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
                raise
            finally:
                os._exit(code)
        codes[job["name"]] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (OUT / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
