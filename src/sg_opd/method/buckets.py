"""Distributions of the top-k estimator: over the ids K of a position, and one bucket for all the rest.

K are the teacher's k likeliest ids and the sampled one. What is called *bucketed* here are log-probabilities
(..., k + 2): of the sampled id, of k others, and of the rest. Where the sampled id is among the k likeliest there are
k - 1 others: the place that is left has `NO_ID` for an id and minus infinity for a log-probability. Each model is
normalised over its own head, and an id that the two do not share belongs to the rest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NO_ID = -1
REST_FLOOR = 1e-5
"""The least probability of the rest in a target, to which it is added.

A server gives no more than K: its rest is 1 less the mass of that, which an fp32 log-softmax over 49,152 ids has off by
2e-6 mostly and by 1e-5 at most, so that a smaller one cannot be told from none. It also bounds the loss where a
teacher's K holds everything and the student leaves it: -log(1e-5) = 11.5 nats for all of the student's mass, not
infinity. Added, and not a bound to clamp at, it is the mass of one more id that no student has: the divergence still
rises with K.
"""
GONE = -1e30  # a logit of no probability; infinite ones would make gradients NaN where all of a row are


class Buckets(NamedTuple):
    """A teacher's bucketed distributions at some positions (...)."""

    ids: Tensor  #: (..., k + 1), int32: the sampled id, then the others; `NO_ID` where there is none
    logps: Tensor  #: (..., k + 2), float32: of the ids, and of the rest, in nats


def log1mexp(values: Tensor) -> Tensor:
    """`log(1 - exp(values))` without cancellation, minus infinity where `values` is 0 or above."""
    below = values.clamp(max=0.0)
    near, far = torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(below))
    return torch.where(below > -math.log(2), near, far)


def bucketed_answer(sampled: Tensor, logps: Tensor, top_ids: Tensor, top_logps: Tensor, vocabulary: int) -> Buckets:
    """What a teacher says of its k likeliest ids and of the sampled one, bucketed; the rest is 1 less their mass.

    `sampled` (...) are ids with the log-probabilities `logps`; `top_ids` and `top_logps` are (..., k), in any order,
    the sampled id among them or not. An id without probability, and one of `vocabulary` or above, joins the rest.
    """
    kept = (top_ids != sampled.unsqueeze(-1)) & (top_ids >= 0) & (top_ids < vocabulary) & (top_logps > -math.inf)
    others = top_logps.masked_fill(~kept, -math.inf)
    known = torch.cat([logps.unsqueeze(-1), others], dim=-1).float()
    ids = torch.cat([sampled.unsqueeze(-1), top_ids.masked_fill(~kept, NO_ID)], dim=-1)
    rest = log1mexp(torch.logsumexp(known, dim=-1, keepdim=True))
    return Buckets(ids.to(torch.int32), torch.cat([known, rest], dim=-1))


def likeliest_ids(logits: Tensor, sampled: Tensor, k: int) -> Tensor:
    """K of each position from whole logits (..., V) of the teacher and the sampled ids (...): (..., k + 1)."""
    at = sampled.unsqueeze(-1)
    others = logits.scatter(-1, at, -math.inf).topk(min(k, logits.shape[-1] - 1), dim=-1)
    ids = torch.nn.functional.pad(others.indices, (0, k - others.indices.shape[-1]), value=NO_ID)
    if others.indices.shape[-1] == k:  # then the last is one of the k likeliest only if the sampled id is not
        beaten = logits.gather(-1, at) >= others.values[..., -1:]
        ids = torch.cat([ids[..., :-1], ids[..., -1:].masked_fill(beaten, NO_ID)], dim=-1)
    return torch.cat([at, ids], dim=-1)


def bucketed_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Whole logits (..., V) as bucketed log-probabilities (..., k + 2) over the ids (..., k + 1), with gradient."""
    logps = torch.log_softmax(logits, dim=-1)
    spare = torch.nn.functional.pad(logps, (0, 1), value=GONE)  # where the places without an id point
    at = torch.where(ids == NO_ID, logps.shape[-1], ids)
    rest = torch.logsumexp(spare.scatter(-1, at, GONE), dim=-1, keepdim=True)
    known = spare.gather(-1, at).masked_fill(ids == NO_ID, -math.inf)
    return torch.cat([known, rest.masked_fill(rest < GONE / 2, -math.inf)], dim=-1)


def floored(target: Tensor, student: Tensor) -> Tensor:
    """A bucketed target with `REST_FLOOR` added to its rest, and without a rest where the student has none."""
    rest = torch.logaddexp(target[..., -1:], target.new_tensor(math.log(REST_FLOOR)))
    return torch.cat([target[..., :-1], rest.masked_fill(student[..., -1:] == -math.inf, -math.inf)], dim=-1)
