"""SignGatedLoss and the functions that decide, against numbers by hand and a loop over tokens in plain Python."""

import math

import pytest
import torch

from sg_opd import SignGatedLoss
from sg_opd.method.gate import GateSettings, decide, verdict_sign
from sg_opd.method.loss import gated_divergence, policy_gradient
from sg_opd.method.rules import GATE_RULES, cases

NAN = math.nan


def log_softmax(row):
    top = max(row)
    log_z = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - log_z for x in row]


def loop_reference(student, teacher, ids, labels, mask, reference=None, *, settings, temperature, divisor=None):
    """Loss and gradient to the student's logits, token by token in Python floats; the formulas of the method's page."""
    extrapolation, interpolation, estimator, dead_zone, clip = settings
    batch, length, width = student.shape
    tokens = float(mask.sum()) if divisor is None else float(divisor)
    shared = min(width, teacher.shape[-1])
    loss, grad = 0.0, torch.zeros(student.shape, dtype=torch.float64)
    for b in range(batch):
        label = labels[b].item()
        sign = 0 if math.isnan(label) else 1 if label == 1.0 else -1
        for t in range(length):
            if not mask[b, t]:
                continue
            y = int(ids[b, t])
            s = [x / temperature for x in student[b, t].tolist()]
            q = [x / temperature for x in teacher[b, t].tolist()]
            r = None if reference is None else [x / temperature for x in reference[b, t].tolist()]
            if estimator == "full":
                s, q, r = s[:shared], q[:shared], None if r is None else r[:shared]
            log_s, log_q = log_softmax(s), log_softmax(q)
            delta = log_q[y] - log_s[y]
            if extrapolation == interpolation:
                factor = extrapolation
            elif sign == 0 or abs(delta) <= dead_zone:
                factor = 1.0
            else:
                factor = extrapolation if sign * delta > 0 else interpolation
            if estimator == "sampled":
                clipped = delta if clip is None else max(-clip, min(clip, delta))
                reward = delta if r is None else log_q[y] - log_softmax(r)[y]
                reward = reward if clip is None else max(-clip, min(clip, reward))
                advantage = clipped + (factor - 1) * reward
                loss -= advantage / tokens
                for v in range(width):
                    grad[b, t, v] = -advantage * ((v == y) - math.exp(log_s[v])) / temperature / tokens
                continue
            if r is not None:
                log_r = log_softmax(r)
                log_q = log_softmax([factor * a + (1 - factor) * c for a, c in zip(log_q, log_r, strict=True)])
                factor = 1.0
            kl = sum(math.exp(a) * (a - c) for a, c in zip(log_s, log_q, strict=True))
            loss += factor * kl / tokens
            for v in range(shared):
                grad[b, t, v] = factor * math.exp(log_s[v]) * (log_s[v] - log_q[v] - kl) / temperature / tokens
    return loss, grad


