"""The callback: its figures are those of an evaluation, and training does not notice it."""

import pytest
import torch
from peft import LoraConfig
from trainers import coin_verifier, make_config
from transformers import TrainerCallback

from sg_opd import SGOPDTrainer
from sg_opd.evaluation.engines import Sampling, TransformersEngine
from sg_opd.evaluation.evaluator import Draws, EvaluationCallback
from sg_opd.evaluation.figures import by_question, figures_over


def build(make_model, tokenizer, dataset, tmp_path, peft_config=None, **overrides):
    settings = {"max_steps": 4, "learning_rate": 0.05, "logging_steps": 2, "log_completions": False, **overrides}
    args = make_config(tmp_path, **settings)
    return SGOPDTrainer(
        make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer, peft_config=peft_config
    )


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_training_does_not_notice_it(make_model, tokenizer, dataset, tmp_path, lora):
    """Evaluated after every step, in and between the logging intervals, with dropout and gradient checkpointing: the
    same weights and the same training log, to the bit."""
    runs = []
    for evaluated in (False, True):
        config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5) if lora else None
        trainer = build(make_model, tokenizer, dataset, tmp_path, config, gradient_checkpointing=True)
        if evaluated:
            trainer.add_callback(EvaluationCallback(trainer, dataset.select(range(3)), num_samples=2, every_steps=1))
        trainer.train()
        runs.append(trainer)
    plain, watched = runs
    for got, want in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(got, want)
    times = ("time", "runtime", "per_second")
    logs = [
        [
            {name: value for name, value in entry.items() if not any(part in name for part in times)}
            for entry in run.state.log_history
            if "eval_avg@2" not in entry
        ]
        for run in runs
    ]
    assert logs[0] == logs[1]
    assert [e["step"] for e in logs[0] if "loss" in e] == [2, 4]
    entries = [entry for entry in watched.state.log_history if "eval_avg@2" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert {"eval_pass@1", "eval_pass@2", "eval_maj@2", "eval_truncated", "eval_tokens"} <= entries[0].keys()
    assert watched.model.training == plain.model.training


def test_its_figures_are_an_evaluations(make_model, tokenizer, dataset, tmp_path):
    """At the last step the model is what training leaves, which is evaluated again here; `eval_steps` says when."""
    trainer = build(make_model, tokenizer, dataset, tmp_path, max_steps=2, eval_steps=2, per_device_eval_batch_size=3)
    rows = dataset.select(range(4))
    trainer.add_callback(EvaluationCallback(trainer, rows, num_samples=4, max_completion_length=8, seed=5))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_avg@4" in entry]
    assert entry["step"] == 2
    engine, places = TransformersEngine(trainer.model, tokenizer), [(q, s) for q in range(4) for s in range(4)]
    draws, samples = Draws(engine, tokenizer, rows, coin_verifier, Sampling(8, 0.8), 4, 3, seed=5), []
    for start in range(0, 16, 3):
        chosen = places[start : start + 3]
        samples += draws.batch(chosen, [(0, start)] * len(chosen))
    figures = figures_over(by_question(samples, 4))
    assert 0 < figures["avg@4"].mean < 100
    assert {name: entry[f"eval_{name}"] for name in figures} == {name: figures[name].mean for name in figures}


def test_it_logs_through_other_callbacks(make_model, tokenizer, dataset, tmp_path):
    seen = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    trainer = build(make_model, tokenizer, dataset, tmp_path, max_steps=2)
    trainer.add_callback(Listener())
    trainer.add_callback(EvaluationCallback(trainer, dataset.select([0]), num_samples=1, every_steps=2))
    trainer.train()
    assert any("eval_avg@1" in names for names in seen)
    assert any("loss" in names and "eval_avg@1" not in names for names in seen)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Set `every_steps`, or `eval_steps`"),
        ({"every_steps": 0}, "`every_steps` must be >= 1, got 0"),
        ({"every_steps": 1, "num_samples": 0}, "`num_samples` must be >= 1, got 0"),
        ({"every_steps": 1, "max_completion_length": 256}, "room for 256: lower `max_completion_length`"),
        ({"every_steps": 1, "eval_dataset": []}, "empty"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make_model, tokenizer, dataset, tmp_path, given, words):
    trainer = build(make_model, tokenizer, dataset, tmp_path)
    with pytest.raises(ValueError, match=words):
        EvaluationCallback(trainer, **{"eval_dataset": dataset, **given})
