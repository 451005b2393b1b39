"""The chunked divergence and the tilted target against whole logits: values, log-probs and every gradient."""

import pytest
import torch
from trl.kernels import chunked_divergence as kernel

from sg_opd.method.divergence import (
    Head,
    _GatheredRows,
    check_linear,
    chunked_divergence,
    chunked_nll,
    head_of,
    spread,
    tilted_target,
    unsharded,
)
from sg_opd.method.loss import gated_divergence


def whole_logits(hidden, head):
    logits = (
        hidden @ head.weight.T * head.scale if head.bias is None else (hidden @ head.weight.T + head.bias) * head.scale
    )
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def make_head(generator, vocab, width, bias=False, **kwargs):
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Head(draw(vocab, width).requires_grad_(), draw(vocab).requires_grad_() if bias else None, **kwargs)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 4 tokens and 8 ids, so that several are needed and the last is ragged."""
    monkeypatch.setattr(kernel, "TOKEN_CHUNK_SIZE", 4)
    monkeypatch.setattr(kernel, "VOCAB_CHUNK_SIZE", 8)


@pytest.mark.parametrize(
    "extras",
    [{}, {"bias": True}, {"scale": 0.5}, {"softcap": 3.0}, {"bias": True, "scale": 2.0, "softcap": 5.0}],
    ids=str,
)
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(19, 19), (19, 13), (13, 19)])
def test_equals_whole_logits(vocab, teacher_vocab, extras):
    generator = torch.Generator().manual_seed(vocab + teacher_vocab)
    student, teacher = make_head(generator, vocab, 6, **extras), make_head(generator, teacher_vocab, 5, **extras)
    hidden = torch.randn(9, 6, generator=generator, requires_grad=True)
    teacher_hidden = torch.randn(9, 5, generator=generator)
    shared = min(vocab, teacher_vocab)
    ids = torch.randint(0, shared, (9,), generator=generator)
    out = chunked_divergence(hidden, student, teacher_hidden, teacher, ids, 0.7)
    logits = (whole_logits(hidden, student) / 0.7)[:, :shared]
    target = (whole_logits(teacher_hidden, teacher) / 0.7)[:, :shared].detach()
    ones = torch.ones(1, 9)
    expected = gated_divergence(logits.unsqueeze(0), target.unsqueeze(0), ones)[0]
    torch.testing.assert_close(out.divergence, expected, rtol=1e-5, atol=1e-5)
    gather = lambda x: x.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)  # noqa: E731
    torch.testing.assert_close(out.student_logps, gather(logits).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.target_logps, gather(target), rtol=1e-5, atol=1e-5)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).detach()
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-5, atol=1e-5)
    weights = torch.randn(9, generator=generator)
    inputs = [x for x in (hidden, student.weight, student.bias) if x is not None]
    got = torch.autograd.grad((out.divergence * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"scale": 0.5}], ids=str)
def test_tilted_target_is_the_normalised_product(extras):
    """softmax(tilted logits / T) = pi_R^(1 - lambda) pi_T^lambda / Z at temperature T, for a lambda a position."""
    generator = torch.Generator().manual_seed(3)
    teacher, reference = make_head(generator, 11, 5, **extras), make_head(generator, 11, 4, **extras)
    teacher_hidden, reference_hidden = torch.randn(7, 5, generator=generator), torch.randn(7, 4, generator=generator)
    factor = torch.linspace(0, 2, 7)
    hidden, head = tilted_target(teacher_hidden, teacher, reference_hidden, reference, factor)
    log_t = (whole_logits(teacher_hidden, teacher) / 0.7).log_softmax(-1)
    log_r = (whole_logits(reference_hidden, reference) / 0.7).log_softmax(-1)
    product = (factor[:, None] * log_t + (1 - factor[:, None]) * log_r).log_softmax(-1)
    torch.testing.assert_close((whole_logits(hidden, head) / 0.7).log_softmax(-1), product, rtol=1e-4, atol=1e-5)


def test_a_soft_capped_head_has_no_tilted_target():
    generator = torch.Generator().manual_seed(3)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        check_linear(make_head(generator, 5, 2), make_head(generator, 5, 2, softcap=30.0))


def test_nll():
    generator = torch.Generator().manual_seed(4)
    head = make_head(generator, 19, 6, bias=True)
    hidden = torch.randn(9, 6, generator=generator, requires_grad=True)
    ids = torch.randint(0, 19, (9,), generator=generator)
    expected = torch.nn.functional.cross_entropy(whole_logits(hidden, head) / 0.7, ids, reduction="none")
    got = chunked_nll(hidden, head, ids, 0.7)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (hidden, head.weight)),
        torch.autograd.grad(expected.sum(), (hidden, head.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_both_estimators_round_a_nearly_certain_token_alike(monkeypatch):
    """Log-probs of -1e-2 to -1e-7 are a few units in the last place of logits near 20. The full estimator's are the
    sampled one's, here bit for bit; from dot products of its own few would be."""
    monkeypatch.setattr(kernel, "TOKEN_CHUNK_SIZE", 4096)
    monkeypatch.setattr(kernel, "VOCAB_CHUNK_SIZE", 32_768)
    generator = torch.Generator().manual_seed(7)
    heads = [Head(torch.randn(2_000, 64, generator=generator) / 4) for _ in range(2)]
    ids = torch.randint(0, 2_000, (300,), generator=generator)
    logits = 16 + 10 * torch.rand(300, 1, generator=generator)
    states = []
    for head in heads:
        row = head.weight[ids]
        noise = torch.randn(300, 64, generator=generator) / 2
        states.append(noise + (logits - (noise * row).sum(1, keepdim=True)) * row / row.square().sum(1, keepdim=True))
    out = chunked_divergence(states[0], heads[0], states[1], heads[1], ids, 0.9)
    student, teacher = (-chunked_nll(of, head, ids, 0.9).detach() for of, head in zip(states, heads, strict=True))
    assert ((student > -1e-2) & (student <= 0)).float().mean() > 0.7
    assert (student == 0).any()
    for got, want in ((out.student_logps, student), (out.target_logps, teacher)):
        assert (got == want).float().mean() > 0.95  # all on x86; another processor's products may differ a little


