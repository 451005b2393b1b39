"""A teacher behind one or several stock `vllm serve` endpoints: token ids in, log-probabilities and token ids out.

Nothing of vLLM is needed here. Prompt log-probabilities of such a server are at temperature 1, of the token that was
sampled and of as many of the likeliest as `--max-logprobs` allows: what the sampled and the top-k estimator need, and
not enough for the full one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .http import Endpoints, TeacherServerError
from .protocol import TopScores
from .sampling import SERVED

COMPLETIONS = "/v1/completions"
SEQUENCES_PER_REQUEST = 8
ANSWER_BYTES = 8 * 2**20  # of one answer, about: larger ones hold up the other questions of both sides
ENTRY_BYTES = 75  # of one log-probability with its token, in JSON; 57 to 74 measured
ROUNDING = 1e-3  # nats above 0 that a log-probability of a server may have

T = TypeVar("T")


class Scores(NamedTuple):
    """How a server scores a sequence's tokens but the first."""

    logps: Tensor  # (length - 1,), float32
    entries: list[dict[str, Any]]  # for each, by token id, `logprob`, `decoded_token` and more


class ServerTeacher:
    """A teacher that stock OpenAI-compatible `vllm serve` endpoints hold; implements `TopKTeacher`.

    Args:
        endpoints: where it is asked; their time-out above the server's warm-up.
        model: id of the served model; `None` takes the only one a server has.
        sampling: `temperature` and `max_tokens` of proposals, and of `SERVED` what is not neutral.
        eos: ids that end a completion.
    """

    sharded = False

    def __init__(self, endpoints: Endpoints, model: str | None, sampling: dict[str, Any], eos: frozenset[int]) -> None:
        self.endpoints = endpoints
        self.model = model
        self.context: int | None = None
        self.sampling = sampling
        self.eos = eos

    @property
    def name(self) -> str:
        return self.model or "a served model"  # without its address, which is nobody's business on a model card

    def connect(self) -> None:
        """Ask every URL for its health and its model; sets `model` and `context`, the shortest of all.

        Raises:
            TeacherServerError: a server that does not answer.
            ValueError: a server without the model asked for, or servers with different models.
        """
        self.model, self.context = served_model(self.endpoints, self.model, "teacher_model_name_or_path")

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities at temperature 1 of each completion's tokens, (T_i,) each, float32 on the CPU.

        All or nothing: an answer that does not cover every token asked for is an error.

        Raises:
            TeacherServerError: no usable answer after all retries.
        """
        scores = self._ask(prompt_ids, completion_ids, 0, _read_scores)
        return [next(scores).logps[-len(ids) :] if ids else torch.empty(0) for ids in completion_ids]

    def score_top(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], k: int
    ) -> list[TopScores]:
        """As `TopKTeacher.score_top`, at temperature 1 and on the CPU; all or nothing, as `score`.

        Raises:
            TeacherServerError: no usable answer after all retries.
        """
        tops = self._ask(prompt_ids, completion_ids, k, partial(_read_tops, k))
        nothing = TopScores(torch.empty(0), torch.empty(0, k, dtype=torch.long), torch.empty(0, k))
        return [TopScores(*(of[-len(ids) :] for of in next(tops))) if ids else nothing for ids in completion_ids]

    def _ask(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        others: int,
        read: Callable[[list[list[int]], Any], list[T]],
    ) -> Iterator[T]:
        """What `read` makes of each sequence with a completion that is not empty, asked with `others` likeliest ids."""
        longest = max(len(prompt) + len(ids) + 1 for prompt, ids in zip(prompt_ids, completion_ids, strict=True))
        if self.context and longest > self.context:
            raise TeacherServerError(
                f"A prompt with its completion needs {longest} tokens, one more included, of the {self.context} that "
                "the teacher's server has: start it with a larger --max-model-len, or filter the dataset by length"
            )
        sequences = [[*prompt, *ids] for prompt, ids in zip(prompt_ids, completion_ids, strict=True) if ids]
        chunks = chunked(sequences, others)
        requests = [({**self._scoring(chunk), "prompt_logprobs": others}, partial(read, chunk)) for chunk in chunks]
        return chain.from_iterable(self.endpoints.ask_all(COMPLETIONS, requests))

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """As `Teacher.propose`; a server ends a completion at the first EOS by itself.

        Seeds are drawn from torch's generator, so that a resumed run asks the same.

        Raises:
            TeacherServerError: no usable answer after all retries.
        """
        seeds = torch.randint(2**31, (len(prompt_ids),)).tolist()
        read = partial(_read_samples, candidates, self.sampling["max_tokens"])
        requests = [
            ({**self._sampling(ids), "n": candidates, "seed": seed}, read)
            for ids, seed in zip(prompt_ids, seeds, strict=True)
        ]
        return self.endpoints.ask_all(COMPLETIONS, requests)

    def score_at(self, url: str, ids: list[int], others: int = 0) -> Scores:
        """One server's scores of a sequence, with the `others` most likely tokens in place of each."""
        scoring = {**self._scoring([ids]), "prompt_logprobs": others}
        return self.endpoints.ask(COMPLETIONS, partial(_read_scores, [ids]), scoring, url)[0]

    def sample_at(self, url: str, prompt_ids: list[int], max_tokens: int) -> dict[str, Any]:
        """One server's sampled completion as it answers it: `token_ids`, `logprobs`, `finish_reason`."""
        sampling = {**self._sampling(prompt_ids), "max_tokens": max_tokens, "logprobs": 0, "seed": 0}

        def read(body: Any) -> dict[str, Any]:
            choice = body["choices"][0]
            if choice.get("token_ids") is None:
                raise TeacherServerError(f"{url} returns no token ids: it must be vLLM 0.10.2 or newer")
            if len(choice["token_ids"]) != len(choice["logprobs"]["token_logprobs"]):
                raise ValueError("a sample with another number of log-probs than tokens")
            return choice

        return self.endpoints.ask(COMPLETIONS, read, sampling, url)

    def _scoring(self, sequences: list[list[int]]) -> dict[str, Any]:
        return {"model": self.model, "prompt": sequences, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}

    def _sampling(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        ends = {"stop_token_ids": sorted(self.eos), "return_token_ids": True}
        return {"model": self.model, "prompt": list(prompt_ids), **SERVED, **self.sampling, **ends}


def chunked(sequences: Sequence[list[int]], others: int) -> list[list[list[int]]]:
    """Token ids in requests: each one's answer, with `others` likeliest ids a token, is of `ANSWER_BYTES` at most.

    A sequence whose answer is larger has a request of its own.
    """
    chunks: list[list[list[int]]] = []
    size = 0
    for ids in sequences:
        expected = len(ids) * (others + 1) * ENTRY_BYTES
        if not chunks or len(chunks[-1]) == SEQUENCES_PER_REQUEST or size + expected > ANSWER_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(ids)
        size += expected
    return chunks


def served_model(endpoints: Endpoints, model: str | None, setting: str) -> tuple[str, int | None]:
    """The model that all servers have under the id `model` (`None`: the only one each has), and their shortest context.

    Each is asked for its health and its models; errors call `model` by the name of the `setting`.

    Raises:
        TeacherServerError: a server that does not answer.
        ValueError: a server without the model asked for, or servers with different models.
    """
    served = [_served_at(endpoints, url, model, setting) for url in endpoints.urls]
    names = {name for name, _ in served}
    if len(names) > 1:
        raise ValueError(
            f"The servers hold different models ({', '.join(sorted(names))}); set `{setting}` to the id of one that "
            "all of them serve."
        )
    return served[0][0], min((context for _, context in served if context), default=None)


def _served_at(endpoints: Endpoints, url: str, model: str | None, setting: str) -> tuple[str, int | None]:
    endpoints.ask("/health", lambda body: None, url=url)
    contexts = endpoints.ask("/v1/models", _read_contexts, url=url)
    names = ", ".join(map(repr, contexts))
    if model is None and len(contexts) != 1:
        raise ValueError(f"{url} serves {names}: set `{setting}` to one of them.")
    name = next(iter(contexts)) if model is None else model
    if name not in contexts:
        raise ValueError(f"`{setting}={model!r}` is not served by {url}, which has {names}.")
    return name, contexts[name]


def _read_contexts(body: Any) -> dict[str, int | None]:
    """By id of a model that a server serves, the longest sequence it takes, in tokens."""
    return {model["id"]: model.get("max_model_len") for model in body["data"]}


def _choices(count: int, body: Any) -> list[dict[str, Any]]:
    """An answer's choices in order, one for each of `count` that were asked for."""
    choices = sorted(body["choices"], key=lambda choice: choice["index"])
    if len(choices) != count:
        raise ValueError(f"{len(choices)} answers instead of {count}")
    return choices


def _read_scores(sequences: list[list[int]], body: Any) -> list[Scores]:
    """What an answer holds of each sequence; one log-probability for every token asked for."""
    scores = []
    for ids, choice in zip(sequences, _choices(len(sequences), body), strict=True):
        entries = choice["prompt_logprobs"][1:]
        if len(entries) != len(ids) - 1:
            raise ValueError(f"{len(entries) + 1} log-probs for {len(ids)} tokens")
        logps = torch.tensor(
            [float(entry[str(token)]["logprob"]) for token, entry in zip(ids[1:], entries, strict=True)]
        )
        _check_finite(logps)
        scores.append(Scores(logps, entries))
    return scores


def _read_tops(k: int, sequences: list[list[int]], body: Any) -> list[TopScores]:
    """What an answer holds of each sequence with the `k` likeliest ids; it has one more where the token is none."""
    tops = []
    for ids, (logps, entries) in zip(sequences, _read_scores(sequences, body), strict=True):
        top_ids, top_logps = [], []
        for token, entry in zip(ids[1:], entries, strict=True):
            likeliest = entry if len(entry) == k else {i: said for i, said in entry.items() if i != str(token)}
            if len(likeliest) != k:
                raise ValueError(f"{len(likeliest)} likeliest ids instead of {k}")
            top_ids.append([*map(int, likeliest)])
            top_logps.append([float(said["logprob"]) for said in likeliest.values()])
        top = torch.tensor(top_logps)
        _check_finite(top)
        tops.append(TopScores(logps, torch.tensor(top_ids), top))
    return tops


def _check_finite(logps: Tensor) -> None:
    if not (logps.isfinite() & (logps <= ROUNDING)).all():
        raise ValueError("a log-prob that is not a finite number <= 0")


def _read_samples(count: int, longest: int, body: Any) -> list[list[int]]:
    """The token ids of `count` sampled completions in an answer, each of at most `longest` tokens."""
    samples = [choice["token_ids"] for choice in _choices(count, body)]
    for ids in samples:
        if not 1 <= len(ids) <= longest or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"a sample that is no list of 1 to {longest} token ids")
    return samples
