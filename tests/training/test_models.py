"""Heads that are computed wrongly are refused; and the precision of student and teacher: what is said of it."""

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from trainers import coin_verifier, make_config
from transformers import AutoModelForCausalLM, ModernBertDecoderConfig, ModernBertDecoderForCausalLM

from sg_opd import SGOPDTrainer
from sg_opd.training.models import check_head, tell_narrow

NARROW = "trained in torch.%s weights: what an update changes by less than about 1/%d of a weight is lost"
DIFFER = "The student's weights are torch.%s, the teacher's torch.%s, as in its checkpoint"
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def halves(tmp_path_factory, make_model, tokenizer):
    """Folders of a student and a teacher in bf16."""
    folder = tmp_path_factory.mktemp("halves")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(seed).to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


@pytest.fixture
def build(halves, dataset, tmp_path):
    def build(model=halves[0], teacher=halves[1], peft_config=None, processing_class=None, **overrides):
        args, given = make_config(tmp_path, **overrides), {"processing_class": processing_class}
        return SGOPDTrainer(model, teacher, coin_verifier, args, dataset, peft_config=peft_config, **given)

    return build


@pytest.mark.parametrize("bf16", [False, True])
def test_without_a_word_the_student_is_float32_and_the_teacher_as_its_checkpoint(build, caplog, bf16):
    trainer = build(bf16=bf16)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert trainer.teacher.unwrapped.dtype == torch.bfloat16
    assert caplog.text.count(DIFFER % ("float32", "bfloat16")) == 1
    assert "teacher_model_init_kwargs={'dtype': 'float32'}" in caplog.text
    assert "is trained in" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_model_init_kwargs": {"dtype": "float32"}},
        {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},  # asked for
        {"model_init_kwargs": {"dtype": "bfloat16"}, "peft_config": LORA},
    ],
    ids=["both float32", "asked for", "both bfloat16"],
)
def test_nothing_is_said_of_one_precision_nor_of_what_was_asked_for(build, caplog, settings):
    build(**settings)
    assert "The student's weights are" not in caplog.text
    assert "is trained in" not in caplog.text


@pytest.mark.parametrize(("dtype", "part"), [("bfloat16", 256), ("float16", 2048)])
@pytest.mark.parametrize("by_name", [True, False])
def test_full_fine_tuning_in_16_bits_is_warned_of_once(build, halves, caplog, dtype, part, by_name):
    loading = {"dtype": getattr(torch, dtype)}
    model = halves[0] if by_name else AutoModelForCausalLM.from_pretrained(halves[0], **loading)
    build(model, model_init_kwargs={"dtype": dtype} if by_name else None)
    assert caplog.text.count(NARROW % (dtype, part)) == caplog.text.count("is trained in") == 1
    assert "model_init_kwargs={'dtype': 'float32'}" in caplog.text


@pytest.mark.parametrize(
    ("kind", "bf16", "said"),
    [
        (DistributedType.NO, True, True),
        (DistributedType.MULTI_GPU, True, True),
        (DistributedType.DEEPSPEED, True, False),
        (DistributedType.FSDP, True, False),
        (DistributedType.FSDP, False, True),
    ],
)
def test_a_master_copy_in_float32_is_taken_into_account(make_model, tmp_path, caplog, monkeypatch, kind, bf16, said):
    """DeepSpeed keeps one, and FSDP with mixed precision."""
    args = make_config(tmp_path, bf16=bf16)
    monkeypatch.setattr(args.distributed_state, "distributed_type", kind)
    tell_narrow(make_model(1).to(torch.bfloat16), args)
    assert ("is trained in" in caplog.text) == said


def test_an_adapter_in_bfloat16_is_as_trl_makes_it_for_qlora(make_model, tmp_path, caplog):
    adapted = get_peft_model(make_model(1).to(torch.bfloat16), LORA, autocast_adapter_dtype=False)
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.bfloat16}
    tell_narrow(adapted, make_config(tmp_path))
    assert not caplog.text


