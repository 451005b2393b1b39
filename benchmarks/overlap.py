"""What happens at once: a server's scoring, grading and old log-probabilities, against the longest of the three.

    vllm serve TEACHER --port 8000 --dtype float32 --no-enable-prefix-caching --max-logprobs 64
    python benchmarks/overlap.py --student STUDENT --server http://127.0.0.1:8000 --output OUT.json

Generation is replaced by rollouts that are always the same: worked-looking texts whose boxed answers need sympy. In
each round each of the three is timed alone, then all of them in turn and at once, as the trainer does them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from sg_opd.evaluation import provenance
from sg_opd.evaluation.results import write_json
from sg_opd.training.rollouts import Rollouts
from sg_opd.training.scoring import Scoring

GENERATIONS = 8
SINGLE = ("scoring", "grading", "old log-probs")
WHOLE = ("in turn", "at once")


def problems(count: int) -> list[dict[str, Any]]:
    """Questions whose answers are equal to their references by algebra alone, with the text of a completion."""
    rows = []
    for n in range(2, count + 2):
        question = f"Simplify (x^2 - {n * n}) / (x - {n}) and add {n}. Put the final answer in \\boxed{{}}."
        worked = f"The quotient is x + {n}, so the sum is \\boxed{{\\frac{{(x+{n})(x-{n})}}{{x-{n}}}+{n}}}"
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "solution": f"x+{2 * n}",
                "worked": worked,
            }
        )
    return rows


class Replayed(SGOPDTrainer):
    """Returns the same completions for every generation."""

    replayed: list[list[int]]

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return self.replayed, None


def trainer_of(options: argparse.Namespace, rows: list[dict[str, Any]], folder: str) -> Replayed:
    """A trainer that needs old log-probabilities (two passes over a generation), and its rollouts."""
    args = SGOPDConfig(
        output_dir=folder,
        preset="sg-opd-lite",
        teacher_phase_steps=0,
        estimator=options.estimator,
        teacher_server_url=[options.server],
        num_iterations=2,
        num_generations=GENERATIONS,
        per_device_train_batch_size=options.rollouts,
        max_completion_length=options.tokens,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    dataset = Dataset.from_list([{"prompt": row["prompt"], "solution": row["solution"]} for row in rows])
    trainer = Replayed(model=options.student, args=args, train_dataset=dataset, processing_class=tokenizer)
    filler = tokenizer(" so")["input_ids"]
    texts = [tokenizer(row["worked"])["input_ids"] for row in rows for _ in range(GENERATIONS)]
    trainer.replayed = [
        [*(filler * options.tokens)[: options.tokens - 1 - len(ids)], *ids, tokenizer.eos_token_id] for ids in texts
    ]
    return trainer


@contextmanager
def in_turn() -> Any:
    """The trainer does one thing after another."""
    with (
        mock.patch.object(Scoring, "begin"),
        mock.patch.object(Rollouts, "grade_ahead"),
    ):
        yield


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(trainer: Replayed, rows: list[dict[str, Any]], count: int) -> list[dict[str, float]]:
    """The seconds of each part, by round; before them one that is not counted."""
    inputs = [{"prompt": row["prompt"], "solution": row["solution"]} for row in rows for _ in range(GENERATIONS)]
    trainer.model.train()
    whole = trainer._generate_and_score_completions
    found = []
    batch = whole(inputs)
    texts = trainer.processing_class.batch_decode(trainer.replayed, skip_special_tokens=True)
    solutions = [row["solution"] for row in inputs]
    assert trainer.verifier(texts, solutions) == [1.0] * len(texts)
    for _ in range(count):
        times = {
            "scoring": seconds(lambda: trainer.scoring.of_generation(batch)),
            "grading": seconds(lambda: trainer.verifier(texts, solutions)),
            "old log-probs": seconds(lambda: trainer.completion_logps(trainer.model, batch)),
            "at once": seconds(lambda: whole(inputs)),
        }
        with in_turn():
            times["in turn"] = seconds(lambda: whole(inputs))
        found.append(times)
    return found


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and both orders as ratios to the longest part of their own round."""
    medians = {name: statistics.median(times[name] for times in found) for name in (*SINGLE, *WHOLE)}
    ratios = {name: sorted(times[name] / max(times[part] for part in SINGLE) for times in found) for name in WHOLE}
    spans = {name: [values[0], statistics.median(values), values[-1]] for name, values in ratios.items()}
    return {"seconds": medians, "to_the_longest": spans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="folder of the student")
    parser.add_argument("--server", required=True, help="base URL of the teacher's server")
    parser.add_argument("--estimator", choices=("sampled", "top_k"), default="sampled")
    parser.add_argument("--rollouts", type=int, default=16, help=f"of a generation, a multiple of {GENERATIONS}")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of this process; the server has cores of its own")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = problems(options.rollouts // GENERATIONS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, rows, folder)
        assert isinstance(trainer.verifier, MathVerifier)
        found = rounds(trainer, rows, options.rounds)
        trainer.verifier.close()
    result = summary(found)
    for name, value in result["seconds"].items():
        print(f"{name:14} {value:7.2f} s")
    for name, (low, middle, high) in result["to_the_longest"].items():
        print(f"{name:14} {middle:5.2f} of the longest ({low:.2f} to {high:.2f})")
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "server", "student")}
        write_json(options.output, {**result, "rounds": found, "settings": settings, "provenance": provenance()})


if __name__ == "__main__":
    main()
