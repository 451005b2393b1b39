"""What is asked of a teacher's server before the first step, on a probe sequence, and compared with the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .http import TeacherServerError
from .server import Scores, ServerTeacher

logger = get_logger(__name__)  # of the main process only

PROBE_TOKENS = 512  # at most, of a prompt and of the vocabulary each
PROBE_SAMPLED = 64
TOP_TOKENS = 5  # whose log-probabilities show the grid
FINEST_GRID = 11  # 2**-11: fp16's at logits of 1 to 2; bf16's are coarser by 8
NEARLY_ALL, MOST = 0.9, 0.6  # shares of differences; by chance half of those on a grid are on one twice as coarse
GRID_TOLERANCE = 2e-5  # nats, of the log-softmax in fp32
LOGP_TOLERANCE = 1e-3  # nats; engines in fp32 agree to 1e-5, those in bf16 to 1e-2


def logit_spacing(positions: Sequence[Sequence[float]]) -> float:
    """Spacing of the power-of-two grid that the logits of most positions lie on, in nats; 0.0 where there is none.

    Differences of log-probabilities are differences of logits. Those of a 16-bit head are multiples of a power of two
    that depends on their size, those of a 32-bit head of none this coarse.
    """
    gaps = torch.tensor([max(logps) - logp for logps in positions for logp in logps if logp < max(logps)])

    def share_on(step: float) -> float:
        return ((gaps - (gaps / step).round() * step).abs() < GRID_TOLERANCE).float().mean().item()

    if not len(gaps) or share_on(2.0**-FINEST_GRID) < NEARLY_ALL:
        return 0.0
    return next(2.0**-k for k in range(FINEST_GRID + 1) if share_on(2.0**-k) >= MOST)


def first_prompt(dataset: Any, tokenizer: PreTrainedTokenizerBase, tokenize: Callable[[list], tuple]) -> list[int]:
    """The token ids of a dataset's first `prompt`, by the trainer's `tokenize`; those of a sum where it has none."""
    first: dict[str, Any] = next(iter(dataset), {}) if dataset is not None else {}
    if "prompt" not in first:
        return tokenizer("1 + 1 = 2")["input_ids"]
    return tokenize([first["prompt"]])[0][0]


def check_server(
    teacher: ServerTeacher,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    eos_token_ids: Sequence[int],
    dead_zone: float,
    student_logps: Callable[[list[int]], Tensor] | None,
    top_k: int = 0,
) -> None:
    """Compare a connected teacher with the student on a probe: vocabulary, repeatability, precision, EOS, sameness.

    The prompt is one of the training's, `tokenizer` and EOS ids are the student's. `student_logps` takes ids to the
    student's log-probabilities of all but the first; `None` skips that comparison. `top_k` likeliest ids are what
    training will ask for.

    Raises:
        TeacherServerError: no usable answer, or fewer likeliest ids than `top_k` or `TOP_TOKENS`.
        ValueError: a server whose token ids mean something else.
    """
    part = min(PROBE_TOKENS, (teacher.context or 4 * PROBE_TOKENS) // 4)  # prompt, vocabulary twice, what is sampled
    ids, prompt_ids = sorted(tokenizer.get_vocab().values()), prompt_ids[-part:]
    # siblings of one family differ in what was added to the vocabulary, and in where it ends
    added = sorted({*tokenizer.get_added_vocab().values(), *eos_token_ids, ids[-1]})[-part:]
    spread = sorted({*ids[:: -(-len(ids) // part)], *added})
    ids = [*prompt_ids, *spread]
    expected = student_logps(ids) if student_logps else None
    for url in teacher.endpoints.urls:
        if top_k:
            what, otherwise = f"`teacher_top_k={top_k}`", ", or set a smaller teacher_top_k"
            given_likeliest(teacher, url, ids[:2], top_k, what, otherwise)
        logps, spacing = _check_scores(teacher, url, tokenizer, ids)
        noise = max(spacing, _check_samples(teacher, url, prompt_ids, min(part, PROBE_SAMPLED), eos_token_ids))
        if noise > max(dead_zone, LOGP_TOLERANCE):
            logger.warning(
                "%s works at a precision of about %.2g nats (16 bits?): the sign of smaller deltas is noise. Set "
                "gate_dead_zone=%g, or serve in float32.",
                *(url, noise, rounded_up(noise)),
            )
        if expected is not None and (expected - logps).abs().max() <= LOGP_TOLERANCE + 2 * noise:
            logger.warning("%s scores as the student does: every delta is zero and nothing is learnt.", url)


def given_likeliest(
    teacher: ServerTeacher, url: str, ids: list[int], count: int, what: str, otherwise: str = ""
) -> Scores:
    """One server's scores of `ids` with the `count` likeliest in place of each: as many as it was started for.

    Raises:
        TeacherServerError: no usable answer; of fewer likeliest ids with `what` needs them, and what else to do.
    """
    try:
        return teacher.score_at(url, ids, others=count)
    except TeacherServerError as error:
        if "logprobs" not in str(error):
            raise
        raise TeacherServerError(
            f"{error}. {what} needs a server that was started with --max-logprobs {count} or more (vLLM's default is "
            f"20); restart it so{otherwise}"
        ) from None


def _check_scores(
    teacher: ServerTeacher, url: str, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> tuple[Tensor, float]:
    """Vocabulary and repeatability; returns the log-probabilities of `ids` but the first, and their `logit_spacing`."""
    logps, entries = given_likeliest(teacher, url, ids, TOP_TOKENS, "The check of its vocabulary and precision")
    said = [entry[str(token)].get("decoded_token") for token, entry in zip(ids[1:], entries, strict=True)]
    check_vocabulary(url, tokenizer, ids[1:], said)
    apart = (teacher.score_at(url, ids).logps - logps).abs().max().item()
    if apart > LOGP_TOLERANCE:
        logger.warning(
            "%s scores the same tokens %.1g nats apart when asked twice; start it with --no-enable-prefix-caching.",
            *(url, apart),
        )
    return logps, logit_spacing([[token["logprob"] for token in entry.values()] for entry in entries])


def _check_samples(
    teacher: ServerTeacher, url: str, prompt_ids: list[int], count: int, eos_token_ids: Sequence[int]
) -> float:
    """EOS; returns the largest difference between sampling tokens and scoring the same tokens, in nats."""
    sample = teacher.sample_at(url, prompt_ids, count)
    ids, said = sample["token_ids"], torch.tensor(sample["logprobs"]["token_logprobs"])
    if sample["finish_reason"] == "stop" and ids[-1] not in eos_token_ids:
        logger.warning(
            "%s ends its completions with token %d, the student with %s: the teacher will rate the student's "
            "ending as unlikely, and none of its proposals is taken. Align `generation_config.eos_token_id`.",
            *(url, ids[-1], eos_token_ids),
        )
    return (said - teacher.score_at(url, [*prompt_ids, *ids]).logps[-len(ids) :]).abs().max().item()


def check_patience(longest: float, ranks_wait: float) -> None:
    """Warn where ranks wait for each other (`ddp_timeout`) for less than one question may take, both in seconds."""
    if ranks_wait < longest:
        logger.warning(
            "One question to the teacher's server may take %d s, but ranks wait %d s for each other and then end "
            "without a checkpoint: raise ddp_timeout, or lower teacher_server_timeout or teacher_server_retries.",
            *(longest, ranks_wait),
        )


def check_vocabulary(
    url: str, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], served: Sequence[str | None]
) -> None:
    """Refuse a server that decodes token ids to other texts than the student's tokenizer does."""
    said = dict(zip(ids, served, strict=True))
    pairs = [(token, str(tokenizer.decode([token])), text or "") for token, text in said.items()]
    # parts of a character are shown by each side in its own way
    comparable = [pair for pair in pairs if pair[2] and pair[1].isascii() and pair[2].isascii()]
    different = [pair for pair in comparable if pair[1].strip() != pair[2].strip()]
    if different:
        shown = ", ".join(f"{token} ({ours!r} / {theirs!r})" for token, ours, theirs in different[:3])
        raise ValueError(
            f"`teacher_server_url`: the model at {url} has another vocabulary: {len(different)} of {len(comparable)} "
            f"probed ids decode differently, first {shown} (student / teacher). Serve a teacher of its family."
        )
    if not comparable:
        logger.warning("%s does not say what its token ids decode to; its vocabulary is not compared.", url)


def rounded_up(value: float) -> float:
    """`value` > 0 rounded up to one significant digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return round(math.ceil(value / unit) * unit, 12)
