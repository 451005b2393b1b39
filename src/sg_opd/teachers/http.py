"""JSON over HTTP to one or several equal servers: bounded concurrency, time-outs, retries, and answers read in full."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import tenacity

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
        self.places = asyncio.Semaphore(concurrency)
        self.retries = retries
        self.turn = offset
        key = self._key = os.environ.get("VLLM_API_KEY")
        self.client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=min(timeout, CONNECT_SECONDS)),
            limits=httpx2.Limits(),  # none: `places` bound what is in flight
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    @property
    def longest(self) -> float:
        """Seconds after which one question has failed for good: the time-outs of all attempts and their pauses."""
        return (self.retries + 1) * self.timeout + self.retries * sum(BACKOFF_SECONDS)

    def ask_all(self, path: str, requests: Sequence[tuple[dict[str, Any], Callable[[Any], T]]]) -> list[T]:
        """Answers to requests (payload, reader), in their order; the first failure stops the others.

        Raises:
            TeacherServerError: no usable answer to one of them.
        """
        first, self.turn = self.turn, self.turn + len(requests)

        async def answers() -> list[T]:
            tasks = [
                asyncio.create_task(self._answer(path, read, payload, self.urls, turn))
                for turn, (payload, read) in enumerate(requests, first)
            ]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return _result(answers())

    def ask(
        self, path: str, read: Callable[[Any], T], payload: dict[str, Any] | None = None, url: str | None = None
    ) -> T:
        """One answer, after as many attempts as it takes.

        Args:
            path: of the request, below the base URL.
            read: JSON body (`None` for another content) -> the answer; `ValueError`, `KeyError`, `TypeError` and
                `IndexError` mean that the body is malformed.
            payload: of a POST; `None` is a GET.
            url: the only base URL to ask; by default all in turn.

        Raises:
            TeacherServerError: no usable answer.
        """
        return _result(self._answer(path, read, payload, [url] if url else self.urls))

    async def _answer(
        self, path: str, read: Callable[[Any], T], payload: dict[str, Any] | None, urls: Sequence[str], first: int = 0
    ) -> T:
        """As `ask`, of `urls` in turn from number `first` on."""
        turns = itertools.count(first)

        async def attempt() -> T:
            return await self._attempt(urls[next(turns) % len(urls)] + path, payload, read)

        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_AttemptError),
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=_pause,
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            async with self.places:
                return await attempts(attempt)
        except _AttemptError as error:
            message = f"No usable answer from the server in {self.retries + 1} attempts, the last: {error}"
            raise TeacherServerError(message) from None  # it says all that the client's three layers do

    async def _attempt(self, url: str, payload: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            async with asyncio.timeout(self.timeout):  # the whole answer; the client's own limits each wait for bytes
                response = await self.client.request("GET" if payload is None else "POST", url, json=payload)
        except httpx2.RequestError as error:
            raise _AttemptError(url, f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise _AttemptError(url, f"ReadTimeout: the answer was not complete after {self.timeout:g} s") from error
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

    def _shown(self, response: httpx2.Response) -> str:
        """The status and the server's own words, in one line and without the key, which some servers repeat."""
        text = response.text.replace(self._key, "<VLLM_API_KEY>") if self._key else response.text
        plain = "".join(sign if sign.isprintable() else " " for sign in text[:SHOWN_CHARACTERS])
        return f"{response.status_code}: {plain.strip()}"


class _Daemons(ThreadPoolExecutor):
    """Threads for an event loop's look-ups of names that the end of the process does not wait for."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # as any executor: whoever waits for the result raises it, and nobody hangs
                future.set_exception(error)
            else:
                future.set_result(result)

        future.set_running_or_notify_cancel()
        threading.Thread(target=work, daemon=True).start()
        return future


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """One for each process, as a fork does not keep the thread; a daemon, so that the process may end at any time."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_Daemons())
    threading.Thread(target=loop.run_forever, name="teacher", daemon=True).start()
    return loop


def _result(question: Coroutine[Any, Any, T]) -> T:
    """What a question comes to, in a thread of its own, for a notebook's has a loop; an interrupt ends the question."""
    future = asyncio.run_coroutine_threadsafe(question, _loop(os.getpid()))
    try:
        return future.result()
    finally:
        future.cancel()


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: doubling with jitter, and what the server asked for within the longest pause."""
    first, longest = BACKOFF_SECONDS
    wait = tenacity.wait_exponential(multiplier=first, max=longest) + tenacity.wait_random(0, first)
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, _AttemptError) else 0.0
    return max(wait(state), min(asked, longest))


def _log_retry(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("Asking the server again after attempt %d: %s", state.attempt_number, error)


def check_url(url: Any, name: str) -> None:
    """Refuse, as the setting `name`, what is no `http://host` or `https://host`, with or without a port and a path.

    Raises:
        ValueError: it is none, or it holds credentials, which are not repeated.
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
