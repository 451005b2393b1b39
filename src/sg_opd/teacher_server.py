"""A teacher behind one or several stock `vllm serve` endpoints: token ids in, log-probabilities and token ids out.

Nothing of vLLM is needed here. Prompt log-probabilities of such a server are at temperature 1, of the token that was
sampled: what the sampled estimator needs, and not enough for the full one.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import httpx2
import torch
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set
from torch import Tensor

from .teacher import proposal_sampling, up_to_eos

logger = logging.getLogger(__name__)  # of every rank: each asks for its own rows

RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})
SEQUENCES_PER_REQUEST = 8  # long answers: some 100 bytes a token
CONNECT_SECONDS = 10.0
BACKOFF_SECONDS = (1.0, 30.0)  # first and longest pause between two attempts, doubling
SHOWN_CHARACTERS = 500  # of a server's own words, in an error
HINTS = {
    401: "Set the environment variable VLLM_API_KEY to the key that the server was started with.",
    404: "Is `teacher_model_name_or_path` the id that the server serves?",
}

T = TypeVar("T")


class TeacherServerError(RuntimeError):
    """A teacher's server gave no usable answer, after all retries; names the URL and the status."""


class _AttemptError(Exception):
    """One attempt failed in a way that another one may not."""

    def __init__(self, url: str, what: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{url}: {what}")
        self.retry_after = retry_after


class ServedModel(NamedTuple):
    """What a server says of the model it serves."""

    name: str
    context: int | None
    """Longest sequence of prompt and completion, in tokens."""


class ServerTeacher:
    """A teacher that stock OpenAI-compatible `vllm serve` endpoints hold; implements `sg_opd.teacher.Teacher`.

    Requests are spread over the URLs in turn, at most `concurrency` in flight; one that fails on a connection error, a
    time-out, a status of `RETRIED_STATUS` or a malformed answer is tried again after a pause, at the next URL. The key
    in the environment variable `VLLM_API_KEY`, if any, is sent along.

    Args:
        urls: base URLs, as `http://host:8000`, with or without `/v1`.
        model: id of the served model; `None` takes the only one a server has.
        sampling: `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty` and `max_tokens` of proposals.
        eos: ids that end a completion.
        timeout: seconds for one request, waiting and reading; above the server's warm-up.
        concurrency: requests in flight, >= 1.
        retries: further attempts after a failed one, >= 0.
        offset: of the first request in the turns over the URLs; a rank's own spreads ranks over servers.

    Raises:
        ValueError: an argument out of its range, by name.
    """

    sharded = False

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        sampling: dict[str, Any],
        eos: frozenset[int],
        timeout: float = 300.0,
        concurrency: int = 8,
        retries: int = 5,
        offset: int = 0,
    ) -> None:
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.model = model
        self.context: int | None = None
        self.sampling = sampling
        self.eos = eos
        self.timeout = timeout
        self.concurrency = concurrency
        self.retries = retries
        self.turn = offset
        key = os.environ.get("VLLM_API_KEY")
        self.client = httpx2.Client(
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None),
            limits=httpx2.Limits(max_connections=concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    @classmethod
    def of(cls, trainer: Any, model: str | None) -> ServerTeacher:
        """The teacher that a trainer's settings describe, not yet connected."""
        args = trainer.args
        return cls(
            args.teacher_server_url,
            model,
            {**proposal_sampling(args), "max_tokens": args.max_completion_length},
            frozenset(trainer.eos_token_ids),
            args.teacher_server_timeout,
            args.teacher_server_concurrency,
            args.teacher_server_retries,
            offset=trainer.accelerator.process_index,
        )

    @property
    def name(self) -> str:
        return f"{self.model} at {', '.join(self.urls)}"

    def connect(self) -> None:
        """Ask every URL for its health and its model; sets `model` and `context`, the shortest of all.

        Raises:
            TeacherServerError: a server that does not answer.
            ValueError: a server without the model asked for, or servers with different models.
        """
        served = [self._served(url) for url in self.urls]
        names = {model.name for model in served}
        if len(names) > 1:
            raise ValueError(
                f"`teacher_server_url`: the servers hold different models ({', '.join(sorted(names))}); set "
                "`teacher_model_name_or_path` to the id of one that all of them serve."
            )
        self.model = served[0].name
        self.context = min((model.context for model in served if model.context), default=None)

    def _served(self, url: str) -> ServedModel:
        self._request(None, lambda body: None, url, "/health")

        def read(body: Any) -> list[ServedModel]:
            return [ServedModel(model["id"], model.get("max_model_len")) for model in body["data"]]

        models = self._request(None, read, url, "/v1/models")
        names = ", ".join(repr(model.name) for model in models)
        if self.model is None and len(models) == 1:
            return models[0]
        if self.model is None:
            raise ValueError(f"{url} serves {names}: set `teacher_model_name_or_path` to one of them.")
        for model in models:
            if model.name == self.model:
                return model
        raise ValueError(f"`teacher_model_name_or_path={self.model!r}` is not served by {url}, which has {names}.")

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **inputs: Any
    ) -> list[Tensor]:
        """Log-probabilities at temperature 1 of each completion's tokens, (T_i,) each, float32 on the CPU.

        All or nothing: an answer that does not cover every token asked for is an error.

        Raises:
            TeacherServerError: no usable answer after all retries.
        """
        if inputs:
            raise ValueError(f"A teacher's server takes token ids only, not {', '.join(map(repr, inputs))}.")
        rows = [i for i, ids in enumerate(completion_ids) if ids]
        chunks = [rows[i : i + SEQUENCES_PER_REQUEST] for i in range(0, len(rows), SEQUENCES_PER_REQUEST)]
        sequences = [[[*prompt_ids[row], *completion_ids[row]] for row in chunk] for chunk in chunks]
        answers = self._all([(self._scoring(chunk), _read_logps(chunk)) for chunk in sequences])
        scored = [torch.empty(0)] * len(completion_ids)
        for chunk, answer in zip(chunks, answers, strict=True):
            for row, logps in zip(chunk, answer, strict=True):
                scored[row] = logps[-len(completion_ids[row]) :]
        return scored

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """`candidates` completions of each prompt as token ids, up to and with the first EOS.

        Seeds are drawn from torch's generator, so that a resumed run asks the same.

        Raises:
            TeacherServerError: no usable answer after all retries.
        """
        seeds = torch.randint(2**31, (len(prompt_ids),)).tolist()
        read = _read_samples(candidates, self.sampling["max_tokens"])
        requests = [
            ({**self._sampling(ids), "n": candidates, "seed": seed}, read)
            for ids, seed in zip(prompt_ids, seeds, strict=True)
        ]
        return [[up_to_eos(ids, self.eos) for ids in some] for some in self._all(requests)]

    def score_at(self, url: str, ids: list[int], others: int = 0) -> list[dict[str, Any]]:
        """One server's entries for a sequence's tokens but the first: by token id `logprob`, `decoded_token` and more.

        Of each token itself, and of the `others` most likely ones in its place.
        """
        payload = {**self._scoring([ids]), "prompt_logprobs": others}
        return self._request(payload, read_entries([ids]), url)[0]

    def sample_at(self, url: str, prompt_ids: list[int], max_tokens: int) -> dict[str, Any]:
        """One server's sampled completion as it answers it: `token_ids`, `logprobs`, `finish_reason`."""
        sampling = {**self._sampling(prompt_ids), "max_tokens": max_tokens, "logprobs": 0, "seed": 0}

        def read(body: Any) -> dict[str, Any]:
            choice = body["choices"][0]
            if len(choice["token_ids"]) != len(choice["logprobs"]["token_logprobs"]):
                raise ValueError("a sample with another number of log-probs than tokens")
            return choice

        return self._request(sampling, read, url)

    def _scoring(self, sequences: list[list[int]]) -> dict[str, Any]:
        return {"model": self.model, "prompt": sequences, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}

    def _sampling(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        ends = {"stop_token_ids": sorted(self.eos), "return_token_ids": True}
        return {"model": self.model, "prompt": list(prompt_ids), **self.sampling, **ends}

    def _all(self, requests: list[tuple[dict[str, Any], Callable[[Any], T]]]) -> list[T]:
        """Answers to requests, in their order; the first failure stops the others."""
        if not requests:
            return []
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.concurrency, len(requests)), thread_name_prefix="teacher")
        try:
            futures = []
            for payload, read in requests:
                futures.append(pool.submit(self._request, payload, read, stop=stop, first=self.turn))
                self.turn += 1
            return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _request(
        self,
        payload: dict[str, Any] | None,
        read: Callable[[Any], T],
        url: str | None = None,
        path: str = "/v1/completions",
        stop: threading.Event | None = None,
        first: int = 0,
    ) -> T:
        """One answer, read and checked, after as many attempts as it takes; only at `url`, if given."""
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
                    turn = first + attempt.retry_state.attempt_number - 1
                    return self._attempt((url or self.urls[turn % len(self.urls)]) + path, payload, read)
        except _AttemptError as error:
            tries = attempts.statistics["attempt_number"]
            message = f"No usable answer from the teacher's server in {tries} attempts, the last: {error}"
            raise TeacherServerError(message) from None  # it says all that the client's three layers do
        raise AssertionError("unreachable: a retried request returns or raises")

    def _attempt(self, url: str, payload: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            response = self._exchange(url, payload)
        except httpx2.RequestError as error:
            raise _AttemptError(url, f"{type(error).__name__}: {error}") from error
        if response.status_code in RETRIED_STATUS:
            after = response.headers.get("Retry-After", "")
            raise _AttemptError(url, f"status {_shown(response)}", float(after) if after.isdigit() else 0.0)
        if response.status_code != 200:
            hint = HINTS.get(response.status_code, "")
            raise TeacherServerError(f"{url} refused the request with status {_shown(response)} {hint}".strip())
        try:
            return read(response.json() if "json" in response.headers.get("Content-Type", "") else None)
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


def _plain(headers: httpx2.Headers) -> dict[str, str]:
    """The headers that still hold once a body is decoded."""
    return {name: value for name, value in headers.items() if name in ("content-type", "retry-after")}


def _shown(response: httpx2.Response) -> str:
    return f"{response.status_code}: {response.text[:SHOWN_CHARACTERS].strip()}"


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: doubling with jitter, and at least what the server asked for."""
    first, longest = BACKOFF_SECONDS
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, _AttemptError) else 0.0
    return max(wait_exponential_jitter(initial=first, max=longest, jitter=first)(state), asked)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("Asking the teacher's server again after attempt %d: %s", state.attempt_number, error)


def read_entries(sequences: list[list[int]]) -> Callable[[Any], list[list[dict[str, Any]]]]:
    """A reader of the prompt log-probabilities of `sequences`: for each token but the first, entries by token id."""

    def read(body: Any) -> list[list[dict[str, Any]]]:
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(sequences):
            raise ValueError(f"{len(choices)} answers to {len(sequences)} sequences")
        answers = []
        for ids, choice in zip(sequences, choices, strict=True):
            entries = choice["prompt_logprobs"]
            if len(entries) != len(ids):
                raise ValueError(f"{len(entries)} log-probs for {len(ids)} tokens")
            logps_of(ids, entries[1:])  # raises where one is missing
            answers.append(entries[1:])
        return answers

    return read


def _read_logps(sequences: list[list[int]]) -> Callable[[Any], list[Tensor]]:
    """A reader of the log-probabilities of `sequences`, (length - 1,) each."""
    read = read_entries(sequences)
    return lambda body: [logps_of(ids, entries) for ids, entries in zip(sequences, read(body), strict=True)]


def logps_of(ids: list[int], entries: list[dict[str, Any]]) -> Tensor:
    """Log-probabilities of a sequence's tokens but the first, (length - 1,), from a server's entries for them."""
    values = [float(entry[str(token)]["logprob"]) for token, entry in zip(ids[1:], entries, strict=True)]
    if not all(math.isfinite(value) and value <= 1e-3 for value in values):  # a rounding above 0 is none of an answer's
        raise ValueError("a log-prob that is not a finite number <= 0")
    return torch.tensor(values, dtype=torch.float32)


def _read_samples(count: int, longest: int) -> Callable[[Any], list[list[int]]]:
    """A reader of `count` sampled completions of at most `longest` tokens."""

    def read(body: Any) -> list[list[int]]:
        samples = [choice["token_ids"] for choice in sorted(body["choices"], key=lambda choice: choice["index"])]
        if len(samples) != count:
            raise ValueError(f"{len(samples)} samples instead of {count}")
        for ids in samples:
            if not 1 <= len(ids) <= longest or not all(isinstance(token, int) for token in ids):
                raise ValueError(f"a sample that is no list of 1 to {longest} token ids")
        return samples

    return read
