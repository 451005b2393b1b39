"""How often does the gate take another side than float64 would, since log-probabilities were rounded?

    python benchmarks/rounding.py                            # some minutes on one CPU core; writes the results
    python benchmarks/rounding.py --quick --output X.json    # fewer tokens and ids, some seconds

Synthetic tokens of two models, a student and a teacher, each with a head of its own. The sampled token's probability is
1 / (1 + u), with u of the student from 1e-7 to 10, evenly by its logarithm. The teacher's u is the student's times
e^(d N(0, 1)), with the distance d 1 (models that are far apart) or 0.1 (near each other). The other logits have a
standard deviation of two or so, so those of the sampled tokens are 10 to 30, as a pretrained model's are. Each way to
compute the log-probabilities gives a delta, which is compared with that in float64 of the same states and heads: what
the layers below round is not in it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sg_opd.evaluation.results import as_table, provenance, write_json
from sg_opd.method.divergence import Head, chunked_divergence, chunked_nll

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "rounding.json"
TOKENS, VOCABULARY, WIDTH = 4_096, 49_152, 256
QUICK = 512, 4_096, 64
SPREAD = 2.0  # standard deviation of the other logits, but for what they share with the token's
ODDS = (1e-7, 10.0)  # against the sampled token
DISTANCES = (1.0, 0.1)  # of the teacher from the student
ROWS = 256  # of whole logits at once
EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, math.inf)  # nats of abs(delta) in float64


class Tokens(NamedTuple):
    """A model's last hidden states (N, H), its head (V, H), and the sampled ids (N,)."""

    states: Tensor
    head: Tensor
    ids: Tensor

    def to(self, dtype: torch.dtype) -> Tokens:
        return Tokens(self.states.to(dtype), self.head.to(dtype), self.ids)


def drawn(odds: Tensor, ids: Tensor, vocabulary: int, width: int, generator: torch.Generator) -> Tokens:
    """Tokens against which the odds are `odds`, (N,)."""
    head = torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)
    noise = SPREAD * torch.randn(len(ids), width, generator=generator) / math.sqrt(width)
    rows = head[ids]
    along = rows / rows.square().sum(1, keepdim=True)
    states = noise - (noise * rows).sum(1, keepdim=True) * along  # the token's logit is 0
    parts = (Tokens(x, head, ids) for x in (states, along))
    logits = []
    for (rest, of), (slope, _), wanted in zip(*map(whole, parts), odds.log().split(ROWS), strict=True):
        rest, logit = rest.scatter(1, of[:, None], -math.inf), -wanted[:, None]
        for _ in range(12):  # the others' logits move with the token's
            logit = (rest + logit * slope).logsumexp(1, keepdim=True) - wanted[:, None]
        logits.append(logit)
    return Tokens(states + torch.cat(logits) * along, head, ids)


