"""The arithmetic world: problems, worked solutions and a tokenizer, all made here from a seed.

A problem is a chain of operations on a running value; the solution writes every step and ends in ``\\boxed{}``:

    user:      Start with 34, add 27, times 3, minus 58.
    assistant: 34+27=61
               61*3=183
               183-58=125
               \\boxed{125}

Usage: ``python examples/arithmetic/problems.py`` rewrites ``data/train.jsonl`` (questions and answers for distillation,
no worked solutions), ``data/test.jsonl`` (200 held-out questions) and ``hinted/train.jsonl`` (500 of the
first, each with its worked solution for the teacher alone) beside this file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
WORDS = ["Start with ", ", add ", ", minus ", ", times ", "\\boxed{", "}", "\n", "+", "-", "*", "=", "."]
PHRASES = r"Start with |, add |, minus |, times |\\boxed\{"
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LARGEST = 999
OPERATIONS = 3, 5
TEST_SEED, TRAIN_SEED, PRETRAIN_SEED = 20_001, 20_002, 20_003


def make_problem(rng: random.Random, slip: float = 0.0, operations: tuple[int, int] = OPERATIONS) -> dict:
    """One problem; every running value lies in [0, 999].

    Args:
        rng: the source of randomness.
        slip: chance that a step of the solution gets its result wrong, by one digit, and goes on from there.
        operations: the fewest and the most.

    Returns:
        `{"question": str, "solution": str, "answer": str}`; `solution` is the worked text.
    """
    value = rng.randint(2, 99)
    question, lines = f"Start with {value}", []
    for _ in range(rng.randint(*operations)):
        kinds = ["add"] * 2 + ["minus"] * 2 * (value > 1) + ["times"] * (2 <= value <= LARGEST // 2)
        kind = rng.choice(kinds)
        if kind == "add":
            n = rng.randint(1, max(1, min(99, LARGEST - value)))
            if value + n > LARGEST:
                kind = "minus"
        if kind == "minus":
            n = rng.randint(1, min(99, value))
        if kind == "times":
            n = rng.randint(2, min(9, LARGEST // value))
        sign, result = {"add": ("+", value + n), "minus": ("-", value - n), "times": ("*", value * n)}[kind]
        if slip and rng.random() < slip:
            result = with_slip(result, rng)
        question += f", {kind} {n}"
        lines.append(f"{value}{sign}{n}={result}")
        value = result
    return {"question": question + ".", "solution": "\n".join(lines) + f"\n\\boxed{{{value}}}", "answer": str(value)}


def with_slip(value: int, rng: random.Random) -> int:
    """`value` with one of its digits replaced by another one."""
    digits = list(str(value))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "0123456789" if d != digits[place]])
    return int("".join(digits))


def make_problems(count: int, seed: int, exclude: frozenset[str] = frozenset(), **settings: Any) -> list[dict]:
    """`count` distinct problems from `seed`, none of whose questions is in `exclude`; settings as of `make_problem`."""
    return distinct(lambda rng: make_problem(rng, **settings), count, seed, exclude)


def distinct(make: Callable[[random.Random], dict], count: int, seed: int, exclude: frozenset[str]) -> list[dict]:
    """`count` problems that `make` draws from `seed`, no question twice and none that is in `exclude`."""
    rng, seen, rows = random.Random(seed), set(exclude), []
    while len(rows) < count:
        row = make(rng)
        if row["question"] not in seen:
            seen.add(row["question"])
            rows.append(row)
    return rows


def make_tokenizer(words: Sequence[str] = WORDS, phrases: str = PHRASES) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token a digit, a sign or a phrase of the questions.

    Args:
        words: its tokens beside the special ones and the ten digits.
        phrases: regular expression of those words that are longer than one character.
    """
    tokens = SPECIAL + list(words) + [str(d) for d in range(10)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{phrases}|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def held_out_questions() -> frozenset[str]:
    """The questions of the test set, which no training set may contain."""
    return frozenset(row["question"] for row in make_problems(200, TEST_SEED))


def as_row(problem: dict) -> dict:
    """A problem in the form the trainer takes: `prompt` as messages, `solution` the bare answer."""
    return {"prompt": [{"role": "user", "content": problem["question"]}], "solution": problem["answer"]}


def as_hinted_row(problem: dict) -> dict:
    """The same for a teacher that sees more: its `teacher_prompt` has the worked solution before the question.

    Of two teachers, `teacher` names the one for questions with products and the one for the others.
    """
    row = as_row(problem) | {"teacher": "products" if "times" in problem["question"] else "sums"}
    return {
        **row,
        "teacher_prompt": [*row["prompt"], {"role": "assistant", "content": problem["solution"]}, *row["prompt"]],
    }


def main() -> None:
    train = make_problems(4000, TRAIN_SEED, held_out_questions())
    files = {
        "data/train": map(as_row, train),
        "data/test": map(as_row, make_problems(200, TEST_SEED)),
        "hinted/train": map(as_hinted_row, train[:500]),
    }
    for name, rows in files.items():
        path = HERE / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
