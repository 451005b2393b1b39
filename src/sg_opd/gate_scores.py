"""`score_rollout`: one completion of a row, judged and scored by student and teacher, to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .divergence import chunked_nll, head_of, last_hidden_state
from .engines import Sampling, TransformersEngine, evaluating
from .evaluate import tokenize_prompts
from .gate_view import RolloutView, inspect_rollout
from .loss import SignGatedLoss
from .verifiers import MathVerifier, as_completion, checked_verdicts, columns_of


def score_rollout(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    row: dict[str, Any],
    completion: str | Sequence[int] | None = None,
    *,
    verifier: Callable[..., list[float | None]] | None = None,
    gate: SignGatedLoss | None = None,
    reference: PreTrainedModel | None = None,
    source: str = "student",
    max_completion_length: int = 256,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> RolloutView:
    """A rollout of one row of a dataset with the gate's decision on each token; see `inspect_rollout`.

    Args:
        student: a model, normalised over its own head, as are the others; the trainer's own is `trainer.model`.
        teacher: a model with the same tokenizer, so none on a server; the trainer's own is `trainer.teacher.unwrapped`.
        processing_class: their tokenizer.
        row: `prompt` (text or messages) and the columns that the verifier reads, such as `solution`.
        completion: token ids, or text, which gets no EOS; `None` samples one from the student.
        verifier: as in training; default: `MathVerifier()`.
        gate: whose settings and temperature count, such as `trainer.sign_gated_loss`; default: `SignGatedLoss()`.
        reference: the initial policy; `None` is the current one.
        source: who wrote a given completion, "student" or "teacher".
        max_completion_length: of a sampled completion, in tokens.
        seed: of its sampling; the caller's random state is left as it was.
        chat_template_kwargs: for the chat template, such as `enable_thinking`.

    Raises:
        ValueError: an argument out of its range, by name, or a verifier's answer that is no verdict.
    """
    gate = SignGatedLoss() if gate is None else gate
    (prompt_ids,) = tokenize_prompts(processing_class, [row["prompt"]], **(chat_template_kwargs or {}))
    if completion is None:
        sampling = Sampling(max_completion_length, gate.temperature)
        (sampled,) = TransformersEngine(student, processing_class).generate([prompt_ids], [seed], sampling)
        completion = sampled.ids
    elif isinstance(completion, str):
        completion = processing_class(completion, add_special_tokens=False)["input_ids"]
    ids = list(completion)
    judged = as_completion(row["prompt"], processing_class.decode(ids, skip_special_tokens=True))
    columns = {**columns_of([row]), "completion_ids": [ids]}
    (verdict,) = checked_verdicts(verifier or MathVerifier(), [row["prompt"]], [judged], **columns)
    logps = partial(token_logps, prompt_ids=prompt_ids, completion_ids=ids, temperature=gate.temperature)
    return inspect_rollout(
        ids,
        logps(student),
        logps(teacher),
        verdict,
        gate,
        tokenizer=processing_class,
        reference_logps=None if reference is None else logps(reference),
        prompt=processing_class.decode(prompt_ids),
        gold=None if row.get("solution") is None else str(row["solution"]),
        source=source,
    )


@torch.no_grad()
def token_logps(
    model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int], temperature: float
) -> Tensor:
    """Log-probabilities of a completion's tokens over the model's whole head, (T,); never whole logits."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    with evaluating(model):
        states = last_hidden_state(model, ids, torch.ones_like(ids), len(completion_ids))[0]
        return -chunked_nll(states, head_of(model), ids[0, len(prompt_ids) :], temperature)
