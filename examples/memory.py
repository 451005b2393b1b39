"""How much GPU memory a recipe needs: an ESTIMATE from formulas.

    python examples/memory.py --config examples/configs/X.yaml --accelerate_config examples/accelerate/Y.yaml

Checked on the CPU are parameter counts, LoRA's, the bytes of 4-bit weights, gradients, optimizer and KV cache, and the
activations a layer stores; on one H100 the peak of a step, without OVERHEAD and SLACK (docs/gpu.md). Assumed are those
two, what a library keeps for itself and how an allocator fragments, and all that needs generation or several GPUs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from geometry import Geometry

GIB = 2**30
VOCAB_TILE, TOKEN_TILE = 32768, 4096  # TRL's fused head and divergence kernel: never more logits than one such tile
TOP_K_TILES = {"student": 5, "teacher": 4}  # fp32 tiles of the top-k kernel that are there at once; a test counts
TOP_K_COLUMN = 48  # bytes a token that an id of K, or the rest, takes in the student's loss and its graph
ZERO_BUCKET, ZERO_LIVE = 5e8, 1e9  # elements: DeepSpeed's defaults for reduce_bucket_size, stage3_max_live_parameters
OVERHEAD, OVERHEAD_NCCL, SLACK = 1.0, 1.0, 0.10  # GiB of a CUDA context; of NCCL; share lost to fragmentation
PROMPT = 512  # tokens, assumed of the longest prompt


@dataclass(frozen=True)
class Teacher:
    """A teacher in this process."""

    geometry: Geometry
    in_4bit: bool = False
    initial: bool = False  # the student before training: its weights are the initial policy's, and stay where they are


@dataclass(frozen=True)
class Run:
    """A run as one GPU sees it: `rows` are sequences generated at once, `batch` those of one backward pass."""

    student: Geometry
    teachers: tuple[Teacher, ...]  # those in this process, and none that is on a server
    rows: int
    batch: int
    completion: int
    prompt: int = PROMPT
    weight_bytes: int = 4  # of the student as loaded: 4 (fp32 masters, bf16 autocast) or 2
    lora_rank: int = 0
    lora_dropout: bool = True
    student_4bit: bool = False
    teacher_rows: int = 0  # sequences the teacher generates at once in its phase
    checkpointing: bool = True
    full: bool = False  # the full estimator
    top_k: int = 0  # the k of the top-k estimator
    initial: bool = False  # the initial policy is the reference: without LoRA a frozen copy of the student
    accumulates: bool = True  # a step has several backward passes: gradients are there before the later ones
    sharding: str = "none"  # "none", "ddp", "zero2", "zero3", "fsdp"
    offload: bool = False  # ZeRO: weights, gradients and optimizer in the host's memory
    teacher_offload: bool = False  # the teacher's layers in the host's memory
    world: int = 1
    vllm: float = 0.0  # GiB given to a colocated vLLM, which then generates and holds the KV cache
    vllm_sleeps: bool = False  # and gives them back while the student is trained


def resident(run: Run) -> dict[str, float]:
    """Bytes held through a step, by part. Mixed-precision Adam: 16 a trained parameter (arXiv 1910.02054, section 3).

    fp32 masters under autocast: weights 4, gradients 4, moments 8. DeepSpeed in bf16: 2, 2, and 4 + 8 in fp32. LoRA:
    adapters in fp32 (4, 4, 8), on a 4-bit student in bf16 (2, 2, 4). ZeRO-2 divides gradients and optimizer by
    the world, ZeRO-3 and FSDP2 weights too, the teacher's among them. DDP adds buckets as large as the gradients. On
    one GPU a step of one backward pass holds no gradients before it (`training` counts them). Of an offloaded teacher
    the tables and the last norm stay, and for the full estimator the teachers' states of a generation's rows, as if all
    were of the widest. For the top-k one a token of these rows keeps k + 1 ids and k + 2 log-probabilities of 4 bytes.
    """
    zero, sharded = run.sharding.startswith("zero"), run.sharding in ("zero3", "fsdp")
    base = 2 if zero else run.weight_bytes
    each, trained = trained_weights(run)
    split = run.world if sharded else 1
    later = run.world if sharded or run.sharding == "zero2" else 1
    on_gpu = 0 if run.offload else 1
    own = run.student.weights(base, run.student_4bit)
    parts = {"student weights": own / split * on_gpu, "LoRA weights": each * trained / split if run.lora_rank else 0.0}
    parts["gradients"] = each * trained / later * on_gpu if gradients_stay(run) else 0.0
    parts["optimizer"] = (12 if zero else 2 * each) * trained / later * on_gpu
    copied = not run.lora_rank and (run.initial or any(teacher.initial for teacher in run.teachers))
    parts["initial policy"] = own / split * on_gpu if copied else 0.0
    parts["communication buffers"] = 2 * ZERO_BUCKET if zero else each * trained if run.sharding == "ddp" else 0.0
    loaded, tokens = [teacher for teacher in run.teachers if not teacher.initial], run.rows * run.completion
    parts["teacher weights"] = sum(t.geometry.weights(2, t.in_4bit) for t in loaded) / split * on_gpu
    if run.teacher_offload:
        parts["teacher weights"] -= sum(2 * t.geometry.layers * t.geometry.layer for t in loaded)
        parts["teacher states"] = 2 * tokens * widest(run) * run.full
    parts["likeliest ids"] = tokens * 4 * (2 * run.top_k + 3) if run.top_k else 0.0
    parts["vLLM"] = run.vllm * GIB * (not run.vllm_sleeps)
    return parts


def trained_weights(run: Run) -> tuple[int, int]:
    """Bytes of a trained weight, and how many are trained."""
    base = 2 if run.sharding.startswith("zero") else run.weight_bytes
    if not run.lora_rank:
        return base, run.student.parameters
    return base if run.sharding.startswith("zero") else 2 if run.student_4bit else 4, run.student.lora(run.lora_rank)


def widest(run: Run) -> int:
    """The hidden size of the widest teacher in this process; 0 without any."""
    return max((teacher.geometry.hidden for teacher in run.teachers), default=0)


def gradients_stay(run: Run) -> bool:
    """Whether gradients are held as a backward pass begins."""
    return run.accumulates or run.sharding != "none"


def passing(run: Run) -> dict[str, float]:
    """Bytes of each phase of a step, by part; phases follow one another, so the largest one counts.

    Sharded weights are gathered: by ZeRO-3 whole to generate, at most ZERO_LIVE otherwise; by FSDP2 the tables and two
    layers of the student, all of the teacher (TRL shards it as one unit). Of an offloaded teacher one layer comes to
    score, for more rows at once (`TOKENS_AT_ONCE`), and all to generate. Generation holds the cache of
    every row of a step at once, and scores the last position only, three times in fp32 (scores, filtered scores,
    probabilities).
    """
    student, length, zero3 = run.student, run.prompt + run.completion, run.sharding == "zero3"
    computing = run.weight_bytes if run.sharding in ("none", "ddp") else 2  # bytes of a weight in use
    layer = student.in_layers / student.layers
    tables = 2 * (student.parameters - student.in_layers)
    gathered = tables + 4 * layer if run.sharding == "fsdp" else 2 * min(student.parameters, ZERO_LIVE) * zero3
    work = run.rows * (run.prompt * student.passing() + 12 * student.vocab)
    generation = {"KV cache": student.kv_bytes(run.rows, length, computing), "logits and prefill": work}
    if run.vllm:
        generation = {"vLLM": run.vllm * GIB * run.vllm_sleeps}
    generation["gathered weights"] = 2 * student.parameters if zero3 else gathered
    phases = {"generation": generation, **training(run, computing)}
    for phase in ("training", "backward"):
        phases[phase]["gathered weights"] = gathered
    # teachers take turns: of several in this process the one that needs most counts
    for phases_of in [teaching(run, teacher) for teacher in run.teachers]:
        for phase, parts in phases_of.items():
            phases[phase] = max(phases.get(phase, {}), parts, key=lambda parts: sum(parts.values()))
    return {f"{phase}: {part}": size for phase, parts in phases.items() for part, size in parts.items()}


def training(run: Run, computing: int) -> dict[str, dict[str, float]]:
    """Bytes of the two moments at which training can be largest, by part; weights are in use in `computing` bytes.

    "training" is the head's turn, when all that the layers keep for the backward pass is there, and the head's own.
    "backward" is a layer's: what is kept falls as gradients come, so that the larger of the two counts (the gradient of
    the table that is the head is there from the start); a checkpointed layer is computed once more. Under autocast the
    layers' bf16 copies live as long as their graph; with checkpointing those of trained weights live to the end of the
    forward pass.
    """
    student = run.student
    tokens, completions = run.batch * (run.prompt + run.completion), run.batch * run.completion
    per_layer = student.stored(computing, bool(run.lora_rank), run.lora_dropout)
    kept = tokens * student.layers * (student.hidden * computing if run.checkpointing else per_layer)
    copies = 2 * student.in_layers if computing == 4 else 0
    table = 0 if run.lora_rank else 4 * student.vocab * student.hidden
    head = turn_of_head(run, computing)
    # each of several teachers has a pass of its own, whose gradient of the table comes beside that of those before
    tables = table * (2 if run.full and at_once(run) > 1 else 1)
    coming = tables + completions * student.hidden * 4  # the head's gradients, when the forward pass is over
    norm = 13 * tokens * student.hidden  # the last one
    # of a checkpointed layer they are gone when those come
    beside = copies if not run.checkpointing else 0 if run.lora_rank else max(0, copies - coming)
    turn = {"activations": kept + norm, "head": head, "head's gradients": coming, "autocast copies": beside}
    each, trained = trained_weights(run)
    arriving = kept + table if gradients_stay(run) else max(kept + table, each * trained)
    back = {"activations and gradients": arriving}
    back["a layer"] = tokens * (student.passing() + (per_layer if run.checkpointing else 0))
    back["autocast copies"] = copies / student.layers if run.checkpointing else copies
    return {"training": turn, "backward": back}


def at_once(run: Run) -> int:
    """How many teachers the full estimator has in one backward pass, at most: sharded ones are all in each."""
    return len(run.teachers) if run.sharding in ("zero3", "fsdp") else min(len(run.teachers), run.batch)


def turn_of_head(run: Run, computing: int) -> float:
    """Bytes of the student's head and loss: tiles of logits, a copy of the states and of a tile's weights in the
    kernel's precision, the states of the teachers or what is known of the likeliest ids.
    """
    student, completions = run.student, run.batch * run.completion
    ids = top_k_ids(student) if run.top_k else VOCAB_TILE
    head = completions * student.hidden * 4 + (ids * student.hidden * 2 if computing == 4 else 0)
    if run.top_k:
        return head + top_k_tiles(student, completions, "student") + completions * TOP_K_COLUMN * (run.top_k + 2)
    head += min(completions, TOKEN_TILE) * VOCAB_TILE * (10 if run.full else 2)
    if run.full:
        head += 2 * completions * widest(run) * 2
    if run.full and run.initial:  # the target's head: a teacher's and the reference's side by side
        sizes = sorted((teacher.geometry.hidden for teacher in run.teachers), reverse=True)[: at_once(run)]
        head += sum(computing * student.vocab * (size + student.hidden) for size in sizes)
    return head


def top_k_ids(model: Geometry) -> int:
    """The ids of a tile of the top-k kernel."""
    from sg_opd.method.top_k import IDS

    return min(IDS, model.vocab)


def top_k_tiles(model: Geometry, positions: int, whose: str) -> float:
    """Bytes of the tiles that the top-k kernel has at once, each with one spare column."""
    from sg_opd.method.top_k import POSITIONS

    return TOP_K_TILES[whose] * 4 * min(POSITIONS, positions) * (top_k_ids(model) + 1)


def teaching(run: Run, of: Teacher) -> dict[str, dict[str, float]]:
    """Bytes of the phases in which a teacher in process scores and generates, by part."""
    teacher = of.geometry
    length, whole = run.prompt + run.completion, 2 * teacher.parameters
    held = whole if run.sharding in ("fsdp", "zero3") else 0
    brought = held if run.sharding == "fsdp" else min(held, 2 * ZERO_LIVE)
    rows = run.batch
    if run.teacher_offload and not of.initial:
        from sg_opd.teachers.local import TOKENS_AT_ONCE

        rows = max(rows, min(run.rows, TOKENS_AT_ONCE // length))
        brought, held = 2 * teacher.layer, 2 * teacher.layers * teacher.layer
    positions = rows * run.completion
    tile: float = min(positions, TOKEN_TILE) * VOCAB_TILE * (10 if run.full else 2)
    if run.top_k:
        tile = top_k_tiles(teacher, positions, "teacher")
    phases = {"scoring": {"activations": rows * length * teacher.passing(), "head": tile, "weights brought": brought}}
    if run.teacher_rows:
        cache = teacher.kv_bytes(run.teacher_rows, length, 2) + run.teacher_rows * 12 * teacher.vocab
        phases["teacher phase"] = {"KV cache and logits": cache, "weights brought": held}
    return phases


def estimate(run: Run) -> dict[str, float]:
    """GiB by part on one GPU, an estimate: what is held, each phase's own, `overhead`, and `peak`.

    The peak adds up what is held, the largest phase and the overhead.
    """
    parts = {name: size / GIB for name, size in (resident(run) | passing(run)).items() if size}
    held = sum(size for name, size in parts.items() if ": " not in name)
    phases: dict[str, float] = {}
    for name, size in parts.items():
        if ": " in name:
            phases[name.split(": ")[0]] = phases.get(name.split(": ")[0], 0.0) + size
    used = held + max(phases.values())
    parts["overhead"] = OVERHEAD + OVERHEAD_NCCL * (run.world > 1) + SLACK * used
    return {**parts, "peak": used + parts["overhead"]}


def read(recipe: Path, accelerate_config: Path, gpu: float = 80.0, prompt: int = PROMPT) -> Run:
    """The run of a recipe under an accelerate configuration, on GPUs of `gpu` GiB; LoRA is taken as all-linear."""
    from trl import ModelConfig

    from sg_opd import SGOPDConfig
    from sg_opd.presets import PRESETS

    given = {field.name: field.default for cls in (SGOPDConfig, ModelConfig) for field in fields(cls)}
    given |= yaml.safe_load(recipe.read_text())
    launch = yaml.safe_load(accelerate_config.read_text())
    zero = launch.get("deepspeed_config", {})
    kinds = {"NO": "none", "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": f"zero{zero.get('zero_stage')}"}
    rows = given["per_device_train_batch_size"] * (
        given["steps_per_generation"] or given["gradient_accumulation_steps"]
    )
    for name, value in PRESETS[given["preset"]].items():
        given[name] = value if given[name] is None else given[name]
    lora_rank = given["lora_r"] if given["use_peft"] else 0
    return Run(
        student=Geometry.of(given["model_name_or_path"]),
        teachers=teachers_of(given),
        rows=rows,
        batch=given["per_device_train_batch_size"],
        completion=given["max_completion_length"],
        prompt=prompt,
        weight_bytes=4 if given["dtype"] == "float32" else 2,
        lora_rank=lora_rank,
        lora_dropout=given["lora_dropout"] > 0,
        student_4bit=given["load_in_4bit"],
        teacher_rows=math.ceil(rows * given["teacher_phase_fraction"])
        * given["teacher_candidates"]
        * (given["teacher_phase_steps"] > 0),
        checkpointing=given["gradient_checkpointing"],
        full=given["estimator"] == "full",
        top_k=given["teacher_top_k"] if given["estimator"] == "top_k" else 0,
        initial=given["reference_policy"] == "initial",
        accumulates=given["gradient_accumulation_steps"] > 1,
        sharding=kinds[launch["distributed_type"]],
        offload=zero.get("offload_param_device") == "cpu",
        teacher_offload=given["teacher_offload"],
        world=launch["num_processes"],
        vllm=gpu * given["vllm_gpu_memory_utilization"] * (given["use_vllm"] and given["vllm_mode"] == "colocate"),
        vllm_sleeps=given["vllm_enable_sleep_mode"],
    )


def teachers_of(given: dict[str, Any]) -> tuple[Teacher, ...]:
    """The teachers in this process of a recipe's settings."""
    from sg_opd.teachers.several import sources_of

    teachers = []
    for source in sources_of(None, SimpleNamespace(**given)):
        if source.server_url is None:
            name = given["model_name_or_path"] if source.is_initial else source.model
            quantised = (source.init_kwargs or {}).get("quantization_config", {})
            teachers.append(Teacher(Geometry.of(name), quantised.get("load_in_4bit", False), source.is_initial))
    return tuple(teachers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimate the GPU memory of a recipe; an estimate, not measured.")
    parser.add_argument("--config", type=Path, required=True, help="a recipe of examples/configs")
    parser.add_argument("--accelerate_config", type=Path, required=True, help="a file of examples/accelerate")
    parser.add_argument(
        "--gpu", type=float, default=80.0, help="GiB of one GPU, of which a colocated vLLM takes a share"
    )
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of the longest prompt")
    args = parser.parse_args()
    for name, size in estimate(read(args.config, args.accelerate_config, args.gpu, args.prompt)).items():
        print(f"{size:8.2f} GiB  {name}")
    print("Of one GPU; an estimate, not measured.")


if __name__ == "__main__":
    main()
