"""An end for verifiers that block: interrupted where Python can be, named, and nothing left changed."""

import asyncio
import math
import signal
import threading
import time

import pytest

from sg_opd.verifiers.verdicts import checked_verdicts, time_limit


def blocking(how):
    def blocks(prompts, completions, **kwargs):
        how()
        return [1.0] * len(completions)

    blocks.time_limit = 0.3
    return blocks


def spin():
    while True:
        pass


@pytest.mark.parametrize(
    "how",
    [lambda: time.sleep(60), lambda: threading.Lock().acquire() and threading.Event().wait(), spin],
    ids=["sleep", "lock", "loop"],
)
def test_a_verifier_that_blocks_ends_in_an_error_that_names_it(how, caplog):
    start, before = time.monotonic(), signal.getsignal(signal.SIGURG)
    with pytest.raises(TimeoutError, match=r"The verifier blocks has not answered for 0\.3 s") as caught:
        checked_verdicts(blocking(how), ["p"], ["c"])
    assert time.monotonic() - start < 5
    assert "the verifier blocks, asked for 1 verdicts" in caught.value.__notes__[0]
    assert "in blocks" in caplog.text  # where it was
    assert signal.getsignal(signal.SIGURG) == before


def test_an_asynchronous_verifier_that_blocks_ends_too():
    async def blocks(prompts, completions, **kwargs):
        await asyncio.sleep(60)

    blocks.time_limit = 0.3
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="The verifier blocks"):
        checked_verdicts(blocks, ["p"], ["c"])
    assert time.monotonic() - start < 5


def test_a_verifier_that_catches_the_error_is_interrupted_again(monkeypatch):
    monkeypatch.setattr("sg_opd.verifiers.verdicts.AGAIN_SECONDS", 0.2)

    def stubborn():
        try:
            time.sleep(60)
        except TimeoutError:
            time.sleep(60)

    with pytest.raises(TimeoutError):
        checked_verdicts(blocking(stubborn), ["p"], ["c"])


def test_within_the_limit_nothing_happens_and_an_alarm_stays_the_codes_own():
    """As math-verify's own time-outs do: SIGALRM set, and gone off, within the block."""
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    with time_limit(5.0, "It"):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2)
    signal.signal(signal.SIGALRM, before)
    assert rung == [1]
    threads = [thread for thread in threading.enumerate() if thread.name == "time limit"]
    for thread in threads:
        thread.join(2.0)
    assert not any(thread.is_alive() for thread in threads)


def test_another_thread_is_reported_not_interrupted(caplog):
    def work():
        with time_limit(0.1, "It"):
            time.sleep(0.5)
        done.append(1)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert done == [1]
    assert "It has not answered for 0.1 s" in caplog.text


def test_no_limit_starts_no_thread():
    count = threading.active_count()
    with time_limit(math.inf, "It"):
        assert threading.active_count() == count
