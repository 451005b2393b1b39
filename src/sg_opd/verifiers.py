r"""`MathVerifier`: a binary verdict on a mathematical answer, in TRL's reward-function form.

Importing this module imports neither torch nor TRL.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import re
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

from .grader import Grader, units_agree

THINK = re.compile(r"<(/?)(?:think|thinking)>|<\|(end|begin)_of_thought\|>")
BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
INTEGERS = re.compile(r"\s*-?\d+\s*(?:,\s*-?\d+\s*)+")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
QUANTITY = re.compile(
    r"(?:\\?\$|\\pounds|[€£])?\s*(?P<number>[+-]?[\d.,{}\\]*\d)\s*~?\s*"
    r"(?:(?P<words>(?<=[\s~])[A-Za-z]{3,}(?: [A-Za-z]+)*)"
    r"|\\(?:text|mathrm)\s*\{\s*(?P<text>[A-Za-z]+(?: [A-Za-z]+)*)\s*\})?"
)
RATIONAL = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s+(?=\d)|\s*(?=\\)))?"
    r"(?:(?P<n>\d+)\s*/\s*(?P<d>\d+)|\\[dt]?frac\s*\{\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\})"
)
PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*percent\s*\}|percent)\s*$")
# what people type for LaTeX, in the forms math-verify does not read
TYPED = {"°": r"^\circ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", r"\varnothing": r"\emptyset"}
ROOT = re.compile(r"√\s*\(?(\w+)\)?")
NO_SPACE = re.compile(r"\\[,!]|\\left(?![a-z])|\\right(?![a-z])")
WIDE_SPACE = re.compile(r"~|\\[;: ]|\\q?quad\b")
LONE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
CHOICE = re.compile(r"^\(([A-Za-z])\)$")  # one letter in parentheses
# columns that a reward function is given under these names anyway
NOT_FORWARDED = ("prompt", "completion", "completion_ids")
MAX_TAIL = 20_000  # characters after the last think delimiter in which a box is looked for
MAX_ANSWER = 1_000  # a longer answer is compared letter by letter only, never by sympy


def extract_answer(completion: str) -> str | None:
    r"""The content of the last complete `\boxed{}` after the last think delimiter; `None` without one.

    A think block that was opened and never closed hides what follows it: such a completion has no answer yet.
    """
    delimiters = list(THINK.finditer(completion))
    if delimiters:
        last = delimiters[-1]
        if last[1] == "" or last[2] == "begin":
            return None
        completion = completion[last.end() :]
    return last_box(completion[-MAX_TAIL:])


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}` or `\fbox{}` whose braces close, or `None`; one pass over `text`."""
    opened: list[int | None] = []  # where a box's content begins, None for an ordinary brace
    start, content = -1, None
    for token in BOX_TOKEN.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None and begin > start:
                start, content = begin, text[begin : token.start()]
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.end())
    return None if content is None else content.strip()


def gold_answer(gold: Any) -> str | None:
    """A dataset's gold as bare LaTeX: the last box of a worked answer, else the text itself; `None` where missing."""
    if gold is None or (isinstance(gold, float) and math.isnan(gold)):
        return None
    text = str(gold).strip()
    boxed = last_box(text)
    return as_latex(text if boxed is None else boxed) or None


def as_latex(text: str) -> str:
    """The text with signs that people type, such as ° or √, as LaTeX."""
    for sign, latex in TYPED.items():
        text = text.replace(sign, latex)
    return ROOT.sub(r"\\sqrt{\1}", text)


def completion_text(completion: Any) -> str:
    """The text to grade: a plain completion, or the content of the last message of a conversational one."""
    if isinstance(completion, str):
        return completion
    if completion is None or len(completion) == 0:
        return ""
    content = completion[-1].get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def plain_number(text: str) -> Decimal | None:
    """The value of a plain integer or decimal, with or without thousands separators; `None` for anything else."""
    text = undecorated(text).replace("\\,", "").replace("{,}", ",")
    if not text or not NUMBER.fullmatch(text) or not text[-1].isdigit():
        return None
    return Decimal(text.replace(",", ""))