def test_the_part_that_is_lost():
    """A weight of 1 keeps an update above half its rounding step, and loses one below; as the warning has it."""
    for dtype in (torch.bfloat16, torch.float16):
        part = torch.finfo(dtype).eps / 2
        weight = torch.ones(1, dtype=dtype)
        assert weight + weight * (0.99 * part) == 1
        assert weight + weight * (1.01 * part) > 1


def test_updates_that_16_bits_lose(build, halves):
    """One step of AdamW, of the size of the rate, on the same rollouts: most weights stay where they were."""
    shares = []
    for dtype in ("bfloat16", "float32"):
        trainer = build(model_init_kwargs={"dtype": dtype}, optim="adamw_torch", learning_rate=1e-5)
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        trainer.train()
        moved = [(a != b).sum().item() for a, b in zip(trainer.model.parameters(), before, strict=True)]
        shares.append(sum(moved) / trainer.model.num_parameters())
    assert shares[0] < 0.2
    assert shares[1] > 0.9


@pytest.fixture
def norm_before_head(tokenizer):
    """A model whose head is a layer, an activation and a norm before `W h + b`."""
    torch.manual_seed(3)
    config = ModernBertDecoderConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=tokenizer.eos_token_id,
        cls_token_id=0, sep_token_id=0,
    )  # fmt: skip
    model = ModernBertDecoderForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.4)
    return model


@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_that_is_more_than_a_layer_is_refused(build, halves, norm_before_head, tokenizer, role, estimator):
    """By how much `W h + b` is off, of the last hidden state h, on eight tokens; here by hand."""
    ids = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    row = torch.tensor([[ids[i * len(ids) // 8] for i in range(8)]])
    with torch.no_grad():
        head, own = norm_before_head.get_output_embeddings(), norm_before_head(input_ids=row).logits
        logits = torch.stack([head(norm_before_head.base_model(input_ids=row).last_hidden_state), own])[:, 0, :-1]
    logps = (logits / 0.8).log_softmax(-1)[:, range(7), row[0, 1:]]
    off = (logps[0] - logps[1]).abs().max().item()
    assert off > 1
    models = {
        "model": AutoModelForCausalLM.from_pretrained(halves[0]),
        role.replace("student", "model"): norm_before_head,
    }
    said = rf"The {role} \(ModernBertDecoderForCausalLM ''\).* up to {off:.2g} nats off"
    with pytest.raises(ValueError, match=said):
        build(**models, estimator=estimator, processing_class=tokenizer)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_trying_the_heads_leaves_no_trace(build, halves, estimator, bf16):
    """Dropout and gradient checkpointing are the run's, random states are as before; heads in 16 bits pass."""
    student = AutoModelForCausalLM.from_pretrained(halves[0], dtype=torch.float32, attention_dropout=0.5).train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trainer = build(student, estimator=estimator, bf16=bf16, gradient_checkpointing=True)
    torch.manual_seed(5)
    args = trainer.processing_class, trainer.args, trainer, trainer.accelerator
    check_head("student", trainer.model, *args)
    check_head("teacher", trainer.teacher.model, *args)
    assert torch.get_rng_state().equal(state)
    assert trainer.model.training
    assert not trainer.teacher.unwrapped.training
    assert all(weight.grad is None for weight in trainer.model.parameters())


@pytest.mark.parametrize("part", ["q_proj", "lm_head"])
def test_an_adapter_is_no_teacher(build, halves, tmp_path, part):
    """Loaded as a model, on its head it would be passed over: `lm_head.weight` is the layer's below."""
    lora = LoraConfig(r=2, target_modules=[part], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(halves[1]), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    merge = r"merge the adapter into its base first \(docs/merging.md\)"
    with pytest.raises(ValueError, match=rf"`teacher_model` '.*/adapter' is an adapter.*{merge}"):
        build(teacher=str(tmp_path / "adapter"))
    with pytest.raises(TypeError, match=rf"`teacher_model` is a PeftModelForCausalLM.*{merge}"):
        build(teacher=adapted)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    if part == "lm_head":
        with pytest.raises(ValueError, match=r"The teacher \(Qwen3ForCausalLM .* adapter on its head.*docs/merging.md"):
            build(teacher=loaded)
    else:
        build(teacher=loaded)
