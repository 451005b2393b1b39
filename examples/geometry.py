"""The sizes of a Qwen3 model, and what follows from them: parameters, LoRA's, bytes of cache and activations."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, an 8-bit scale for 64, an fp32 scale for 256 of those

# what the models' own config.json say, so that no hub is needed: hidden, intermediate, layers, heads, tied
_QWEN3 = {"0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "4B": (2560, 9728, 36, 32, True)}
_QWEN3 |= {"8B": (4096, 12288, 36, 32, False), "14B": (5120, 17408, 40, 40, False), "32B": (5120, 25600, 64, 64, False)}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Qwen3 model, whose layers have norms on queries and keys and no biases."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151936

    @classmethod
    def of(cls, name: str) -> Geometry:
        """The geometry of `Qwen/Qwen3-<size>`, or of another Qwen3 checkpoint by its path or hub id."""
        if name.removeprefix("Qwen/Qwen3-") in _QWEN3:
            return cls(*_QWEN3[name.removeprefix("Qwen/Qwen3-")])
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type != "qwen3":
            raise SystemExit(f"The formulas are for Qwen3 layers; {name} is a {config.model_type} model.")
        sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
        heads = (config.num_key_value_heads, config.head_dim, config.vocab_size)
        return cls(*sizes, config.tie_word_embeddings, *heads)

    def config(self, **more: Any) -> Any:
        """The `Qwen3Config` of these sizes."""
        from transformers import Qwen3Config

        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
        names += ("num_key_value_heads", "head_dim", "vocab_size")
        return Qwen3Config(**dict(zip(names, astuple(self), strict=True)), **more)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear maps."""
        q, kv, h, f = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return {**attention, "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    @property
    def in_layers(self) -> int:
        """Weights of all layers' linear maps: what 4-bit loading quantises."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def layer(self) -> int:
        """Parameters of one layer, its four norms among them."""
        return self.in_layers // self.layers + 2 * (self.hidden + self.head_dim)

    @property
    def parameters(self) -> int:
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer + tables + self.hidden

    def lora(self, rank: int) -> int:
        """Parameters of LoRA on every linear map of the layers (peft's all-linear leaves the head out)."""
        return self.layers * sum(rank * (a + b) for a, b in self.linears.values())

    def kv_bytes(self, rows: int, tokens: int, bytes_each: int) -> int:
        """Keys and values of `rows` sequences of `tokens` in all layers."""
        return 2 * self.layers * rows * tokens * self.kv_heads * self.head_dim * bytes_each

    def stored(self, weight_bytes: int, lora: bool, dropout: bool = True) -> int:
        """Bytes a token that one layer stores for its backward pass, computing in bf16 without attention matrices.

        Korthikanti et al. (arXiv 2205.05198, section 4) count 34 bytes a hidden unit, for GELU and dropout. Here, with
        SDPA and SwiGLU: a norm keeps its input in fp32, the normalised values and its output (4 + 2 + 2 bytes; 13 with
        fp32 weights), twice; the MLP gate, up, activation and product (8 a unit); a query 10, a key or value pair 10.
        LoRA's frozen norms and values keep less; its dropout adds dropped-out inputs and their masks. Counted from the
        tensors autograd saves; a test counts again.
        """
        q, kv, h, f = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        if lora:
            return 38 * h + 12 * f + 14 * q + 8 * kv if dropout else 18 * h + 8 * f + 10 * q + 8 * kv
        return (26 if weight_bytes == 4 else 16) * h + 8 * f + 10 * q + 10 * kv

    def passing(self) -> int:
        """Bytes a token in flight in one layer without a gradient: stream and norm in fp32, gate, up and product."""
        return 8 * self.hidden + 6 * self.intermediate

    def weights(self, bytes_each: float, in_4bit: bool = False) -> float:
        """Bytes of all weights; bitsandbytes leaves embeddings, head and norms as they were loaded."""
        return self.in_layers * (NF4 if in_4bit else bytes_each) + (self.parameters - self.in_layers) * bytes_each
