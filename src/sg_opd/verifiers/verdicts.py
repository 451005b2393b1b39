"""Judges completions: `MathVerifier` for mathematics, and how any verifier is called, checked and interrupted.

A verifier is a TRL reward function that returns 1 (correct), 0 (incorrect) or `None` (abstained) for each completion.
Importing this module imports neither torch nor TRL.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from .answers import MAX_ANSWER, MAX_REFERENCE, extract_answer, reference_answer
from .grader import Grader, Task
from .mathematics.comparing import UndecidedError, compare, same
from .mathematics.reading import read, read_answer

read_reference = functools.lru_cache(maxsize=16_384)(read)

T = TypeVar("T")

logger = logging.getLogger(__name__)  # of every rank: each has its own calls

NOT_FORWARDED = ("prompt", "completion", "completion_ids")  # columns that a reward function is given by name anyway
# what a reward function is given beside the dataset's columns, and whose it is: no column can have such a name
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments", "self")
PATIENCE_SECONDS = 1800.0  # for one call of a verifier; as long as ranks wait for each other by default
AGAIN_SECONDS = 10.0  # between two attempts to interrupt, where the first was caught by the code that blocks
FRAMES = 4  # of the place where it blocks, in the log
UNDECIDED = 2  # comparisons by workers that came to nothing, after which an answer votes without them


class MathVerifier:
    r"""Judges mathematical answers: 1.0 correct, 0.0 incorrect, `None` abstained.

    The answer is the last `\boxed{}` after the last think delimiter; none, as in a completion that is no text, is
    incorrect. Of a reference answer that is a worked solution the last box counts, any other is bare LaTeX. It
    abstains where the reference answer is missing, cannot be read or is longer than 4,000 characters (and the
    answer is another text), where the answer cannot be read, and after a time-out or a crash of the grader. What
    needs no sympy is compared here, all else in a worker, so a verdict depends neither on the order of a batch nor
    on the number of workers. docs/verifiers.md says what it takes for equal. A worker has at most 1 GiB of memory,
    writes no file, and gets none of the caller's environment but what finds Python's modules.

    It has the form of a TRL reward function, and any TRL reward function that answers 1, 0 or `None` can stand in its
    place. Workers start at the first answer that needs one and end with this object, at `close()`, or with the process.
    A process forked from this one starts workers of its own.

    Args:
        timeout: wall-clock seconds for one answer, > 0.
        workers: worker processes; `None` is the number of CPU cores, at most 8.

    Raises:
        ValueError: an argument out of its range.
    """

    time_limit = math.inf  # of a batch: each answer has its own

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
            solution: the reference answers, one a completion: text, number or `None`.
            **kwargs: other columns and TRL's extras, not read.

        Raises:
            ValueError: `completions` and `solution` differ in length.
            RuntimeError: a worker could not start (its own output says why).
        """
        if len(completions) != len(solution):
            raise ValueError(f"{len(completions)} completions but {len(solution)} rows of `solution`; give one each.")
        answers = [extract_answer(completion_text(completion)) for completion in completions]
        return self._compared(list(zip(map(reference_answer, solution), answers, strict=True)))

    def _compared(self, pairs: Sequence[tuple[str | None, str | None]]) -> list[float | None]:
        """The verdict on each reference answer and answer; workers are asked where no quick look decides."""
        verdicts, tasks = quick_verdicts(pairs)
        for row, verdict in self._grader.run(tasks).items():
            verdicts[row] = verdict
        return verdicts

    def unparseable(self, solution: Sequence[Any]) -> list[int]:
        """The rows whose reference answer is missing or cannot be read: every verdict on them would abstain."""
        references = dict(enumerate(map(reference_answer, solution)))
        usable = {row: text for row, text in references.items() if text is not None and len(text) <= MAX_REFERENCE}
        bad = references.keys() - usable.keys()
        tasks: dict[int, Task] = {}
        for row, text in usable.items():
            form = read_reference(text)
            if form is None:
                bad.add(row)
                continue
            try:
                compare(form, form)
            except UndecidedError:
                tasks[row] = Task(text)
        return sorted(bad | {row for row, value in self._grader.run(tasks).items() if value != 1.0})

    def votes(self, questions: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """A number for each answer, by question: answers that this verifier takes for equal have the same one.

        The number is the place of the first of them within its question; `None` stays `None`. Answers that cannot be
        read vote by their text. Two comparisons of an answer that took too long, or told nothing, are enough: what
        needs a worker counts as different from it afterwards. So n answers have at most 2 (n - 1) such comparisons.
        """
        places = [{answer: answers.index(answer) for answer in answers if answer is not None} for answers in questions]
        votes: list[dict[str, int]] = [{} for _ in questions]
        undecided = Counter[tuple[int, str]]()
        while any(map(len, places)):  # each round settles the first answer that is left of every question
            pairs = [(number, next(iter(left)), other) for number, left in enumerate(places) for other in left]
            verdicts, tasks = quick_verdicts([(first, other) for _, first, other in pairs])
            for row, (number, *both) in enumerate(pairs):
                if any(undecided[number, answer] >= UNDECIDED for answer in both):
                    tasks.pop(row, None)
            for row, verdict in self._grader.run(tasks).items():
                number, _, other = pairs[row]
                verdicts[row] = verdict
                undecided[number, other] += verdict is None  # not the first one's: all of its comparisons are in this
            for (number, first, other), verdict in zip(pairs, verdicts, strict=True):
                if other == first or verdict == 1.0:
                    votes[number][other] = votes[number].get(first, places[number].get(first, 0))
            places = [
                {answer: place for answer, place in left.items() if answer not in votes[number]}
                for number, left in enumerate(places)
            ]
        return [
            [None if answer is None else chosen[answer] for answer in answers]
            for answers, chosen in zip(questions, votes, strict=True)
        ]

    def close(self) -> None:
        """End the workers; the next answer that needs one starts them again."""
        self._grader.close()


def quick_verdicts(pairs: Sequence[tuple[str | None, str | None]]) -> tuple[list[float | None], dict[int, Task]]:
    """`quick_verdict` on each reference answer and answer, and by its row each task for a worker, `None` until then."""
    verdicts: list[float | None] = []
    tasks: dict[int, Task] = {}
    for row, (reference, answer) in enumerate(pairs):
        try:
            verdicts.append(quick_verdict(reference, answer))
        except UndecidedError:
            verdicts.append(None)
            tasks[row] = Task(str(reference), answer)
    return verdicts, tasks


def quick_verdict(reference: str | None, answer: str | None) -> float | None:
    """The verdict where no sympy is needed.

    Raises:
        UndecidedError: a worker is needed.
    """
    if reference is None:
        return None
    if not answer:
        return 0.0
    if reference == answer and len(reference) > MAX_REFERENCE:
        return 1.0
    if len(reference) > MAX_REFERENCE or len(answer) > MAX_ANSWER:
        return None
    some = read_reference(reference)
    other = None if some is None else read_answer(answer, some)
    verdict = None if some is None or other is None else same(some, other)
    return None if verdict is None else float(verdict)


def completion_text(completion: Any) -> str:
    """The text to grade: a plain completion, or the content of the last message of a conversational one.

    Empty where there is no text, whatever stands in its place: such a completion has no answer.
    """
    message = completion[-1] if isinstance(completion, Sequence) and completion else completion
    content = message.get("content") if isinstance(message, Mapping) else completion
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def as_completion(prompt: Any, text: str) -> Any:
    """A completion's text in the form of its prompt: plain, or as the assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The columns of a dataset's rows that TRL hands to a reward function."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in NOT_FORWARDED}


def check_columns(name: str, columns: Iterable[str]) -> None:
    """Refuse a dataset with a column that a verifier could not be given, as its name is taken.

    Args:
        name: of the dataset, for the error.
        columns: its columns' names.

    Raises:
        ValueError: a column of `GIVEN`.
    """
    if taken := [column for column in columns if column in GIVEN]:
        raise ValueError(
            f"`{name}` has the column{'s' * (len(taken) > 1)} {', '.join(map(repr, taken))}: a verifier is given "
            f"something else by that name. Rename it, as in `dataset.rename_column({taken[0]!r}, ...)`, or remove it."
        )


def checked_verdicts(verifier: Callable, /, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list:
    """What any verifier in reward-function form answers, as 1.0, 0.0 or `None` a row; async ones are awaited.

    A verifier has `PATIENCE_SECONDS` for a batch, or what its attribute `time_limit` says in seconds. Running in this
    process, it is interrupted as far as Python can be, see `time_limit`; what it left half done is its own. One
    that may block within an extension for ever belongs into a process of its own, as `MathVerifier`'s grading is.

    Raises:
        ValueError: another value, or another number of values than completions, with the row.
        TimeoutError: no answer in time.
        Exception: the verifier's own, with a note that names it.
    """
    name = getattr(verifier, "__name__", type(verifier).__name__)
    try:
        with time_limit(getattr(verifier, "time_limit", PATIENCE_SECONDS), f"The verifier {name}"):
            answer = verifier(prompts=prompts, completions=completions, **kwargs)
            if inspect.isawaitable(answer):
                answer = _awaited(answer)
    except Exception as error:  # a user's code, whose error goes on as it is, with whose it was
        given = ", ".join(("prompts", "completions", *kwargs))
        error.add_note(f"It came from the verifier {name}, asked for {len(completions)} verdicts, given {given}.")
        raise
    if not hasattr(answer, "__len__") or isinstance(answer, str | bytes | Mapping | Set):
        raise ValueError(f"The verifier {name} answered {answer!r}; it must return a list, one verdict a completion.")
    if len(answer) != len(completions):
        raise ValueError(f"The verifier {name} answered {len(answer)} values for {len(completions)} completions.")
    for row, value in enumerate(answer):
        if not _is_verdict(value):
            raise ValueError(
                f"The verifier {name} answered {value!r} for row {row} (completion {str(completions[row])[:80]!r}); "
                "a verdict is 1 (correct), 0 (incorrect) or None (abstained)."
            )
    return [None if value is None else float(value) for value in answer]


def _is_verdict(value: Any) -> bool:
    try:
        return value is None or bool(value in (0, 1))
    except (TypeError, ValueError, RuntimeError):  # equal or not is no question of an array, a tensor or pandas' NA
        return False


def _awaited(answer: Awaitable) -> Any:
    """The result of a coroutine, in a thread: a notebook's own event loop is running in this one."""
    return in_thread(lambda: asyncio.run(asyncio.wait_for(answer, None))).result()


def in_thread(function: Callable[[], T]) -> Future[T]:
    """What `function` will come to, in a thread that holds up nobody's end."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whatever it is, the thread that asks for the result raises it
            future.set_exception(error)

    threading.Thread(target=work, name="aside", daemon=True).start()
    return future


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise a `TimeoutError` within the block when it takes longer; `math.inf` is no limit.

    In the main thread, code is interrupted where Python can be: between two instructions, asleep, waiting for a lock,
    a socket or a process; not within a call of an extension that does not return. Another thread cannot be interrupted.
    Either way the place where it blocks is logged. The signal is SIGURG, whose default is to do nothing, so that alarms
    of the code within stay its own.

    Args:
        seconds: wall-clock time for the block.
        what: the beginning of the error's message, for the reader.
    """
    if math.isinf(seconds):
        yield
        return
    ours, message = threading.get_ident(), f"{what} has not answered for {seconds:g} s"
    in_main, ended = threading.current_thread() is threading.main_thread(), threading.Event()

    def interrupt(signum: int, frame: Any) -> None:
        if not ended.is_set():
            raise TimeoutError(f"{message}.")

    def watch() -> None:
        pause = seconds
        while not ended.wait(pause):
            stack = traceback.format_stack(sys._current_frames().get(ours))
            logger.error("%s. It is at:\n%s", message, "".join(stack[-FRAMES:]))
            pause = max(AGAIN_SECONDS, pause) if not in_main else AGAIN_SECONDS
            if in_main:
                signal.pthread_kill(ours, signal.SIGURG)

    previous = signal.signal(signal.SIGURG, interrupt) if in_main else None
    threading.Thread(target=watch, name="time limit", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if in_main:
            signal.signal(signal.SIGURG, previous)
