"""The top-k estimator: the full one where K is all there is, below it elsewhere, with the gradient of whole logits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sg_opd import SignGatedLoss
from sg_opd.method import top_k
from sg_opd.method.buckets import (
    NO_ID,
    REST_FLOOR,
    Buckets,
    bucketed_answer,
    bucketed_logps,
    likeliest_ids,
    log1mexp,
)
from sg_opd.method.divergence import Head, Target, full_per_token
from sg_opd.method.loss import bucketed_divergence, gated_divergence
from sg_opd.method.top_k import bucketed, likeliest, top_k_per_token


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 positions and 8 ids, so that several are needed and the last are ragged."""
    monkeypatch.setattr(top_k, "POSITIONS", 4)
    monkeypatch.setattr(top_k, "IDS", 8)


def draw(seed, *shape, dtype=torch.float32, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_head(seed, vocab, width, bias=False, dtype=torch.float32, **kwargs):
    weight = draw(seed, vocab, width, dtype=dtype).requires_grad_()
    return Head(weight, draw(seed + 1, vocab, dtype=dtype).requires_grad_() if bias else None, **kwargs)


def whole_logits(hidden, head, temperature):
    logits = hidden @ head.weight.T if head.bias is None else hidden @ head.weight.T + head.bias
    logits = logits * head.scale
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)) / temperature


def by_hand(student, teacher, sampled, k):
    """The definition for one position, in a loop, with the target's floor: log-probabilities (V,) of both models."""
    student, teacher = student.double().exp(), teacher.double().exp()
    kept = {*teacher.topk(k).indices.tolist(), sampled}
    pairs = [(student[v], teacher[v]) for v in kept]
    others = [v for v in range(len(student)) if v not in kept]
    if others:
        pairs.append((student[others].sum(), teacher[others].sum() + REST_FLOOR))
    mass = sum(q for _, q in pairs)
    return sum(p * (p / q * mass).log() for p, q in pairs).item()


