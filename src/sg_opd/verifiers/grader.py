"""Compares answers with math-verify in worker processes, which are killed at a wall-clock limit.

math-verify's own time-outs rest on SIGALRM, need the main thread, and answer "wrong" instead of "unknown". `Grader` is
the pool in the caller's process. A worker runs this very file as a program, never the caller's main module; hence the
standard library only at the top, and no other module of the package. Sympy is imported by workers alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from io import BufferedReader, BufferedWriter
from multiprocessing.connection import wait
from typing import Any, NamedTuple, cast

# what sympy would evaluate for ever: huge exponents, towers of powers, huge or repeated factorials
BOMB = re.compile(
    r"\^\s*\{?\s*-?\d{5,}|\d\s*\}*\s*\^\s*\{?\s*\d{2,}\s*\^\s*\{?\s*\d|\^[\s{]*\d+[\s}]*\^[\s{]*\d+[\s}]*\^"
    r"|\d{4,}[\s})]*!|![\s})]*!"
)
SMALL, RELATIVE_TOLERANCE = 1e-2, 1e-5
PROGRAM = (os.path.abspath(__file__),)  # of a worker
WORKER_START_SECONDS = 120.0
WORKER_MEMORY_BYTES = 1024**3  # of address space; sympy, math-verify and the answers kept take 0.1 to 0.2 GiB
WORKER_SPENT_BYTES = 256 * 1024**2  # resident after a task: the worker is replaced before the next one
WORKER_FILES = 64  # open at a time
WORKER_LIMITS = {"NOFILE": WORKER_FILES, "FSIZE": 0, "CORE": 0}  # by the names of `resource`
if sys.platform != "darwin":  # which refuses it
    WORKER_LIMITS["AS"] = WORKER_MEMORY_BYTES
REFERENCES_KEPT = 16_384  # reference answers that a worker remembers as sympy's objects
# all of the environment that a worker gets: how to find Python's modules and libraries, and the language. No secrets
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")
# a verdict must not depend on the order of a hash, nor a worker take a second core
ENVIRONMENT_SET = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class Task(NamedTuple):
    """LaTeX for a worker: two answers to compare, 1.0 or 0.0, or a reference answer to read, 1.0 if it can be."""

    reference: str
    answer: str | None = None
    words: bool = False  # the reference answer is words: where sympy reads nothing in it, no answer equals it
    same_unit: bool = True


class Grader:
    """A pool of workers that start when needed.

    A pool belongs to one process: a child after `os.fork` begins with an empty one, starts workers of its own, and
    neither reads nor ends those of its parent.

    Args:
        timeout: wall-clock seconds for one task.
        workers: the most processes at a time.
    """

    def __init__(self, timeout: float, workers: int) -> None:
        self.timeout = timeout
        self.workers = workers
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
        """The result of each task by its row; `None` after a time-out, a crash or a reference answer without meaning.

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
            self.pool.append(_Worker(self.timeout))

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
                    "A grading worker did not start. Its error is above; most often math-verify is missing from "
                    f"{sys.executable}: pip install math-verify."
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
        self.pool.append(_Worker(self.timeout))

    def _forget(self) -> None:
        """After a fork, in the child: the workers are the parent's, and one of its threads may hold the lock."""
        while self.pool:
            self.pool.pop().abandon()
        self._lock = threading.Lock()


class _Worker:
    """A grading process: one JSON line in, one JSON line out."""

    def __init__(self, timeout: float) -> None:
        # -P: the package's folder must not shadow modules that sympy imports. A session of its own: Ctrl-C is for the
        # caller, who then ends the workers; so is SIGTERM, which schedulers send to every process of a job.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited, so blocked for its whole life
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", *PROGRAM, str(timeout)],
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


# From here on: what a worker does.


def _serve(timeout: float) -> None:
    """A worker's life: bound what it may use, then do tasks until standard input ends."""
    import logging

    replies = os.fdopen(os.dup(1), "w")
    logging.disable(logging.CRITICAL)
    for name, most in WORKER_LIMITS.items():
        _limit(name, most, for_good=True)
    judge = _judge()
    judge(Task("x+1", "1+x"))  # whatever is imported or built at first use, before a task
    # what a library prints of an answer is neither a reply nor a line of the caller's log
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)

    sys.audit("sg_opd.ready")  # for a hook that watches what grading does
    print(json.dumps({"key": None, "spent": False}), file=replies, flush=True)
    for line in sys.stdin:
        key, *task = json.loads(line)
        # the system ends this process when a task takes more time or CPU than its parent would let it
        _limit("CPU", math.ceil(time.process_time() + timeout + 1.0), for_good=False)
        signal.setitimer(signal.ITIMER_REAL, timeout + 1.0)
        try:
            verdict = judge(Task(*task))
        except Exception:  # whatever a comparison raises means one thing: no verdict. The parent abstains
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"key": key, "verdict": verdict, "spent": _is_spent()}), file=replies, flush=True)


def _limit(name: str, most: int, for_good: bool) -> None:
    """Bound a resource of this process, within its hard limit, which `for_good` lowers too."""
    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most if for_good else hard))


def _is_spent() -> bool:
    """Whether this process has grown too large, as Linux shows it; elsewhere its limit alone holds."""
    if not sys.platform.startswith("linux"):
        return False
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > WORKER_SPENT_BYTES


def _judge() -> Callable[[Task], float | None]:
    """The function that does one task, see `Task`; `None`, or whatever it raises, means no verdict."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # the lenient reading: \frac13, units and malformed operators are understood
    form = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="last")
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=form)

    def read(latex: str) -> list[Any]:  # sympy's objects, none where the text has no meaning
        if BOMB.search(latex):
            raise OverflowError("not evaluated")
        box = f"\\boxed{{{latex}}}"
        return parse(box, [config], "no_fallback", "first_match", parsing_timeout=None, raise_on_error=True)

    read_reference = functools.lru_cache(maxsize=REFERENCES_KEPT)(read)

    def judge(task: Task) -> float | None:
        reference = read_reference(task.reference)
        if task.answer is None:
            return 1.0 if reference else None
        if not reference:
            return 0.0 if task.words else None
        answer = read(task.answer)
        # a symbolic comparison that fails inside sympy is no verdict, hence raise_on_error
        options = {"allow_set_relation_comp": True, "timeout_seconds": None, "raise_on_error": True}
        same = bool(answer) and verify(reference, answer, **options) and _close(reference[0], answer[0])
        return float(same and task.same_unit)

    return judge


def _close(reference: Any, answer: Any) -> bool:
    """False where two numbers agree only because both are small, since math-verify rounds to six decimals, or where one
    expression alone is infinite, which sympy may call equal to anything."""
    from sympy import Expr, S

    values = [value.doit() for value in (reference, answer) if isinstance(value, Expr)]
    if len({value.has(S.Infinity, S.NegativeInfinity, S.ComplexInfinity, S.NaN) for value in values}) > 1:
        return False
    if len(values) < 2 or not all(value.is_number for value in values):
        return True
    a, b = (complex(value.evalf(15)) for value in values)
    size = max(abs(a), abs(b))
    return a == b if math.isinf(size) else size > SMALL or abs(a - b) <= RELATIVE_TOLERANCE * size


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
