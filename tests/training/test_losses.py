"""The update with each of TRL's losses, beside formulas written here from its documentation and the papers."""

import copy
import inspect
import math
import re

import pytest
import torch
from trainers import LOSS_TYPES, Recorder, assert_same_weights, coin_verifier, make_config, plain_logits
from trl import GRPOTrainer

from sg_opd.method.loss import sequence_old_logps

LENGTH, TEMPERATURE, RATE = 12, 0.8, 0.3
LOW, HIGH = 0.2, 0.28  # PPO's clip; `HIGH` of CISPO is a bound of the ratio itself
CISPO_HIGH = 1.05
EXTRAPOLATION, INTERPOLATION = 1.8, 0.6


def token_logps(model, batch):
    """log pi(y_t) at the sampling temperature, (B, T)."""
    logits = plain_logits(model, batch).float() / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def gate_advantages(student, teacher, labels):
    """A_t = lambda_t * delta_t, by the sign of verdict times delta; (B, T)."""
    delta = teacher - student
    sides = torch.where(labels == 1, 1.0, torch.where(labels == 0, -1.0, 0.0)).unsqueeze(1) * delta
    factor = torch.where(sides > 0, EXTRAPOLATION, torch.where(sides < 0, INTERPOLATION, 1.0))
    return factor * delta


def token_losses(loss_type, logps, old, advantage, mask, level):
    """-(what is maximised) for each token, (B, T)."""
    ratio = (logps - old).exp()
    if level == "sequence":  # GSPO, equations 14 to 17: the sequence's value, the token's gradient
        mean = (((logps - old) * mask).sum(1) / mask.sum(1)).detach().unsqueeze(1)
        ratio = mean.exp() * (1 + logps - logps.detach())
    if loss_type == "cispo":
        return -ratio.detach().clamp(max=CISPO_HIGH) * advantage * logps
    if loss_type == "sapo":
        tau = torch.where(advantage > 0, 1.0, 1.05)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    if loss_type == "vespo":
        weight = ((logps - old) * mask).sum(1, keepdim=True).exp()
        k, lam = (torch.where(advantage >= 0, *values) for values in ((2.0, 3.0), (3.0, 2.0)))
        phi = (lam * (1 - weight)).exp() * weight**k
        return -phi.detach() * advantage * logps
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)


def aggregated(loss_type, per_token, mask, tokens):
    """Of one of two micro-batches of a step; `tokens` are those of both."""
    sums = (per_token * mask).sum(1)
    if loss_type in ("dapo", "cispo", "vespo"):
        return sums.sum() / tokens
    if loss_type == "bnpo":
        return sums.sum() / mask.sum() / 2
    if loss_type == "dr_grpo":
        return sums.sum() / (len(sums) * LENGTH) / 2
    if loss_type == "luspo":
        return sums.mean() / 2
    return (sums / mask.sum(1)).mean() / 2


