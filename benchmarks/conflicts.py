"""Where the gate finds conflict: by a token's place in its rollout, and by the size of delta.

A model's own rollouts, scored by itself and by the world's teacher, with the gate's cases (`sg_opd.inspect_rollout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from arms import load, verifier

from sg_opd import inspect_rollout
from sg_opd.evaluation.engines import Sampling, TransformersEngine
from sg_opd.evaluation.evaluator import tokenize_prompts
from sg_opd.method.rules import CONFLICT
from sg_opd.views.gate_samples import judged, token_logps

QUESTIONS, GROUP, SEED = 100, 8, 0
PLACES = 5  # equal parts of a rollout
SIZES = (1e-3, 1e-2, 1e-1, 1.0)  # nats, between which the classes of abs(delta) lie


@dataclass(frozen=True)
class Scored:
    """One rollout: by token delta in nats and the gate's case under the verdict's sign; whether it is right."""

    question: int
    right: bool
    delta: np.ndarray
    case: np.ndarray


def scored(world: Any, model: str, questions: int = QUESTIONS) -> list[Scored]:
    """Rollouts of a model on validation questions, `GROUP` of each, but those on which the verifier abstains."""
    (student, _), (teacher, tokenizer) = load(model), load(world.teacher)
    rows = [row for row in world.split("validation", questions) for _ in range(GROUP)]
    prompts = tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    engine, sampling = TransformersEngine(student, tokenizer), Sampling(world.max_completion_length)
    found = []
    for number, completion in enumerate(engine.generate(prompts, [SEED], sampling)):
        verdict = judged(verifier(), rows[number], prompts[number], completion.ids, tokenizer)
        if verdict is None:
            continue
        logps = [token_logps(of, prompts[number], completion.ids, 1.0) for of in (student, teacher)]
        decision = inspect_rollout(completion.ids, *logps, verdict, tokenizer=tokenizer).decision
        found.append(Scored(number // GROUP, verdict == 1.0, decision.delta[0].numpy(), decision.case[0].numpy()))
    return found


def shares(rollouts: Sequence[Scored]) -> dict[str, Any]:
    """What the tables show of rollouts, each share in [0, 1]: in all, by place and by size of delta."""
    outcomes: dict[int, set[bool]] = {}
    for rollout in rollouts:
        outcomes.setdefault(rollout.question, set()).add(rollout.right)
    mixed = [len(outcomes[rollout.question]) == 2 for rollout in rollouts]
    lengths = [len(rollout.delta) for rollout in rollouts]
    table = {
        "delta": np.concatenate([rollout.delta for rollout in rollouts]),
        "conflict": np.concatenate([rollout.case == CONFLICT for rollout in rollouts]),
        "right": np.repeat([rollout.right for rollout in rollouts], lengths),
        "mixed": np.repeat(mixed, lengths),
        "place": np.concatenate([PLACES * np.arange(length) // length for length in lengths]),
    }
    table["size"] = np.digitize(np.abs(table["delta"]), SIZES)
    return {
        "rollouts": len(rollouts),
        "right": float(np.mean([rollout.right for rollout in rollouts])),
        "uniform_groups": float(np.mean([len(kinds) == 1 for kinds in outcomes.values()])),
        "all": cell(table, np.full(sum(lengths), True)),
        "place": list(by(table, "place", PLACES)),
        "size": list(by(table, "size", len(SIZES) + 1)),
    }


def by(table: dict[str, np.ndarray], name: str, classes: int) -> Iterable[dict[str, float | None]]:
    return (cell(table, table[name] == one) for one in range(classes))


def cell(table: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, float | None]:
    """Of the chosen tokens: their share of all tokens and of the sum of abs(delta), and of them the conflicts."""
    size = np.abs(table["delta"])

    def share(of: np.ndarray, among: np.ndarray, weight: np.ndarray | None = None) -> float | None:
        weight = np.ones_like(size) if weight is None else weight
        total = weight[among].sum()
        return round(float(weight[among & of].sum() / total), 4) if total else None

    every = np.full_like(chosen, True)
    return {
        "tokens": share(chosen, every),
        "mass": share(chosen, every, size),
        "conflict": share(table["conflict"], chosen),
        "conflict_mass": share(table["conflict"], chosen, size),
        "conflict_right": share(table["conflict"], chosen & table["right"]),
        "conflict_wrong": share(table["conflict"], chosen & ~table["right"]),
        "conflict_group": share(table["conflict"] & table["mixed"], chosen),
    }