def quantity(text: str) -> tuple[Decimal, str] | None:
    r"""A plain number and its unit, which may be empty: `25 dollars`, `5\text{ cm}`, `\$5`, `5`."""
    text = undecorated(text)
    whole = TEXT_COMMAND.fullmatch(text)
    match = QUANTITY.fullmatch(whole[1] if whole else text)
    number = plain_number(match["number"]) if match else None
    return None if match is None or number is None else (number, (match["text"] or match["words"] or "").strip())


def rational(text: str) -> Fraction | None:
    r"""The exact value of a number, `a/b`, `\frac{a}{b}`, a mixed number of these, or any of them in per cent."""
    text = undecorated(text)
    bare = PERCENT.sub("", text)
    number, match = plain_number(bare), RATIONAL.fullmatch(bare)
    if number is not None:
        return Fraction(number)
    if match is None:
        return None
    top, bottom = (int(match[a] or match[b]) for a, b in (("n", "top"), ("d", "bottom")))
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(top, bottom)
    return -value if match["sign"] == "-" else value


def integer_list(text: str) -> list[int] | None:
    r"""The sorted members of `1, 2` or `\{1, 2\}`; `None` for anything else."""
    text = undecorated(text).removeprefix("\\{").removesuffix("\\}")
    return sorted(map(int, text.split(","))) if INTEGERS.fullmatch(text) else None


def undecorated(text: str) -> str:
    """Without surrounding space, math delimiters and a final full stop."""
    text = text.strip().removesuffix("\\\\").removesuffix(".").removeprefix("\\approx").strip()
    for left, right in (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("$", "$")):
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
    return text.removesuffix(".")


def normalised(text: str) -> str:
    """For comparison letter by letter: besides, without text commands, and without spacing but between two digits."""
    text = TEXT_COMMAND.sub(r"\1", undecorated(text).replace("dfrac", "frac").replace("tfrac", "frac"))
    text = " ".join(WIDE_SPACE.sub(" ", NO_SPACE.sub("", text)).split())
    return CHOICE.sub(r"\1", LONE_SPACE.sub("", text))


def canonical_answer(answer: str) -> Hashable:
    """What two ways to write an answer have in common, for counting votes: an exact number's value, else the text."""
    answer = as_latex(answer)
    value = rational(answer) if len(answer) <= MAX_ANSWER else None
    return normalised(answer) if value is None else value


def quick_verdict(gold: str, answer: str) -> float | None:
    """The verdict where no sympy is needed, else `None`: equal texts, plain numbers, words, over-long answers."""
    a, b = normalised(gold), normalised(answer)
    if a == b or (len(a) == 1 and a in "ABCDEFGHIJ" and a == b.upper()):
        return 1.0
    if len(answer) > MAX_ANSWER:
        return 0.0
    members = integer_list(gold)
    if members is not None and members == integer_list(answer):
        return 1.0
    some, other = quantity(gold), quantity(answer)
    if some is not None and other is not None:
        agree = not some[1] or not other[1] or units_agree(some[1], other[1])
        return float(some[0] == other[0] and agree)
    p, q = rational(gold), rational(answer)
    if p is not None and q is not None:
        if p == q:
            return 1.0
        if "." not in gold + answer and "%" not in gold + answer:  # else a matter of rounding, or of per cent
            return 0.0
    if is_text(gold):
        return float(a.casefold() == b.casefold())
    if a.casefold() == b.casefold() == "no":
        return 1.0
    if a.isalpha() and b.isalpha() and len(a) > 2:  # words, but for anagrams, which may be products
        if a.casefold() == b.casefold():
            return 1.0
        if sorted(a.casefold()) != sorted(b.casefold()):
            return 0.0
    return None


def is_readable(gold: str) -> bool:
    """Whether a gold can be compared without sympy: words, a number with or without a unit, a fraction."""
    return is_text(gold) or normalised(gold).isalpha() or quantity(gold) is not None or rational(gold) is not None


def is_text(gold: str) -> bool:
    """Whether a gold is nothing but words in text commands."""
    return TEXT_COMMAND.sub("", undecorated(gold)).strip() == "" and any(map(str.isalpha, gold))


