"""Does training on this device agree with the CPU? The cases of gpu.py's part `agreement`.

The embedded arithmetic student is trained on the same completions twice: in bf16 autocast on the device, and in fp32 on
the CPU. The losses of every step must agree within what bf16 rounds away. What samples cannot be compared with another
device: a resumed run must equal the uninterrupted one on the same device, and the rest must run with finite losses.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gpu_cost import FULL, INITIAL, OFFLOAD, SAMPLED
from peft import LoraConfig
from problems import make_problems
from transformers import PrinterCallback, ProgressCallback, set_seed

from sg_opd import SGOPDConfig, SGOPDTrainer

ARITHMETIC = Path(__file__).resolve().parents[1] / "examples" / "arithmetic"
ROWS, COMPLETION, RANK = 8, 64, 8
CHECKPOINTING = {"gradient_checkpointing": True}
COMPARED: dict[str, dict[str, Any]] = {
    "full/sampled": SAMPLED,
    "full/full": SAMPLED | FULL,
    "lora/sampled": SAMPLED,
    "lora/full": SAMPLED | FULL,
    "full/sampled, initial": INITIAL,
    "full/full, initial": INITIAL | FULL,
    "lora/sampled, initial": INITIAL,
    "lora/full, initial": INITIAL | FULL,
    "full/sampled, teacher_offload": SAMPLED | OFFLOAD,
    "full/full, teacher_offload": SAMPLED | FULL | OFFLOAD,
    "full/full, gradient checkpointing": SAMPLED | FULL | CHECKPOINTING,
    "lora/sampled, gradient checkpointing": SAMPLED | CHECKPOINTING,
}
TINY = ("full/sampled", "lora/full, initial", "full/full, teacher_offload", "lora/sampled, gradient checkpointing")
RESUMED = ("full/sampled", "lora/full, initial")
EAGER = {"attn_implementation": "eager"}  # the others' backward passes differ from run to run
NOISE = 10.0  # times what two equal runs differ by
TOLD = {"log_completions": True, "log_gate_samples": 2, "num_completions_to_print": 0, "eval_strategy": "steps"}
PHASE = {"teacher_phase_steps": 2, "teacher_phase_fraction": 0.5, "teacher_rollout_loss": "nll"}
EVERYTHING = (
    {"preset": "sg-opd"} | PHASE | OFFLOAD | CHECKPOINTING | TOLD | {"eval_steps": 1, "truncated_verdict": "abstain"}
)


def problems() -> list[dict[str, Any]]:
    """Every second gold is another number, so that both verdicts occur."""
    return [
        {"prompt": [{"role": "user", "content": row["question"]}], "solution": row["answer"] if i % 2 else "1000"}
        for i, row in enumerate(make_problems(ROWS, seed=5))
    ]


def worked_solutions(prompts: list, trainer: Any) -> dict[str, Any]:
    """The same completions for every run, in TRL's `rollout_func` form."""
    tokenizer = trainer.processing_class
    texts = {p["question"]: p["solution"] for p in make_problems(ROWS, seed=5)}
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
    answers = [tokenizer(texts[p[-1]["content"]] + tokenizer.eos_token)["input_ids"] for p in prompts]
    return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}


def trained(
    folder: str, tuning: str, settings: dict[str, Any], device: str, bf16: bool, resume: str | None = None, **given: Any
) -> SGOPDTrainer:
    """A trainer after training; `settings` are of its configuration, `given` goes to the trainer."""
    gc.collect()
    set_seed(0)  # LoRA's weights are drawn before the trainer sets its seed
    settings = {"gradient_checkpointing": False, "save_strategy": "no", "num_generations": 1} | settings
    settings |= {"learning_rate": 1e-4, "per_device_train_batch_size": ROWS, "max_completion_length": COMPLETION}
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    settings |= {"logging_steps": 1, "seed": 0, "report_to": "none", "disable_tqdm": True, "shuffle_dataset": False}
    trainer = SGOPDTrainer(
        *(str(ARITHMETIC / name) for name in ("student", "teacher")),
        args=SGOPDConfig(folder, bf16=bf16, use_cpu=device == "cpu", **settings),
        train_dataset=Dataset.from_list(problems()),
        peft_config=lora if tuning == "lora" else None,
        **given,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: SGOPDTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compared(name: str, device: str, bf16: bool, steps: int) -> dict[str, Any]:
    """Losses by step, and seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = COMPARED[name] | {"max_steps": steps}
        trainer = trained(folder, name.split("/")[0], settings, device, bf16, rollout_func=worked_solutions)
    return {"losses": losses(trainer), "seconds": round(time.perf_counter() - start, 2)}


def resumed(name: str, device: str, steps: int) -> dict[str, Any]:
    """A run that generates, the same from its checkpoint, and once more: all have the same losses and weights.

    With deterministic algorithms, since on a GPU sums of gradients else differ from run to run.
    """
    settings = COMPARED[name] | {"max_steps": 2 * steps, "save_strategy": "steps", "save_steps": steps}
    settings |= {"model_init_kwargs": EAGER, "teacher_model_init_kwargs": EAGER}
    tuning = name.split("/")[0]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, tempfile.TemporaryDirectory() as c:
            whole = trained(a, tuning, settings, device, True)
            again = trained(b, tuning, settings, device, True)
            rest = trained(c, tuning, settings, device, True, resume=f"{a}/checkpoint-{steps}")
    finally:
        torch.use_deterministic_algorithms(False)
    found = {
        "losses": losses(whole),
        "losses_resumed": losses(rest),
        "apart_resumed": apart(whole, rest),
        "apart_again": apart(whole, again),
    }
    return found | {"agrees": found["apart_resumed"] <= NOISE * found["apart_again"] and found["losses"][0] != 0}


def apart(one: SGOPDTrainer, other: SGOPDTrainer) -> float:
    """The largest difference of a weight."""
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


def everything(device: str, steps: int) -> dict[str, Any]:
    """What generates and grades and shows: the teacher phase with an offloaded teacher, evaluation, gate samples."""
    with tempfile.TemporaryDirectory() as folder:
        settings = EVERYTHING | {"max_steps": steps, "num_generations": 4}
        trainer = trained(folder, "full", settings, device, True, eval_dataset=Dataset.from_list(problems()[:4]))
        kept = sorted(path.name for path in Path(folder).glob("gate_samples.*"))
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    found = {"losses": losses(trainer), "kept": kept, "eval_reward": logged["eval_reward"]}
    finite = all(map(math.isfinite, found["losses"]))
    return found | {"agrees": finite and len(kept) == 2 and len(found["losses"]) == steps}


def agreement_cases(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What `device` does in bf16."""
    steps = 2 if tiny else 5
    for name in TINY if tiny else COMPARED:
        yield name, lambda name=name: compared(name, device, True, steps)
    for name in RESUMED[-1:] if tiny else RESUMED:
        yield f"resume, {name}", lambda name=name: resumed(name, device, 1 if tiny else 3)
    yield "everything", lambda: everything(device, 2 if tiny else 4)


def reference_cases(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The same on the CPU in fp32, whatever the device."""
    for name in TINY if tiny else COMPARED:
        yield name, lambda name=name: compared(name, "cpu", False, 2 if tiny else 5)
