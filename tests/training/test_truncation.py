"""Rollouts that were cut: their verdict, what evaluation makes of them, and the warning when most of the first are."""

import pytest
import torch
from trainers import MIXED, Recorder, make_config


def all_correct(prompts, completions, **kwargs):
    return [1.0] * len(completions)


@pytest.fixture
def trained(make_model, tokenizer, dataset, tmp_path):
    def train(verdict, **overrides):
        args = make_config(tmp_path, truncated_verdict=verdict, **{"max_completion_length": 6, **overrides})
        trainer = Recorder(
            make_model(1), make_model(2), all_correct, args, dataset, dataset, processing_class=tokenizer
        )
        trainer.train()
        return trainer

    return train


def rows(trainer, name):
    return torch.cat([batch[name] for batch in trainer.batches])


@pytest.mark.parametrize("phase", [{}, MIXED], ids=["student", "mixed"])
def test_cut_rollouts_abstain_where_the_run_says_so(trained, tokenizer, phase):
    """Judged, all are correct; else those without an EOS are neutral: no verdict, and their share in the metrics."""
    judged, neutral = trained("judge", **phase), trained("abstain", **phase)
    assert (rows(judged, "verifier_labels") == 1).all()
    labels, student = rows(neutral, "verifier_labels"), ~rows(neutral, "from_teacher")
    # a completion that ended at the last token is whole
    ended = (rows(neutral, "completion_ids") == tokenizer.eos_token_id).any(1)
    assert torch.equal(labels.isnan(), ~ended)
    assert (labels[ended] == 1).all()
    cut = (~ended).sum().item() / student.sum().item()
    assert 0 < cut < 1
    log = neutral.state.log_history[0]
    assert log["verdict/abstained"] == pytest.approx(cut)
    assert log["verdict/correct"] == pytest.approx(1 - cut)
    assert log["completions/clipped_ratio"] == pytest.approx(cut) or phase
    assert judged.state.log_history[0]["verdict/abstained"] == 0
    tokens = torch.cat([batch["completion_mask"].sum(1) for batch in neutral.batches])
    assert log["gate/neutral"] == pytest.approx((tokens[~ended].sum() / tokens.sum()).item())
    assert judged.state.log_history[0]["gate/neutral"] == 0


def test_evaluation_judges_them_all(trained):
    """Left out, they would raise the mean that `eval_reward` is."""
    for verdict in ("judge", "abstain"):
        found = trained(verdict).evaluate()
        assert 0 < found["eval_completions/clipped_ratio"] < 1
        assert (found["eval_verdict/correct"], found["eval_verdict/abstained"], found["eval_reward"]) == (1, 0, 1)


@pytest.mark.parametrize(("length", "warned"), [(1, 1), (6, 0)])
def test_a_first_generation_that_is_mostly_cut_is_warned_of_once(trained, caplog, length, warned):
    trained("judge", max_steps=2, max_completion_length=length)
    assert caplog.text.count("% of the first rollouts were cut at max_completion_length=1") == warned
    for remedy in ("Raise it", "chat_template_kwargs={'enable_thinking': False}", "truncated_verdict='abstain'"):
        assert not warned or remedy in caplog.text


def test_a_verifier_is_not_blamed_for_rollouts_that_were_cut(trained, caplog):
    trained("abstain", max_completion_length=1)
    assert "They are neutral (truncated_verdict='abstain')" in caplog.text
    assert "abstained on every rollout" not in caplog.text