def test_by_hand():
    """pi_T = (.4, .3, .2, .1), k = 1, sampled id 2: K = {0, 2}, rest .4. pi_S = (.1, .2, .3, .4) with the rest .6."""
    teacher, student = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    ids = likeliest_ids(teacher, torch.tensor(2), 1)
    assert ids.tolist() == [2, 0]
    both = [bucketed_logps(x, ids).view(1, 1, -1) for x in (student, teacher)]
    torch.testing.assert_close(both[0].exp().flatten(), torch.tensor([0.3, 0.1, 0.6]))
    expected = 0.3 * math.log(0.3 / 0.2) + 0.1 * math.log(0.1 / 0.4) + 0.6 * math.log(0.6 / 0.4)
    assert bucketed_divergence(*both, torch.full((1, 1), 1.8)).item() == pytest.approx(1.8 * expected, abs=3e-5)
    # sampled id 0 is the likeliest: K has one id, and not twice that one
    ids = likeliest_ids(teacher, torch.tensor(0), 1)
    assert ids.tolist() == [0, NO_ID]
    torch.testing.assert_close(bucketed_logps(teacher, ids).exp(), torch.tensor([0.4, 0.0, 0.6]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([0.3, 1.0, 4.0, 12.0]))
def test_a_lower_bound_that_rises_with_k(seed, vocab, scale):
    """To the full divergence at K = V, at every step of k, flat distributions and nearly certain ones alike."""
    student, teacher = (draw(seed + i, vocab, scale=scale, dtype=torch.float64).log_softmax(-1) for i in (0, 1))
    sampled = torch.tensor(seed % vocab)
    full = gated_divergence(student.view(1, 1, -1), teacher.view(1, 1, -1), torch.ones(1, 1).double()).item()
    values = []
    for k in range(1, vocab + 1):
        ids = likeliest_ids(teacher, sampled, k)
        both = [bucketed_logps(x, ids).view(1, 1, -1) for x in (student, teacher)]
        values.append(bucketed_divergence(*both, torch.ones(1, 1).double()).item())
        assert values[-1] == pytest.approx(by_hand(student, teacher, seed % vocab, k), rel=1e-9, abs=1e-12)
    assert values[0] >= -1e-12
    assert all(low <= high + REST_FLOOR for low, high in itertools.pairwise(values))
    assert values[-1] == pytest.approx(full, rel=1e-9, abs=1e-12)


EXTRAS = [{}, {"bias": True}, {"scale": 0.5}, {"bias": True, "scale": 2.0, "softcap": 5.0}]


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize(("vocab", "teacher_vocab", "k"), [(19, 19, 5), (19, 13, 5), (13, 19, 5), (19, 19, 19)])
def test_equals_whole_logits(vocab, teacher_vocab, k, extras, small_tiles):
    """Teacher's K, log-probs, entropy and every gradient, from tiles; ids that are not shared are in the rest."""
    student, teacher = make_head(0, vocab, 6, **extras), make_head(9, teacher_vocab, 5, **extras)
    hidden, teacher_hidden = draw(2, 9, 6).requires_grad_(), draw(3, 9, 5)
    shared = min(vocab, teacher_vocab)
    sampled = torch.randint(0, shared, (9,), generator=torch.Generator().manual_seed(4))
    teacher_logits = whole_logits(teacher_hidden, teacher, 0.7).detach()
    sampled[:3] = teacher_logits[:3, :shared].argmax(-1)
    target = likeliest(teacher_hidden, teacher, sampled, k, shared, 0.7)
    want = likeliest_ids(teacher_logits[:, :shared], sampled, k)
    assert target.ids.dtype == torch.int32
    assert target.ids.tolist() == want.tolist()
    torch.testing.assert_close(target.logps, bucketed_logps(teacher_logits, want), rtol=1e-5, atol=1e-5)
    own, entropy = bucketed(hidden, student, target.ids, 0.7)
    logits = whole_logits(hidden, student, 0.7)
    expected = bucketed_logps(logits, want)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    logps = logits.log_softmax(-1)
    torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(-1), rtol=1e-5, atol=1e-5)
    inputs = [x for x in (hidden, student.weight, student.bias) if x is not None]
    weights = draw(5, *own.shape).masked_fill(own.detach() == -math.inf, 0.0)
    got = torch.autograd.grad((own.masked_fill(own == -math.inf, 0.0) * weights).sum(), inputs)
    want = torch.autograd.grad((expected.masked_fill(expected == -math.inf, 0.0) * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_gradcheck(extras, small_tiles):
    head = make_head(0, 11, 3, dtype=torch.float64, **extras)
    hidden = draw(2, 5, 3, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 3, 7], [10, 9, NO_ID], [4, 5, 6], [8, 0, 1], [1, 10, NO_ID]])

    def logps(hidden, weight, bias):
        found = bucketed(hidden, head._replace(weight=weight, bias=bias), ids, 0.7)[0]
        return found.masked_fill(found == -math.inf, 0.0)

    assert torch.autograd.gradcheck(logps, (hidden, head.weight, head.bias))


def per_token(estimator, student, teacher, ids, gated, factor, reference=None, k=None, temperature=0.7):
    """Loss of positions (B, T) by the trainer's own functions: states and heads, factors given."""
    given = gated, temperature, lambda own, other: factor
    if estimator == "full":
        return full_per_token(*student, [Target(*teacher)], ids, *given, reference)[0]
    flat = likeliest(teacher[0].flatten(0, 1), teacher[1], ids.flatten(), k, len(teacher[1].weight), temperature)
    target = Buckets(*(part.view(*ids.shape, -1) for part in flat))
    return top_k_per_token(*student, target, ids, *given, reference)[0]


