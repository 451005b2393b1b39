"""The top-k estimator on hidden states and heads, in chunks of positions and ids: never whole logits.

TRL's kernel for log-probabilities rounds its logits to bfloat16 under autocast. A normaliser and the logits of K that
are rounded apart would make K's mass exceed 1, so here both are read off the same float32 tiles, and so is the rest:
it is summed, not subtracted, and exact however little is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .buckets import GONE, NO_ID, Buckets
from .divergence import Head, gathered, places, spread, taken, taught_per_token, unsharded, vocabulary
from .loss import bucketed_divergence

POSITIONS, IDS = 2048, 8192  # of a tile of logits: 64 MiB


def bucketed(hidden: Tensor, head: Head, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Bucketed log-probabilities (N, k + 2) over `ids` (N, k + 1), and the entropy (N,) of the whole distribution.

    Hidden states are (N, H). The log-probabilities have a gradient to them and to the head, the entropy has none. Must
    run inside the wrapper's forward, where a sharded head is gathered.
    """
    scaling = temperature, head.scale, head.softcap
    logps, entropy = _Bucketed.apply(hidden, head.weight, head.bias, ids.long(), *scaling)
    return logps, entropy


@torch.no_grad()
def likeliest(hidden: Tensor, head: Head, sampled: Tensor, k: int, shared: int, temperature: float) -> Buckets:
    """The teacher's `Buckets` (N, ...) from its hidden states (N, H), for the sampled ids (N,).

    Ids of `shared` and above are never among K. `k` is at most `shared`, and so is every sampled id below it.
    """
    count, dtype = len(hidden), _accumulated(hidden)
    own, rest = (torch.full((count,), GONE, device=hidden.device, dtype=dtype) for _ in range(2))
    best = torch.full((count, k), GONE, device=hidden.device, dtype=dtype)
    best_ids = torch.full((count, k), NO_ID, device=hidden.device)
    with gathered(head.weight, head.bias):
        for rows, first, tile in _tiles(hidden, head, temperature, _compute_dtype(hidden)):
            columns = _columns(sampled[rows].unsqueeze(1), first, tile)
            tile[:, -1] = own[rows]
            own[rows] = tile.gather(1, columns).squeeze(1)
            tile.scatter_(1, columns, GONE)
            tile[:, -1] = GONE
            shown = max(0, min(tile.size(1), shared - first))  # the spare column at most, which is never chosen
            both = torch.cat([best[rows], tile[:, :shown]], dim=1)
            values, at = both.topk(k, dim=1)
            known = best_ids[rows].gather(1, at.clamp(max=k - 1))
            chosen = torch.where(at < k, known, at - k + first).masked_fill(values < GONE / 2, NO_ID)
            left = torch.cat([both.scatter_(1, at, GONE), tile[:, shown:]], dim=1)
            rest[rows] = torch.logaddexp(rest[rows], torch.logsumexp(left, dim=1))
            best[rows], best_ids[rows] = values, chosen
    # the last is one of the k likeliest only if the sampled id is not
    beaten = (own >= best[:, -1]) & (best_ids[:, -1] != NO_ID)
    rest = torch.where(beaten, torch.logaddexp(rest, best[:, -1]), rest)
    best_ids[:, -1].masked_fill_(beaten, NO_ID)
    ids = torch.cat([sampled.unsqueeze(1), best_ids], dim=1)
    logits = torch.cat([own.unsqueeze(1), best, rest.unsqueeze(1)], dim=1)
    logits[:, 1:-1].masked_fill_(best_ids == NO_ID, -math.inf)
    logits[:, -1].masked_fill_(rest < GONE / 2, -math.inf)
    return Buckets(ids.to(torch.int32), torch.log_softmax(logits, dim=1).float())


