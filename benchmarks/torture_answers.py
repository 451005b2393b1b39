"""Hostile answers through `MathVerifier`, one at a time: what hangs, what is taken for correct, what it costs after.

    python benchmarks/torture_answers.py --answers 2100 --timeout 1

An answer hangs whose verdict takes longer than the verifier's time limit and GRACE_SECONDS. The attack's effect on
speed is the rate on ordinary batches of the attacked verifier over that of one which saw no attack, the two in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from grading import latex_pairs
from hostile import Attack, attacks

from sg_opd import MathVerifier
from sg_opd.evaluation.results import provenance, write_json
from sg_opd.verifiers.worker import MEMORY_BYTES

GRACE_SECONDS = 2.0  # for the start of a replaced worker on a busy machine, and for texts of a megabyte
ORDINARY = 100  # answers of an ordinary batch
ATTEMPTS = 3  # on a busy machine an ordinary answer may take longer than a hostile one is given
SHOWN = 10


def torture_answers(
    count: int, timeout: float = 1.0, workers: int = 2, seed: int = 0, rounds: int = 9
) -> dict[str, Any]:
    """The figures of one attack.

    Args:
        count: hostile answers.
        timeout: seconds, of the verifier.
        workers: of the verifier.
        seed: of the answers.
        rounds: ordinary batches of each verifier, before and after.

    Returns:
        `answers_tried`, `hangs`, `slowest_verdict_s`, `verdicts` (counts), `taken_for_correct` (the first of them),
        `workers_replaced`, `workers_left`, `worker_peak_mib`, `ordinary_per_s` before and after, `throughput_ratio`.
    """
    attacked, spared = (MathVerifier(timeout, workers) for _ in range(2))
    try:
        before = [steady_rate(verifier, rounds) for verifier in (attacked, spared)]
        with peak_memory(attacked) as peak:
            found = attack(attacked, attacks(count, seed), timeout)
        found |= {"workers_replaced": attacked._grader.replaced, "worker_peak_mib": round(peak[0] / 2**20)}
        after = np.median([[rate(verifier) for verifier in (attacked, spared)] for _ in range(rounds + 1)][1:], axis=0)
        found["workers_left"] = sum(worker.process.poll() is None for worker in attacked._grader.pool)
        found["ordinary_per_s"] = {
            "before": round(before[0], 1),
            "after": round(after[0], 1),
            "spared": round(after[1], 1),
        }
        found["throughput_ratio"] = round(float(after[0] / after[1]), 3)
    finally:
        attacked.close()
        spared.close()
    return found


def attack(verifier: MathVerifier, cases: Sequence[Attack], timeout: float) -> dict[str, Any]:
    """Each case by itself; an exception ends it all, as it would end a trainer."""
    verdicts, kinds, slowest, hangs, fooled = Counter(), Counter(), 0.0, 0, []
    for case in cases:
        start = time.perf_counter()
        (verdict,) = verifier([case.completion], [case.gold])
        took = time.perf_counter() - start
        slowest, hangs = max(slowest, took), hangs + (took > timeout + GRACE_SECONDS)
        verdicts[{1.0: "correct", 0.0: "incorrect", None: "abstained"}[verdict]] += 1
        kinds[case.kind] += verdict is None
        if verdict == 1.0:
            fooled.append(f"{case.kind}: {shown(case.completion)} for {shown(case.gold)}")
    return {
        "answers_tried": len(cases),
        "hangs": hangs,
        "slowest_verdict_s": round(slowest, 2),
        "verdicts": dict(verdicts),
        "abstained": {kind: number for kind, number in kinds.most_common() if number},
        "taken_for_correct": fooled[:SHOWN],
    }


def shown(value: Any) -> str:
    return ascii(value if not isinstance(value, str) else value[-60:])[:80]


def rate(verifier: MathVerifier) -> float:
    """Ordinary answers a second, in one batch."""
    completions, golds = zip(*latex_pairs(ORDINARY), strict=True)
    for _ in range(ATTEMPTS):
        start = time.perf_counter()
        verdicts = verifier(completions, golds)
        if None not in verdicts:
            return ORDINARY / (time.perf_counter() - start)
    raise RuntimeError("An ordinary answer was not judged: the time limit is too low for this machine.")


def steady_rate(verifier: MathVerifier, rounds: int) -> float:
    """The median of some batches, after one that starts the workers."""
    return float(np.median([rate(verifier) for _ in range(rounds + 1)][1:]))


@contextlib.contextmanager
def peak_memory(verifier: MathVerifier) -> Iterator[list[int]]:
    """The largest resident memory of one worker within the block, in bytes; looked at every 20 ms, on Linux."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for worker in list(verifier._grader.pool):
                with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
                    status = Path(f"/proc/{worker.process.pid}/status").read_text()
                    peak[0] = max(peak[0], int(status.split("VmHWM:")[1].split()[0]) * 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def held(found: dict[str, Any]) -> list[str]:
    """What an attack broke, in words; empty where all holds."""
    limit = MEMORY_BYTES // 2**20
    return [
        *([f"{found['hangs']} answers hang"] if found["hangs"] else []),
        *([f"taken for correct: {found['taken_for_correct']}"] if found["taken_for_correct"] else []),
        *([f"a worker took {found['worker_peak_mib']} of {limit} MiB"] if found["worker_peak_mib"] > limit else []),
        *(
            []
            if found["throughput_ratio"] >= 0.9
            else [f"throughput fell to {found['throughput_ratio']} of what it was"]
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=2_100)
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="a folder for answers.json")
    options = parser.parse_args()
    found = torture_answers(options.answers, options.timeout, options.workers, options.seed)
    print(json.dumps(found, indent=1))
    if options.output_dir:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(options).items() if name != "output_dir"}
        write_json(options.output_dir / "answers.json", {**found, "settings": settings, **provenance()})
    if broken := held(found):
        raise SystemExit("; ".join(broken))


if __name__ == "__main__":
    main()