def make_batch(seed, batch=3, length=5, width=7, teacher_width=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda v: (2 * torch.randn(batch, length, v, generator=generator)).to(dtype)  # noqa: E731
    student, teacher, reference = draw(width), draw(teacher_width or width), draw(width)
    ids = torch.randint(0, min(width, teacher_width or width), (batch, length), generator=generator)
    labels = torch.tensor([1.0, 0.0, NAN] * batch)[:batch]
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    return student, teacher, reference, ids, labels, mask


def test_three_tokens_by_hand():
    """Two ids, one completion called correct (s = +1), extrapolation 2, interpolation 1, three sampled tokens y = 0.

    pi_S(y) = 1/2 at each: student logits (0, 0). pi_T(y) by teacher logits (log a, 0), pi_T(y) = a / (a + 1):
      t=1: a = 3   pi_T = 3/4  delta = log(3/4) - log(1/2) = log(3/2)  > 0  consensus, factor 2, A = 2 log(3/2)
      t=2: a = 1/3 pi_T = 1/4  delta = log(1/2)                        < 0  conflict,  factor 1, A = -log 2
      t=3: a = 1   pi_T = 1/2  delta = 0                                    neutral,   factor 1, A = 0
    loss = -(2 log(3/2) - log 2 + 0) / 3. d loss / d z(y) = -A (1 - 1/2) / 3, and minus that for the other id.
    """
    student = torch.zeros(1, 3, 2, requires_grad=True)
    teacher = torch.tensor([[[math.log(3), 0], [-math.log(3), 0], [0, 0]]])
    ids, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3)
    out = SignGatedLoss(extrapolation=2.0, interpolation=1.0)(student, teacher, ids, torch.tensor([1.0]), mask)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-(2 * math.log(1.5) - math.log(2)) / 3, abs=1e-6)
    expected = [-2 * math.log(1.5) / 6, math.log(2) / 6, 0.0]
    torch.testing.assert_close(student.grad[0, :, 0], torch.tensor(expected))
    torch.testing.assert_close(student.grad[0, :, 1], -torch.tensor(expected))
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["gate/consensus"] == metrics["gate/conflict"] == metrics["gate/neutral"] == pytest.approx(1 / 3)
    assert metrics["gate/factor"] == pytest.approx(4 / 3)
    sizes = math.log(1.5), math.log(2)
    assert metrics["gate/consensus_delta"] == pytest.approx(sizes[0] / sum(sizes))
    assert metrics["gate/conflict_delta"] == pytest.approx(sizes[1] / sum(sizes))
    assert metrics["delta/p50"] == pytest.approx(0.0, abs=1e-7)


def test_full_estimator_by_hand():
    """One position, y = 0, verdict incorrect (s = -1), factors 2 and 0.5; pi_S = (1/2, 1/2), pi_T = (3/4, 1/4).

    delta = log(3/2) > 0, so s * delta < 0: conflict, factor 1/2. KL(pi_S || pi_T) = 1/2 log(2/3) + 1/2 log 2
    = 1/2 log(4/3); loss = 1/4 log(4/3).
    """
    teacher = torch.tensor([[[math.log(3), 0.0]]])
    loss_fn = SignGatedLoss(extrapolation=2.0, interpolation=0.5, estimator="full")
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    out = loss_fn(torch.zeros(1, 1, 2), teacher, ids, torch.tensor([0.0]), mask)
    assert out.loss.item() == pytest.approx(0.25 * math.log(4 / 3), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("initial", [False, True], ids=["current", "initial"])
@pytest.mark.parametrize(
    ("estimator", "dead_zone", "clip"), [("sampled", 0.0, None), ("sampled", 0.8, 0.5), ("full", 0.8, None)]
)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 2), (4, 3, 33)], ids=str)
def test_value_and_gradient_equal_a_loop_over_tokens(shape, estimator, dead_zone, clip, initial, temperature, dtype):
    student, teacher, reference, ids, labels, mask = make_batch(sum(shape), *shape, dtype=dtype)
    student.requires_grad_()
    loss_fn = SignGatedLoss(
        extrapolation=1.8,
        interpolation=0.6,
        estimator=estimator,
        dead_zone=dead_zone,
        log_ratio_clip=clip,
        temperature=temperature,
    )
    reference = reference if initial else None
    out = loss_fn(student, teacher, ids, labels, mask, reference)
    out.loss.backward()
    loss, grad = loop_reference(
        student.detach().double(),
        teacher.double(),
        ids,
        labels,
        mask,
        None if reference is None else reference.double(),
        settings=(1.8, 0.6, estimator, dead_zone, clip),
        temperature=temperature,
    )
    assert out.loss.dtype == torch.float32  # computed in float32 at least; only the gradient is rounded to bf16
    assert out.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(student.grad.double(), grad, **tolerance)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
