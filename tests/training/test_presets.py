"""Each preset's first update in the trainer, against SignGatedLoss on plain logits with signs taken by hand."""

import copy
import math

import pytest
import torch
from trainers import (
    Recorder,
    assert_same_weights,
    coin_verifier,
    expected_loss,
    make_config,
    plain_logits,
    sgd_step,
)

from sg_opd import SignGatedLoss
from sg_opd.presets import PRESETS
from sg_opd.training.rollouts import Rollouts

SAMPLED_ONLY = ("power-opd", "opd-grpo")
CASES = [(name, "sampled") for name in PRESETS] + [(name, "full") for name in PRESETS if name not in SAMPLED_ONLY]


def by_hand(batches, group):
    """The sign of each rollout's outcome in its group, and GRPO's advantage of it, in plain Python."""
    labels = [v for batch in batches for v in batch["verifier_labels"].tolist()]
    teacher = [v for batch in batches for v in batch["from_teacher"].tolist()]
    places = [int(v) for batch in batches for v in batch["place"].tolist()]
    signs, advantages = {}, {}
    for first in range(0, len(labels), group):
        of_group = [(labels[i], teacher[i], i) for i in range(len(labels)) if places[i] // group == first // group]
        judged = [label for label, taken, _ in of_group if not taken and not math.isnan(label)]
        mean = sum(judged) / len(judged) if judged else 0.0
        spread = math.sqrt(sum((x - mean) ** 2 for x in judged) / (len(judged) - 1)) if len(judged) > 1 else 0.0
        for label, taken, i in of_group:
            abstained = math.isnan(label)
            centred = 0.0 if abstained else label - mean
            signs[i] = 0.0 if abstained else 2 * label - 1 if taken else math.copysign(1, centred) if centred else 0.0
            advantages[i] = 0.0 if taken or abstained else centred / (spread + 1e-4)
    split = [len(batch["place"]) for batch in batches]
    ordered = ([values[i] for i in range(len(labels))] for values in (signs, advantages))
    return [torch.tensor(values).split(split) for values in ordered]


class Placed(Recorder):
    """Keeps where in its generation each row was, before GRPOTrainer shuffles them into micro-batches."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return output | {"place": torch.arange(len(inputs))}


@pytest.mark.parametrize(("preset", "estimator"), CASES)
def test_a_presets_update_is_the_losss(preset, estimator, make_model, tokenizer, dataset, tmp_path):
    """Two groups of four in two shuffled micro-batches, so that a micro-batch holds parts of both groups."""
    student, teacher = make_model(1), make_model(2)
    copies = copy.deepcopy(student), copy.deepcopy(teacher)
    phase = {"teacher_phase_steps": None, "teacher_phase_fraction": 0.5, "teacher_candidates": 32}
    args = make_config(tmp_path, preset=preset, estimator=estimator, **phase, max_completion_length=10, seed=4)
    trainer = Placed(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    batches = trainer.batches
    assert any(len({int(p) // 4 for p in batch["place"]}) > 1 for batch in batches)
    signs, advantages = by_hand(batches, 4)
    by_verdict = args.gate_signal == "verdict"
    cut = [~(batch["completion_ids"] == tokenizer.eos_token_id).any(1) for batch in batches]
    assert any(c.any() for c in cut)
    divisor = sum(batch["completion_mask"].sum() for batch in batches)
    loss_fn = SignGatedLoss(args.gate_settings())
    reference = copies[0] if args.reference_policy == "initial" else None
    losses = []
    for i, batch in enumerate(batches):
        if args.truncated_verdict == "abstain":
            assert batch["verifier_labels"][cut[i]].isnan().all()
        given = {} if by_verdict else {"signs": signs[i]}
        given |= {"group_advantages": advantages[i]} if args.advantage_weight else {}
        frozen = None if reference is None else copy.deepcopy(reference)
        of_batch = copies[0], copies[1], frozen, batch, loss_fn, divisor
        losses.append(expected_loss(*of_batch, args.teacher_rollout_loss == "nll", **given))
    assert trainer.losses == pytest.approx([loss.item() for loss in losses], rel=1e-4, abs=1e-6)
    sgd_step(copies[0], losses)
    assert_same_weights(student, copies[0])
    if not by_verdict:
        assert {*torch.cat(signs).tolist()} >= {-1.0, 1.0}


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_the_weight_of_teacher_rollouts(estimator, make_model, tokenizer, dataset, tmp_path):
    """Their cross-entropy, three times; the gated rows as they are."""
    student, teacher = make_model(1), make_model(2)
    copies = copy.deepcopy(student), copy.deepcopy(teacher)
    phase = {"teacher_phase_steps": 10, "teacher_phase_fraction": 0.5, "teacher_candidates": 32}
    weighted = {"teacher_rollout_loss": "nll", "teacher_rollout_weight": 3.0}
    args = make_config(tmp_path, estimator=estimator, **phase, **weighted)
    trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    divisor = sum(batch["completion_mask"].sum() for batch in trainer.batches)
    losses = []
    for batch in trainer.batches:
        loss = expected_loss(*copies, None, batch, SignGatedLoss(args.gate_settings()), divisor, True)
        ids = batch["completion_ids"].unsqueeze(-1)
        logps = (plain_logits(copies[0], batch).float() / 0.8).log_softmax(-1).gather(-1, ids).squeeze(-1)
        taught = batch["completion_mask"] * batch["from_teacher"].unsqueeze(1)
        losses.append(loss - 2 * (logps * taught).sum() / divisor)
    assert sum(batch["from_teacher"].sum() for batch in trainer.batches) > 0
    assert trainer.losses == pytest.approx([loss.item() for loss in losses], rel=1e-4, abs=1e-6)
    sgd_step(copies[0], losses)
    assert_same_weights(student, copies[0])


def test_uniform_groups_are_counted(make_model, tokenizer, dataset, tmp_path):
    """A verifier that calls the first prompt's rollouts correct, and of the second's each other one: one of two."""

    def verifier(prompts, completions, **columns):
        return [1.0 if prompt == prompts[0] else float(i % 2) for i, prompt in enumerate(prompts)]

    args = make_config(tmp_path, preset="grpd", teacher_phase_steps=0)
    trainer = Recorder(make_model(1), make_model(2), verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    logged = [entry["gate/uniform_groups"] for entry in trainer.state.log_history if "gate/uniform_groups" in entry]
    assert logged == [0.5]
    factors = torch.cat([batch["gate_signs"] for batch in trainer.batches])
    assert sorted(factors.tolist()) == [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_a_rank_compares_its_rows_with_all_others():
    """Two ranks of three rows, two groups of three: rank 1 has rows 3 to 5. A teacher's row (3) is part of no mean, so
    that the student's (4, 5) are uniform; it keeps its own sign."""
    rollouts = Rollouts([{}] * 3, None, None)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    teacher = torch.tensor([False, False, False, True, False, False])
    for by_group, signs in ((True, [1.0, 0.0, 0.0]), (False, [1.0, -1.0, -1.0])):
        rollouts.compare(labels, teacher, 3, by_group, rank=1)
        assert rollouts.by_row["gate_signs"].tolist() == signs
        assert rollouts.by_row["uniform"].tolist() == [True] * 3
    rollouts.compare(labels, teacher & False, 3, True, rank=1)
    assert rollouts.by_row["gate_signs"].tolist() == [1.0, -1.0, -1.0]
    assert rollouts.by_row["uniform"].tolist() == [False] * 3
    rollouts.compare(labels, teacher, 3, True, rank=0)
    assert rollouts.by_row["gate_signs"].tolist() == [1.0, -1.0, -1.0]


def test_one_rollout_a_prompt_has_no_groups(make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, preset="opd", num_generations=1)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    assert not any("gate/uniform_groups" in entry for entry in trainer.state.log_history)