class MathVerifier:
    r"""Judges mathematical answers: 1.0 correct, 0.0 incorrect, `None` abstained.

    The answer is the last `\boxed{}` after the last think delimiter; none is incorrect. A gold that is a worked
    solution is read by its last box, any other as bare LaTeX. A missing or unparseable gold, a time-out and a crash of
    the grader abstain. Plain integers, decimals and words are compared here, all else by math-verify in a worker, so a
    verdict depends neither on the order of a batch nor on the number of workers.

    It has the form of a TRL reward function, and any TRL reward function that answers 1, 0 or `None` can stand in its
    place. Workers start at the first answer that needs one and end with this object, at `close()`, or with the process.

    Args:
        timeout: wall-clock seconds for one answer, > 0.
        workers: worker processes; `None` is the number of CPU cores, at most 8.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, timeout: float = 5.0, workers: int | None = None) -> None:
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"`timeout` must be a finite number of seconds > 0, got {timeout!r}.")
        if workers is not None and workers < 1:
            raise ValueError(f"`workers` must be >= 1 or None, got {workers!r}.")
        self.timeout = timeout
        self.workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        self.__name__ = type(self).__name__  # TRL names a reward's metrics by it
        self._grader = Grader(timeout, self.workers)

    def __call__(self, completions: Sequence[Any], solution: Sequence[Any], **kwargs: Any) -> list[float | None]:
        """One verdict a completion.

        Args:
            completions: plain texts, or lists of messages (the last one's content is graded).
            solution: the golds, one a completion: text, number or `None`.
            **kwargs: other columns and TRL's extras, not read.

        Raises:
            ValueError: `completions` and `solution` differ in length.
            RuntimeError: a worker could not start (its own output says why).
        """
        if len(completions) != len(solution):
            raise ValueError(f"{len(completions)} completions but {len(solution)} rows of `solution`; give one each.")
        verdicts: list[float | None] = [None] * len(completions)
        tasks = []
        for row, (completion, gold) in enumerate(zip(completions, map(gold_answer, solution), strict=True)):
            if gold is None:
                continue
            answer = extract_answer(completion_text(completion))
            answer = as_latex(answer or "")
            verdicts[row] = 0.0 if not answer else quick_verdict(gold, answer)
            if verdicts[row] is None:
                words = normalised(gold).isalpha() and len(normalised(gold)) > 2
                tasks.append((row, {"gold": gold, "answer": answer, "words": words}))
        for row, verdict in self._grader.run(tasks).items():
            verdicts[row] = verdict
        return verdicts

    def unparseable(self, solution: Sequence[Any]) -> list[int]:
        """The rows whose gold is missing or cannot be parsed, so that every verdict on them would abstain."""
        golds = [gold_answer(gold) for gold in solution]
        bad = {row for row, gold in enumerate(golds) if gold is None}
        unsure = [(row, {"gold": gold}) for row, gold in enumerate(golds) if gold is not None and not is_readable(gold)]
        return sorted(bad | {row for row, parsed in self._grader.run(unsure).items() if parsed != 1.0})

    def close(self) -> None:
        """End the workers; the next answer that needs one starts them again."""
        self._grader.close()


def as_completion(prompt: Any, text: str) -> Any:
    """A completion's text in the form of its prompt: plain, or as the assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The columns of a dataset's rows that TRL hands to a reward function."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in NOT_FORWARDED}


def checked_verdicts(verifier: Callable, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list:
    """What any verifier in reward-function form answers, as 1.0, 0.0 or `None` a row; async ones are awaited.

    Raises:
        ValueError: another value, or another number of values than completions, with the row.
    """
    answer = verifier(prompts=prompts, completions=completions, **kwargs)
    if inspect.isawaitable(answer):
        with ThreadPoolExecutor(1) as executor:  # a notebook's own event loop is running in this thread
            answer = executor.submit(asyncio.run, _awaited(answer)).result()
    name = getattr(verifier, "__name__", type(verifier).__name__)
    if not hasattr(answer, "__len__"):
        raise ValueError(f"The verifier {name} answered {answer!r}; it must return a list, one verdict a completion.")
    if len(answer) != len(completions):
        raise ValueError(f"The verifier {name} answered {len(answer)} values for {len(completions)} completions.")
    for row, value in enumerate(answer):
        if value is not None and value not in (0, 1):
            raise ValueError(
                f"The verifier {name} answered {value!r} for row {row} (completion {str(completions[row])[:80]!r}); "
                "a verdict is 1 (correct), 0 (incorrect) or None (abstained)."
            )
    return [None if value is None else float(value) for value in answer]


async def _awaited(answer: Any) -> Any:
    return await answer
