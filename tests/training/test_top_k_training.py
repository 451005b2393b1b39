"""Training with estimator="top_k": against the full estimator, from any kind of teacher, and what is refused."""

import math

import pytest
import torch
from peft import LoraConfig
from scoring import Countdown
from trainers import MIXED, Recorder, assert_same_weights, coin_verifier, make_config, plain_logits

from sg_opd.method.buckets import NO_ID, bucketed_logps, likeliest_ids
from sg_opd.teachers import Teacher, TeacherError, TopKTeacher, TopScores
from sg_opd.teachers.protocol import ask_top


class Named(Countdown):
    """A teacher of a user's own that names its likeliest ids: a plain model at temperature 0.8."""

    name = "named"

    def __init__(self, model):
        model.get_output_embeddings().weight.data /= 0.8
        self.model = model

    @torch.no_grad()
    def score_top(self, prompt_ids, completion_ids, k):
        scores = []
        for prompt, ids in zip(prompt_ids, completion_ids, strict=True):
            logps = self.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            top = logps.topk(k)
            scores.append(TopScores(logps.gather(1, torch.tensor(ids)[:, None]).squeeze(1), top.indices, top.values))
        return scores


@pytest.fixture
def train(make_model, tokenizer, dataset, tmp_path):
    def train(teacher=None, peft_config=None, **overrides):
        settings = {"estimator": "top_k", **overrides}
        trainer = Recorder(
            make_model(1), teacher or make_model(2, hidden_size=48), coin_verifier, make_config(tmp_path, **settings),
            dataset, processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("reference_policy", ["current", "initial"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_two_steps_are_the_full_estimators_where_k_is_the_vocabulary(lora, reference_policy, train, tokenizer):
    """Losses, entropy, gradient norm and weights, with teacher rows, a dead zone and temperature 0.8."""
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    settings = {"reference_policy": reference_policy, "max_steps": 2, "gate_dead_zone": 0.1, **MIXED}
    full = train(estimator="full", peft_config=adapter, **settings)
    top = train(teacher_top_k=len(tokenizer), peft_config=adapter, **settings)
    assert any(batch["from_teacher"].any() for batch in full.batches)
    assert top.losses == pytest.approx(full.losses, rel=1e-4, abs=1e-6)
    for name in ("entropy", "grad_norm", "gate/factor", "delta/p05", "loss/student"):
        got, want = ([entry[name] for entry in run.state.log_history if name in entry] for run in (top, full))
        assert got == pytest.approx(want, rel=1e-4), name
    assert_same_weights(top.model, full.model)
    assert [entry["rest/teacher"] for entry in top.state.log_history[:2]] == [0.0, 0.0]


def test_what_a_batch_holds_and_what_is_logged(train, make_model):
    """Per token k + 1 ids of 4 bytes and k + 2 log-probs: the teacher's of plain logits; and both models' rest."""
    trainer = train(teacher_top_k=4, teacher_offload=True)
    student, teacher = make_model(1), make_model(2, hidden_size=48)
    rests, tokens = {"student": 0.0, "teacher": 0.0}, 0
    for batch in trainer.batches:
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        assert "teacher_states" not in batch
        assert "teacher_per_token_logps" not in batch
        assert batch["teacher_top_ids"].dtype == torch.int32
        assert batch["teacher_top_ids"].shape == (*ids.shape, 5)
        logits = plain_logits(teacher, batch).detach() / 0.8
        kept = likeliest_ids(logits, ids, 4)
        assert (kept[mask] == NO_ID).any()
        assert batch["teacher_top_ids"][mask].equal(kept[mask].int())
        want = bucketed_logps(logits, kept)
        torch.testing.assert_close(batch["teacher_top_logps"][mask], want[mask], rtol=1e-4, atol=1e-5)
        own = bucketed_logps(plain_logits(student, batch).detach() / 0.8, kept)
        for name, of in (("student", own), ("teacher", want)):
            rests[name] += of[..., -1].exp()[mask].sum().item()
        tokens += mask.sum().item()
    logged = trainer.state.log_history[0]
    for name, total in rests.items():
        assert logged[f"rest/{name}"] == pytest.approx(total / tokens, rel=1e-4)
    assert 0.01 < logged["rest/teacher"] < logged["rest/student"]


def test_a_teacher_of_ones_own_that_names_its_likeliest_ids(train, make_model):
    own = Named(make_model(2))
    assert isinstance(own, TopKTeacher)
    ours, local = train(own, teacher_top_k=4), train(make_model(2), teacher_top_k=4)
    for batch, other in zip(ours.batches, local.batches, strict=True):
        mask = batch["completion_mask"].bool()
        for name in ("teacher_top_ids", "teacher_top_logps"):  # places may differ where an id is missing
            pair = [part[name][mask].float().sort(dim=1).values for part in (batch, other)]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
        assert (batch["teacher_top_logps"][~mask] == 0).all()
    assert ours.losses == pytest.approx(local.losses, rel=1e-4)
    assert_same_weights(ours.model, local.model, tolerance=1e-5)


def test_what_is_refused_at_the_start(train, make_model, tokenizer):
    assert isinstance(Countdown(), Teacher)
    with pytest.raises(ValueError, match=r"a Countdown has no `score_top` \(`sg_opd\.teachers\.TopKTeacher`\)"):
        train(Countdown())
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"`teacher_top_k` is 64, but student and teacher share {size} ids only"):
        train(teacher_top_k=64)


def answer(**changed):
    """Of two tokens, ids 3 and 4, with k = 2; and what it is asked with."""
    given = {
        "logps": torch.tensor([-2.0, -1.0]),
        "top_ids": torch.tensor([[3, 5], [5, 6]]),
        "top_logps": torch.tensor([[-2.0, -0.5], [-1.5, -3.0]]),
    }

    class Saying(Countdown):
        def score_top(self, prompt_ids, completion_ids, k):
            return [TopScores(**{**given, **changed})]

    batch = {"prompt_ids": torch.tensor([[1, 2]]), "completion_ids": torch.tensor([[3, 4, 0]])}
    masks = {"prompt_mask": torch.ones(1, 2), "completion_mask": torch.tensor([[1, 1, 0]])}
    return Saying(), batch | masks


def test_an_answer_becomes_a_batchs_targets():
    ids, logps = ask_top(*answer(), 2, 6)
    assert ids.tolist() == [[[3, NO_ID, 5], [4, 5, NO_ID], [0, 0, 0]]]  # id 6 is the teacher's alone
    rest = [math.log(1 - math.exp(-2) - math.exp(-0.5)), math.log(1 - math.exp(-1) - math.exp(-1.5))]
    want = [[-2.0, -math.inf, -0.5, rest[0]], [-1.0, -1.5, -math.inf, rest[1]], [0.0] * 4]
    torch.testing.assert_close(logps, torch.tensor([want]))


def test_an_answer_about_a_token_that_is_not_trained_is_not_looked_at():
    teacher, batch = answer(**{"logps": torch.tensor([-2.0, -9999.0]), "top_logps": torch.full((2, 2), -0.75)})
    ids, logps = ask_top(teacher, {**batch, "tool_mask": torch.tensor([[1, 0, 0]])}, 2, 6)
    assert ids.tolist() == [[[3, NO_ID, 5], [0, 0, 0], [0, 0, 0]]]
    assert logps[0, 1:].eq(0).all()


BAD = {
    "rows of [3] tokens, but the batch has [2]": {"logps": torch.full((3,), -1.0)},
    "ids of shape (2, 3), with log-probabilities of shape (2, 2), but was asked for (2, 2)": {
        "top_ids": torch.ones(2, 3, dtype=torch.long)
    },
    "names an id twice among its likeliest [5, 5]": {"top_ids": torch.tensor([[3, 5], [5, 5]])},
    "a probability of 1.40805 in all": {"top_logps": torch.tensor([[-2.0, -0.5], [-0.1, -2.0]])},
    "gives token 4 the log-probability nan, on which": {"top_logps": torch.tensor([[-2.0, -0.5], [math.nan, -3.0]])},
    "gives token 3 the log-probability -9999, on which no delta can be trained. Set `non_finite_log_probs='skip'`": {
        "logps": torch.tensor([-9999.0, -1.0]),
    },
}


@pytest.mark.parametrize("said", BAD)
def test_an_answer_that_is_refused(said):
    with pytest.raises(TeacherError) as caught:
        ask_top(*answer(**BAD[said]), 2, 8)
    assert str(caught.value).startswith("countdown ")
    assert said in str(caught.value)


def test_what_is_no_number_is_left_to_the_guard_where_its_step_is_skipped():
    """At the sampled id, where it looks; an id without probability that is not sampled is one of the rest."""
    changed = {"top_logps": torch.tensor([[-2.0, math.nan], [-9999.0, -3.0]]), "logps": torch.tensor([-2.0, -9999.0])}
    ids, logps = ask_top(*answer(**changed), 2, 8, skips=True)
    assert logps[0, 0, 0].isnan()
    assert logps[0, 1, 0] == -math.inf
    assert ids[0, 1].tolist() == [4, NO_ID, 6]
