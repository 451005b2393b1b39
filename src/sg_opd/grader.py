"""math-verify in worker processes of our own, which are killed at a wall-clock limit.

math-verify's own time-outs rest on SIGALRM, need the main thread, and answer "wrong" instead of "unknown". A worker
runs this very file, never the caller's main module. Standard library only; sympy lives in the workers.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

# what sympy would evaluate for ever: huge exponents, towers of powers, huge or repeated factorials
BOMB = re.compile(
    r"\^\s*\{?\s*-?\d{5,}|\d\s*\}*\s*\^\s*\{?\s*\d{2,}\s*\^\s*\{?\s*\d|\^[\s{]*\d+[\s}]*\^[\s{]*\d+[\s}]*\^"
    r"|\d{4,}[\s})]*!|![\s})]*!"
)
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
        with selectors.DefaultSelector() as selector:
            while queue or busy:
                while queue and len(busy) < self.workers:
                    key, task = queue.popleft()
                    worker = self._idle_worker(busy)
                    worker.send(task)
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
                        worker.kill()
                        self.pool.remove(worker)
        return results

    def _idle_worker(self, busy: dict[_Worker, tuple[int, float]]) -> _Worker:
        for worker in [w for w in self.pool if w not in busy]:
            if worker.alive():
                return worker
            worker.kill()
            self.pool.remove(worker)
        self.pool.append(_Worker(self.timeout))
        return self.pool[-1]


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

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


def _kill_all(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().kill()


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

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

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

    read_gold = functools.lru_cache(maxsize=65_536)(read)

    def judge(task: dict[str, Any]) -> float | None:
        gold = read_gold(task["gold"])
        if not gold or "answer" not in task:
            return 1.0 if gold else None
        try:
            answer = read(task["answer"])
        except OverflowError:
            return None
        # a symbolic comparison that fails inside sympy is no verdict, hence raise_on_error
        return float(bool(answer) and verify(gold, answer, timeout_seconds=None, raise_on_error=True))

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