def test_every_loss_of_trl_is_here():
    """A new one of TRL's is tested too, or this fails."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    named = re.findall(r"self\.loss_type (?:==|in|!=) (\[[^\]]*\]|\"\w+\")", source)
    assert set(re.findall(r"\w+", " ".join(named))) == set(LOSS_TYPES)


CASES = [(name, "token") for name in LOSS_TYPES] + [(name, "sequence") for name in ("grpo", "dapo", "sapo", "luspo")]


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_update(loss_type, level, beta, make_model, tokenizer, dataset, tmp_path):
    """Three SGD steps on one generation of two micro-batches: after the first, ratios are off 1 and some clipped."""
    simulated, initial, teacher = make_model(1), make_model(1), make_model(2)
    copy_of_teacher, path = copy.deepcopy(teacher), str(tmp_path / "student")
    simulated.save_pretrained(path)  # GRPOTrainer loads the reference of the KL penalty from the student's path
    high = CISPO_HIGH if loss_type == "cispo" else HIGH
    args = make_config(
        tmp_path, loss_type=loss_type, importance_sampling_level=level, beta=beta, num_iterations=3, max_steps=3,
        epsilon=LOW, epsilon_high=high, max_completion_length=LENGTH, temperature=TEMPERATURE, learning_rate=RATE,
        gate_extrapolation=EXTRAPOLATION, gate_interpolation=INTERPOLATION,
    )  # fmt: skip
    trainer = Recorder(path, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    first, last = trainer.batches[:2], trainer.batches[4:]
    assert [a["completion_ids"].equal(b["completion_ids"]) for a, b in zip(first, last, strict=True)] == [True, True]
    tokens = sum(batch["completion_mask"].sum() for batch in first)
    assert len({int(length) for batch in first for length in batch["completion_mask"].sum(1)}) > 1
    with torch.no_grad():
        old = [token_logps(simulated, batch) for batch in first]
        taught = [token_logps(copy_of_teacher, batch) for batch in first]
        reference = [token_logps(initial, batch) for batch in first]
    advantages = [gate_advantages(o, t, b["verifier_labels"]) for o, t, b in zip(old, taught, first, strict=True)]
    for step in range(3):
        losses = []
        for i, batch in enumerate(first):
            mask, logps = batch["completion_mask"], token_logps(simulated, batch)
            per_token = token_losses(loss_type, logps, old[i], advantages[i], mask, level)
            if beta:
                gap = reference[i] - logps
                ratio = (logps - old[i]).exp()
                if level == "sequence":
                    mean = (((logps - old[i]) * mask).sum(1) / mask.sum(1)).detach().unsqueeze(1)
                    ratio = mean.exp() * (1 + logps - logps.detach())
                per_token = per_token + beta * (gap.exp() - gap - 1) * ratio  # `use_bias_correction_kl`, on by default
            losses.append(aggregated(loss_type, per_token, mask, tokens))
        expected = [loss.item() for loss in losses]
        assert trainer.losses[2 * step : 2 * step + 2] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        simulated.zero_grad()
        sum(losses).backward()
        with torch.no_grad():
            for parameter in simulated.parameters():
                parameter -= RATE * parameter.grad
    clipped = trainer.state.log_history[1].get("clip_ratio/region_mean", 1.0)
    assert clipped > 0.02  # or the ratio would not be shown to count
    assert_same_weights(trainer.model, simulated, tolerance=2e-5)


def test_what_is_masked_may_be_infinite():
    logps, old = torch.tensor([[-1.0, -2.0, -math.inf]]), torch.tensor([[-1.5, -2.5, -1.0]])
    found = sequence_old_logps(logps, old, torch.tensor([[1, 1, 0]]))
    assert found[0, :2].tolist() == [-1.5, -2.5]  # the mean of two ratios of 0.5 is 0.5


def test_with_one_advantage_a_row_the_token_form_is_gspo_itself():
    """Value and gradient of `min(s A, clip(s) A)` with `s = exp(mean log ratio)`, as TRL's sequence level has it."""
    torch.manual_seed(0)
    old, mask = torch.randn(3, 5).double(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    advantage = torch.tensor([[1.5], [-0.7], [0.4]]).double()
    results = []
    for form in ("sequence", "token"):
        logps = (old + torch.tensor([[0.05], [-0.05], [0.6]]) * torch.arange(1, 6)).requires_grad_()
        if form == "sequence":
            ratio = (((logps - old) * mask).sum(1) / mask.sum(1)).exp().unsqueeze(1)
        else:
            ratio = (logps - sequence_old_logps(logps, old, mask)).exp()
        per_token = torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage).expand(3, 5)
        loss = -((per_token * mask).sum(1) / mask.sum(1)).mean()
        loss.backward()
        results.append((loss.item(), logps.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][1][2].abs().max() == 0  # beyond the clip
    assert results[0][1][0].abs().min() > 0
