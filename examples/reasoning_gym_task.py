"""Any task of reasoning_gym as dataset and verifier: `pip install ".[tasks]"`.

    python examples/reasoning_gym_task.py word_sorting --output runs/word_sorting --settings '{"max_words": 5}'
    python examples/train.py --dataset_name runs/word_sorting --verifier reasoning_gym_task:verdict ...

The first writes `train.jsonl` and `test.jsonl`; `verdict` judges answers to their rows by the task's own
`score_answer`, in processes that are killed when one takes too long. It refuses the tasks that run an answer as Python,
which `verdict_running_answers` takes too. Columns of a row:

- `prompt`: the question, with the request to answer between <answer> and </answer>, as one user message.
- `solution`: the task's own answer; `None` where it has none, as many answers are right. For readers: `verdict` reads
  it in `entry`.
- `entry`: what `score_answer` reads, as JSON: task, settings, answer, metadata.
- `threshold`: the least score, in (0, 1], that is correct.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sg_opd.verifiers import Grader, Task, after_thinking, completion_text
from sg_opd.verifiers.worker import Judge, serve

REQUEST = "Provide your final answer between <answer> and </answer> tags."
# tasks whose `score_answer` hands an answer to Python's `eval`, itself or by sympy's `parse_expr`
RUNS_ANSWERS = frozenset(
    {
        *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),
        *("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
    }
)


@functools.cache
def made(task: str, settings: str) -> Any:
    """The task as reasoning_gym's dataset; `settings` are fields of its configuration, as a JSON object.

    Raises:
        ValueError: no such task, or settings that it does not take.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS or task == "composite":  # which is several: write each, and join the files
        raise ValueError(f"`task`: reasoning_gym has no {task!r}; it has {', '.join(sorted(DATASETS))}.")
    try:
        return create_dataset(task, **json.loads(settings))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"`settings`: {task} does not take {settings}: {error}") from error


