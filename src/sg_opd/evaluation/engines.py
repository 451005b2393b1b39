"""Samples completions for an evaluation: with transformers, with vLLM in this process, or from a vLLM server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..teachers.http import Endpoints
from ..teachers.protocol import eos_set
from ..teachers.sampling import NEUTRAL, SERVED, WHOLE_DISTRIBUTION, sample_completions
from ..teachers.server import COMPLETIONS, served_model
from .results import files_checksum, weights_checksum


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled; by default from the model's whole distribution."""

    max_completion_length: int = 256  #: In tokens, > 0, with the EOS.
    temperature: float = 1.0  #: >= 0; 0 is greedy.
    top_p: float = 1.0  #: In (0, 1].
    top_k: int = 0  #: >= 0; 0 is all.
    min_p: float = 0.0  #: In [0, 1]; 0 is all.
    repetition_penalty: float = 1.0  #: > 0; 1 is none.

    def __post_init__(self) -> None:
        for name, fits, words in (
            ("max_completion_length", self.max_completion_length > 0, "> 0"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
        ):
            if not fits:
                raise ValueError(f"`{name}` must be {words}, got {getattr(self, name)!r}.")

    def distribution(self) -> dict[str, Any]:
        """The settings that transformers and vLLM share, by their names."""
        return {name: getattr(self, name) for name in ("temperature", *WHOLE_DISTRIBUTION)}

    def effective(self) -> dict[str, Any]:
        """Whatever shapes a completion, by the names of transformers and vLLM, the same for every engine; for JSON."""
        return {**NEUTRAL, **self.distribution(), "max_completion_length": self.max_completion_length}


class Completion(NamedTuple):
    """Token ids with the EOS, and "stop" or "length"."""

    ids: list[int]
    finish_reason: str


class Engine(Protocol):
    """What an evaluation asks of an engine.

    One that knows its checkpoint's `generation_config`, a dict, may have it as an attribute; what of it does not
    count is then warned of.
    """

    seeds: Literal["batch", "sample"]  #: Whether a batch shares one seed, or each sample has its own.

    context: int | None  #: Longest prompt with its completion, in tokens; `None` where it is not known.

    def describe(self) -> dict[str, Any]:
        """`engine`, `model` and what else decides its samples, for JSON."""

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """One completion of each prompt, the same for the same seeds."""


class TransformersEngine:
    """A model in this process; implements `Engine`.

    Sampling settings of the checkpoint's own generation config do not count, its EOS ids do. The caller's random state
    and the model's training mode are left as they were.
    """

    seeds: Literal["batch", "sample"] = "batch"

    def __init__(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.eos = eos_set(model.generation_config.eos_token_id) | eos_set(processing_class.eos_token_id)
        pad = processing_class.pad_token_id
        self.pad = processing_class.eos_token_id if pad is None else pad
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.generation_config = model.generation_config.to_dict()

    def describe(self) -> dict[str, Any]:
        """With a checksum of the weights, which training changes under the same name."""
        name = getattr(self.model.config, "_name_or_path", "") or "a model in memory"
        return {"engine": "transformers", "model": name, "weights": weights_checksum(self.model)}

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """As `Engine.generate`; one batch, whose first seed counts."""
        how = {"do_sample": True, **sampling.distribution()}
        if sampling.temperature == 0:
            how = {"do_sample": False, "repetition_penalty": sampling.repetition_penalty}
        ends = {"eos_token_id": sorted(self.eos), "pad_token_id": self.pad}
        config = GenerationConfig(max_new_tokens=sampling.max_completion_length, **ends, **how)
        with torch.random.fork_rng(), evaluating(self.model):
            torch.manual_seed(seeds[0])
            rows = sample_completions(self.model, prompt_ids, config)
        return [Completion(ids, "stop" if ids[-1] in self.eos else "length") for ids in rows]


class VLLMEngine:
    """vLLM in this process (`sg-opd[vllm]`); implements `Engine`.

    Args:
        model: path or hub id.
        processing_class: its tokenizer, whose EOS ends a completion beside the checkpoint's own.
        trust_remote_code: whether code that comes with a checkpoint is run.
        **kwargs: for `vllm.LLM`, such as `tensor_parallel_size` or `max_model_len`.
    """

    seeds: Literal["batch", "sample"] = "sample"

    def __init__(
        self, model: str, processing_class: PreTrainedTokenizerBase, trust_remote_code: bool = False, **kwargs: Any
    ) -> None:
        from vllm import LLM

        self.name = model
        self.eos = eos_set(processing_class.eos_token_id)
        self.options = kwargs
        # vLLM itself would fall back to pickles
        self.llm = LLM(model=model, trust_remote_code=trust_remote_code, **{"load_format": "safetensors", **kwargs})
        self.context = self.llm.llm_engine.model_config.max_model_len
        self.generation_config = self.llm.llm_engine.model_config.try_get_generation_config()

    def describe(self) -> dict[str, Any]:
        """With a checksum of the weights where `model` is a local folder."""
        options = {name: str(value) for name, value in self.options.items()}
        return {"engine": "vllm", "model": self.name, "weights": files_checksum(self.name), "vllm_options": options}

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """As `Engine.generate`."""
        from vllm import SamplingParams

        settings = for_vllm(sampling, self.eos)
        requests = [{"prompt_token_ids": ids} for ids in prompt_ids]
        params = [SamplingParams(seed=seed, detokenize=False, **settings) for seed in seeds]
        answers = self.llm.generate(requests, params, use_tqdm=False)
        return [Completion(list(a.outputs[0].token_ids), a.outputs[0].finish_reason) for a in answers]


class ServerEngine:
    """Stock `vllm serve` endpoints, asked for token ids; implements `Engine`.

    Args:
        urls: base URLs of servers of the same model.
        processing_class: its tokenizer.
        model: id of the served model; `None` takes the only one.
        timeout: seconds for one request, waiting and reading.
        concurrency: requests in flight, >= 1.
        retries: further attempts after a failed request, >= 0.

    Raises:
        TeacherServerError: a server that does not answer.
        ValueError: a server without the model, or servers with different ones.
    """

    seeds: Literal["batch", "sample"] = "sample"

    def __init__(
        self,
        urls: Sequence[str],
        processing_class: PreTrainedTokenizerBase,
        model: str | None = None,
        timeout: float = 3600.0,
        concurrency: int = 64,
        retries: int = 5,
    ) -> None:
        self.eos = eos_set(processing_class.eos_token_id)
        self.endpoints = Endpoints(urls, timeout, concurrency, retries)
        self.model, self.context = served_model(self.endpoints, model, "served_model")

    def describe(self) -> dict[str, Any]:
        """Of the weights it knows nothing: another output folder is needed when what is served changes."""
        return {"engine": "vllm-server", "model": self.model}

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """As `Engine.generate`.

        Raises:
            TeacherServerError: no usable answer after all retries.
        """
        common = {"model": self.model, "return_token_ids": True, **for_vllm(sampling, self.eos)}
        read = partial(read_completion, sampling.max_completion_length)
        asked = [{**common, "prompt": list(ids), "seed": seed} for ids, seed in zip(prompt_ids, seeds, strict=True)]
        return self.endpoints.ask_all(COMPLETIONS, [(payload, read) for payload in asked])


def for_vllm(sampling: Sampling, eos: frozenset[int]) -> dict[str, Any]:
    """Sampling settings by vLLM's names."""
    ends = {"max_tokens": sampling.max_completion_length, "stop_token_ids": sorted(eos)}
    return {**SERVED, **sampling.distribution(), **ends}


def read_completion(longest: int, body: Any) -> Completion:
    """A server's answer as a completion of at most `longest` tokens; a `ValueError` where it is none."""
    (choice,) = body["choices"]
    ids, reason = choice["token_ids"], choice["finish_reason"]
    if not 1 <= len(ids) <= longest or not all(isinstance(token, int) for token in ids):
        raise ValueError(f"a completion that is no list of 1 to {longest} token ids")
    if reason not in ("stop", "length"):
        raise ValueError(f"the finish reason {reason!r}")
    return Completion(ids, reason)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