def test_no_tokens_give_a_zero_gradient():
    """A rank with only masked rows still runs its backward."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = make_head(generator, 19, 6), make_head(generator, 19, 5)
    hidden = torch.randn(1, 4, 6, generator=generator, requires_grad=True)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    none = torch.zeros(0, dtype=torch.long)
    out = chunked_divergence(hidden[mask], student, torch.zeros(0, 5), teacher, none, 1.0)
    spread(out.divergence, mask).sum().backward()
    assert (hidden.grad == 0).all()
    assert (student.weight.grad == 0).all()


def test_head_of_reads_the_configurations_scaling(make_model):
    model = make_model(1)
    assert head_of(model)[1:] == (None, 1.0, None)
    model.config.logits_scaling, model.config.final_logit_softcapping = 8.0, 30.0
    assert head_of(model)[2:] == (0.125, 30.0)
    model.config.model_type = "hyperclovax"
    assert head_of(model).scale == 8.0
    model.config.logits_scaling, model.config.logit_scale = None, 0.25
    assert head_of(model).scale == 0.25


@pytest.mark.parametrize("shape", [(7, 3), (7,)], ids=["weight", "bias"])
def test_gathered_rows_are_a_slice(shape):
    """Value and gradient of `parameter[:4]`: the gradient of the other rows is zero, in the parameter's own shape."""
    generator = torch.Generator().manual_seed(6)
    parameter = torch.randn(shape, generator=generator, requires_grad=True)
    rows = _GatheredRows.apply(parameter, 4)
    assert rows.equal(parameter[:4])
    weights = torch.randn(rows.shape, generator=generator)
    (got,) = torch.autograd.grad((rows * weights).sum(), parameter)
    assert got.equal(torch.cat([weights, torch.zeros(3, *shape[1:])]))


def test_a_sharded_head_is_made_whole_unless_it_is_trained(tmp_path):
    """FSDP2's own gathering within the forward averages gradients over ranks; a DTensor's does not."""
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight, bias = torch.randn(5, 3), torch.randn(5)
        head = Head(distribute_tensor(weight, mesh, [Shard(0)]), distribute_tensor(bias, mesh, [Shard(0)]), scale=2.0)
        whole = unsharded(head)
        assert type(whole.weight) is type(whole.bias) is torch.Tensor
        assert whole.weight.equal(weight)
        assert whole.bias.equal(bias)
        assert whole.scale == 2.0
        with pytest.raises(ValueError, match="transformer_layer_cls_to_wrap"):
            unsharded(head._replace(weight=head.weight.requires_grad_()))
    finally:
        distributed.destroy_process_group()
