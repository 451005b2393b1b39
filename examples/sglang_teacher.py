"""A teacher behind an SGLang server: what it takes to bring a server of another kind as `teacher_model`.

    python -m sglang.launch_server --model-path Qwen/Qwen3-8B --port 30000      # in an environment of its own

    teacher = SGLangTeacher("http://127.0.0.1:30000", max_completion_length=512, eos_token_ids=[151645, 151643])
    trainer = SGOPDTrainer(model=..., teacher_model=teacher, ...)

`sg_opd.teachers.Teacher` is the protocol that it implements. `Endpoints` brings time-outs, retries and the ending of
the run after a checkpoint; the start-up checks of a vLLM server are not made here. Log-probabilities of SGLang are at
temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sg_opd.teachers.http import Endpoints

ALL_IDS = -1  # SGLang's top_k that cuts nothing


class SGLangTeacher:
    """Token ids in, log-probabilities and token ids out, by SGLang's own `/generate`.

    Args:
        url: of the server.
        max_completion_length: of a proposal, in tokens; the trainer's.
        eos_token_ids: that end a proposal; the student's.
        name: what a model card calls it.
    """

    sharded = False

    def __init__(
        self, url: str, max_completion_length: int, eos_token_ids: Sequence[int], name: str = "a model behind SGLang"
    ) -> None:
        self.endpoints = Endpoints([url], timeout=240.0, concurrency=8, retries=5)
        self.sampling = {"max_new_tokens": max_completion_length, "stop_token_ids": list(eos_token_ids)}
        self.sampling |= {"temperature": 1.0, "top_p": 1.0, "top_k": ALL_IDS, "no_stop_trim": True}
        self.name = name
        self.context = self.endpoints.ask("/v1/models", lambda body: body["data"][0].get("max_model_len"))

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `Teacher.score`."""
        requests = []
        for prompt, ids in zip(prompt_ids, completion_ids, strict=True):
            # the first entry is that of the prompt's last token, and has no number
            request = {"input_ids": [*prompt, *ids], "return_logprob": True, "logprob_start_len": len(prompt) - 1}
            request["sampling_params"] = {"max_new_tokens": 0, "temperature": 0.0}
            requests.append((request, lambda body, ids=ids: self._scores(body, ids)))
        return self.endpoints.ask_all("/generate", requests)

    def propose(self, prompt_ids: Sequence[Sequence[int]], candidates: int = 1) -> list[list[list[int]]]:
        """As `Teacher.propose`."""
        sampling = {**self.sampling, "n": candidates}
        requests = [({"input_ids": list(ids), "sampling_params": sampling}, self._samples) for ids in prompt_ids]
        return self.endpoints.ask_all("/generate", requests)

    @staticmethod
    def _scores(body: Any, ids: Sequence[int]) -> Tensor:
        entries = body["meta_info"]["input_token_logprobs"][1:]
        if [entry[1] for entry in entries] != list(ids):  # what does not fit is asked for again
            raise ValueError("log-probs of other tokens than were sent")
        return torch.tensor([float(entry[0]) for entry in entries])

    @staticmethod
    def _samples(body: Any) -> list[list[int]]:
        return [answer["output_ids"] for answer in (body if isinstance(body, list) else [body])]
