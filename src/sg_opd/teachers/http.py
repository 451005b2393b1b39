"""JSON over HTTP to one or several equal servers: bounded concurrency, time-outs, retries, and answers read in full."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

from .protocol import TeacherError

logger = logging.getLogger(__name__)  # of every rank: each asks for its own rows

RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})
CONNECT_SECONDS = 10.0
BACKOFF_SECONDS = (1.0, 30.0)  # first and longest pause between two attempts, doubling
SHOWN_CHARACTERS = 500  # of a server's own words, in an error
HINTS = {
    401: "Set the environment variable VLLM_API_KEY to the key that the server was started with.",
    404: "Is `teacher_model_name_or_path` the id that the server serves?",
}

T = TypeVar("T")


class TeacherServerError(TeacherError):
    """A teacher's server gave no usable answer, after all retries; names the URL and the status."""


class _AttemptError(Exception):
    """One attempt failed in a way that another one may not."""

    def __init__(self, url: str, what: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{url}: {what}")
        self.retry_after = retry_after


class Endpoints:
    """Servers that answer the same questions.

    Requests are spread over the URLs in turn, at most `concurrency` in flight; one that fails on a connection error, a
    time-out, a status of `RETRIED_STATUS` or a malformed answer is tried again after a pause, at the next URL. The key
    in the environment variable `VLLM_API_KEY`, if any, is sent along.

    Args:
        urls: base URLs, as `http://host:8000`, with or without `/v1`.
        timeout: seconds for one request, waiting and reading.
        concurrency: requests in flight, >= 1.
        retries: further attempts after a failed one, >= 0.
        offset: of the first request in the turns over the URLs; a rank's own spreads ranks over servers.

    Raises:
        ValueError: what is no base URL, or one with credentials.
    """

    def __init__(self, urls: Sequence[str], timeout: float, concurrency: int, retries: int, offset: int = 0) -> None:
        for url in urls:
            check_url(url, "server URL")
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.timeout = timeout
        self.concurrency = concurrency
        self.retries = retries
        self.turn = offset
        key = self._key = os.environ.get("VLLM_API_KEY")
        self.client = httpx2.Client(
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None),
            limits=httpx2.Limits(max_connections=concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    @property
    def longest(self) -> float:
        """Seconds after which one question has failed for good: the time-outs of all attempts and their pauses."""
        return (self.retries + 1) * self.timeout + self.retries * sum(BACKOFF_SECONDS)

    def ask_all(self, path: str, requests: list[tuple[dict[str, Any], Callable[[Any], T]]]) -> list[T]:
        """Answers to requests (payload, reader), in their order; the first failure stops the others.

        Raises:
            TeacherServerError: no usable answer to one of them.
        """
        stop, todo, done = threading.Event(), queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, Any, Any]]()
        first, self.turn = self.turn, self.turn + len(requests)
        for index in range(len(requests)):
            todo.put(index)

        def work() -> None:
            while not stop.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                payload, read = requests[index]
                try:
                    done.put((index, self.ask(path, read, payload, stop=stop, first=first + index), None))
                except BaseException as error:  # the caller's thread raises it
                    done.put((index, None, error))

        # daemons: a request in flight must hold up neither an error nor the end of the process
        for _ in range(min(self.concurrency, len(requests))):
            threading.Thread(target=work, name="teacher", daemon=True).start()
        answers: dict[int, T] = {}
        try:
            while len(answers) < len(requests):
                index, answer, error = done.get()
                if error is not None:
                    raise error
                answers[index] = answer
        finally:
            stop.set()
        return [answers[index] for index in range(len(requests))]

    def ask(
        self,
        path: str,
        read: Callable[[Any], T],
        payload: dict[str, Any] | None = None,
        url: str | None = None,
        stop: threading.Event | None = None,
        first: int = 0,
    ) -> T:
        """One answer, after as many attempts as it takes.

        Args:
            path: of the request, below the base URL.
            read: JSON body (`None` for another content) -> the answer; `ValueError`, `KeyError`, `TypeError` and
                `IndexError` mean that the body is malformed.
            payload: of a POST; `None` is a GET.
            url: the only base URL to ask; by default all in turn, from number `first` on.
            stop: gives up between two attempts once it is set.

        Raises:
            TeacherServerError: no usable answer.
        """
        stop = stop or threading.Event()
        attempts = Retrying(
            retry=retry_if_exception_type(_AttemptError),
            stop=stop_after_attempt(self.retries + 1) | stop_when_event_set(stop),
            wait=_pause,
            sleep=sleep_using_event(stop),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            for attempt in attempts:
                with attempt:
                    if stop.is_set():  # woken from a pause: nobody waits for this any more
                        raise TeacherServerError("another request failed first")
                    turn = first + attempt.retry_state.attempt_number - 1
                    return self._attempt((url or self.urls[turn % len(self.urls)]) + path, payload, read)
        except _AttemptError as error:
            tries = attempts.statistics["attempt_number"]
            message = f"No usable answer from the server in {tries} attempts, the last: {error}"
            raise TeacherServerError(message) from None  # it says all that the client's three layers do
        raise AssertionError("unreachable: a retried request returns or raises")

    def _attempt(self, url: str, payload: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            response = self._exchange(url, payload)
        except httpx2.RequestError as error:
            raise _AttemptError(url, f"{type(error).__name__}: {error}") from error
        if response.status_code in RETRIED_STATUS:
            after = response.headers.get("Retry-After", "")
            raise _AttemptError(url, f"status {self._shown(response)}", float(after) if after.isdigit() else 0.0)
        if response.status_code != 200:
            hint = HINTS.get(response.status_code, "")
            raise TeacherServerError(f"{url} refused the request with status {self._shown(response)} {hint}".strip())
        try:
            is_json = response.content and "json" in response.headers.get("Content-Type", "")
            return read(response.json() if is_json else None)
        except (ValueError, KeyError, TypeError, IndexError) as error:  # what reading a malformed answer raises
            raise _AttemptError(url, f"a malformed answer ({type(error).__name__}: {error})") from error

    def _exchange(self, url: str, payload: dict[str, Any] | None) -> httpx2.Response:
        """The whole response within `timeout`; the client's own limit is only on each wait for further bytes."""
        deadline = time.monotonic() + self.timeout
        with self.client.stream("GET" if payload is None else "POST", url, json=payload) as response:
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"the answer was not complete after {self.timeout:g} s")
        return httpx2.Response(response.status_code, headers=_plain(response.headers), content=bytes(body))

    def _shown(self, response: httpx2.Response) -> str:
        """The status and the server's own words, in one line and without the key, which some servers repeat."""
        text = response.text.replace(self._key, "<VLLM_API_KEY>") if self._key else response.text
        plain = "".join(sign if sign.isprintable() else " " for sign in text[:SHOWN_CHARACTERS])
        return f"{response.status_code}: {plain.strip()}"


def _plain(headers: httpx2.Headers) -> dict[str, str]:
    """The headers that still hold once a body is decoded."""
    return {name: value for name, value in headers.items() if name in ("content-type", "retry-after")}


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: doubling with jitter, and what the server asked for within the longest pause."""
    first, longest = BACKOFF_SECONDS
    wait = wait_exponential(multiplier=first, max=longest) + wait_random(0, first)
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, _AttemptError) else 0.0
    return max(wait(state), min(asked, longest))


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("Asking the server again after attempt %d: %s", state.attempt_number, error)


def check_url(url: Any, name: str) -> None:
    """Refuse what is no `http://host` or `https://host`, with or without a port and a path, or holds credentials.

    Args:
        url: the base URL of a server; never repeated with its credentials.
        name: of the setting, for the error.

    Raises:
        ValueError: see above.
    """
    text = url if isinstance(url, str) else ""
    if "@" in text or "?" in text or "#" in text:
        raise ValueError(
            f"`{name}` holds a user name, a password or a query, which would end in logs: give the bare URL, as "
            "http://host:8000, and the server's key in the environment variable VLLM_API_KEY."
        )
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ValueError(f"`{name}` must hold URLs as http://host:8000, got {url!r}.")
