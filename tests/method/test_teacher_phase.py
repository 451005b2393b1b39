"""TeacherPhaseSampler: how many slots, where, and what may fill them."""

import math

import pytest
import torch

from sg_opd import TeacherPhaseSampler
from sg_opd.method.teacher_phase import Proposal


def test_fractions_by_hand():
    """fraction 0.5 over 4 steps: linear 0.5 * (1 - k/4); cosine 0.5 * (1 + cos(pi k / 4)) / 2; constant 0.5; then 0."""
    linear = TeacherPhaseSampler(0.5, 4, "linear")
    assert [linear.fraction_at(k) for k in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    constant = TeacherPhaseSampler(0.5, 4, "constant")
    assert [constant.fraction_at(k) for k in range(6)] == [0.5] * 4 + [0.0] * 2
    cosine = TeacherPhaseSampler(0.5, 4, "cosine")
    assert cosine.fraction_at(2) == pytest.approx(0.25)
    assert cosine.fraction_at(1) == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert cosine.fraction_at(4) == 0.0


def test_three_phases_by_hand():
    """fraction 0.5 over 8 steps, half of them held: 0.5 for four, then 0.25 (1 + cos(pi k / 4)), then none."""
    phase = TeacherPhaseSampler(0.5, 8, "three-phase")
    expected = [0.5] * 4 + [0.25 * (1 + math.cos(math.pi * k / 4)) for k in range(4)] + [0.0] * 2
    assert [phase.fraction_at(k) for k in range(10)] == pytest.approx(expected)
    assert TeacherPhaseSampler(0.5, 8, "three-phase", hold=0.0).fraction_at(4) == pytest.approx(0.25)
    for hold in (1.0, -0.1):
        with pytest.raises(ValueError, match="`hold`"):
            TeacherPhaseSampler(0.5, 8, "three-phase", hold=hold)


def test_a_phase_of_zero_steps_is_off():
    assert TeacherPhaseSampler(1.0, 0).slots(0, 5, 4).tolist() == [0] * 5


def test_whole_counts_are_not_random():
    assert TeacherPhaseSampler(0.25, 10, "constant").slots(3, 50, 8).tolist() == [2] * 50


def test_rounding_is_exact_in_expectation():
    """0.3 * 4 = 1.2 slots: 1 or 2, mean 1.2 within five standard errors, sqrt(0.2 * 0.8 / 20000) each."""
    sampler = TeacherPhaseSampler(0.3, 100, "constant", seed=5)
    slots = torch.cat([sampler.slots(step, 200, 4) for step in range(100)]).double()
    assert set(slots.tolist()) == {1.0, 2.0}
    assert slots.mean().item() == pytest.approx(1.2, abs=5 * math.sqrt(0.16 / 20_000))


def test_slots_depend_on_seed_step_and_place_only():
    sampler = TeacherPhaseSampler(0.3, 100, "constant", seed=5)
    torch.manual_seed(1)
    first = sampler.slots(7, 64, 4)
    torch.manual_seed(2)
    resumed = TeacherPhaseSampler(0.3, 100, "constant", seed=5)
    assert resumed.slots(7, 64, 4).equal(first)
    assert resumed.slots(7, 16, 4).equal(first[:16])  # a place's draw does not depend on the batch's size
    assert not sampler.slots(8, 64, 4).equal(first)
    assert not TeacherPhaseSampler(0.3, 100, "constant", seed=6).slots(7, 64, 4).equal(first)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_sees_the_same_slots(ranks):
    """16 prompts of 3 rollouts, 48 rows, cut into ranks that may split a group."""
    sampler = TeacherPhaseSampler(0.4, 10, seed=3)
    whole = sampler.slot_rows(2, 16, 3, range(48))
    local = 48 // ranks
    parts = [sampler.slot_rows(2, 16, 3, range(r * local, (r + 1) * local)) for r in range(ranks)]
    assert [r * local + row for r, part in enumerate(parts) for row in part] == whole


def test_slots_are_the_last_rows_of_their_group():
    sampler = TeacherPhaseSampler(0.5, 10, "constant")
    assert sampler.slot_rows(0, 3, 4, range(12)) == [2, 3, 6, 7, 10, 11]


def proposal(name, terminated=True):
    return Proposal([len(name)], name, terminated)


def test_fill_takes_the_first_endorsed_one_that_ended():
    """Row 1: truncated, then two endorsed ones. Row 5: refused and abstained. Row 6: endorsed, but truncated."""
    proposed = {
        1: [proposal("good", terminated=False), proposal("good a"), proposal("good b")],
        5: [proposal("bad"), proposal("unsure"), proposal("bad")],
        6: [proposal("good", terminated=False)] * 3,
    }
    calls = {"propose": 0, "endorse": 0}

    def propose(rows, candidates):
        calls["propose"] += 1
        assert candidates == 3
        return [proposed[row] for row in rows]

    def endorse(rows, proposals):
        calls["endorse"] += 1
        assert list(rows) == [1, 1, 5, 5, 5]
        assert all(p.terminated for p in proposals)
        return [{"good": 1.0, "bad": 0.0, "unsu": None}[p.completion[:4].strip()] for p in proposals]

    taken = TeacherPhaseSampler(0.5, 1, candidates=3).fill([1, 5, 6], propose, endorse)
    assert taken == {1: proposal("good a")}
    assert calls == {"propose": 1, "endorse": 1}


def test_fill_asks_nobody_without_slots():
    def never(*_):
        raise AssertionError("asked")

    assert TeacherPhaseSampler(0.5, 1).fill([], never, never) == {}


def test_fill_refuses_an_answer_for_other_rows():
    with pytest.raises(ValueError, match="1 rows, but 2"):
        TeacherPhaseSampler(0.5, 1).fill([0, 1], lambda rows, n: [[]], lambda rows, p: [])


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"fraction": 1.1, "steps": 1}, "fraction"),
        ({"fraction": math.nan, "steps": 1}, "fraction"),
        ({"fraction": 0.5, "steps": -1}, "steps"),
        ({"fraction": 0.5, "steps": 1.5}, "steps"),
        ({"fraction": 0.5, "steps": 1, "schedule": "step"}, "schedule"),
        ({"fraction": 0.5, "steps": 1, "candidates": 0}, "candidates"),
    ],
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        TeacherPhaseSampler(**kwargs)
