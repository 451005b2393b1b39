"""The gate's rules, signs and forms: against a loop over tokens in plain Python, and against each other."""

import math
import statistics
from functools import partial

import pytest
import torch

from sg_opd import SignGatedLoss
from sg_opd.method import loss as loss_module
from sg_opd.method.gate import GateSettings, decide, group_sign, uniform_groups, verdict_sign
from sg_opd.method.loss import SignGatedLoss as Loss

NAN = math.nan
LENGTH, WIDTH = 6, 7
SIGNS = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0])
LENGTHS = [6, 5, 4, 1, 6, 0]  # the fourth has one token, the last none; the fifth's teacher is the student
RULES = {
    "sign": {"extrapolation": 1.8, "interpolation": 0.6, "dead_zone": 0.3},
    "neutral": {"extrapolation": 1.0, "interpolation": 0.0, "neutral": 0.0},
    "sigmoid": {"rule": "sigmoid", "beta": 0.7},
    "sharp": {"rule": "sigmoid", "beta": 1e5},  # every weight of a token in conflict is too small for a number
    "row": {"rule": "row", "row_threshold": 1.0, "neutral": 0.5},
    "power": {"extrapolation": 1.5, "log_ratio_form": "power", "log_ratio_power": 0.3},
    "reward": {"extrapolation": 1.5, "advantage_weight": 0.7},
    "clip": {"extrapolation": 1.5, "log_ratio_clip": 0.4, "advantage_weight": 0.7},
}
FACTORS = [name for name in RULES if name not in ("power", "reward", "clip")]  # which the full estimator takes
ADVANTAGES = torch.tensor([0.9, -1.3, 0.0, 0.4, -0.2, 0.1])


def make_batch(dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(6, LENGTH, WIDTH, generator=draw, dtype=dtype) for _ in range(2))
    teacher[4] = student[4]
    teacher[0, 1] = student[0, 1]  # of a row with mass one token without
    ids = torch.randint(0, WIDTH, (6, LENGTH), generator=draw)
    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)
    return student, teacher, ids, mask


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def factors_of(deltas, sign, settings):
    """The factors of one row's trained tokens, by the formulas of the method's page."""
    if settings.rule == "row":
        agrees = sign * sum(deltas) > settings.row_threshold
        return [settings.neutral if sign == 0 else float(agrees)] * len(deltas)
    if settings.rule == "sigmoid":
        if sign == 0 or not deltas:
            return [1.0] * len(deltas)
        scale = max(statistics.median_low(map(abs, deltas)), 1e-8)
        weights = [sigmoid(settings.beta * sign * delta / scale) for delta in deltas]
        mass = sum(map(abs, deltas))
        kept = sum(w * abs(delta) for w, delta in zip(weights, deltas, strict=True))
        return [w * mass / kept if kept else 1.0 for w in weights]
    if settings.extrapolation == settings.interpolation:
        return [settings.extrapolation] * len(deltas)
    side = [0 if abs(delta) <= settings.dead_zone else sign * delta for delta in deltas]
    return [settings.neutral if s == 0 else settings.extrapolation if s > 0 else settings.interpolation for s in side]


def loop(student, teacher, ids, mask, settings):
    """Loss and gradient to the student's logits, token by token."""
    tokens = int(mask.sum())
    loss, grad = 0.0, torch.zeros_like(student)
    for row, sign in enumerate(SIGNS.tolist()):
        trained = range(LENGTHS[row])
        own, other = (x[row].log_softmax(-1).tolist() for x in (student, teacher))
        taken = [(own[t][ids[row, t]], other[t][ids[row, t]]) for t in trained]
        factors = factors_of([b - a for a, b in taken], sign, settings)
        for t, factor, (a, b) in zip(trained, factors, taken, strict=True):
            p = [math.exp(x) for x in own[t]]
            if settings.estimator == "full":
                kl = sum(q * (x - y) for q, x, y in zip(p, own[t], other[t], strict=True))
                loss += factor * kl / tokens
                for v in range(WIDTH):
                    grad[row, t, v] = factor * p[v] * (own[t][v] - other[t][v] - kl) / tokens
                continue
            preference = b - a
            if settings.log_ratio_form == "power":
                preference = math.exp(b) ** settings.log_ratio_power - math.exp(a) ** settings.log_ratio_power
            clip = settings.log_ratio_clip or math.inf
            advantage = factor * max(-clip, min(clip, preference))
            advantage += settings.advantage_weight * ADVANTAGES[row].item()
            loss -= advantage / tokens
            for v in range(WIDTH):
                grad[row, t, v] = -advantage * ((v == int(ids[row, t])) - p[v]) / tokens
    return loss, grad


