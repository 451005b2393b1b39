"""Does training on this GPU agree with the CPU, and does it take the memory that examples/memory.py estimates?

    python benchmarks/gpu_check.py                                          # needs a GPU; writes benchmarks/results
    python benchmarks/gpu_check.py --device cpu --steps 2 --output X.json   # a dry run of the same code in bf16

Full fine-tuning and LoRA, with both estimators, train the embedded arithmetic student on the same completions twice: in
bf16 autocast on the device, and in fp32 on the CPU. The losses of every step must agree within what bf16 rounds away.
Then a larger student with random weights generates and trains for a step, and its peak is set beside the estimate.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen3ForCausalLM

from sg_opd import SGOPDConfig, SGOPDTrainer

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("examples", "examples/arithmetic")]
from geometry import Geometry
from memory import Run, estimate
from problems import make_problems

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = ROOT / "examples" / "arithmetic"
KINDS = [(tuning, estimator) for tuning in ("full", "lora") for estimator in ("sampled", "full")]
# bf16 keeps 8 bits: a log-ratio of logits of about 20 is off by up to 0.06 nats, the mean of 320 tokens' by 0.06 / 18
ABSOLUTE, RELATIVE = 0.005, 0.02
ROWS, PROMPT, COMPLETION, RANK = 8, 32, 64, 8


def train(models: list[str], kind: tuple[str, str], device: str, bf16: bool, steps: int, **given) -> dict:
    """Losses by step, seconds and peak memory in GiB of one training run on `device`; `given` goes to the trainer."""
    gc.collect()  # or the model before this one counts as this one's memory
    rows = [  # every second gold is another number, so that both verdicts occur
        {"prompt": [{"role": "user", "content": row["question"]}], "solution": row["answer"] if i % 2 else "1000"}
        for i, row in enumerate(make_problems(ROWS, seed=5))
    ]
    settings = {"max_steps": steps, "learning_rate": 1e-4, "per_device_train_batch_size": ROWS, "num_generations": 1}
    settings |= {"max_completion_length": COMPLETION, "teacher_phase_steps": 0, "logging_steps": 1, "seed": 0}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "shuffle_dataset": False}
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SGOPDTrainer(
            *models,
            args=SGOPDConfig(folder, estimator=kind[1], bf16=bf16, use_cpu=device == "cpu", **settings),
            train_dataset=Dataset.from_list(rows),
            peft_config=lora if kind[0] == "lora" else None,
            **given,
        )
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # its largest size so far
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else process
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": round(seconds, 2), "peak_gib": round(peak / 2**30, 3)}


def worked_solutions(prompts: list, trainer) -> dict:
    """The same completions for every run, in TRL's `rollout_func` form."""
    tokenizer = trainer.processing_class
    texts = {p["question"]: p["solution"] for p in make_problems(ROWS, seed=5)}
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
    answers = [tokenizer(texts[p[-1]["content"]] + tokenizer.eos_token)["input_ids"] for p in prompts]
    return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}


def agreement(device: str, bf16: bool, steps: int) -> dict[str, dict]:
    models = [str(ARITHMETIC / name) for name in ("student", "teacher")]
    return {"/".join(k): train(models, k, device, bf16, steps, rollout_func=worked_solutions) for k in KINDS}


def memory(device: str) -> dict[str, dict]:
    """A step of a student with random weights: measured peak and estimate, in GiB, both without CUDA's own."""
    geometry = Geometry.of("Qwen/Qwen3-0.6B") if device == "cuda" else Geometry(64, 128, 2, 2, True, 1, 32, 4096)
    results, tokenizer = {}, AutoTokenizer.from_pretrained(ARITHMETIC / "student")
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(geometry.config(**ends)).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for kind in KINDS:
            shape = {"rows": ROWS, "batch": ROWS, "completion": COMPLETION, "prompt": PROMPT}
            shape |= {"lora_rank": RANK * (kind[0] == "lora"), "full": kind[1] == "full"}
            parts = estimate(Run(geometry, geometry, **shape))
            expected = {"estimate_gib": round(parts["peak"] - parts["overhead"], 3)}
            results["/".join(kind)] = train([folder, folder], kind, device, True, 1) | expected
    return results


def worker(part: str, device: str, steps: int) -> dict[str, dict]:
    """A part in a process of its own: a process trains on one device only."""
    command = [sys.executable, __file__, "--part", part, "--device", device, "--steps", str(steps)]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    output = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def report(device: str, steps: int) -> dict:
    result, reference = worker("agreement", device, steps), worker("reference", device, steps)
    for kind, run in result.items():
        run["losses_cpu_fp32"] = wanted = reference[kind]["losses"]
        run["agrees"] = torch.allclose(*map(torch.tensor, (run["losses"], wanted)), RELATIVE, ABSOLUTE)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu, a dry run", "commit": commit}
    about["versions"] = {
        package: version(package) for package in ("torch", "trl", "transformers", "peft", "accelerate")
    }
    return {**about, "steps": steps, "agreement": result, "memory": worker("memory", device, steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default on a GPU: benchmarks/results/gpu_check-<device>.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run = {"agreement": (args.device, True, args.steps), "reference": ("cpu", False, args.steps)}.get(args.part)
        return print(json.dumps(agreement(*run) if run else memory(args.device)))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_check needs a CUDA device, and torch sees none. A dry run: --device cpu --output X.json")
    if args.device == "cpu" and not args.output:
        raise SystemExit("A dry run is no result: say with --output where it may be written.")
    result = report(args.device, args.steps)
    output = args.output or ROOT / f"benchmarks/results/gpu_check-{result['device'].replace(' ', '-')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(output.read_text(), end="")
    if not all(run["agrees"] for run in result["agreement"].values()):
        raise SystemExit("The losses on the device are not those of the CPU.")


if __name__ == "__main__":
    main()
