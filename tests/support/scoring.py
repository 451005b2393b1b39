"""Prompts and completions as token ids, their log-probabilities by a plain model, and a teacher of one's own."""

import torch

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # the 4-bit CPU kernel packs blocks of 64
BITS = {
    "Linear4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
    "Linear8bitLt": {"load_in_8bit": True},
}

PROMPTS = [[3, 4, 5], [6, 7], [8]]


COMPLETIONS = [[9, 10, 11, 2], [12], [13, 14]]


@torch.no_grad()
def expected_logps(model, prompt, completion):
    """From the model's own logits, token by token."""
    row = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return torch.stack([row[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


class Countdown:
    """A teacher of a user's own: -1, -2, -3, ... whatever the tokens."""

    sharded, context, name = False, None, "countdown"

    def score(self, prompt_ids, completion_ids):
        return [-torch.arange(1.0, len(ids) + 1) for ids in completion_ids]

    def propose(self, prompt_ids, candidates=1):
        return [[[3, 1]] * candidates for _ in prompt_ids]