CASES = [(name, "sampled") for name in RULES] + [(name, "full") for name in FACTORS]


@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_value_and_gradient_equal_a_loop_over_tokens(name, estimator):
    student, teacher, ids, mask = make_batch()
    settings = GateSettings(**{"estimator": estimator, **RULES[name]})
    labels = torch.where(SIGNS == 0, NAN, (SIGNS + 1) / 2).double()
    z = student.clone().requires_grad_()
    out = SignGatedLoss(settings)(z, teacher, ids, labels, mask, group_advantages=ADVANTAGES.double())
    out.loss.backward()
    loss, grad = loop(student, teacher, ids, mask, settings)
    if name == "sharp":  # the loop's weights underflow where ours are logarithms
        z.grad[1], grad[1] = 0.0, 0.0
    else:
        assert out.loss.item() == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(z.grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_weights_keep_a_rows_mass(dtype):
    """Even where all weights are too small for a number: the largest of them take the whole mass."""
    student, teacher, ids, mask = make_batch(dtype)
    logps = [x.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in (student, teacher)]
    for beta in (1e-3, 1.0, 1e5 if dtype == torch.float64 else 1e2):  # logarithms of 1e5 have two digits in float32
        decision = decide(*logps, SIGNS.to(dtype), mask, GateSettings(rule="sigmoid", beta=beta))
        assert decision.factor.isfinite().all()
        assert decision.advantage.isfinite().all()
        mass = (decision.advantage.abs() * mask).sum(1), (decision.delta.abs() * mask).sum(1)
        torch.testing.assert_close(*mass, rtol=1e-4, atol=1e-6)
        assert (decision.factor[2] == 1).all()  # abstained
        assert (decision.factor[4] == 1).all()  # nothing to teach
        assert decision.advantage[0, 1] == 0.0
        assert decision.factor[3, 0].item() == pytest.approx(1.0, abs=1e-5)  # one token


def test_a_sharp_sigmoid_drops_conflict():
    """delta 1, -1, 0.5, -0.5, correct, beta 1e4: the mass of 3 lies on the two in consensus, equally: factor 2."""
    delta = torch.tensor([[1.0, -1.0, 0.5, -0.5]], dtype=torch.float64)
    settings = GateSettings(rule="sigmoid", beta=1e4)
    decision = decide(torch.zeros_like(delta), delta, torch.ones(1), torch.ones(1, 4), settings)
    torch.testing.assert_close(decision.factor, torch.tensor([[2.0, 0.0, 2.0, 0.0]], dtype=torch.float64))


def test_rows_by_hand():
    """Sums 3, -1, 3, -1, 0.5; correct, correct, incorrect, incorrect, abstained. -1 is not beyond a threshold of 1."""
    teacher = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 2.0], [1.0, -2.0], [0.5, 0.0]])
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    for threshold, expected in ((0.0, [1.0, 0.0, 0.0, 1.0, 1.0]), (1.0, [1.0, 0.0, 0.0, 0.0, 1.0])):
        settings = GateSettings(rule="row", row_threshold=threshold)
        decision = decide(torch.zeros(5, 2), teacher, signs, torch.ones(5, 2), settings)
        assert decision.factor[:, 0].tolist() == decision.factor[:, 1].tolist() == expected
        assert decision.case[0].tolist() == [1, 1]
        assert decision.case[1].tolist() == [-1, -1]  # dropped
        assert decision.case[4].tolist() == [0, 0]


def test_a_row_is_its_trained_tokens():
    """The sum of what is trained is 1, with what is not it would be -4."""
    delta, mask = torch.tensor([[1.0, -5.0]]), torch.tensor([[1, 0]])
    assert decide(torch.zeros(1, 2), delta, torch.ones(1), mask, GateSettings(rule="row")).factor[0, 0] == 1.0


