"""math-verify in worker processes of our own, which are killed at a wall-clock limit.

math-verify's own time-outs rest on SIGALRM, need the main thread, and answer "wrong" instead of "unknown". A worker
runs this very file, never the caller's main module. Standard library only; sympy lives in the workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

# what sympy would evaluate for ever: huge exponents, towers of powers, huge or repeated factorials
BOMB = re.compile(
    r"\^\s*\{?\s*-?\d{5,}|\d\s*\}*\s*\^\s*\{?\s*\d{2,}\s*\^\s*\{?\s*\d|\^[\s{]*\d+[\s}]*\^[\s{]*\d+[\s}]*\^"
    r"|\d{4,}[\s})]*!|![\s})]*!"
)
NAME = re.compile(r"\\[A-Za-z]+|[A-Za-z]")  # a command or a letter
GREEK_CAPITALS = {"\\Gamma", "\\Delta", "\\Theta", "\\Lambda", "\\Xi", "\\Pi", "\\Sigma", "\\Phi", "\\Psi", "\\Omega"}
UNIT = re.compile(r"\\(?:text|mathrm)\s*\{\s*([A-Za-z]+)\s*\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?\s*$")
SMALL, RELATIVE_TOLERANCE = 1e-2, 1e-5
WORKER_START_SECONDS = 120.0
WORKER_MEMORY_BYTES = 4 * 1024**3


class Grader:
    """A pool of workers that read and compare LaTeX; they start when needed.

    Args:
        timeout: wall-clock seconds for one task.
        workers: the most processes at a time.
    """

    def __init__(self, timeout: float, workers: int) -> None:
        self.timeout = timeout
        self.workers = workers
        self.pool: list[_Worker] = []
        self._lock = threading.Lock()  # a pipe carries one task at a time
        self._finalizer = weakref.finalize(self, _kill_all, self.pool)

    def close(self) -> None:
        """End the workers."""
        _kill_all(self.pool)

    def run(self, tasks: Sequence[tuple[int, dict[str, Any]]]) -> dict[int, float | None]:
        """The workers' answer to each task by its key; `None` after a time-out, a crash or a gold without meaning.

        A task with a `gold` and an `answer` is compared, 1.0 or 0.0; one with a `gold` alone is read, 1.0 if it can be.

        Raises:
            RuntimeError: a worker could not start (its own output says why).
        """
        results: dict[int, float | None] = {}
        queue = deque(tasks)
        busy: dict[_Worker, tuple[int, float]] = {}
        with self._lock, selectors.DefaultSelector() as selector:
            try:
                while queue or busy:
                    while queue and len(busy) < self.workers:
                        key, task = queue.popleft()
                        worker = self._send(task, busy)
                        busy[worker] = (key, time.monotonic() + self.timeout)
                        selector.register(worker.stdout, selectors.EVENT_READ, worker)
                    patience = min(deadline for _, deadline in busy.values()) - time.monotonic()
                    answered = {event.data for event, _ in selector.select(max(patience, 0.0))}
                    for worker in list(busy):
                        key, deadline = busy[worker]
                        if worker not in answered and time.monotonic() < deadline:
                            continue
                        reply = worker.receive() if worker in answered else None
                        results[key] = None if reply is None else reply["verdict"]
                        selector.unregister(worker.stdout)
                        del busy[worker]
                        if reply is None:  # timed out or died: never use it again
                            self._discard(worker)
            finally:
                for worker in busy:  # an interrupt: its answer must never be read as that of a later task
                    self._discard(worker)
        return results

    def _send(self, task: dict[str, Any], busy: dict[_Worker, tuple[int, float]]) -> _Worker:
        """Give the task to an idle worker, or to a new one where those at hand have died."""
        for worker in [w for w in self.pool if w not in busy]:
            try:
                worker.send(task)
            except BrokenPipeError:
                self._discard(worker)
            else:
                return worker
        self.pool.append(_Worker(self.timeout))
        self.pool[-1].send(task)
        return self.pool[-1]

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self.pool.remove(worker)


class _Worker:
    """A grading process: one JSON line in, one JSON line out."""

    def __init__(self, timeout: float) -> None:
        # -P: the package's folder must not shadow modules that sympy imports. A session of its own: Ctrl-C is for the
        # caller, who then ends the workers.
        self.process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: PT018
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            if not selector.select(WORKER_START_SECONDS) or self.receive() is None:
                self.kill()
                raise RuntimeError(
                    "A grading worker did not start. Its error is above; most often math-verify is missing from "
                    f"{sys.executable}: pip install math-verify."
                )

    def send(self, task: dict[str, Any]) -> None:
        self.stdin.write(json.dumps(task).encode() + b"\n")
        self.stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        line = self.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was not sent stays unsent
            self.stdin.close()
        self.stdout.close()


def _kill_all(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().kill()


def distinct_cases(*texts: str) -> list[str]:
    """The texts with a capital renamed where its small letter occurs too: math-verify reads `M` and `m` as one.

    >>> distinct_cases("m/M", r"\\Delta m")
    ['m/b', '\\\\Delta m']
    """
    names = {name for text in texts for name in NAME.findall(text)}
    free = iter(letter for letter in "bcfghjkqtuvwyzampnrsxl" if not names & {letter, letter.upper()})
    renamed = {
        name: f"{{{next(free)}}}" if name.startswith("\\") else next(free)
        for name in sorted(names)
        if name != name.lower() and name.lower() in names and (len(name) == 1 or name in GREEK_CAPITALS)
    }
    return [NAME.sub(lambda match: renamed.get(match[0], match[0]), text) for text in texts]


def close(gold: Any, answer: Any) -> bool:
    """False where two numbers agree only because both are small: math-verify rounds to six decimals."""
    if not (getattr(gold, "is_number", False) and getattr(answer, "is_number", False)):
        return True
    a, b = complex(gold.doit().evalf(15)), complex(answer.doit().evalf(15))
    size = max(abs(a), abs(b))
    return size > SMALL or abs(a - b) <= RELATIVE_TOLERANCE * size


def same_unit(gold: str, answer: str) -> bool:
    """False where both end in a unit and neither abbreviates the other, as cm does centimetres."""
    a, b = UNIT.search(gold), UNIT.search(answer)
    return a is None or b is None or (a[2] == b[2] and units_agree(a[1], b[1]))


def units_agree(a: str, b: str) -> bool:
    """Whether one unit is the other or abbreviates it."""
    short, long = sorted((a.casefold(), b.casefold()), key=len)
    letters = iter(long)
    return short[0] == long[0] and all(letter in letters for letter in short.removesuffix("s"))


def _reader() -> Callable[[str], list[Any]]:
    """The function that parses LaTeX into sympy objects; an empty list where it cannot."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # the lenient reading: \frac13, units and malformed operators are understood
    lenient = LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="last"
        ),
    )

    def read(latex: str) -> list[Any]:
        if BOMB.search(latex):
            raise OverflowError("not evaluated")
        return parse(
            f"\\boxed{{{latex}}}",
            extraction_config=[lenient],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
            raise_on_error=True,
        )

    return read


def _serve(timeout: float) -> None:
    """A worker's life: parse and compare until standard input ends."""
    import functools
    import logging
    import resource
    import signal
    import warnings

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)

    from math_verify import verify

    read = _reader()
    read_gold = functools.lru_cache(maxsize=65_536)(read)

    def judge(task: dict[str, Any]) -> float | None:
        if "answer" not in task:
            return 1.0 if read_gold(task["gold"]) else None
        gold_latex, answer_latex = distinct_cases(task["gold"], task["answer"])
        gold = read_gold(gold_latex)
        if not gold:
            return 0.0 if task["words"] else None
        try:
            answer = read(answer_latex)
        except OverflowError:
            return None
        # a symbolic comparison that fails inside sympy is no verdict, hence raise_on_error
        same = bool(answer) and verify(
            gold, answer, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
        )
        return float(same and close(gold[0], answer[0]) and same_unit(task["gold"], task["answer"]))

    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout + 1.0)  # ends an orphan that its parent can no longer kill
        try:
            verdict = judge(json.loads(line))
        except Exception:  # whatever a comparison raises means one thing: no verdict. The parent reads it as abstained
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
