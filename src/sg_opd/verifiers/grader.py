"""math-verify in worker processes of our own, which are killed at a wall-clock limit.

math-verify's own time-outs rest on SIGALRM, need the main thread, and answer "wrong" instead of "unknown". A worker
runs this very file, never the caller's main module. Standard library only; sympy lives in the workers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
PROGRAM = (os.path.abspath(__file__),)  # of a worker
WORKER_START_SECONDS = 120.0
WORKER_MEMORY_BYTES = 1024**3  # of address space; sympy, math-verify and 16,384 golds take 0.1 to 0.2 GiB
WORKER_SPENT_BYTES = 256 * 1024**2  # resident after a task: the worker is replaced before the next one
WORKER_FILES = 64  # open at a time
GOLDS_KEPT = 16_384  # read golds that a worker remembers
# all of the environment that a worker gets: how to find Python's modules and libraries, and the language. No secrets
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")
# a verdict must not hang on the order of a hash, nor a worker take a second core
ENVIRONMENT_SET = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


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
        self.replaced = 0
        """Workers that timed out, died or had grown too large, so far."""
        self._lock = threading.Lock()  # a pipe carries one task at a time
        self._finalizer = weakref.finalize(self, _kill_all, self.pool)

    def close(self) -> None:
        """End the workers, once no other thread is in `run`."""
        with self._lock:
            _kill_all(self.pool)

    def run(self, tasks: Sequence[tuple[int, dict[str, Any]]]) -> dict[int, float | None]:
        """The workers' answer to each task by its key; `None` after a time-out, a crash or a gold without meaning.

        A task with a `gold` and an `answer` is compared, 1.0 or 0.0; one with a `gold` alone is read, 1.0 if it can be.
        The replacement of a worker starts at once and is not waited for where there is nothing left to do.

        Raises:
            RuntimeError: a worker could not start (its own output says why).
        """
        results: dict[int, float | None] = {}
        queue = deque(tasks)
        with self._lock, selectors.DefaultSelector() as selector:
            for worker in self.pool:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            try:
                while queue or any(worker.key is not None for worker in self.pool):
                    self._hand_out(queue, selector)
                    self._collect(results, selector)
            finally:
                # after an interrupt: a late answer must never be read as that of a later task
                for worker in [w for w in self.pool if w.key is not None]:
                    self._discard(worker, selector)
        return results

    def _hand_out(self, queue: deque[tuple[int, dict[str, Any]]], selector: selectors.BaseSelector) -> None:
        """Give tasks to idle workers, and start workers for the others."""
        for worker in [w for w in self.pool if w.key is None and not w.starting]:
            if not queue:
                return
            try:
                worker.send(*queue[0], deadline=time.monotonic() + self.timeout)
            except BrokenPipeError:  # died since its last task
                self._replace(worker, selector)
            else:
                queue.popleft()
        while len(self.pool) < min(self.workers, len(queue) + sum(w.key is not None for w in self.pool)):
            self._start(selector)

    def _collect(self, results: dict[int, float | None], selector: selectors.BaseSelector) -> None:
        """Wait for an answer, a worker that is ready, or the next deadline."""
        patience = min(worker.deadline for worker in self.pool) - time.monotonic()
        answered = {event.data for event, _ in selector.select(max(patience, 0.0))}
        for worker in list(self.pool):
            if worker not in answered and time.monotonic() < worker.deadline:
                continue
            reply = worker.receive() if worker in answered else None
            if worker.starting:
                if reply is None:
                    self._discard(worker, selector)
                    raise RuntimeError(
                        "A grading worker did not start. Its error is above; most often math-verify is missing from "
                        f"{sys.executable}: pip install math-verify."
                    )
            elif worker.key is not None:
                results[worker.key] = None if reply is None else reply["verdict"]
            if reply is None or reply["spent"]:  # timed out, died or grown too large: never use it again
                self._replace(worker, selector)
            else:
                worker.rest()

    def _start(self, selector: selectors.BaseSelector) -> None:
        self.pool.append(_Worker(self.timeout))
        selector.register(self.pool[-1].stdout, selectors.EVENT_READ, self.pool[-1])

    def _discard(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        self.pool.remove(worker)
        selector.unregister(worker.stdout)
        worker.kill()

    def _replace(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        self._discard(worker, selector)
        self.replaced += 1
        self._start(selector)


class _Worker:
    """A grading process: one JSON line in, one JSON line out."""

    def __init__(self, timeout: float) -> None:
        # -P: the package's folder must not shadow modules that sympy imports. A session of its own: Ctrl-C is for the
        # caller, who then ends the workers; so is SIGTERM, which schedulers send to every process of a job.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited, so blocked for its whole life
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *PROGRAM, str(timeout)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | ENVIRONMENT_SET,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: PT018
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.starting = True
        self.key: int | None = None
        """Of the task at hand."""
        self.deadline = time.monotonic() + WORKER_START_SECONDS

    def send(self, key: int, task: dict[str, Any], deadline: float) -> None:
        self.key, self.deadline = key, deadline  # first: what an interrupt cuts short must not be taken for idle
        self.stdin.write(json.dumps(task).encode() + b"\n")  # ASCII: a lone surrogate passes as an escape
        self.stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        line = self.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def rest(self) -> None:
        self.starting, self.key, self.deadline = False, None, math.inf

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
    """False where two numbers agree only because both are small, since math-verify rounds to six decimals, or where one
    expression alone is infinite, which sympy may call equal to anything."""
    from sympy import Expr, S

    values = [value.doit() for value in (gold, answer) if isinstance(value, Expr)]
    if len({value.has(S.Infinity, S.NegativeInfinity, S.ComplexInfinity, S.NaN) for value in values}) > 1:
        return False
    if len(values) < 2 or not all(value.is_number for value in values):
        return True
    a, b = (complex(value.evalf(15)) for value in values)
    size = max(abs(a), abs(b))
    return a == b if math.isinf(size) else size > SMALL or abs(a - b) <= RELATIVE_TOLERANCE * size


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


def _bound() -> None:
    """Bound this process's memory, open files, and writing to files, for good."""
    for what, most in (("AS", WORKER_MEMORY_BYTES), ("NOFILE", WORKER_FILES), ("FSIZE", 0), ("CORE", 0)):
        if what == "AS" and sys.platform == "darwin":  # which refuses it
            continue
        kind = getattr(resource, f"RLIMIT_{what}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


@contextlib.contextmanager
def _task(seconds: float) -> Iterator[None]:
    """Have the system end this process when a task takes more time or CPU than its parent would let it."""
    most, hard = math.ceil(time.process_time() + seconds), resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _spent() -> bool:
    """Whether this process has grown too large, as Linux shows it; elsewhere its limit alone holds."""
    if not sys.platform.startswith("linux"):
        return False
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > WORKER_SPENT_BYTES


def _judge() -> Callable[[dict[str, Any]], float | None]:
    """The function that does one task, see `Grader.run`; whatever it raises means no verdict."""
    import functools

    from math_verify import verify

    read = _reader()
    read_gold = functools.lru_cache(maxsize=GOLDS_KEPT)(read)

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

    return judge


def _serve(timeout: float) -> None:
    """A worker's life: parse and compare until standard input ends."""
    import logging
    import warnings

    replies = os.fdopen(os.dup(1), "w")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    _bound()
    judge = _judge()
    judge({"gold": "x+1", "answer": "1+x", "words": False})  # whatever is imported or built at first use, before a task
    # what a library prints of an answer is neither a reply nor a line of the caller's log
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)

    sys.audit("sg_opd.ready")  # for a hook that watches what grading does
    print(json.dumps({"spent": False}), file=replies, flush=True)
    for line in sys.stdin:
        with _task(timeout + 1.0):
            try:
                verdict = judge(json.loads(line))
            except Exception:  # whatever a comparison raises means one thing: no verdict. The parent abstains
                verdict = None
        print(json.dumps({"verdict": verdict, "spent": _spent()}), file=replies, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
