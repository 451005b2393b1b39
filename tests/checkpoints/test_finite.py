"""Log-probabilities that are no numbers, of either model and under each estimator: named, then stopped or skipped."""

import itertools
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from trainers import assert_same_weights_exactly, coin_verifier, make_config

from sg_opd import SGOPDTrainer
from sg_opd.checkpoints.folders import flaw
from sg_opd.checkpoints.stops import NonFiniteError

ROW, TOKEN = 1, 2


class Poisoned(SGOPDTrainer):
    """At one step, one log-probability of one model is replaced where the gate gets it, as a broken model gives it."""

    def __init__(self, *args, whose, value, at, **kwargs):
        super().__init__(*args, **kwargs)
        self.poison = whose, value, at

    def _decide(self, inputs, **logps):
        whose, value, at = self.poison
        if self.state.global_step == at and "decision" not in inputs:
            logps[whose] = logps[whose].clone()
            logps[whose][ROW, TOKEN] = value
            self.token = inputs["completion_ids"][ROW, TOKEN].item()
        return super()._decide(inputs, **logps)


@pytest.fixture
def run(make_model, tokenizer, dataset, tmp_path):
    def run(whose="student", value=math.nan, at=1, **settings):
        known = {"max_steps": 3, "optim": "adamw_torch", "generation_kwargs": {"do_sample": False}}
        args = make_config(tmp_path, **{**known, **settings})
        poison = {"whose": whose, "value": value, "at": at}
        models = make_model(1), make_model(2)
        trainer = Poisoned(*models, coin_verifier, args, dataset, processing_class=tokenizer, **poison)
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
@pytest.mark.parametrize(("whose", "value"), [("student", math.nan), ("teacher", math.nan), ("teacher", -math.inf)])
def test_the_run_stops_and_names_rollout_and_token(whose, value, estimator, run, tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        run(whose, value, estimator=estimator)
    said = str(caught.value)
    assert said.startswith(f"Step 1, rank 0: the {whose}'s log-probability of token {TOKEN} (")
    assert f"of the rollout in row {ROW} of its micro-batch is {value:g}, and 1 in all are no numbers" in said
    assert "Its prompt ends with" in said
    assert "non_finite_log_probs='skip'" in said
    # what was trained is kept, unless it is the student that is broken
    folder = tmp_path / "checkpoint-1"
    assert folder.is_dir() == (f"The last good step is 1, saved in {folder}" in said) == (whose == "teacher")
    assert whose == "student" or flaw(folder) is None


def test_a_second_run_saves_its_own_last_good_step(run, tmp_path):
    """The first saved a step of the same number; the second goes on from its weights."""
    trainer = run("teacher", math.nan, 9, save_strategy="steps", save_steps=3)
    first = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    trainer.poison, trainer.args.max_steps, trainer.args.save_strategy = ("teacher", math.nan, 3), 4, "no"
    with pytest.raises(NonFiniteError, match=r"The last good step is 3, saved in"):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert any(not torch.equal(saved[name], first[name]) for name in first)
    assert all(torch.equal(saved[name], weight) for name, weight in trainer.model.state_dict().items() if name in saved)


@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
def test_the_step_is_skipped_on_request(estimator, run, caplog):
    """Greedy rollouts: the second of two steps moves no weight, though AdamW has momentum, and is warned of once."""
    with caplog.at_level(logging.WARNING):
        trainer = run("student", math.nan, 1, estimator=estimator, non_finite_log_probs="skip", max_steps=2)
        one = run("student", math.nan, 9, estimator=estimator, non_finite_log_probs="skip", max_steps=1)
    assert_same_weights_exactly(trainer.model, one.model)
    (said,) = [r.getMessage() for r in caplog.records if "This optimizer step is skipped" in r.getMessage()]
    assert f"of token {TOKEN} ({trainer.token}, " in said
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isfinite(entry["loss"]) for entry in logs] == [True, True]
    assert "gate/factor" in logs[0]
    assert all(math.isfinite(v) for e in logs for k, v in e.items() if k.startswith(("gate/", "delta/", "loss/")))
    whole = run("student", math.nan, 9, estimator=estimator, non_finite_log_probs="skip", max_steps=2)
    moved = [(a - b).abs().max().item() for a, b in zip(whole.model.parameters(), one.model.parameters(), strict=True)]
    assert max(moved) > 1e-3


# one generation for two optimizer steps: the same micro-batch twice, or its two halves
REUSED = [{"num_iterations": 2}, {"steps_per_generation": 2, "gradient_accumulation_steps": 1}]


@pytest.mark.parametrize("settings", REUSED, ids=str)
@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
def test_a_student_that_goes_bad_while_rollouts_are_reused(settings, estimator, run, monkeypatch):
    """After the first step a weight is NaN; the second is on rollouts which were decided or scored before."""

    def break_it(callback, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.get_output_embeddings().weight[7] = math.nan

    monkeypatch.setattr("sg_opd.checkpoints.stops.FiniteGuard.on_step_end", break_it, raising=False)
    with pytest.raises(NonFiniteError, match="Step 1, rank 0: the student's log-probability"):
        run(at=9, estimator=estimator, **settings)


@pytest.mark.parametrize("settings", REUSED[:1], ids=str)
def test_a_bad_rollout_is_skipped_each_time_it_is_trained_on(settings, run, monkeypatch):
    """The teacher's score of the first generation is NaN: neither of its two steps moves a weight, the third does."""
    seen, score = [], SGOPDTrainer._set_advantages

    def poisoned(trainer, logps, inputs):
        if trainer.state.global_step == 0:
            inputs["teacher_per_token_logps"][ROW, TOKEN] = math.nan
        score(trainer, logps, inputs)

    def note(callback, args, state, control, model=None, **kwargs):
        seen.append([p.detach().clone() for p in model.parameters()])

    monkeypatch.setattr(SGOPDTrainer, "_set_advantages", poisoned)
    monkeypatch.setattr("sg_opd.checkpoints.stops.StopAtStepEnd.on_step_begin", note, raising=False)
    run(at=9, non_finite_log_probs="skip", max_steps=4, **settings)
    same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False]


def test_an_infinite_log_ratio_is_let_through_where_it_is_clipped(run):
    trainer = run("teacher", -math.inf, log_ratio_clip=2.0)
    assert trainer.state.global_step == 3
    with pytest.raises(NonFiniteError):
        run("teacher", math.nan, log_ratio_clip=2.0)


@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
def test_a_model_whose_weights_are_not_finite(estimator, make_model, tokenizer, dataset, tmp_path):
    teacher = make_model(2)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[7] = math.inf
    args = make_config(tmp_path, estimator=estimator)
    trainer = SGOPDTrainer(make_model(1), teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    with pytest.raises(NonFiniteError, match="the teacher's log-probability"):
        trainer.train()


def test_deepspeed_skips_no_step(tmp_path):
    with pytest.raises(ValueError, match=r"non_finite_log_probs='skip' does not run under DeepSpeed"):
        make_config(tmp_path, non_finite_log_probs="skip", deepspeed={"zero_optimization": {"stage": 2}})
