"""What a rank does at the same time: grading beside the old log-probabilities, and a server's scoring beside both."""

import threading
import time

import pytest
import torch
from fault_proxy import FaultProxy, StandIn
from trainers import Recorder, coin_verifier, make_config

from sg_opd import MathVerifier, SGOPDTrainer
from sg_opd.training.rollouts import Rollouts
from sg_opd.training.scoring import Scoring

SECONDS = 20.0  # after which what was to happen meanwhile did not
OLD_LOGPS = {"num_iterations": 2, "gradient_accumulation_steps": 1, "temperature": 1.0}  # GRPOTrainer computes them


class Meanwhile(SGOPDTrainer):
    """Computes its first log-probabilities, the old ones, once grading has begun; notes whether it had in time."""

    def __init__(self, *args, **kwargs):
        self.grading, self.met = threading.Event(), []
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.met = self.met or [self.grading.wait(SECONDS)]
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


@pytest.fixture
def trainer_of(make_model, tokenizer, dataset, tmp_path):
    def make(verifier, kind=Meanwhile, **settings):
        args = make_config(tmp_path, **{**OLD_LOGPS, **settings})
        return kind(make_model(1), make_model(2), verifier, args, dataset, processing_class=tokenizer)

    return make


def test_grading_runs_beside_the_old_log_probs(trainer_of, monkeypatch):
    """Old log-probs that wait for the grading to begin would wait in vain if it came after them."""
    verifier, graded = MathVerifier(), MathVerifier._compared

    def compared(self, pairs):
        trainer.grading.set()
        return graded(self, pairs)

    monkeypatch.setattr(MathVerifier, "_compared", compared)
    trainer = trainer_of(verifier)
    trainer.train()
    verifier.close()
    assert trainer.met == [True]


def test_a_verifier_of_a_users_own_is_called_in_the_main_thread_with_what_it_may_log(trainer_of):
    called = []

    class Logging(MathVerifier):
        def __call__(self, completions, solution, log_extra=None, **kwargs):
            called.append(threading.current_thread())
            log_extra("length", [len(completion) for completion in completions])
            return super().__call__(completions, solution)

    trainer = trainer_of(Logging(), SGOPDTrainer, log_completions=True)
    trainer.train()
    trainer.verifier.close()
    assert set(called) == {threading.main_thread()}
    assert list(trainer._logs["extra"]["length"])


def test_an_error_of_the_grading_ends_the_run_with_its_own_words(trainer_of, monkeypatch):
    def compared(self, pairs):
        raise RuntimeError("A grading worker did not start.")

    monkeypatch.setattr(MathVerifier, "_compared", compared)
    with pytest.raises(RuntimeError, match="did not start") as raised:
        trainer_of(MathVerifier(), SGOPDTrainer).train()
    assert "It came from the verifier MathVerifier" in raised.value.__notes__[0]


@pytest.fixture
def proxy(make_model, tokenizer):
    proxy = FaultProxy(StandIn(make_model(2), tokenizer))
    yield proxy
    proxy.close()


def test_a_server_scores_beside_the_grading(make_model, tokenizer, dataset, tmp_path, proxy):
    """A verifier that waits for the question to the server would wait in vain if it came after the verdicts."""
    met = []

    def waiting(prompts, completions, completion_ids, **kwargs):
        end = time.monotonic() + SECONDS
        while len(proxy.posts) == probed and time.monotonic() < end:
            time.sleep(0.01)
        met.append(len(proxy.posts) > probed)
        return coin_verifier(prompts, completions, completion_ids)

    args = make_config(tmp_path, temperature=1.0, teacher_server_url=[proxy.url])
    trainer = SGOPDTrainer(make_model(1), None, waiting, args, dataset, processing_class=tokenizer)
    probed = len(proxy.posts)
    trainer.train()
    assert met == [True]


@pytest.mark.parametrize("estimator", [{"estimator": "sampled"}, {"estimator": "top_k", "teacher_top_k": 4}])
def test_the_order_of_the_work_changes_no_bit(make_model, tokenizer, dataset, tmp_path, proxy, monkeypatch, estimator):
    """Micro-batches, losses and weights of two generations, in which cut completions are masked after the question."""
    settings = {**OLD_LOGPS, **estimator, "mask_truncated_completions": True, "max_completion_length": 6}

    def trained(folder):
        args = make_config(folder, teacher_server_url=[proxy.url], max_steps=4, **settings)
        trainer = Recorder(make_model(1), None, MathVerifier(), args, dataset, processing_class=tokenizer)
        trainer.train()
        trainer.verifier.close()
        return trainer

    at_once = trained(tmp_path / "at once")
    monkeypatch.setattr(Scoring, "begin", lambda *_: None)
    monkeypatch.setattr(Rollouts, "grade_ahead", lambda *_: None)
    in_turn = trained(tmp_path / "in turn")
    assert at_once.losses == in_turn.losses
    assert len(at_once.batches) == len(in_turn.batches) == 4
    masked = 0
    for one, other in zip(at_once.batches, in_turn.batches, strict=True):
        assert one.keys() == other.keys()
        masked += int((one["completion_mask"].sum(1) == 0).sum())
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert masked
    for one, other in zip(at_once.model.parameters(), in_turn.model.parameters(), strict=True):
        assert one.equal(other)