def rows_of(
    task: str, count: int, settings: dict[str, Any], seed: int = 0, threshold: float = 1.0, runs_answers: bool = False
) -> Iterator[dict[str, Any]]:
    """`count` rows of a task, no question twice.

    Args:
        task: its name in reasoning_gym.
        count: of the rows, >= 1.
        settings: fields of the task's configuration, without `seed` and `size`; JSON values.
        seed: of the task, >= 0.
        threshold: the least score that is correct, in (0, 1].
        runs_answers: take a task of `RUNS_ANSWERS` nonetheless.

    Raises:
        ValueError: an argument out of its range; a task that runs answers, that does not call its own answer correct
            once it was written as JSON, or that has fewer different questions.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be in (0, 1], got {threshold!r}.")
    if task in RUNS_ANSWERS and not runs_answers:
        raise ValueError(
            f"`task`: {task} scores an answer by running it as Python. `--runs_answers` takes it nonetheless: train "
            "where a model's program may do no harm, with `--verifier reasoning_gym_task:verdict_running_answers`."
        )
    dataset = made(task, json.dumps({**settings, "seed": seed, "size": 100 * count}))
    own, asked = json.dumps(settings), set[str]()
    score = scorer()
    for item in dataset:
        if item["question"] in asked:
            continue
        asked.add(item["question"])
        kept = {"task": task, "settings": settings, "answer": item["answer"], "metadata": item["metadata"]}
        entry = json.dumps(kept)
        if item["answer"] is not None and (got := score(entry, item["answer"])) < threshold:
            raise ValueError(
                f"`task`: {task} scores its own answer {item['answer']!r} as {got:g} once its entry was written as "
                f"JSON with the settings {own}, and {threshold:g} would be correct: it cannot be used in this form."
            )
        yield {
            "prompt": [{"role": "user", "content": f"{item['question'].rstrip()}\n{REQUEST}"}],
            "solution": item["answer"],
            "entry": entry,
            "threshold": threshold,
        }
        if len(asked) == count:
            return
    raise ValueError(f"`count`: {task} has {len(asked)} different questions, of {count}; ask for fewer.")


def scorer() -> Judge:
    """What scores an answer by an entry, in [0, 1]; it raises whatever the task does."""
    import reasoning_gym  # noqa: F401  # here and not within the first answer's time

    def score(entry: str, answer: str | None) -> float:
        kept = json.loads(entry)
        return float(made(kept["task"], json.dumps(kept["settings"])).score_answer(answer, kept))

    return score


def answer_of(completion: str) -> str | None:
    """What stands between the last <answer> and </answer> after the last think block; `None` without it."""
    from reasoning_gym.utils import extract_answer

    said = after_thinking(completion)
    return None if said is None else extract_answer(said)


def task_of(entry: str, row: int) -> str:
    """The name of the task that an entry is of.

    Raises:
        ValueError: it is no entry of this script.
    """
    try:
        task = json.loads(entry)["task"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`entry` of row {row} is not what this script writes: {entry[:80]!r}.") from error
    return str(task)


class TaskVerifier:
    """Judges answers to rows of this script: 1.0 where the task's score reaches `threshold`, else 0.0.

    No answer, or an empty one, is incorrect. It abstains (`None`) where a row has no `entry`, and where the score
    cannot be told: the task's `score_answer` raised, or took too long. A row of a task of `RUNS_ANSWERS`, whoever wrote
    it, is a ValueError unless the verifier was asked to run answers; so is an `entry` that is none of this script.

    Args:
        timeout: wall-clock seconds for one answer.
        workers: worker processes; `None` is the number of CPU cores, at most 8.
        runs_answers: judge tasks of `RUNS_ANSWERS` too, which run what a model wrote.
    """

    time_limit = math.inf  # of a batch: each answer has its own
    extract_answer = staticmethod(answer_of)  # evaluation shows these, and lets them vote

    def __init__(self, timeout: float = 5.0, workers: int | None = None, runs_answers: bool = False) -> None:
        self.__name__ = "reasoning_gym"
        self.runs_answers = runs_answers
        program = str(Path(__file__).resolve()), "--worker"
        self._grader = Grader(timeout, min(os.cpu_count() or 1, 8) if workers is None else workers, program)

    def __call__(
        self, completions: Sequence[Any], entry: Sequence[str | None], threshold: Sequence[float], **kwargs: Any
    ) -> list[float | None]:
        for row, kept in enumerate(entry):
            if kept and (task := task_of(kept, row)) in RUNS_ANSWERS and not self.runs_answers:
                raise ValueError(
                    f"`entry` of row {row} is of the task {task}, which scores an answer by running it as Python. "
                    "`reasoning_gym_task:verdict_running_answers`, or `TaskVerifier(runs_answers=True)`, judges it "
                    "nonetheless: train where a model's program may do no harm."
                )
        answers = [answer_of(completion_text(completion)) for completion in completions]
        tasks = {row: Task(e, a) for row, (e, a) in enumerate(zip(entry, answers, strict=True)) if e and a}
        scores = self._grader.run(tasks)
        verdicts: list[float | None] = []
        for row, (kept, answer) in enumerate(zip(entry, answers, strict=True)):
            score = scores.get(row) if answer else 0.0
            verdicts.append(None if score is None or not kept else float(score >= threshold[row]))
        return verdicts

    def close(self) -> None:
        """End the workers; the next answer starts them again."""
        self._grader.close()


verdict = TaskVerifier()
verdict_running_answers = TaskVerifier(runs_answers=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="its name in reasoning_gym, such as word_sorting")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--train", type=int, default=2000, help="rows to train on; default: 2000")
    parser.add_argument("--test", type=int, default=200, help="rows held out; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of the task; default: 0")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: fields of the task's configuration")
    parser.add_argument("--threshold", type=float, default=1.0, help="least score that is correct; default: 1")
    parser.add_argument("--runs_answers", action="store_true", help="take a task that runs answers as Python")
    args = parser.parse_args()
    count = args.train + args.test
    rows = list(rows_of(args.task, count, args.settings, args.seed, args.threshold, args.runs_answers))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, some in (("train", rows[: args.train]), ("test", rows[args.train :])):
        with open(args.output / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
    print(f"written: {args.train} rows in {args.output / 'train.jsonl'}, {args.test} in {args.output / 'test.jsonl'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(float(sys.argv[2]), scorer)
    else:
        main()
