"""What several test modules share: the arithmetic world's tokenizer and tiny models made here."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from problems import make_problems, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A factory of tiny Qwen3 models with random weights: `make_model(seed, vocab_size=None, **config)`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def make(seed: int, vocab_size: int | None = None, scale: float = 4.0, **overrides) -> Qwen3ForCausalLM:
        config = {
            "vocab_size": vocab_size or len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            **overrides,
        }
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
        with torch.no_grad():  # as initialised all distributions are nearly flat, and so every delta nearly zero
            model.get_output_embeddings().weight.mul_(scale)
        return model

    return make


@pytest.fixture(scope="session")
def dataset():
    """Sixteen problems as rows of `prompt` (messages) and `solution`."""
    from datasets import Dataset

    rows = make_problems(16, seed=7)
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["question"]}], "solution": r["answer"]} for r in rows]
    )


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tokenizer, make_model, dataset):
    """A folder with a student, a teacher and twelve problems."""
    folder = tmp_path_factory.mktemp("pair")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    dataset.select(range(12)).to_json(folder / "data.jsonl")
    return folder