@pytest.mark.parametrize(("width", "teacher_width"), [(7, 5), (5, 7)])
def test_unequal_vocabularies(width, teacher_width, estimator):
    """Sampled: each model over its own head. Full: both over the shared ids, the others get no gradient."""
    student, teacher, _, ids, labels, mask = make_batch(3, width=width, teacher_width=teacher_width)
    student.requires_grad_()
    out = SignGatedLoss(estimator=estimator)(student, teacher, ids, labels, mask)
    out.loss.backward()
    settings = (1.8, 1.0, estimator, 0.0, None)
    loss, grad = loop_reference(
        student.detach().double(), teacher.double(), ids, labels, mask, settings=settings, temperature=1.0
    )
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(student.grad.double(), grad, rtol=1e-5, atol=1e-6)
    if estimator == "full" and width > teacher_width:
        assert (student.grad[..., teacher_width:] == 0).all()


@pytest.mark.parametrize("initial", [False, True], ids=["current", "initial"])
def test_gradcheck(initial):
    """What is differentiated, with the decision fixed beforehand, in float64."""
    student, teacher, reference, *_ = make_batch(5, dtype=torch.float64)
    factor = torch.tensor([[1.8, 1.0, 0.0, 1.8, 0.5]] * 3, dtype=torch.float64)
    student.requires_grad_()
    given = reference if initial else None
    assert torch.autograd.gradcheck(lambda z: gated_divergence(z, teacher, factor, given), (student,))
    logps = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    old = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: policy_gradient(x, factor, old), (logps,))


@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_expectation_of_the_sampled_gradient_is_the_full_gradient(factor):
    """Constant factor, current reference: the sampled gradient's mean over y ~ pi_S, position by position."""
    student, teacher, *_ = make_batch(11, batch=1, length=4, width=6, dtype=torch.float64)
    mask, labels = torch.ones(1, 4), torch.tensor([1.0], dtype=torch.float64)
    probabilities = student.softmax(-1)
    expectation = torch.zeros_like(student)
    for token in range(6):
        z = student.clone().requires_grad_()
        ids = torch.full((1, 4), token)
        SignGatedLoss(extrapolation=factor, interpolation=factor)(z, teacher, ids, labels, mask).loss.backward()
        expectation += probabilities[..., token : token + 1] * z.grad
    z = student.clone().requires_grad_()
    ids = torch.zeros(1, 4, dtype=torch.long)
    SignGatedLoss(extrapolation=factor, interpolation=factor, estimator="full")(
        z, teacher, ids, labels, mask
    ).loss.backward()
    torch.testing.assert_close(expectation, z.grad, rtol=1e-10, atol=1e-12)


def test_policy_gradient_by_hand():
    """rho = exp(log 2) = 2 and A = 3: loss -6, d/d logp = -rho A = -6. Without old log-probs rho = 1: -3 and -3."""
    logps = torch.tensor([[math.log(0.5)]], requires_grad=True)
    loss = policy_gradient(logps, torch.tensor([[3.0]]), torch.tensor([[math.log(0.25)]]))
    assert loss.item() == pytest.approx(-6.0)
    assert torch.autograd.grad(loss.sum(), logps)[0].item() == pytest.approx(-6.0)
    loss = policy_gradient(logps, torch.tensor([[3.0]]))
    assert (loss.item(), torch.autograd.grad(loss.sum(), logps)[0].item()) == (-3.0, -3.0)


def test_gradient_reaches_the_student_only():
    for estimator in ("sampled", "full"):
        student, teacher, reference, ids, labels, mask = make_batch(2)
        for logits in (student, teacher, reference):
            logits.requires_grad_()
        SignGatedLoss(estimator=estimator)(student, teacher, ids, labels, mask, reference).loss.backward()
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None
        assert reference.grad is None


def test_abstention_is_plain_distillation():
    student, teacher, _, ids, _, mask = make_batch(4)
    abstained = torch.full((3,), NAN)
    gated = SignGatedLoss(extrapolation=5.0, interpolation=0.2)(student, teacher, ids, abstained, mask)
    plain = SignGatedLoss(extrapolation=1.0, interpolation=1.0)(student, teacher, ids, abstained, mask)
    assert gated.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert gated.metrics["gate/neutral"].item() == 1.0
    assert gated.metrics["gate/factor"].item() == 1.0


