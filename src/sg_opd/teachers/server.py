"""A teacher behind one or several stock `vllm serve` endpoints: token ids in, log-probabilities and token ids out.

Nothing of vLLM is needed here. Prompt log-probabilities of such a server are at temperature 1, of the token that was
sampled: what the sampled estimator needs, and not enough for the full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .http import Endpoints, TeacherServerError

COMPLETIONS = "/v1/completions"
SEQUENCES_PER_REQUEST = 8  # long answers: some 100 bytes a token


class ServedModel(NamedTuple):
    """What a server says of the model it serves."""

    name: str
    context: int | None
    """Longest sequence of prompt and completion, in tokens."""


class ServerTeacher:
    """A teacher that stock OpenAI-compatible `vllm serve` endpoints hold; implements `sg_opd.teachers.Teacher`.

    Args:
        endpoints: where it is asked; their time-out above the server's warm-up.
        model: id of the served model; `None` takes the only one a server has.
        sampling: `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty` and `max_tokens` of proposals.
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
    def urls(self) -> list[str]:
        return self.endpoints.urls

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
        longest = max(len(prompt) + len(ids) + 1 for prompt, ids in zip(prompt_ids, completion_ids, strict=True))
        if self.context and longest > self.context:
            raise TeacherServerError(
                f"A prompt with its completion needs {longest} tokens, one more included, of the {self.context} that "
                "the teacher's server has: start it with a larger --max-model-len, or filter the dataset by length"
            )
        rows = [i for i, ids in enumerate(completion_ids) if ids]
        chunks = [rows[i : i + SEQUENCES_PER_REQUEST] for i in range(0, len(rows), SEQUENCES_PER_REQUEST)]
        sequences = [[[*prompt_ids[row], *completion_ids[row]] for row in chunk] for chunk in chunks]
        answers = self.endpoints.ask_all(
            COMPLETIONS, [(self._scoring(chunk), _read_logps(chunk)) for chunk in sequences]
        )
        scored = [torch.empty(0)] * len(completion_ids)
        for chunk, answer in zip(chunks, answers, strict=True):
            for row, logps in zip(chunk, answer, strict=True):
                scored[row] = logps[-len(completion_ids[row]) :]
        return scored

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """As `Teacher.propose`; a server ends a completion at the first EOS by itself.

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
        return self.endpoints.ask_all(COMPLETIONS, requests)

    def score_at(self, url: str, ids: list[int], others: int = 0) -> list[dict[str, Any]]:
        """One server's entries for a sequence's tokens but the first: by token id `logprob`, `decoded_token` and more.

        Of each token itself, and of the `others` most likely ones in its place.
        """

        def read(body: Any) -> list[dict[str, Any]]:
            (entries,) = _entries(body, [ids])
            logps_of(ids, entries)  # raises where one is missing, while the question can still be asked again
            return entries

        return self.endpoints.ask(COMPLETIONS, read, {**self._scoring([ids]), "prompt_logprobs": others}, url)

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
        return {"model": self.model, "prompt": list(prompt_ids), **self.sampling, **ends}


def served_model(endpoints: Endpoints, model: str | None, setting: str) -> ServedModel:
    """What all servers serve under the id `model` (`None`: the only one each has); its context is the shortest of all.

    Args:
        endpoints: asked one by one for their health and their models.
        model: id of a served model.
        setting: what the errors call `model`.

    Raises:
        TeacherServerError: a server that does not answer.
        ValueError: a server without the model asked for, or servers with different models.
    """
    served = [_served_at(endpoints, url, model, setting) for url in endpoints.urls]
    names = {found.name for found in served}
    if len(names) > 1:
        raise ValueError(
            f"The servers hold different models ({', '.join(sorted(names))}); set `{setting}` to the id of one that "
            "all of them serve."
        )
    return ServedModel(served[0].name, min((found.context for found in served if found.context), default=None))


def _served_at(endpoints: Endpoints, url: str, model: str | None, setting: str) -> ServedModel:
    endpoints.ask("/health", lambda body: None, url=url)

    def read(body: Any) -> list[ServedModel]:
        return [ServedModel(found["id"], found.get("max_model_len")) for found in body["data"]]

    models = endpoints.ask("/v1/models", read, url=url)
    names = ", ".join(repr(found.name) for found in models)
    if model is None and len(models) == 1:
        return models[0]
    if model is None:
        raise ValueError(f"{url} serves {names}: set `{setting}` to one of them.")
    for found in models:
        if found.name == model:
            return found
    raise ValueError(f"`{setting}={model!r}` is not served by {url}, which has {names}.")


def _entries(body: Any, sequences: list[list[int]]) -> list[list[dict[str, Any]]]:
    """Of each sequence, for each token but the first, a server's entries by token id; one for every token asked for."""
    choices = sorted(body["choices"], key=lambda choice: choice["index"])
    if len(choices) != len(sequences):
        raise ValueError(f"{len(choices)} answers to {len(sequences)} sequences")
    for ids, choice in zip(sequences, choices, strict=True):
        if len(choice["prompt_logprobs"]) != len(ids):
            raise ValueError(f"{len(choice['prompt_logprobs'])} log-probs for {len(ids)} tokens")
    return [choice["prompt_logprobs"][1:] for choice in choices]


def _read_logps(sequences: list[list[int]]) -> Callable[[Any], list[Tensor]]:
    """A reader of the log-probabilities of `sequences`, (length - 1,) each."""
    return lambda body: [logps_of(ids, some) for ids, some in zip(sequences, _entries(body, sequences), strict=True)]


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
