"""A tokenizer whose template calls tools, and models of its vocabulary."""

import pytest
from chatting import byte_tokenizer


@pytest.fixture(scope="module")
def chat():
    """Tokenizer, and a factory of models that answer in its bytes."""
    return byte_tokenizer()


@pytest.fixture
def chat_model(chat, make_model):
    def make(seed, **config):
        return make_model(
            seed, len(chat), max_position_embeddings=4096, eos_token_id=chat.eos_token_id,
            pad_token_id=chat.pad_token_id, **config,
        )  # fmt: skip

    return make
