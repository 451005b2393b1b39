"""The precision that student and teacher are loaded and trained in: what there is without a word, and what is said."""

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from trainers import coin_verifier, make_config
from transformers import AutoModelForCausalLM

from sg_opd import SGOPDTrainer
from sg_opd.training.models import tell_narrow

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
    def build(model=halves[0], teacher=halves[1], peft_config=None, **overrides):
        args = make_config(tmp_path, **overrides)
        return SGOPDTrainer(model, teacher, coin_verifier, args, dataset, peft_config=peft_config)

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
