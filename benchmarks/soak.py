"""A long run of the arithmetic world: whether memory, descriptors, processes and step time stay what they are.

    python benchmarks/soak.py --steps 2000 --output_dir runs/soak    # writes runs/soak/soak.json

Golds are written as roots, so that every answer goes through a grading worker, and every so often one answer hangs its
worker, which is then killed.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import psutil
import torch
from datasets import load_dataset
from hostile import HANGING, ITS_REFERENCE
from transformers import TrainerCallback

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from sg_opd.evaluation.results import write_json

ARITHMETIC = Path(__file__).resolve().parent.parent / "examples" / "arithmetic"
HANG_EVERY = 25  # gradings
WORKERS, TIME_LIMIT = 2, 0.5  # processes, seconds an answer
WARM_UP = 0.1  # of the steps


class HangingVerifier(MathVerifier):
    """`MathVerifier` on golds written as roots, which now and then is given an answer that hangs."""

    def __init__(self) -> None:
        super().__init__(timeout=TIME_LIMIT, workers=WORKERS)
        self.calls = 0

    def __call__(self, completions: list, solution: list, **kwargs: Any) -> list[float | None]:
        self.calls += 1
        golds = [rf"\sqrt{{{int(gold) ** 2}}}" for gold in solution]
        if self.calls % HANG_EVERY == 0:
            super().__call__([HANGING], [ITS_REFERENCE])
        return super().__call__(completions, golds)


class Watch(TrainerCallback):
    """Notes at each step its seconds, a calibration loop's, and what the process and its workers hold."""

    def __init__(self, verifier: HangingVerifier) -> None:
        self.verifier = verifier
        self.seen: list[dict[str, float]] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self.began
        workers = [worker.process.pid for worker in self.verifier._grader.pool]
        self.seen.append(
            {
                "seconds": seconds,
                "calibration": calibration_seconds(),
                "rss": psutil.Process().memory_info().rss,
                "workers": max((psutil.Process(pid).memory_info().rss for pid in workers), default=0),
                "descriptors": psutil.Process().num_fds(),
                "children": len(psutil.Process().children(recursive=True)),
                "hung": self.verifier.calls % HANG_EVERY == 0,
            }
        )


def calibration_seconds() -> float:
    """Seconds that a fixed piece of work takes now, of the kinds that a step is made of."""
    begin = time.perf_counter()
    matrix = torch.full((128, 128), 0.01)
    for _ in range(40):
        matrix = (matrix @ matrix).clamp(max=0.01)
    sum(i * i for i in range(20_000))
    return time.perf_counter() - begin


def growth(values: list[float]) -> float:
    """How much more the last quarter has than the first one, by their medians, in per cent."""
    quarter = max(1, len(values) // 4)
    return 100 * (median(values[-quarter:]) / median(values[:quarter]) - 1)


def figures(seen: list[dict[str, float]], worker_kills: int) -> dict[str, Any]:
    """The soak's figures, after a warm-up; of workers the largest, since they are killed and start anew."""
    warm = seen[int(WARM_UP * len(seen)) :]
    steps = [one for one in warm if not one["hung"]]  # a killed worker takes its time limit, not the step's
    quarter = max(1, len(warm) // 4)

    def more(name: str) -> float:
        return max(one[name] for one in warm[-quarter:]) - max(one[name] for one in warm[:quarter])

    return {
        "soak_steps": len(seen),
        "rss_growth_percent": growth([one["rss"] for one in warm]),
        "worker_rss_growth_percent": growth([one["workers"] for one in warm if one["workers"]]),
        "step_time_growth_percent": growth([one["seconds"] / one["calibration"] for one in steps]),
        "descriptors_more": more("descriptors"),
        "processes_more": more("children"),
        "worker_kills": worker_kills,
        "rss_megabytes": median(one["rss"] for one in warm[-quarter:]) / 1e6,
        "step_seconds": median(one["seconds"] for one in steps),
        "calibration_seconds": median(one["calibration"] for one in steps),
    }


def soak(steps: int, rows: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Train so many steps of so many rollouts in this process; answers the figures, and whatever is left over."""
    random.seed(0)
    verifier = HangingVerifier()
    watch = Watch(verifier)
    args = SGOPDConfig(
        str(folder / "run"), max_steps=steps, per_device_train_batch_size=rows, num_generations=4,
        max_completion_length=tokens, learning_rate=3e-4, warmup_steps=steps // 10, logging_steps=10,
        log_completions=True, num_completions_to_print=0, save_steps=max(1, steps // 10), save_total_limit=2,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, estimator="full",
    )  # fmt: skip
    data = load_dataset("json", data_files=str(ARITHMETIC / "data" / "train.jsonl"), split="train")
    models = str(ARITHMETIC / "student"), str(ARITHMETIC / "teacher")
    trainer = SGOPDTrainer(*models, verifier, args, data, callbacks=[watch])
    trainer.train()
    kills = verifier._grader.replaced
    verifier.close()
    return {**figures(watch.seen, kills), "processes_left": len(psutil.Process().children(recursive=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16, help="rollouts a step")
    parser.add_argument("--tokens", type=int, default=48, help="longest completion")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    result = soak(options.steps, options.rows, options.tokens, options.output_dir)
    write_json(options.output_dir / "soak.json", result)
    print(result)


if __name__ == "__main__":
    main()
