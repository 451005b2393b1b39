"""Cost and memory of a step on a GPU: the cases of gpu.py's parts `cost` and `memory`, and their targets."""

from __future__ import annotations

import gc
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floor import Floor, floor_seconds
from geometry import Geometry
from gpu_trace import profiled, waits
from memory import GIB, Run, Teacher, estimate
from steps import Size, Step, Variant, model, sharing

GATED = {"preset": "opd", "gate_extrapolation": 1.8, "gate_interpolation": 1.0, "teacher_phase_steps": 0}
SAMPLED = {**GATED, "reference_policy": "current"}
INITIAL = {**GATED, "reference_policy": "initial"}
FULL = {"estimator": "full"}
VARIANTS = (
    Variant("sampled", settings=SAMPLED),
    Variant("full", settings=SAMPLED | FULL),
    Variant("sampled, initial", settings=INITIAL),
    Variant("distillation", trainer="distillation"),
    Variant("grpo", trainer="grpo"),
)
OFFLOAD, RANK = {"teacher_offload": True}, 16
HELD = (  # what a memory case holds beside those of `VARIANTS`
    Variant("full, initial", settings=INITIAL | FULL),
    Variant("sampled, teacher_offload", settings=SAMPLED | OFFLOAD),
    Variant("full, teacher_offload", settings=SAMPLED | FULL | OFFLOAD),
    Variant("sampled, LoRA", settings=SAMPLED, lora=RANK),
    Variant("full, LoRA", settings=SAMPLED | FULL, lora=RANK),
    Variant("sampled, LoRA, initial", settings=INITIAL, lora=RANK),
)
QWEN = {"vocab": 151_936, "student": Geometry.of("Qwen/Qwen3-0.6B"), "teacher": Geometry.of("Qwen/Qwen3-1.7B")}
SIZES = (
    Size("8 x 512", tokens=512, **QWEN),
    # the whole logits of the floor would not fit at once
    Size("8 x 2,048, gradient checkpointing", tokens=2048, checkpointing=True, floor_rows=2, **QWEN),
)
SMALL = Geometry(64, 128, 1, 2, True, 1, 32, 512)
TINY_SIZES = tuple(
    replace(size, vocab=512, student=SMALL, teacher=replace(SMALL, layers=2), batch=4, prompt=8, tokens=16)
    for size in SIZES
)
GENERATED = 64  # tokens
DTYPES = "student's weights and optimizer fp32 under bf16 autocast, teacher's weights bf16"


def bf16_teacher(size: Size, device: str) -> torch.nn.Module:
    """In evaluation mode and bf16, as a checkpoint's dtype would have it."""
    return model(size, size.teacher, 1, device).to(torch.bfloat16).eval().requires_grad_(False)


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Bench:
    """All trainers of a size, ready to step in turn; what does not fit on the device is left out, with the reason."""

    def __init__(self, size: Size, device: str, folder: Path) -> None:
        self.size, self.device = size, device
        teacher = bf16_teacher(size, device)
        self.left_out: dict[str, str] = {}
        self.steps: dict[str, Step] = {}
        for variant in VARIANTS:
            self._keep(variant.name, lambda v=variant: Step(size, v, device, folder, True, teacher), self.steps)
        floors: dict[str, Floor] = {}
        self._keep("plain", lambda: Floor(size, device, True, sharing(teacher)), floors)
        self.floor = floors.get("plain")

    def _keep(self, name: str, make: Callable[[], Any], among: dict[str, Any] | list[Any]) -> bool:
        """Put what `make` returns among the others; whether it did."""
        try:
            made = make()
        except Exception as error:  # the others can still be measured
            traceback.print_exc()
            self.left_out[name] = f"{type(error).__name__}: {error}"[:500]
        if name in self.left_out:
            free(self.device)  # not above, where the error still holds what its frames hold
            return False
        if isinstance(among, dict):
            among[name] = made
        else:
            among.append(made)
        return True

    def flops(self) -> dict[str, int]:
        found: dict[str, dict[str, int]] = {}
        if self.floor:
            self._keep("flops", self.floor.flops, found)
        return found.get("flops", {})

    def turns(self, repetitions: int, coarse: bool) -> dict[str, list[dict[str, float]]]:
        """Seconds by phase of each trainer and of the plain models, by repetition, another one first each time."""
        names = list(self.steps)
        seconds: dict[str, list] = {name: [] for name in names}
        seconds |= {"plain": []} if self.floor else {}
        for step in self.steps.values():
            step.clock.coarse = coarse
        for repetition in range(repetitions + 1):  # the first one warms up
            for turn in range(len(names)):
                name = names[(turn + repetition) % len(names)]
                if name in self.steps and not self._keep(name, self.steps[name].once, seconds[name]):
                    del self.steps[name], seconds[name]
            if self.floor and not self._keep("plain", self.floor.once, seconds["plain"]):
                self.floor = None
                del seconds["plain"]
        for step in self.steps.values():
            step.clock.coarse = False
        return {name: some[1:] for name, some in seconds.items()}

    def waits(self, name: str) -> dict[str, int]:
        step = self.steps[name]
        step.clock.coarse = True
        with waits(step.clock.device) as found:
            step.once()
        step.clock.coarse = False
        return dict(found.most_common())

    def trace(self, name: str) -> dict[str, Any]:
        step = self.steps[name]
        step.clock.coarse = True
        found = profiled(step.once, step.clock.device)
        step.clock.coarse = False
        return found

    def generation(self, name: str) -> float:
        """Seconds of a generation of `GENERATED` tokens a row, by a trainer that generates with transformers."""
        trainer = self.steps[name].trainer
        trainer.generation_config.max_new_tokens = min(GENERATED, self.size.tokens)
        trainer.generates = True
        try:
            return self.steps[name].once()["generate"]
        finally:
            trainer.generates = False