def test_equal_factors_are_no_gate():
    """Not even on neutral tokens: every factor is that value."""
    _, _, _, _, labels, _ = make_batch(4)
    signs, teacher = verdict_sign(labels), torch.tensor([[0.0, 1.0]] * 3)
    decision = decide(torch.zeros(3, 2), teacher, signs, torch.ones(3, 2), GateSettings(1.25, 1.25))
    assert (decision.factor == 1.25).all()


def test_dead_zone_includes_its_edge():
    delta = torch.tensor([[0.5, 0.5001, -0.5, -0.5001]])
    one = torch.tensor([1.0])
    decision = decide(torch.zeros(1, 4), delta, one, torch.ones(1, 4), GateSettings(2.0, 0.0, dead_zone=0.5))
    assert decision.case.tolist() == [[0, 1, 0, -1]]
    assert decision.factor.tolist() == [[1.0, 2.0, 1.0, 0.0]]
    torch.testing.assert_close(decision.advantage, torch.tensor([[0.5, 1.0002, -0.5, 0.0]]))


def test_clip_bounds_each_log_ratio_by_itself():
    """clip 1: delta = 3 -> 1; log pi_T - log pi_R = -2 -> -1; factor 1.8: A = 1 + 0.8 * -1 = 0.2."""
    decision = decide(
        torch.tensor([[-4.0]]),
        torch.tensor([[-1.0]]),
        torch.tensor([1.0]),
        torch.ones(1, 1),
        GateSettings(1.8, 1.0, log_ratio_clip=1.0),
        reference_logps=torch.tensor([[1.0]]),
    )
    assert decision.advantage.item() == pytest.approx(0.2)
    assert decision.clipped.item() == 1.0
    assert decision.delta.item() == 3.0


def test_verdict_signs():
    assert verdict_sign(torch.tensor([1.0, 0.0, NAN])).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_all_masked_gives_zero_loss_and_zero_gradient(estimator):
    student, teacher, _, ids, labels, mask = make_batch(6)
    student.requires_grad_()
    out = SignGatedLoss(estimator=estimator)(student, teacher, ids, labels, torch.zeros_like(mask))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert (student.grad == 0).all()
    assert all(math.isnan(v) for name, v in out.metrics.items() if name.startswith("delta/p"))


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_any_split_gives_the_same_gradient(estimator):
    student, teacher, reference, ids, labels, mask = make_batch(8, batch=6)
    loss_fn, total = SignGatedLoss(extrapolation=1.8, interpolation=0.6, estimator=estimator), mask.sum()
    gradients = []
    for split in ([6], [2, 4], [1] * 6):
        z = student.clone().requires_grad_()
        parts = zip(*(x.split(split) for x in (z, teacher, ids, labels, mask, reference)), strict=True)
        sum(loss_fn(*part, num_items_in_batch=total).loss for part in parts).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_teacher_equal_to_student_has_nothing_to_teach(estimator):
    student, _, _, ids, labels, mask = make_batch(9)
    student.requires_grad_()
    out = SignGatedLoss(estimator=estimator)(student, student.detach(), ids, labels, mask)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.abs().max() < 1e-7


def test_metrics_are_detached():
    student, teacher, _, ids, labels, mask = make_batch(1)
    out = SignGatedLoss()(student.requires_grad_(), teacher, ids, labels, mask)
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"extrapolation": -0.1}, "extrapolation"),
        ({"interpolation": math.inf}, "interpolation"),
        ({"dead_zone": NAN}, "dead_zone"),
        ({"log_ratio_clip": 0.0}, "log_ratio_clip"),
        ({"log_ratio_clip": 1.0, "estimator": "full"}, "log_ratio_clip"),
        ({"temperature": 0.0}, "temperature"),
        ({"estimator": "half"}, "estimator"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        SignGatedLoss(**settings)


def test_bad_inputs_are_named():
    student, teacher, reference, ids, labels, mask = make_batch(1)
    loss_fn = SignGatedLoss()
    with pytest.raises(ValueError, match=r"verifier_labels\[1\].*0\.5"):
        loss_fn(student, teacher, ids, torch.tensor([1.0, 0.5, NAN]), mask)
    with pytest.raises(ValueError, match="completion_ids"):
        loss_fn(student, teacher, torch.full_like(ids, 7), labels, mask)
    with pytest.raises(ValueError, match="interpolation"):
        SignGatedLoss(interpolation=0.0)(student, teacher, ids, labels, mask, reference)


def test_shapes_are_enforced_by_their_annotations():
    """jaxtyping's annotations are executed in the tests: see `--jaxtyping-packages` in pyproject.toml."""
    student, teacher, _, ids, labels, mask = make_batch(1)
    with pytest.raises(Exception, match=r"(?i)type-check"):
        SignGatedLoss()(student, teacher, ids[:, :2], labels, mask)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, NAN])
