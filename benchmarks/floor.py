"""The least a step can cost: student forward and backward, teacher forward, optimizer; and the loss's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from steps import LEARNING_RATE, SPECIAL, Clock, Size, model, peak_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sg_opd.method.divergence import Head, chunked_divergence, chunked_nll, last_hidden_state
from sg_opd.method.loss import bucketed_divergence
from sg_opd.method.top_k import bucketed, likeliest


class Floor:
    """Plain models, without any trainer, on a size's tokens: what their forward and backward take.

    Args:
        size: of models and batch.
        device: "cpu" or "cuda".
        bf16: under autocast, as the trainers.
        teacher: the frozen teacher; default: one of its own.
    """

    def __init__(self, size: Size, device: str, bf16: bool = False, teacher: nn.Module | None = None) -> None:
        self.size, self.bf16, self.device = size, bf16, torch.device(device)
        self.student = model(size, size.student, 0, device).train()
        if size.checkpointing:
            self.student.gradient_checkpointing_enable()
        self.teacher = teacher or model(size, size.teacher, 1, device).eval().requires_grad_(False)
        fused = self.device.type == "cuda"  # as the trainers' own
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE, fused=fused)
        draw = torch.Generator().manual_seed(1)
        shape = (size.batch, size.prompt + size.tokens)
        self.ids = torch.randint(len(SPECIAL), size.vocab, shape, generator=draw).to(device)
        self.clock = Clock(self.device)
        self.times = {"student": "forward+backward", "teacher": "score teacher", "optimizer": "optimizer"}
        self.once()  # warm-up; it makes the optimizer's state

    def states(self, model: nn.Module) -> Tensor:
        """The backbone's output at the positions that predict the completions."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return last_hidden_state(model, self.ids, torch.ones_like(self.ids), self.size.tokens)

    def losses(self, model: nn.Module, states: Tensor) -> Iterator[Tensor]:
        """Cross-entropy of the completions, logits whole; of `floor_rows` of them at a time."""
        rows = self.size.floor_rows or self.size.batch
        for part, ids in zip(states.split(rows), self.ids.split(rows), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = model.get_output_embeddings()(part)
            yield nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -self.size.tokens :].flatten())

    def train(self) -> None:
        states = self.states(self.student)
        given = states.detach().requires_grad_()
        for loss in self.losses(self.student, given):  # each backward frees its logits
            loss.backward()
        states.backward(given.grad)

    def score(self) -> None:
        with torch.no_grad():
            for _ in self.losses(self.teacher, self.states(self.teacher)):
                pass

    def once(self) -> dict[str, float]:
        """Seconds of the student's forward and backward, the teacher's forward, and the optimizer."""
        self.clock.reset()
        for phase, work in (("forward+backward", self.train), ("score teacher", self.score)):
            with self.clock.phase(phase):
                work()
        with self.clock.phase("optimizer"):
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: self.clock.seconds[phase] for name, phase in self.times.items()}

    def flops(self) -> dict[str, int]:
        """Floating-point operations of the student's forward and backward, the teacher's forward, and both heads in it.

        `recomputed` is one more pass of the student's head: where no more than a chunk of logits is held, the backward
        pass needs them a second time.
        """
        counts = {"student": flops(self.train), "teacher": flops(self.score)}
        self.optimizer.zero_grad()
        positions = self.size.batch * self.size.tokens
        passes = {"student": 3, "teacher": 1}  # forward, and towards states and weights
        each = {role: 2 * positions * self.size.vocab * self.size.hidden(role) for role in passes}
        heads = sum(passes[role] * each[role] for role in passes)
        return {**counts, "heads": heads, "recomputed": each["student"]}


Shape = Sequence[int]


def attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Operations of an attention whose key and value may have fewer heads, as a GPU's kernels take them.

    torch's own formula refuses those.
    """
    key, value = ((*of[:1], query[1], *of[2:]) for of in (key, value))
    return sdpa_flop_count(query, key, value)


def attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    key, value = ((*of[:1], query[1], *of[2:]) for of in (key, value))
    return sdpa_backward_flop_count(gradient, query, key, value)


KERNELS = [f"_scaled_dot_product_{name}_attention" for name in ("efficient", "flash", "cudnn")]
GROUPED = {getattr(torch.ops.aten, name): attention for name in KERNELS}
GROUPED |= {getattr(torch.ops.aten, f"{name}_backward"): attention_backward for name in KERNELS}


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        work()
    return counter.get_total_flops()


def floor_seconds(times: dict[str, float], counts: dict[str, int], recomputed: bool) -> float:
    """A step at the rate at which the plain student's forward and backward ran; the optimizer as it was timed."""
    rate = counts["student"] / times["student"]
    extra = counts["recomputed"] if recomputed else 0
    return (counts["student"] + counts["teacher"] + extra) / rate + times["optimizer"]


def heads_alone(size: Size, device: str, repetitions: int) -> dict[str, float]:
    """Median seconds of a size's heads and losses on given states: TRL's kernels, and whole logits beside them."""
    positions, widths = size.batch * size.tokens, (size.hidden("student"), size.hidden("teacher"))
    own, other = (torch.randn(positions, width, device=device) for width in widths)
    weight, frozen = (torch.randn(size.vocab, width, device=device) / width**0.5 for width in widths)
    ids = torch.randint(size.vocab, (positions,), device=device)
    leaves = [own.requires_grad_(), weight.requires_grad_()]
    student, teacher = Head(weight, None), Head(frozen, None)

    def differentiated(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss().sum(), leaves)

    def frozen_logps() -> Tensor:
        with torch.no_grad():
            return chunked_nll(other, teacher, ids, 1.0)

    works: dict[str, Callable[[], Any]] = {
        "whole": differentiated(lambda: nn.functional.cross_entropy(own @ weight.T, ids)),
        "log_prob": differentiated(lambda: chunked_nll(own, student, ids, 1.0)),
        "log_prob of the teacher": frozen_logps,
        "divergence": differentiated(lambda: chunked_divergence(own, student, other, teacher, ids, 1.0).divergence),
    }
    clock = Clock(torch.device(device))
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions + 1):
        for name, work in works.items():
            clock.reset()
            with clock.phase("rest"):
                work()
            seconds[name].append(clock.seconds["rest"])
    return {name: float(np.median(some[1:])) for name, some in seconds.items()}


def loss_memory(
    estimator: str, tokens: Sequence[int], vocabularies: Sequence[int], hidden: int, device: str
) -> list[dict[str, float]]:
    """Peak bytes of the loss on given states and heads, forward and backward, for each number of tokens and of ids."""
    rows = []
    for vocab in vocabularies:
        for count in tokens:
            states, weight, teacher = (torch.randn(n, hidden, device=device) for n in (count, vocab, vocab))
            ids = torch.randint(vocab, (count,), device=device)
            leaves = [states.requires_grad_(), weight.requires_grad_()]

            def work(states=states, weight=weight, teacher=teacher, ids=ids, leaves=leaves) -> None:
                student = Head(weight, None)
                if estimator == "full":
                    loss = chunked_divergence(states, student, states.detach(), Head(teacher, None), ids, 1.0)[0].sum()
                elif estimator == "top_k":
                    target = likeliest(states.detach(), Head(teacher, None), ids, 4, len(teacher), 1.0)
                    own, _ = bucketed(states, student, target.ids, 1.0)
                    given = own.unsqueeze(0), target.logps.unsqueeze(0), torch.ones_like(states[:, 0]).unsqueeze(0)
                    loss = bucketed_divergence(*given).sum()
                else:
                    loss = chunked_nll(states, student, ids, 1.0).sum()
                torch.autograd.grad(loss, leaves)

            peak = peak_of(work, torch.device(device))
            rows.append({"estimator": estimator, "tokens": count, "vocab": vocab, "peak": peak})
    return rows


def memory_slope(rows: Sequence[dict[str, float]]) -> float:
    """Bytes a (token, id) pair, by least squares beside a constant and terms in tokens and in ids alone."""
    tokens, vocab, peak = (np.array([row[name] for row in rows], dtype=float) for name in ("tokens", "vocab", "peak"))
    terms = np.stack([np.ones_like(tokens), tokens, vocab, tokens * vocab], axis=1)
    scale = np.abs(terms).max(axis=0)
    return float((np.linalg.lstsq(terms / scale, peak, rcond=None)[0] / scale)[3])