@pytest.mark.parametrize("rule", ["sigmoid", "row"])
def test_infinities_are_clipped_before_a_row_is_weighed(rule):
    """A token that the teacher excludes, and anything where nothing is trained."""
    delta = torch.tensor([[0.5, -math.inf, -0.25, NAN, math.inf]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    settings = GateSettings(rule=rule, log_ratio_clip=2.0, beta=1.0)
    decision = decide(torch.zeros(1, 5), delta, -torch.ones(1), mask, settings)
    assert decision.advantage[0, :3].isfinite().all()
    if rule == "sigmoid":  # 0.5, 2 and 0.25: the mass that is trained on
        assert decision.advantage[0, :3].abs().sum().item() == pytest.approx(2.75)
    else:  # they sum to -1.75, and the answer is wrong
        assert decision.advantage[0, :3].tolist() == [0.5, -2.0, -0.25]


def test_the_least_scale_is_below_what_deltas_are():
    """delta 1e-6 and -1e-6, correct, beta 1: x is 1 and -1, so the factors are 2 sigmoid(1) and 2 sigmoid(-1)."""
    delta = torch.tensor([[1e-6, -1e-6]], dtype=torch.float64)
    settings = GateSettings(rule="sigmoid", beta=1.0)
    factor = decide(torch.zeros_like(delta), delta, torch.ones(1), torch.ones(1, 2), settings).factor[0].tolist()
    assert factor == pytest.approx([2 * sigmoid(1.0), 2 * sigmoid(-1.0)])


def test_power_and_the_initial_reference_by_hand():
    """Probabilities 1/4, 9/16 and 1/16, a = 1/2, factor 1.5: (3/4 - 1/2) + 0.5 * (3/4 - 1/4) = 1/2."""
    student, teacher, reference = (torch.tensor([[math.log(p)]]) for p in (1 / 4, 9 / 16, 1 / 16))
    settings = GateSettings(1.5, 1.0, log_ratio_form="power", reference="initial")
    decision = decide(student, teacher, torch.ones(1), torch.ones(1, 1), settings, reference)
    assert decision.advantage.item() == pytest.approx(0.5)


def test_a_clip_counts_where_it_changed_the_advantage():
    """The log-ratio to the reference is beyond the clip, and enters where the factor is not 1."""
    for sign, expected in ((-1.0, 1.0), (1.0, 0.0)):
        settings = GateSettings(1.8, 1.0, log_ratio_clip=1.0)
        logps = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
        decision = decide(*logps, torch.tensor([sign]), torch.ones(1, 1), settings, torch.tensor([[1.0]]))
        assert decision.clipped.item() == expected


def test_the_group_sign_by_hand():
    """Groups of four: mixed; all correct; both verdicts and an abstention; abstentions alone; the student's all wrong,
    and a teacher row (last) that is part of no mean and keeps its own sign."""
    labels = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, NAN, 1, 0, 0, NAN, NAN, NAN, NAN, 0, 0, 0, 1])
    teacher = torch.zeros(20, dtype=torch.bool)
    teacher[19] = True
    signs = group_sign(labels, 4, teacher)
    assert signs.tolist() == [1, -1, -1, -1, 0, 0, 0, 0, 0, 1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 1]
    uniform = uniform_groups(labels, 4, teacher)
    assert uniform.view(5, 4)[:, 0].tolist() == [False, True, False, True, True]
    assert (uniform.view(5, 4) == uniform.view(5, 4)[:, :1]).all()
    assert group_sign(labels, 4)[16:].tolist() == [-1, -1, -1, 1]  # as a student's it makes the group a mixed one


def test_group_and_verdict_sign_agree_in_mixed_groups():
    labels = (
        torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(0))
        .float()
        .masked_fill_(torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.1, NAN)
    )
    labels = torch.where(labels == 2, 1.0, labels)
    none = torch.zeros(4000, dtype=torch.bool)
    mixed = ~uniform_groups(labels, 8, none)
    assert 0 < mixed.sum() < 4000
    assert group_sign(labels, 8)[mixed].equal(verdict_sign(labels)[mixed])
    assert (group_sign(labels, 8)[~mixed] == 0).all()


def test_grpd_is_an_indicator_of_the_group():
    """`1[s delta > 0]` with the group's sign: a uniform group teaches nothing."""
    student, teacher, ids, mask = make_batch()
    logps = [x.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in (student, teacher)]
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, NAN])
    signs = group_sign(labels, 3)
    decision = decide(*logps, signs, mask, GateSettings(1.0, 0.0, neutral=0.0))
    delta = logps[1] - logps[0]
    torch.testing.assert_close(decision.advantage, (signs.unsqueeze(1) * delta > 0) * delta)
    assert (decision.advantage[:3] == 0).all()