def spread(values: Any) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75))
    return {"median": round(float(median), 5), "q25": round(float(low), 5), "q75": round(float(high), 5)}


def figures(coarse: dict[str, list], fine: dict[str, list], counts: dict[str, int]) -> dict[str, Any]:
    """Seconds a step without generation, by phase, and the ratios of the same repetition.

    The steps of the ratios are timed without a wait at the edges of phases; the teacher's forward within them is the
    median of those that were timed with it.
    """

    def whole(name: str) -> np.ndarray:
        return np.array([sum(value for phase, value in s.items() if phase != "generate") for s in coarse[name]])

    step = {name: whole(name) for name in coarse if name != "plain"}
    by_phase = {
        name: {phase: round(float(np.median([s[phase] for s in some])), 6) for phase in some[0]}
        for name, some in fine.items()
    }
    pairs = {"full_vs_distillation": ("full", "distillation"), "sampled_vs_distillation": ("sampled", "distillation")}
    ratios = {name: step[a] / step[b] for name, (a, b) in pairs.items() if a in step and b in step}
    if "sampled" in step and "grpo" in step:
        scored = by_phase["sampled"]["score teacher"]
        ratios["sampled_vs_grpo_plus_teacher"] = step["sampled"] / (step["grpo"] + scored)
    if "sampled" in step and "plain" in coarse:
        ratios["sampled_vs_plain"] = step["sampled"] / [sum(s.values()) for s in coarse["plain"]]
    if "sampled" in step and "plain" in coarse and counts:
        for name, recomputed in (("sampled_vs_floor", False), ("sampled_vs_chunked_floor", True)):
            ratios[name] = step["sampled"] / [floor_seconds(s, counts, recomputed) for s in coarse["plain"]]
    return {
        "step_seconds": {name: spread(values) for name, values in step.items()},
        "phase_seconds": by_phase,
        "ratios": {name: spread(values) for name, values in ratios.items()},
    }


def expected(size: Size, variant: Variant) -> float:
    """The estimate of examples/memory.py in bytes, without CUDA's own and without slack, of a step that trains."""
    settings = variant.settings
    run = Run(
        replace(size.student, vocab=size.vocab),
        (Teacher(replace(size.teacher, vocab=size.vocab)),),
        rows=size.batch,
        batch=size.batch,
        completion=size.tokens,
        prompt=size.prompt,
        lora_rank=variant.lora,
        lora_dropout=False,  # peft's default
        checkpointing=size.checkpointing,
        full=settings.get("estimator") == "full",
        initial=settings.get("reference_policy") == "initial",
        accumulates=False,
        teacher_offload=settings.get("teacher_offload", False),
    )
    parts = estimate(run)
    return (parts["peak"] - parts["overhead"]) * GIB


def held(size: Size, variant: Variant, step: Step) -> dict[str, float]:
    """Measured bytes of a step, and what examples/memory.py says of it."""
    found = step.memory()
    found["total"] = found["resident"] + found["peak"]
    if variant.trainer == "sg-opd":
        found |= {
            "estimate": expected(size, variant),
            "vs_estimate": round(found["total"] / expected(size, variant), 4),
        }
    return found


def cost_cases(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """By name, what to measure; each size's trainers live as long as its cases."""
    for size in TINY_SIZES if tiny else SIZES:
        repetitions = 2 if tiny else 5 if size.checkpointing else 8
        with tempfile.TemporaryDirectory() as folder:
            bench: list[Bench] = []

            def timed(
                size: Size = size, bench: list = bench, folder: str = folder, repetitions: int = repetitions
            ) -> dict[str, Any]:
                bench.append(Bench(size, device, Path(folder)))
                coarse, fine = (bench[0].turns(count, of) for count, of in ((repetitions, True), (3, False)))
                counts = bench[0].flops()
                about = {"size": asdict(size), "dtypes": DTYPES, "left_out": bench[0].left_out, "flops": counts}
                return {**about, "repetitions": repetitions, **figures(coarse, fine, counts), "raw": coarse}

            def memory(size: Size = size, bench: list = bench) -> dict[str, Any]:
                found = {v.name: v for v in VARIANTS if v.name in bench[0].steps}
                return {name: held(size, variant, bench[0].steps[name]) for name, variant in found.items()}

            def of_each(work: str, names: tuple[str, ...], bench: list = bench) -> Callable[[], dict[str, Any]]:
                return lambda: {n: getattr(bench[0], work)(n) for n in names if n in bench[0].steps}

            yield f"time, {size.name}", timed
            yield f"memory, {size.name}", memory
            yield f"waits, {size.name}", of_each("waits", tuple(v.name for v in VARIANTS))
            yield f"gaps, {size.name}", of_each("trace", ("sampled", "full", "grpo", "distillation"))
            if size is (TINY_SIZES if tiny else SIZES)[0]:
                yield f"generation, {size.name}", of_each("generation", ("sampled", "grpo"))
            bench.clear()
            free(device)


def memory_cases(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """One trainer at a time, with each setting that the estimate knows of."""
    short, long = TINY_SIZES if tiny else SIZES
    for size, variant in [(short, v) for v in HELD] + [(long, v) for v in HELD[-3:-1]]:

        def alone(size: Size = size, variant: Variant = variant) -> dict[str, Any]:
            free(device)
            with tempfile.TemporaryDirectory() as folder:
                return held(size, variant, Step(size, variant, device, Path(folder), True, bf16_teacher(size, device)))

        yield f"{variant.name}, {size.name}", alone
