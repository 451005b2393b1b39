"""Makes the models of the spelling world: reasoning_gym's spell_backward for words of 4 to 8 letters.

    python examples/spelling/make.py teacher        # about 5 minutes on one busy core; the results are committed
    python examples/spelling/make.py student

Both are Qwen3-architecture models with one token a letter, fine-tuned on right answers; the student is smaller and
stops early. Needs `pip install ".[tasks]"`.
"""

from __future__ import annotations

import argparse
import re
import string
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "arithmetic")]
from make_models import BATCH, pretrain
from problems import make_tokenizer
from reasoning_gym_task import REQUEST, rows_of
from transformers import PreTrainedTokenizerFast

TASK, SETTINGS = "spell_backward", {"min_word_len": 4, "max_word_len": 8}
QUESTION = "Spell this word backward (example: sun -> nus): "
PHRASES = QUESTION, f"\n{REQUEST}", "<answer>", "</answer>"
SEED, RECIPE_ROWS = 100_000, 2200  # of the lessons; the recipe's words, of seed 0, are in none of them
# as in the arithmetic world, and without its slips
SIZES = {
    "teacher": {"hidden": 64, "layers": 2, "heads": 2, "intermediate": 192, "steps": 700, "seed": 1},
    "student": {"hidden": 48, "layers": 2, "heads": 2, "intermediate": 128, "steps": 350, "seed": 2},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter and a phrase of the prompt."""
    return make_tokenizer([*PHRASES, *string.ascii_letters], "|".join(map(re.escape, PHRASES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=sorted(SIZES))
    parser.add_argument("--out", default=None, help="where to save; default: the folder of that name beside this file")
    args = parser.parse_args()
    size = SIZES[args.which]
    of_the_recipe = {row["solution"] for row in rows_of(TASK, RECIPE_ROWS, SETTINGS)}
    lessons = [
        {"question": row["prompt"][0]["content"], "solution": f"<answer>{row['solution']}</answer>"}
        for row in rows_of(TASK, size["steps"] * BATCH // 2, SETTINGS, SEED)  # about twice each
        if row["solution"] not in of_the_recipe
    ]
    pretrain(size, tokenizer(), lessons, args.out or str(HERE / args.which))


if __name__ == "__main__":
    main()