def test_masked_positions_may_hold_any_logit(value, estimator):
    student, teacher, _, ids, labels, mask = make_batch(1)
    assert (mask == 0).any()
    gradients = []
    for filler in (0.0, value):
        z = student.masked_fill((mask == 0).unsqueeze(-1), filler).requires_grad_()
        out = SignGatedLoss(estimator=estimator)(z, teacher, ids, labels, mask)
        out.loss.backward()
        gradients.append(z.grad)
    assert gradients[0].isfinite().all()
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("initial", [False, True], ids=["current", "initial"])
def test_an_id_suppressed_in_all_models_is_as_if_it_were_not_there(initial):
    student, teacher, reference, ids, labels, mask = make_batch(1, width=7)
    ids = ids.clamp(max=5)
    results = []
    for cut in (False, True):
        parts = [
            x[..., :6] if cut else x.index_fill(-1, torch.tensor([6]), -math.inf) for x in (student, teacher, reference)
        ]
        z = parts[0].clone().requires_grad_()
        out = SignGatedLoss(estimator="full")(z, parts[1], ids, labels, mask, parts[2] if initial else None)
        out.loss.backward()
        results.append((out.loss.item(), z.grad[..., :6]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_a_divisor_of_zero_counts_as_one():
    student, teacher, _, ids, labels, mask = make_batch(1)
    for zero in (0, torch.tensor(0)):
        assert SignGatedLoss()(student, teacher, ids, labels, mask * 0, num_items_in_batch=zero).loss.item() == 0.0


def test_padding_may_hold_any_id():
    student, teacher, _, ids, labels, mask = make_batch(1)
    padded = ids.masked_fill(mask == 0, 99)
    loss_fn = SignGatedLoss()
    assert loss_fn(student, teacher, padded, labels, mask).loss == loss_fn(student, teacher, ids, labels, mask).loss


def test_a_further_rule_touches_one_place(monkeypatch, tmp_path):
    """One entry of the table is known to the loss and to the configuration. It gets the mask: here the factor of a row
    is its trained tokens' mean delta, (1 + 3) / 2 = 2 and -1, so A = 2 * [1, 3, 5] and -1 * [-1, 7, 9]."""

    def row_mean(delta, sign, mask, settings):
        mean = (delta * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return cases(delta, sign, settings.dead_zone), mean.expand_as(delta)

    monkeypatch.setitem(GATE_RULES, "row-mean", row_mean)
    teacher, mask = torch.tensor([[1.0, 3.0, 5.0], [-1.0, 7.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss_fn = SignGatedLoss(rule="row-mean")
    decision = loss_fn.decide(torch.zeros(2, 3), teacher, torch.tensor([1.0, 0.0]), mask)
    assert decision.advantage.tolist() == [[2.0, 6.0, 10.0], [1.0, -7.0, -9.0]]
    assert decision.case.tolist() == [[1, 1, 1], [1, -1, -1]]
    from sg_opd import SGOPDConfig

    args = SGOPDConfig(str(tmp_path), preset="opd", gate_rule="row-mean", bf16=False, use_cpu=True)
    assert args.gate_settings().rule == "row-mean"
    with pytest.raises(ValueError, match="`gate_rule` must be 'sign' or 'sigmoid' or 'row' or 'row-mean', got 'col'"):
        SGOPDConfig(str(tmp_path), gate_rule="col", bf16=False, use_cpu=True)
