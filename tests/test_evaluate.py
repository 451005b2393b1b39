"""avg@k and pass@k: by hand, against counting all subsets, and on a model."""

import itertools
import math

import pytest
import torch

from sg_opd.evaluate import evaluate_model, mean_and_standard_error, pass_at_k


def test_pass_at_k_by_hand():
    """n=4, c=1, k=2: 1 - C(3,2)/C(4,2) = 1 - 3/6 = 1/2."""
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 0, 2) == 0.0
    assert pass_at_k(4, 3, 2) == 1.0


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_counts_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_is_undefined(n, c, k):
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(n, c, k)


def test_standard_error_by_hand():
    """Values 0 and 100: mean 50, standard deviation sqrt(5000), error sqrt(5000 / 2) = 50."""
    assert mean_and_standard_error([0.0, 100.0]) == (50.0, pytest.approx(50.0))
    assert math.isnan(mean_and_standard_error([1.0])[1])


def test_evaluate_model(make_model, tokenizer, dataset):
    """A verifier that knows the third question only: 4 of 4 there; and the caller's random state is untouched."""
    rows = dataset.select(range(3))

    def knows_the_third(prompts, completions, completion_ids, solution, **kwargs):
        assert all(isinstance(c[0]["content"], str) for c in completions)
        return [1.0 if s == rows[2]["solution"] else (0.0 if s == rows[0]["solution"] else None) for s in solution]

    model = make_model(1)
    before = torch.get_rng_state()
    result = evaluate_model(model, tokenizer, rows, knows_the_third, 4, 8, batch_size=5, progress=False)
    assert torch.get_rng_state().equal(before)
    assert (result.num_questions, result.num_samples) == (3, 4)
    assert result.avg_percent == pytest.approx(100 / 3)
    assert result.pass_percent == pytest.approx(100 / 3)
    assert result.abstained_percent == pytest.approx(100 / 3)
    assert 0 < result.mean_tokens <= 8
    assert {"avg@4", "pass@4"} <= set(result.as_dict())


def test_a_checkpoints_own_sampling_settings_do_not_count(make_model, tokenizer, dataset):
    """transformers fills what a generation config leaves out from the checkpoint's, which would change the figures."""

    def verifier(prompts, completions, completion_ids, **kwargs):
        return [float(sum(ids) % 2) for ids in completion_ids]

    plain, narrow = make_model(1), make_model(1)
    narrow.generation_config.update(top_p=0.1, min_p=0.5, repetition_penalty=2.0, top_k=1, eos_token_id=None)
    runs = [evaluate_model(model, tokenizer, dataset, verifier, 2, 8, progress=False) for model in (plain, narrow)]
    assert runs[0] == runs[1]


def test_the_same_seed_gives_the_same_figures(make_model, tokenizer, dataset):
    def verifier(prompts, completions, completion_ids, **kwargs):
        return [float(sum(ids) % 2) for ids in completion_ids]

    runs = [
        evaluate_model(make_model(1), tokenizer, dataset, verifier, 2, 8, seed=s, progress=False) for s in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_verdict_is_checked_as_in_training(make_model, tokenizer, dataset):
    def graded(prompts, completions, **kwargs):
        return [0.5 for _ in completions]

    with pytest.raises(ValueError, match=r"graded answered 0\.5 for row 0"):
        evaluate_model(make_model(1), tokenizer, dataset, graded, 1, 2, progress=False)


def test_an_empty_dataset_is_refused(make_model, tokenizer):
    with pytest.raises(ValueError, match="empty"):
        evaluate_model(make_model(1), tokenizer, [], lambda **_: [])
