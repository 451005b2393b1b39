"""An end for a call into somebody else's code that blocks."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)  # of every rank: each has its own calls

AGAIN_SECONDS = 10.0  # between two attempts to interrupt, where the first was caught by the code that blocks
FRAMES = 4  # of the place where it blocks, in the log


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
