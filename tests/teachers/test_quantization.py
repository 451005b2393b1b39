"""Teachers and students in 4 and 8 bits, on bitsandbytes' CPU kernels, against copies loaded without the trainer."""

import pytest
import torch
from peft import LoraConfig
from scoring import BITS, COMPLETIONS, PROMPTS, SIZES, expected_logps
from trainers import Recorder, coin_verifier, expected_loss, make_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sg_opd import SGOPDTrainer, SignGatedLoss


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    def saved(seed):
        folder = tmp_path / str(seed)
        make_model(seed, **SIZES).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return saved


def loaded(path, bits):
    settings = None if bits is None else BitsAndBytesConfig(**BITS[bits])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=settings).eval()


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_teacher_scores_as_it_does_by_itself(bits, saved, make_model, tokenizer, dataset, tmp_path):
    """Its log-probs are those of a copy in the same bits, and not those of the model in full precision."""
    path = saved(2)
    args = make_config(tmp_path, temperature=1.0, teacher_model_init_kwargs={"quantization_config": BITS[bits]})
    trainer = SGOPDTrainer(make_model(1), path, coin_verifier, args, dataset, processing_class=tokenizer)
    assert type(trainer.teacher.unwrapped.model.layers[0].mlp.up_proj).__name__ == bits
    scored = torch.cat(trainer.teacher.score(PROMPTS, COMPLETIONS))
    same, full = (
        torch.cat([expected_logps(model, *row) for row in zip(PROMPTS, COMPLETIONS, strict=True)])
        for model in (loaded(path, bits), loaded(path, None))
    )
    tolerance = 1e-4 if bits == "Linear4bit" else 5e-3  # 8 bits: activations are quantised by what a batch holds
    torch.testing.assert_close(scored, same.float(), rtol=0, atol=tolerance)
    assert (scored - full).abs().max() > 2 * tolerance
    trainer.train()


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_qlora_trains_the_adapter_on_a_4_bit_student(estimator, saved, tokenizer, dataset, tmp_path):
    """The first loss is the plain one of 4-bit copies (a new adapter adds nothing), and only the adapter moves."""
    student, teacher = saved(1), saved(2)
    args = make_config(
        tmp_path, temperature=1.0, estimator=estimator, gradient_accumulation_steps=1, gradient_checkpointing=True,
        teacher_model_init_kwargs={"quantization_config": BITS["Linear4bit"]},
    )  # fmt: skip
    trainer = Recorder(
        student, teacher, coin_verifier, args, dataset,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        quantization_config=BitsAndBytesConfig(**BITS["Linear4bit"]),
    )  # fmt: skip
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    batch = trainer.batches[0]
    plain = [loaded(path, "Linear4bit") for path in (student, teacher)]
    loss_fn = SignGatedLoss(extrapolation=1.8, interpolation=1.0, estimator=estimator)
    expected = expected_loss(*plain, None, batch, loss_fn, batch["completion_mask"].sum(), nll=False)
    assert trainer.losses[0] == pytest.approx(expected.item(), rel=2e-2)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_B" in name for name in moved)  # A has no gradient while B is zero
