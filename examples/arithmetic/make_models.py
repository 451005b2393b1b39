"""Makes the two starting checkpoints of the arithmetic world: an imperfect teacher and a weak student.

Both are Qwen3-architecture models, fine-tuned by TRL's SFTTrainer on worked solutions made from a seed; the student is
smaller and stops early. Usage (about 30 minutes on two CPU cores; the results are committed):

    python examples/arithmetic/make_models.py teacher
    python examples/arithmetic/make_models.py student
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from problems import HERE, PRETRAIN_SEED, held_out_questions, make_problems, make_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

# hidden, layers, heads, intermediate, steps of 128 worked solutions, learning rate, seed
SIZES = {
    "teacher": {"hidden": 128, "layers": 4, "heads": 4, "intermediate": 384, "steps": 1100, "slip": 0.0, "seed": 1},
    "student": {"hidden": 96, "layers": 3, "heads": 3, "intermediate": 256, "steps": 900, "slip": 0.15, "seed": 2},
}
BATCH, RATE = 128, 2e-3


def make_model(size: dict, tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def pretrain(
    size: dict, tokenizer, problems: list[dict], out: str, save_steps: int = 0, start: str | None = None
) -> None:
    """Fine-tune a model on worked solutions and save it in `out`.

    Args:
        size: an entry of a table like `SIZES`.
        tokenizer: the world's.
        problems: `{"question", "solution"}` each, or with a `prompt` of messages for the question; `BATCH` a step.
        out: where to save.
        save_steps: also keep a checkpoint each this many steps; 0 keeps none.
        start: checkpoint to go on from; `None` is a new model.
    """
    set_seed(size["seed"])
    model = Qwen3ForCausalLM.from_pretrained(start, trust_remote_code=False) if start else make_model(size, tokenizer)
    dataset = Dataset.from_list(
        [
            {
                "prompt": row.get("prompt") or [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["solution"]}],
            }
            for row in problems
        ]
    )
    config = SFTConfig(
        output_dir=f"{out}-run",
        per_device_train_batch_size=BATCH,
        max_steps=size["steps"],
        learning_rate=size.get("rate", RATE),
        lr_scheduler_type="cosine",
        warmup_steps=size.get("warmup", 100),
        weight_decay=0.01,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_only_model=True,
        report_to="none",
        seed=size["seed"],
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    model.to("cpu", torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=sorted(SIZES))
    parser.add_argument("--out", default=None, help="where to save; default: the folder of that name beside this file")
    parser.add_argument("--save-steps", type=int, default=0, help="also keep a checkpoint each this many steps")
    args = parser.parse_args()
    size = SIZES[args.which]
    problems = make_problems(size["steps"] * BATCH, PRETRAIN_SEED, held_out_questions(), slip=size["slip"])
    pretrain(size, make_tokenizer(), problems, args.out or str(HERE / args.which), args.save_steps)


if __name__ == "__main__":
    main()
