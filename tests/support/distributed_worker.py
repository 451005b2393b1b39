"""The program that `test_distributed.py` runs in one or two processes: trains its scenarios, and writes what it saw.

    [torchrun --nproc_per_node 2] distributed_worker.py JOB.json

The job names the backend (`single`, `ddp`, `zero3`, `fsdp2`), the folders of models, data and results, and the
scenarios, run one after another. Of each, rank r writes `<out>/<scenario>/rank<r>.json` and rank 0 the trained weights.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import load_dataset
from leaving import leave
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from sg_opd import SGOPDConfig, SGOPDTrainer
from sg_opd.evaluation.evaluator import EvaluationCallback
from sg_opd.teachers.local import loading_defaults

JOB = json.loads(Path(sys.argv[1]).read_text())
BACKEND, OUT = JOB["backend"], Path(JOB["out"])
# with DeepSpeed's own thresholds a model as tiny as this would not be sharded at all
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
}
BACKENDS = {"zero3": {"deepspeed": ZERO3}, "fsdp2": {"fsdp": True, "fsdp_config": FSDP2}}


def coin_verifier(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float | None]:
    """Correct, incorrect or abstained by the ids alone."""
    return [(1.0, 0.0, None, 1.0, 0.0)[sum(ids) % 5] for ids in completion_ids]


def by_place(prompts: list, **columns: Any) -> list[float | None]:
    """Correct, incorrect or abstained by a row's place in the global batch of eight."""
    first = PartialState().process_index * len(prompts)
    return [(1.0, 0.0, None, 1.0, 0.0, 0.0, 0.0, 0.0)[first + row] for row in range(len(prompts))]


VERIFIERS = {"coin": coin_verifier, "by_place": by_place}


class Witness(SGOPDTrainer):
    """Notes this rank's rows of each generation, its trained tokens of each micro-batch, and the teacher's calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rows: list[list[dict]] = []
        self.trained_tokens: list[int] = []
        self.teacher_calls: list[int] = []
        super().__init__(*args, **kwargs)
        for teacher in self.teachers.by_name.values():
            teacher.generation_config.do_sample = False  # greedy, so that any number of processes proposes the same
            teacher.propose = self._counted(teacher.propose)

    def _counted(self, propose: Callable) -> Callable:
        def counted(prompt_ids: list, *candidates: int) -> list:
            self.teacher_calls[-1] += 1
            return propose(prompt_ids, *candidates)

        return counted

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        self.teacher_calls.append(0)
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            self.teacher_calls.pop()
            return output
        columns = {name: output[name].tolist() for name in ("verifier_labels", "from_teacher", "slot")}
        kept = output["completion_mask"].bool()
        self.rows.append(
            [
                {
                    "prompt": inputs[i]["prompt"][-1]["content"],
                    "ids": output["completion_ids"][i].tolist(),
                    "kept": int(kept[i].sum()),
                    "verdict": str(columns["verifier_labels"][i]),
                    "from_teacher": columns["from_teacher"][i],
                    "slot": columns["slot"][i],
                }
                for i in range(len(inputs))
            ]
        )
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.trained_tokens.append(int(inputs["completion_mask"].sum()))
        return super()._compute_loss(model, inputs)


def local_share(model: torch.nn.Module) -> float:
    """The share of a model's elements that this rank holds between forward passes."""
    held = total = 0
    for parameter in model.parameters():
        total += getattr(parameter, "ds_numel", parameter.numel())
        if isinstance(parameter, DTensor):
            held += parameter.to_local().numel()
        elif hasattr(parameter, "ds_tensor"):
            held += parameter.ds_tensor.numel() + parameter.numel()  # the latter is 0 where it is partitioned
        elif not parameter.is_meta:  # as a teacher's blocks are that rest in host memory
            held += parameter.numel()
    return held / total


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter in full, gathered without the trainer's own saving."""
    weights = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            weights[name] = whole.detach().clone()
    return weights


def configuration(folder: Path, world: int, settings: dict[str, Any]) -> SGOPDConfig:
    """Two micro-batches of one prompt's four rollouts, or of half of that on each of two ranks, a step."""
    args = SGOPDConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4 // world,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 12,
            "generation_kwargs": {"do_sample": False},
            "learning_rate": 0.03,
            "adam_epsilon": 1.0,  # far above the gradients' noise, which AdamW would otherwise turn into whole steps
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "preset": "sg-opd-lite",
            "gate_interpolation": 0.6,
            "teacher_phase_steps": 0,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "per_device_eval_batch_size": 4 // world,
            "disable_tqdm": True,
            **BACKENDS.get(BACKEND, {}),
            **settings,
        }
    )
    if BACKEND == "fsdp2":  # accelerate turns FSDP on for accelerators only; the rest of it runs on the CPU as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def run(name: str, scenario: dict[str, Any], world: int) -> None:
    """Train one scenario and write down what this rank saw."""
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    args = configuration(folder, world, scenario.get("settings", {}))
    data = load_dataset("json", data_files=JOB["data"], split="train")
    if scenario.get("hinted"):  # the teacher reads more than the student
        hint = {"role": "user", "content": "3*4=12 5+7=12"}
        data = data.map(lambda row: {"teacher_prompt": [hint, *row["prompt"]]})
    if "teachers" in scenario:
        data = data.map(lambda row, i: {"teacher": scenario["teachers"][i % 2]}, with_indices=True)
    lora = scenario.get("lora")
    trainer = Witness(
        scenario["student"],
        scenario["teacher"],
        VERIFIERS[scenario.get("verifier", "coin")],
        args,
        data,
        data.select(range(4)) if args.eval_strategy != "no" else None,
        peft_config=LoraConfig(**lora) if lora else None,
    )
    assert trainer.accelerator.num_processes == world
    if "evaluated" in scenario:
        trainer.add_callback(EvaluationCallback(trainer, data.select(range(3)), **scenario["evaluated"]))
    trainer.train(resume_from_checkpoint=scenario.get("resume"))
    first = next(iter(trainer.teachers.by_name.values()))
    models = {"student": trainer.accelerator.unwrap_model(trainer.model), "teacher": first.unwrapped}
    if getattr(trainer, "initial_policy", None) is not None and trainer.initial_policy.frozen is not None:
        models["initial"] = trainer.accelerator.unwrap_model(trainer.initial_policy.frozen)
    result = {
        "world": trainer.accelerator.num_processes,
        "backend": str(trainer.accelerator.distributed_type),
        "shares": {which: local_share(model) for which, model in models.items()},
        "device_map": loading_defaults(trainer.args).get("device_map", "auto"),
        "rows": trainer.rows,
        "trained_tokens": trainer.trained_tokens,
        "teacher_calls": trainer.teacher_calls,
        "logs": trainer.state.log_history,
    }
    trainer.save_model(str(folder / "saved"))
    weights = whole_weights(models["student"])
    rank = trainer.accelerator.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    trainer.accelerator.wait_for_everyone()


def prepare() -> None:
    """Before the first trainer of a process."""
    torch.set_num_threads(1)
    if BACKEND == "zero3":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes


def main() -> None:
    prepare()
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, scenario in JOB["scenarios"].items():
        run(name, scenario, world)
        gc.collect()  # the trainer's models, before the next ones
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        leave()


if __name__ == "__main__":
    main()
