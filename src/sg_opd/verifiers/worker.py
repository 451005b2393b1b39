"""What a grading worker does: one JSON line in, one JSON line out. A program, run by `grader`, never imported by it."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

MEMORY_BYTES = 1024**3  # of address space; sympy, math-verify, pint and the formulas kept take 0.1 to 0.3 GiB
SPENT_BYTES = 320 * 1024**2  # resident after a task: the worker is replaced before the next one
LIMITS = {"NOFILE": 64, "FSIZE": 0, "CORE": 0}  # by the names of `resource`
if sys.platform != "darwin":  # which refuses it
    LIMITS["AS"] = MEMORY_BYTES
REFERENCES_KEPT = 16_384  # reference answers that a worker remembers as forms


def serve(timeout: float) -> None:
    """A worker's life: bound what it may use, then do tasks until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    logging.disable(logging.CRITICAL)
    for name, most in LIMITS.items():
        _limit(name, most, for_good=True)
    judge = judge_of_tasks()
    for pair in (("x+1", "1+x"), ("3 km", r"3000\text{ m}"), ("x>1", r"(1,\infty)")):
        judge(*pair)  # whatever is imported or built at first use, before a task
    # what a library prints of an answer is neither a reply nor a line of the caller's log
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)

    sys.audit("sg_opd.ready")  # for a hook that watches what grading does
    print(json.dumps({"key": None, "spent": False}), file=replies, flush=True)
    for line in sys.stdin:
        key, reference, answer = json.loads(line)
        # the system ends this process when a task takes more time or CPU than its parent would let it
        _limit("CPU", math.ceil(time.process_time() + timeout + 1.0), for_good=False)
        signal.setitimer(signal.ITIMER_REAL, timeout + 1.0)
        try:
            verdict = judge(reference, answer)
        except Exception:
            # sympy, math-verify and pint raise anything, of an answer that anybody may have written: no verdict comes
            # of it, and the caller abstains. Not logged, for its words are the answer's
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"key": key, "verdict": verdict, "spent": _is_spent()}), file=replies, flush=True)


def judge_of_tasks() -> Callable[[str, str | None], float | None]:
    """The function that does one task: a verdict, or with `None` for an answer 1.0 if the reference can be compared.

    `None`, or whatever it raises, means that it cannot be told.
    """
    from sg_opd.verifiers.mathematics.comparing import compare, same
    from sg_opd.verifiers.mathematics.reading import read, read_answer
    from sg_opd.verifiers.mathematics.symbols import FormulaAlgebra

    symbols, read_reference = FormulaAlgebra(), functools.lru_cache(maxsize=REFERENCES_KEPT)(read)

    def judge(reference: str, answer: str | None) -> float | None:
        some = read_reference(reference)
        if some is None:
            return None
        if answer is None:
            return 1.0 if compare(some, some, symbols) else None
        other = read_answer(answer, some)
        verdict = None if other is None else same(some, other, symbols)
        return None if verdict is None else float(verdict)

    return judge


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
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > SPENT_BYTES


if __name__ == "__main__":
    # this very package, whatever else of its name is installed; its folder is not put on the path, where a module of it
    # could shadow one that sympy imports
    folder = Path(__file__).resolve().parents[1]
    spec = spec_from_file_location("sg_opd", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec
    assert spec.loader
    sys.modules["sg_opd"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["sg_opd"])
    serve(float(sys.argv[1]))
