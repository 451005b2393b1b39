"""What a rank does at the same time: grading beside the old log-probabilities."""

import threading

import pytest
from trainers import make_config

from sg_opd import MathVerifier, SGOPDTrainer

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
