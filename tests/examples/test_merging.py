"""docs/merging.md: its code merges an adapter into what was trained, from a base in bfloat16."""

import pytest
import torch
from documents import ROOT, blocks
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

PYTHON = [block.code for block in blocks((ROOT / "docs" / "merging.md").read_text()) if block.language == "python"]


@pytest.fixture
def adapted(make_model, tokenizer, tmp_path, monkeypatch):
    """A folder `base` in bfloat16 and in `out/adapter` a large adapter in float32."""
    monkeypatch.chdir(tmp_path)
    base = make_model(1).to(torch.bfloat16)
    base.save_pretrained("base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained("out/adapter")
    tokenizer.save_pretrained("out/adapter")


@torch.no_grad()
def logits(model):
    ids = torch.arange(27).repeat(2, 2)
    return model.eval()(input_ids=ids).logits.float()


def load(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_the_merged_model_is_the_trained_one(adapted):
    train, *rest = PYTHON
    assert "peft_config=LoraConfig(" in train  # what the fixture stands for
    exec("\n".join(rest).replace('"Qwen/Qwen3-1.7B"', '"base"'), {})
    trained = logits(PeftModel.from_pretrained(load("base", torch.float32), "out/adapter"))
    assert load("base").dtype == torch.bfloat16
    assert (logits(load("base", torch.float32)) - trained).abs().max() > 1
    merged, serving = load("out/merged"), load("out/serving")
    assert (merged.dtype, serving.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-4)
    for name, weight in serving.state_dict().items():  # cast from it
        assert weight.equal(merged.state_dict()[name].to(torch.bfloat16))


def test_what_the_page_warns_of(adapted):
    """Merged in bfloat16 it is far from what was trained."""
    trained = logits(PeftModel.from_pretrained(load("base", torch.float32), "out/adapter"))
    rounded = PeftModel.from_pretrained(load("base", torch.bfloat16), "out/adapter").merge_and_unload()
    assert (logits(rounded.float()) - trained).abs().max() > 1e-2