def whole(of: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of `ROWS` tokens at once, with their ids."""
    for states, ids in zip(of.states.split(ROWS), of.ids.split(ROWS), strict=True):
        yield states @ of.head.T, ids


def log_softmax(of: Tokens, dtype: torch.dtype = torch.float32) -> Tensor:
    """From whole logits in the dtype of the states, with a log-softmax in `dtype`; a server computes so."""
    return torch.cat([x.to(dtype).log_softmax(1).gather(1, ids[:, None]).squeeze(1) for x, ids in whole(of)])


def fused(of: Tokens) -> Tensor:
    """By TRL's fused head, which the sampled estimator takes for every model in this process."""
    return -chunked_nll(of.states, Head(of.head), of.ids, 1.0)


def fused_fp32(of: Tokens) -> Tensor:
    """The same with `cast_lm_head_to_fp32`."""
    return fused(of.to(torch.float32))


def apart(one: Callable[[Tokens], Tensor], other: Callable[[Tokens], Tensor]) -> Callable[[Tokens, Tokens], Tensor]:
    """The delta of a student scored by `one` and a teacher scored by `other`."""
    return lambda student, teacher: other(teacher) - one(student)


def full(student: Tokens, teacher: Tokens) -> Tensor:
    """The delta of the full estimator."""
    of_student, of_teacher = (student.states, Head(student.head)), (teacher.states, Head(teacher.head))
    out = chunked_divergence(*of_student, *of_teacher, student.ids, 1.0)
    return out.target_logps - out.student_logps


WAYS: dict[str, tuple[torch.dtype, Callable[[Tokens, Tokens], Tensor]]] = {
    "fp32, sampled": (torch.float32, apart(fused, fused)),
    "fp32, full": (torch.float32, full),
    "fp32, log-softmax": (torch.float32, apart(log_softmax, log_softmax)),
    "bf16, sampled": (torch.bfloat16, apart(fused, fused)),
    "bf16, sampled, fp32 head": (torch.bfloat16, apart(fused_fp32, fused_fp32)),
    "bf16, full": (torch.bfloat16, full),
    "bf16, sampled, teacher's server": (torch.bfloat16, apart(fused, log_softmax)),
}
DOCUMENTED = ("fp32, full", "bf16, sampled", "bf16, full", "bf16, sampled, teacher's server")


def sides(delta: Tensor, exact: Tensor) -> list[dict[str, Any]]:
    """By size of the exact delta: how many tokens, and the shares with the other sign and with none."""
    rows = []
    for low, high in pairwise(EDGES):
        within = (exact.abs() >= low) & (exact.abs() < high)
        sign, wanted = delta[within].sign(), exact[within].sign()
        wrong, neutral = (sign == -wanted) & (sign != 0), sign == 0
        share = {name: float(of.double().mean()) for name, of in (("wrong", wrong), ("neutral", neutral))}
        rows.append({"from": low, "to": None if math.isinf(high) else high, "tokens": int(within.sum()), **share})
    return rows


@torch.no_grad()
def at_distance(distance: float, count: int, vocabulary: int, width: int, seed: int) -> dict[str, Any]:
    """Of each way its sides, and the quantiles of its error in nats."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (math.log(end) for end in ODDS)
    odds = (low + (high - low) * torch.rand(count, generator=generator)).exp()
    other = odds * (distance * torch.randn(count, generator=generator)).exp()
    ids = torch.randint(0, vocabulary, (count,), generator=generator)
    student, teacher = (drawn(of, ids, vocabulary, width, generator) for of in (odds, other))
    ways: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        pair = student.to(dtype), teacher.to(dtype)
        one, two = (log_softmax(of.to(torch.float64), torch.float64) for of in pair)
        for name, (of_dtype, way) in WAYS.items():
            if of_dtype == dtype:
                delta = way(*pair).double()
                error = (delta - (two - one)).abs()
                quantiles = {f"p{q}": error.quantile(q / 100).item() for q in (50, 99)}
                ways[name] = {"sides": sides(delta, two - one), "error": quantiles}
    return ways


def measured(count: int, vocabulary: int, width: int, seed: int) -> dict[str, Any]:
    """The content of the result: of each distance what each way does, and the settings."""
    sizes = {"count": count, "vocabulary": vocabulary, "width": width, "seed": seed}
    ways = {f"{distance:g}": at_distance(distance, **sizes) for distance in DISTANCES}
    return {"distances": ways, "settings": sizes | {"odds": ODDS, "spread": SPREAD}, "provenance": provenance()}


def rows_of(ways: dict[str, Any]) -> list[list[str]]:
    """A row a size of delta: of each way the per cent of tokens on the wrong side, and without a side."""
    rows = []
    for place, (low, high) in enumerate(pairwise(EDGES)):
        size = f"below {high:g}" if low == 0 else f"from {low:g}"
        of_size = [way["sides"][place] for way in ways.values()]
        rows.append([size, *(f"{100 * of['wrong']:.1f} / {100 * of['neutral']:.1f}" for of in of_size)])
    return rows


def documented(result: dict[str, Any]) -> list[str]:
    """The rows of the table in docs/method.md: models near each other, and one way where several are alike."""
    ways = result["distances"][f"{min(DISTANCES):g}"]
    return [f"| {' | '.join(row)} |" for row in rows_of({name: ways[name] for name in DOCUMENTED})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="{} tokens, {} ids, {} wide".format(*QUICK))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"default, unless --quick: {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    sizes = QUICK if options.quick else (TOKENS, VOCABULARY, WIDTH)
    result = measured(*sizes, options.seed)
    for distance, ways in result["distances"].items():
        print(f"distance {distance}", as_table(["abs(delta)", *ways], rows_of(ways)), sep="\n")
    output = options.output or (None if options.quick else RESULT)
    if output:
        write_json(output, result)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
