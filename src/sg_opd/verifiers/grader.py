"""Compares answers in worker processes, which are killed at a wall-clock limit: sympy may take for ever.

math-verify's own time-outs rest on SIGALRM, need the main thread, and answer "wrong" instead of "unknown". `Grader` is
the pool in the caller's process. A worker runs `worker.py` as a program, never the caller's main module. Sympy and pint
are imported by workers alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from io import BufferedReader, BufferedWriter
from multiprocessing.connection import wait
from typing import Any, NamedTuple, cast

PROGRAM = (os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py"),)  # of a worker
WORKER_START_SECONDS = 120.0
# all of the environment that a worker gets: how to find Python's modules and libraries, and the language. No secrets
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")
# a verdict must not depend on the order of a hash, nor a worker take a second core
ENVIRONMENT_SET = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class Task(NamedTuple):
    """Texts for a worker: a reference and an answer to judge. Of `MathVerifier`'s: two answers to compare, 1.0 or 0.0,
    or a reference answer to read, 1.0 if it can be.
    """

    reference: str
    answer: str | None = None


class Grader:
    """A pool of workers that start when needed.

    A pool belongs to one process: a child after `os.fork` begins with an empty one, starts workers of its own, and
    neither reads nor ends those of its parent.

    Args:
        timeout: wall-clock seconds for one task.
        workers: the most processes at a time.
        program: of a worker: a file for Python, with arguments, that calls `worker.serve` with the time-out that is
            appended to them; default: `MathVerifier`'s.
    """

    def __init__(self, timeout: float, workers: int, program: Sequence[str] = ()) -> None:
        self.timeout = timeout
        self.workers = workers
        self.program = tuple(program)
        self.pool: list[_Worker] = []
        self.replaced = 0
        """Workers that timed out, died, answered another task or had grown too large, so far."""
        self._lock = threading.Lock()  # a pipe carries one task at a time
        weakref.finalize(self, _kill_all, self.pool)
        forget = weakref.WeakMethod(self._forget)  # a hook cannot be taken back, but it keeps no grader alive
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())

    def close(self) -> None:
        """End the workers, once no other thread is in `run`."""
        with self._lock:
            _kill_all(self.pool)

    def run(self, tasks: Mapping[int, Task]) -> dict[int, float | None]:
        """The result of each task by its row; `None` after a time-out, a crash, or where a worker cannot tell.

        A reply that carries the key of another task counts as a crash. The replacement of a worker starts at once and
        is not waited for where there is nothing left to do.

        Raises:
            RuntimeError: a worker could not start (its own output says why).
        """
        results: dict[int, float | None] = {}
        queue = deque(tasks.items())
        with self._lock:
            try:
                while queue or any(worker.row is not None for worker in self.pool):
                    self._hand_out(queue)
                    self._collect(results)
            finally:  # after an interrupt: a late reply must not be there for a later task
                for worker in [w for w in self.pool if w.row is not None]:
                    self._discard(worker)
        return results

    def _hand_out(self, queue: deque[tuple[int, Task]]) -> None:
        """Give tasks to idle workers, and start workers for the others."""
        for worker in [w for w in self.pool if w.row is None and not w.starting]:
            if not queue:
                return
            try:
                worker.send(*queue[0], self.timeout)
            except BrokenPipeError:  # died since its last task
                self._replace(worker)
            else:
                queue.popleft()
        while len(self.pool) < min(self.workers, len(queue) + sum(w.row is not None for w in self.pool)):
            self.pool.append(_Worker(self.timeout, self.program or PROGRAM))

    def _collect(self, results: dict[int, float | None]) -> None:
        """Wait for a reply, a worker that is ready, or the next deadline."""
        patience = min(worker.deadline for worker in self.pool) - time.monotonic()
        replied = wait([worker.stdout.fileno() for worker in self.pool], max(patience, 0.0))
        for worker in list(self.pool):
            has_replied = worker.stdout.fileno() in replied
            if not has_replied and time.monotonic() < worker.deadline:
                continue
            reply = worker.receive() if has_replied else None
            if worker.starting and reply is None:
                self._discard(worker)
                raise RuntimeError(
                    f"A grading worker ({worker.program[0]}) did not start. Its error is above; most often a package "
                    f"that it needs is missing from {sys.executable}; of MathVerifier's: math-verify or pint."
                )
            if worker.row is not None:
                results[worker.row] = reply["verdict"] if reply else None
            if reply is None or reply["spent"]:  # timed out, died or grown too large: never use it again
                self._replace(worker)
            else:
                worker.rest()

    def _discard(self, worker: _Worker) -> None:
        self.pool.remove(worker)
        worker.kill()

    def _replace(self, worker: _Worker) -> None:
        self._discard(worker)
        self.replaced += 1
        self.pool.append(_Worker(self.timeout, self.program or PROGRAM))

    def _forget(self) -> None:
        """After a fork, in the child: the workers are the parent's, and one of its threads may hold the lock."""
        while self.pool:
            self.pool.pop().abandon()
        self._lock = threading.Lock()


class _Worker:
    """A grading process: one JSON line in, one JSON line out."""

    def __init__(self, timeout: float, program: Sequence[str]) -> None:
        self.program = program
        # -P: the package's folder must not shadow modules that sympy imports. A session of its own: Ctrl-C is for the
        # caller, who then ends the workers; so is SIGTERM, which schedulers send to every process of a job.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited, so blocked for its whole life
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", *program, str(timeout)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | ENVIRONMENT_SET,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.stdin = cast(BufferedWriter, self.process.stdin)
        self.stdout = cast(BufferedReader, self.process.stdout)
        self.starting = True
        self.row: int | None = None
        self.key: str | None = None  # of the task at hand: its reply must carry it
        self.deadline = time.monotonic() + WORKER_START_SECONDS

    def send(self, row: int, task: Task, seconds: float) -> None:
        # first: what an interrupt cuts short must not be taken for idle
        self.row, self.key, self.deadline = row, f"{os.getpid()}.{next(_numbers)}", time.monotonic() + seconds
        self.stdin.write(json.dumps([self.key, *task]).encode() + b"\n")  # ASCII: a lone surrogate passes as an escape
        self.stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        line = self.stdout.readline()
        reply = json.loads(line) if line.endswith(b"\n") else None
        return reply if reply and reply["key"] == self.key else None

    def rest(self) -> None:
        self.starting, self.row, self.key, self.deadline = False, None, None, math.inf

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was not sent stays unsent
            self.stdin.close()
        self.stdout.close()

    def abandon(self) -> None:
        """Close this process's copies of the pipes without a byte: a copy would keep the worker beyond its owner."""
        self.stdin.raw.close()
        self.stdout.raw.close()
        self.process.returncode = 0  # so that nobody waits for another process's child


_numbers = itertools.count()  # of tasks


def _kill_all(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().kill()