@pytest.mark.parametrize("initial", [False, True], ids=["current", "initial"])
def test_is_the_full_estimator_where_k_is_the_vocabulary(initial, small_tiles):
    """Value, and gradient to states and head, with factors of positions, at temperature 0.7."""
    shape, vocab = (2, 5), 19
    student, teacher = make_head(0, vocab, 6, bias=True), make_head(9, vocab, 5)
    hidden, others = draw(2, *shape, 6).requires_grad_(), draw(3, *shape, 5)
    ids = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(4))
    gated = torch.ones(shape, dtype=torch.bool)
    gated[1, 3:] = False
    factor = torch.tensor([1.8, 1.0, 0.0, 0.6, 1.2]).expand(shape)
    reference = (draw(7, *shape, 4), make_head(8, vocab, 4)) if initial else None
    losses = [
        per_token(name, (hidden, student), (others, teacher), ids, gated, factor, reference, k=vocab)
        for name in ("full", "top_k")
    ]
    assert losses[0].abs().sum() > 1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=2e-6)
    inputs = hidden, student.weight, student.bias
    want, got = (torch.autograd.grad(loss.sum(), inputs) for loss in losses)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("initial", [False, True], ids=["current", "initial"])
def test_is_the_loss_on_plain_logits(initial, small_tiles):
    """Of `SignGatedLoss`, which decides by itself; with the initial reference soft-capped heads are no obstacle."""
    shape, vocab = (2, 5), 19
    student, teacher = make_head(0, vocab, 6, softcap=4.0), make_head(9, vocab, 5, softcap=4.0)
    hidden, others = draw(2, *shape, 6).requires_grad_(), draw(3, *shape, 5)
    ids = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(4))
    mask, labels = torch.ones(shape), torch.tensor([1.0, 0.0])
    reference = (draw(7, *shape, 4), make_head(8, vocab, 4, softcap=4.0)) if initial else None
    logits = [whole_logits(of, head, 1.0) for of, head in [(hidden, student), (others, teacher)]]
    initial_logits = None if reference is None else whole_logits(*reference, 1.0)
    loss_fn = SignGatedLoss(estimator="top_k", top_k=4, temperature=0.7)
    loss = loss_fn(*logits, ids, labels, mask, initial_logits).loss
    tokens = [(x / 0.7).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in logits]
    factor = loss_fn.decide(*tokens, labels, mask).factor
    assert {1.0, 1.8} == {round(value, 4) for value in factor.flatten().tolist()}
    got = per_token("top_k", (hidden, student), (others, teacher), ids, mask.bool(), factor, reference, k=4)
    assert got.sum().item() / 10 == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.sum() / 10, (hidden, student.weight)),
        torch.autograd.grad(loss, (hidden, student.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("initial", [False, True], ids=["current", "initial"])
def test_where_k_holds_all_of_the_mass(initial):
    """Finite values and gradients, and 11.5 nats for the mass that the student has elsewhere."""
    sure, open_ = torch.tensor([60.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, -1.0])
    ids = torch.tensor([[[0, NO_ID]]])
    for student, teacher in ((open_, sure), (sure, open_), (sure, sure)):
        z = student.clone().requires_grad_()
        own, target = (bucketed_logps(x, ids[0, 0]).view(1, 1, -1) for x in (z, teacher))
        loss = bucketed_divergence(own, target, torch.full((1, 1), 1.8), target if initial else None)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        if teacher is sure and student is open_ and not initial:
            stays = student.softmax(-1)[0].item()
            leaves = (1 - stays) * math.log((1 - stays) / REST_FLOOR)
            assert loss.item() == pytest.approx(1.8 * (stays * math.log(stays) + leaves), rel=1e-4)
    served = bucketed_answer(torch.tensor(0), torch.tensor(0.0), torch.tensor([0]), torch.tensor([0.0]), 4)
    assert served.logps.tolist() == [0.0, -math.inf, -math.inf]


def test_the_rest_is_exact_however_little_is_left(small_tiles):
    """e^-40 of the mass, of which 1 less the sum of K in float32 would keep nothing."""
    head = Head(torch.tensor([[40.0]] + [[0.0]] * 16), None)
    logps, _ = bucketed(torch.ones(1, 1), head, torch.tensor([[0, NO_ID]]), 1.0)
    assert logps[0, -1].item() == pytest.approx(-40 + math.log(16), rel=1e-6)
    found = likeliest(torch.ones(1, 1), head, torch.tensor([3]), 1, 17, 1.0)
    assert found.ids.tolist() == [[3, 0]]
    assert found.logps[0, -1].item() == pytest.approx(-40 + math.log(15), rel=1e-6)


def test_logits_are_not_rounded_to_the_states_dtype():
    """Of bfloat16 states and weights, logits near 30: the sum of K's and the rest's probabilities would show it too."""
    hidden, weight = 3 * draw(0, 5, 64).bfloat16(), draw(1, 19, 64).bfloat16()
    ids = torch.randint(0, 19, (5, 3), generator=torch.Generator().manual_seed(2))
    ids[:, 1], ids[:, 2] = (ids[:, 0] + 1) % 19, (ids[:, 0] + 2) % 19
    got, _ = bucketed(hidden, Head(weight), ids, 1.0)
    torch.testing.assert_close(got, bucketed_logps(hidden.float() @ weight.float().T, ids), rtol=1e-5, atol=1e-4)


def test_log1mexp():
    values = torch.tensor([-1e-6, -1e-3, -0.5, -1.0, -20.0, -100.0, 0.0, 1e-7], dtype=torch.float64)
    got = log1mexp(values.float())
    want = torch.log(-torch.expm1(values[:6].float().double()))
    torch.testing.assert_close(got[:6].double(), want, rtol=1e-6, atol=1e-40)
    assert got[6:].tolist() == [-math.inf, -math.inf]


def test_a_teachers_answer_is_bucketed():
    """Any order, the sampled id among them or not; without probability, or beyond the vocabulary: in the rest."""
    top_ids = torch.tensor([[4, 2], [4, 2], [9, 2], [4, 2]])
    top_logps = torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.5, 0.25], [0.5, 0.0]]).log()
    answer = bucketed_answer(
        torch.tensor([2, 3, 3, 3]), torch.tensor([0.25, 0.125, 0.125, 0.125]).log(), top_ids, top_logps, 8
    )
    assert answer.ids.tolist() == [[2, 4, NO_ID], [3, 4, 2], [3, NO_ID, 2], [3, 4, NO_ID]]
    want = [[0.25, 0.5, 0, 0.25], [0.125, 0.5, 0.25, 0.125], [0.125, 0, 0.25, 0.625], [0.125, 0.5, 0, 0.375]]
    torch.testing.assert_close(answer.logps.exp(), torch.tensor(want))