def test_sigmoid_of_beta_zero_is_opd():
    student, teacher, ids, mask = make_batch()
    logps = [x.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in (student, teacher)]
    zero = decide(*logps, SIGNS, mask, GateSettings(rule="sigmoid", beta=0.0))
    plain = decide(*logps, SIGNS, mask, GateSettings(1.0, 1.0))
    torch.testing.assert_close(zero.advantage * mask, plain.advantage * mask)


def test_power_is_bounded_and_of_deltas_sign():
    student, teacher = torch.tensor([[-50.0, -0.1, -3.0]]), torch.tensor([[-0.1, -50.0, -3.0]])
    settings = GateSettings(1.0, 1.0, log_ratio_form="power", log_ratio_power=0.5)
    advantage = decide(student, teacher, torch.ones(1), torch.ones(1, 3), settings).advantage[0].tolist()
    expected = math.exp(-0.05) - math.exp(-25)
    assert advantage == pytest.approx([expected, -expected, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", FACTORS)
def test_any_split_gives_the_same_gradient(name):
    """Rows are weighed by themselves, and the group's signs are taken before the split."""
    student, teacher, ids, mask = make_batch()
    labels = torch.where(SIGNS == 0, NAN, (SIGNS + 1) / 2).double()
    signs = group_sign(labels, 3)
    for estimator in ("sampled", "full"):
        loss_fn = SignGatedLoss(**{"estimator": estimator, "signal": "group", **RULES[name]})
        gradients = []
        for split in ([6], [2, 4], [1] * 6):
            z = student.clone().requires_grad_()
            parts = zip(*(x.split(split) for x in (z, teacher, ids, labels, mask, signs)), strict=True)
            given = [(part[:-1], part[-1]) for part in parts]
            sum(loss_fn(*part, num_items_in_batch=mask.sum(), signs=s).loss for part, s in given).backward()
            gradients.append(z.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_gradcheck(name, estimator, monkeypatch):
    """The module's gradient, with its decision as it was made before the update."""
    student, teacher, ids, mask = make_batch()
    labels = torch.where(SIGNS == 0, NAN, (SIGNS + 1) / 2).double()
    loss_fn, kept = SignGatedLoss(**{"estimator": estimator, **RULES[name]}), []

    def once(*given):
        if not kept:
            kept.append(decide(*given))
        return kept[0]

    monkeypatch.setattr(loss_module, "decide", once)
    given = teacher, ids, labels, mask
    forward = partial(loss_fn, group_advantages=ADVANTAGES.double())
    # the value's own derivative is the policy gradient's at ratio 1, which the loss has by its old log-probs
    value = forward(student, *given).loss
    z = student.clone().requires_grad_()
    if estimator == "full":
        assert torch.autograd.gradcheck(lambda x: forward(x, *given).loss, (z,))
        return
    logps = student.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    def surrogate(x):
        new = x.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return -((new - logps).exp() * kept[0].advantage * mask).sum() / mask.sum()

    assert torch.autograd.gradcheck(surrogate, (z,))
    assert surrogate(student).item() == pytest.approx(value.item(), rel=1e-12)
    (expected,) = torch.autograd.grad(surrogate(z), z)
    (got,) = torch.autograd.grad(forward(z, *given).loss, z)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_all_masked_gives_zero_loss_and_zero_gradient(name):
    student, teacher, ids, mask = make_batch()
    labels = torch.where(SIGNS == 0, NAN, (SIGNS + 1) / 2).double()
    z = student.requires_grad_()
    out = SignGatedLoss(**RULES[name])(z, teacher, ids, labels, mask & False, group_advantages=ADVANTAGES.double())
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert (z.grad == 0).all()


def test_what_is_missing_is_named():
    student, teacher, ids, mask = make_batch()
    labels = torch.ones(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`signs`.*group_sign"):
        Loss(signal="group")(student, teacher, ids, labels, mask)
    with pytest.raises(ValueError, match="7 rows, which are no whole groups of 4"):
        group_sign(torch.ones(7), 4)
    with pytest.raises(ValueError, match="`log_ratio_form`='power'"):
        Loss(rule="sigmoid", log_ratio_form="power")
    with pytest.raises(ValueError, match="group_advantages"):
        Loss(advantage_weight=0.1)(student, teacher, ids, labels, mask)
    with pytest.raises(ValueError, match="`rule`='sigmoid'"):
        Loss(rule="sigmoid")(student, teacher, ids, labels, mask, student)