def top_k_per_token(
    student_states: Tensor,
    student: Head,
    target: Buckets,
    ids: Tensor,
    gated: Tensor,
    temperature: float,
    decide: Callable[[Tensor, Tensor], Tensor],
    reference: tuple[Tensor, Head] | None = None,
    taught: Tensor | None = None,
    taught_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, student's entropy and student's probability of the rest at each position, (B, T), zero where not trained.

    As `full_per_token`, but that the teacher's `target` stands in place of its states and head.
    """
    student = unsharded(student)
    at = places(gated)
    kept, known = taken(target.ids, at), taken(target.logps, at)
    own, entropy = bucketed(taken(student_states, at), student, kept, temperature)
    factor = taken(decide(spread(own[:, 0].detach(), gated), spread(known[:, 0], gated)), at)
    initial = None
    if reference is not None:
        with torch.no_grad():
            initial, _ = bucketed(taken(reference[0], at), unsharded(reference[1]), kept, temperature)
            initial = initial.unsqueeze(0)
    divergence = bucketed_divergence(own.unsqueeze(0), known.unsqueeze(0), factor.unsqueeze(0), initial).squeeze(0)
    per_token = spread(divergence, gated)
    if taught is not None:
        per_token = per_token + taught_per_token(student_states, student, ids, taught, taught_weight, temperature)
    return per_token, spread(entropy, gated), spread(own[:, -1].detach().exp(), gated)


class _Bucketed(torch.autograd.Function):
    """Bucketed log-probabilities; of the logits z, `d log pi(v) / d z_j = [v = j] - pi(j)`, and of the rest
    `d log pi(rest) / d z_j = [j in the rest] pi(j) / pi(rest) - pi(j)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.dtype = (temperature, scale, softcap), _compute_dtype(hidden)
        dtype, head = _accumulated(hidden), Head(weight, bias, scale, softcap)
        kept = torch.full(ids.shape, GONE, device=hidden.device, dtype=dtype)
        rest = torch.full((len(hidden),), GONE, device=hidden.device, dtype=dtype)
        mean = torch.zeros_like(rest)  # of the rest's logits
        with gathered(weight, bias):
            for rows, first, tile in _tiles(hidden, head, temperature, ctx.dtype):
                columns = _columns(ids[rows], first, tile)
                found = tile.gather(1, columns)
                kept[rows] = torch.where(columns < tile.size(1) - 1, found, kept[rows])
                tile.scatter_(1, columns, GONE)
                total = torch.logaddexp(rest[rows], torch.logsumexp(tile, dim=1))
                share = (tile - total.unsqueeze(1)).exp_().mul_(tile).sum(1)
                mean[rows] = mean[rows] * (rest[rows] - total).exp() + share
                rest[rows] = total
        rest = rest.masked_fill(rest < GONE / 2, -math.inf)
        logits = torch.cat([kept.masked_fill(ids == NO_ID, -math.inf), rest.unsqueeze(1)], dim=1)
        log_z = torch.logsumexp(logits, dim=1, keepdim=True)
        logps = logits - log_z
        weighed = torch.cat([kept, mean.unsqueeze(1)], dim=1).masked_fill(logps == -math.inf, 0.0)
        entropy = log_z.squeeze(1) - (logps.exp() * weighed).sum(1)
        ctx.save_for_backward(hidden, weight, bias, ids, logps, log_z)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradient is None:
            return (None,) * 7
        hidden, weight, bias, ids, logps, log_z = ctx.saved_tensors
        temperature, scale, softcap = ctx.scaling
        gradient = gradient.masked_fill(logps == -math.inf, 0.0)
        total = gradient.sum(1, keepdim=True)
        own = gradient[:, :-1] - logps[:, :-1].exp() * total
        own = own * _slope(logps[:, :-1] + log_z, temperature, scale, softcap)
        of_rest, rest = gradient[:, -1:], (logps[:, -1:] + log_z).nan_to_num(neginf=0.0)
        given = hidden, weight, bias
        with gathered(weight, bias):
            sums = [
                torch.zeros(of.shape, device=hidden.device, dtype=logps.dtype) if needed else None
                for of, needed in zip(given, ctx.needs_input_grad[:3], strict=True)
            ]
            for rows, first, tile in _tiles(hidden, Head(weight, bias, scale, softcap), temperature, ctx.dtype):
                columns = _columns(ids[rows], first, tile)
                shift = of_rest[rows] * (tile - rest[rows]).exp() - total[rows] * (tile - log_z[rows]).exp()
                tile = shift * _slope(tile, temperature, scale, softcap)
                tile.scatter_(1, columns, own[rows])  # what stands there was computed as if it belonged to the rest
                _add(sums, tile[:, :-1], hidden, weight, rows, first, ctx.dtype)
        return *(None if s is None else s.to(of.dtype) for s, of in zip(sums, given, strict=True)), *(None,) * 4


def _add(
    sums: list[Tensor | None], tile: Tensor, hidden: Tensor, weight: Tensor, rows: slice, first: int, dtype: torch.dtype
) -> None:
    """Add to the gradients of states, weight and bias what a tile's (n, c) contributes."""
    of_ids = slice(first, first + tile.size(1))
    rounded = tile.to(dtype).contiguous()
    of_hidden, of_weight, of_bias = sums
    if of_hidden is not None:
        _addmm(of_hidden[rows], rounded, weight[of_ids].to(dtype))
    if of_weight is not None:
        _addmm(of_weight[of_ids], rounded.t(), hidden[rows].to(dtype))
    if of_bias is not None:
        of_bias[of_ids] += tile.sum(0)


def _addmm(total: Tensor, left: Tensor, right: Tensor) -> None:
    from trl.kernels.chunked_logprob import _addmm_fp32

    if total.dtype == torch.float64:
        total.addmm_(left, right)
    else:
        _addmm_fp32(total, left, right)


def _tiles(hidden: Tensor, head: Head, temperature: float, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
    """The scaled logits in tiles (n, c + 1): positions, first id, and the tile, whose last column is spare, `GONE`."""
    from trl.kernels.chunked_divergence import _project

    vocab = vocabulary(head)
    for start in range(0, len(hidden), POSITIONS):
        rows = slice(start, min(start + POSITIONS, len(hidden)))
        states = hidden[rows].to(dtype)
        for first in range(0, vocab, IDS):
            end = min(first + IDS, vocab)
            tile = torch.empty(len(states), end - first + 1, device=hidden.device, dtype=_accumulated(states))
            logits = tile[:, :-1]
            if dtype == torch.float64:
                torch.mm(states, head.weight[first:end].t(), out=logits)
                if head.bias is not None:
                    logits += head.bias[first:end]
            else:
                _project(logits, states, head.weight, head.bias, first, end, dtype)
            logits *= head.scale
            if head.softcap is not None:
                logits.div_(head.softcap).tanh_().mul_(head.softcap)
            logits /= temperature
            tile[:, -1] = GONE
            yield rows, first, tile


def _columns(ids: Tensor, first: int, tile: Tensor) -> Tensor:
    """Where in a tile that begins with the id `first` each id stands; the spare column for those that are elsewhere."""
    spare, local = tile.size(1) - 1, ids - first
    return torch.where((ids >= 0) & (local >= 0) & (local < spare), local, spare)


def _slope(logits: Tensor, temperature: float, scale: float, softcap: float | None) -> Tensor | float:
    """The derivative of scaled logits by what the head's product is."""
    plain = scale / temperature
    return plain if softcap is None else plain * (1 - (logits * (temperature / softcap)).square())


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    from trl.kernels.chunked_divergence import _compute_dtype

    return _compute_dtype(hidden)


def _accumulated(hidden: Tensor) -> torch.dtype:
    """What sums are kept in: float32, or float64 where states are that already."""
    return torch.promote_types(hidden.dtype, torch.float32)