def test_no_positions_give_a_zero_gradient():
    """A rank with only masked rows still runs its backward; what it holds there may be anything."""
    head, hidden = make_head(0, 19, 6), draw(2, 1, 4, 6).requires_grad_()
    target = Buckets(torch.zeros(1, 4, 3, dtype=torch.int32), torch.full((1, 4, 4), math.nan))
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    losses, entropy, rest = top_k_per_token(
        hidden, head, target, torch.zeros(1, 4).long(), nothing, 1.0, lambda own, other: own
    )
    losses.sum().backward()
    assert (losses == 0).all()
    assert (entropy == 0).all()
    assert (rest == 0).all()
    assert (hidden.grad == 0).all()
    assert (head.weight.grad == 0).all()


def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one(monkeypatch):
    """As LoRA's is: of the three sums only that of the states is kept."""
    shapes = []
    kept = top_k._add
    monkeypatch.setattr(
        top_k, "_add", lambda sums, *given: shapes.append([s is not None for s in sums]) or kept(sums, *given)
    )
    head, hidden = Head(draw(0, 19, 6), draw(1, 19)), draw(2, 3, 6).requires_grad_()
    bucketed(hidden, head, torch.tensor([[0, 1], [2, 3], [4, 5]]), 1.0)[0].sum().backward()
    assert shapes == [[True, False, False]]
    assert hidden.grad.abs().sum() > 0


def test_k_beyond_the_vocabulary_is_named():
    logits, ids = torch.randn(1, 2, 5), torch.zeros(1, 2).long()
    with pytest.raises(ValueError, match="`top_k` is 6, but the shared vocabulary has 5"):
        SignGatedLoss(estimator="top_k", top_k=6)(logits, logits, ids, torch.tensor([1.0]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="`top_k` must be a whole number >= 1"):
        SignGatedLoss(estimator="top_k", top_k=0)
