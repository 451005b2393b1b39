"""Sample completions of questions, grade them, and report avg@k and pass@k. Meets the trainer only through a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .teacher import WHOLE_DISTRIBUTION, eos_set, sample_completions
from .verifiers import as_completion, checked_verdicts, columns_of


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct, from c correct ones of n.

    `1 - C(n - c, k) / C(n, k)`, as a product (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}.")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


@dataclass(frozen=True)
class EvaluationResult:
    """Figures over questions, in percent where the name says so, with the standard error over questions."""

    num_questions: int
    num_samples: int
    avg_percent: float
    avg_standard_error: float
    pass_percent: float
    pass_standard_error: float
    abstained_percent: float
    truncated_percent: float
    mean_tokens: float

    def as_dict(self) -> dict[str, float]:
        """The fields by name, avg and pass under the names of the field: `avg@k`, `pass@k`."""
        values, k = asdict(self), self.num_samples
        values[f"avg@{k}"], values[f"pass@{k}"] = values.pop("avg_percent"), values.pop("pass_percent")
        return values


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; the error of a single value is NaN."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def tokenize_prompts(processing_class: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of prompts, each plain text or a list of messages ready for the assistant's turn."""
    return [
        processing_class(prompt)["input_ids"]
        if isinstance(prompt, str)
        else processing_class.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]


def evaluate_model(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Sequence[dict[str, Any]],
    verifier: Callable[..., list[float | None]],
    num_samples: int = 8,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> EvaluationResult:
    """avg@k and pass@k with k = `num_samples` on a dataset with the columns `prompt` and those the verifier reads.

    An abstained verdict counts as not correct and is reported. The caller's random state is left as it was.
    """
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty: there is nothing to evaluate.")
    rows = [row for row in dataset for _ in range(num_samples)]
    eos = eos_set(model.generation_config.eos_token_id) | eos_set(processing_class.eos_token_id)
    pad = processing_class.pad_token_id
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        max_new_tokens=max_completion_length,
        eos_token_id=sorted(eos),
        pad_token_id=processing_class.eos_token_id if pad is None else pad,
        **WHOLE_DISTRIBUTION,
    )
    prompt_ids = tokenize_prompts(processing_class, [row["prompt"] for row in rows])
    ids: list[list[int]] = []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(rows), batch_size), desc="evaluate", disable=not progress):
            ids += sample_completions(model, prompt_ids[start : start + batch_size], config)
    model.train(was_training)
    verdicts = grade(rows, ids, processing_class, verifier)
    correct = [sum(v == 1.0 for v in verdicts[i : i + num_samples]) for i in range(0, len(rows), num_samples)]
    average, average_error = mean_and_standard_error([100 * c / num_samples for c in correct])
    passed, passed_error = mean_and_standard_error([100 * pass_at_k(num_samples, c, num_samples) for c in correct])
    return EvaluationResult(
        num_questions=len(correct),
        num_samples=num_samples,
        avg_percent=average,
        avg_standard_error=average_error,
        pass_percent=passed,
        pass_standard_error=passed_error,
        abstained_percent=100 * sum(v is None for v in verdicts) / len(verdicts),
        truncated_percent=100 * sum(i[-1] not in eos for i in ids) / len(ids),
        mean_tokens=statistics.fmean(len(i) for i in ids),
    )


def grade(
    rows: Sequence[dict[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    processing_class: PreTrainedTokenizerBase,
    verifier: Callable[..., list[float | None]],
) -> list[float | None]:
    """The verifier's answer to each completion, with the columns of its row, as in training."""
    texts = processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    prompts = [row["prompt"] for row in rows]
    completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return checked_verdicts(verifier, prompts, completions, completion_ids=completion_ids, **columns_of(rows))
