"""What a step does on a GPU: where the host waits for the device, and where the device waits for the host."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
import trl

import sg_opd

PACKAGES = (sg_opd, trl, transformers, accelerate)
FOLDERS = {Path(package.__file__).parent: package.__name__ for package in PACKAGES}
CALLERS = ("sg_opd", "trl")  # who is named, also where a line of another package waits
WAITS = "called a synchronizing CUDA operation"  # torch's words
LARGEST = 8


def site(frame: FrameType | None) -> str:
    """The innermost line of sg_opd or TRL that was running, as `package/file.py:line function`.

    Before it stands the line of another library that it called, with ` < ` between.
    """
    inner = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for folder, package in FOLDERS.items():
            if path.is_relative_to(folder):
                line = f"{package}/{path.relative_to(folder)}:{frame.f_lineno} {frame.f_code.co_name}"
                if package in CALLERS:
                    return f"{inner} < {line}" if inner else line
                inner = inner or line
        frame = frame.f_back
    return inner or "elsewhere"


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """How often the host waited for the device within this context, by `site`."""
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if WAITS in str(message):
            found[site(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


class Event(NamedTuple):
    """Something that ran from `start` to `end`, in nanoseconds."""

    start: int
    end: int
    name: str


def idle(kernels: Sequence[Event], host: Sequence[Event], phases: Sequence[Event]) -> dict[str, Any]:
    """The device's seconds from its first kernel to its last, the share without a kernel, and the largest gaps.

    A gap is named by the kernels around it, by the phase of the step whose host code ends it, and by what the host did
    longest within it.
    """
    if not kernels:
        return {}
    ordered = sorted(kernels)
    first, last, busy, gaps = ordered[0].start, ordered[0], ordered[0].end - ordered[0].start, []
    for kernel in ordered[1:]:
        if kernel.start > last.end:
            gaps.append((kernel.start - last.end, last, kernel))
        busy += max(0, kernel.end - max(kernel.start, last.end))
        last = max(last, kernel, key=lambda event: event.end)
    gaps.sort(key=lambda gap: -gap[0])
    span = last.end - first
    return {"span_ms": span / 1e6, "idle_share": round(1 - busy / span, 4), "kernels": len(kernels)} | {
        "gaps": [named(length, before, after, host, phases) for length, before, after in gaps[:LARGEST]]
    }


def named(length: int, before: Event, after: Event, host: Sequence[Event], phases: Sequence[Event]) -> dict[str, Any]:
    around = [phase for phase in phases if phase.start <= after.start <= phase.end]
    within = [event for event in host if event.start < after.start and event.end > before.end]
    inside = [event for event in within if event.start >= before.end]
    longest = max(inside, key=lambda event: min(event.end, after.start) - event.start, default=None)
    return {
        "us": length / 1e3,
        "after": before.name[:80],
        "before": after.name[:80],
        "phase": min(around, key=lambda phase: phase.end - phase.start).name if around else "none",
        "host": longest.name[:80] if longest else "Python",
        "host_us": (min(longest.end, after.start) - longest.start) / 1e3 if longest else 0.0,
    }


def profiled(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """`idle` of one call on a CUDA device; elsewhere it is called, and nothing is known.

    The profiler slows the host down, so a device that waits for it is shown to wait longer than it does.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    on_device: list[Event] = []
    on_host: list[Event] = []
    phases: list[Event] = []
    for event in profiler.profiler.kineto_results.events():
        entry = Event(event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        if event.device_type() == torch.autograd.DeviceType.CPU:
            (phases if event.is_user_annotation() else on_host).append(entry)
        elif not event.is_user_annotation():  # a phase is shown on the device as well
            on_device.append(entry)
    return idle(on_device, on_host, phases)
