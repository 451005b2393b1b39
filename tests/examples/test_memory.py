"""The memory estimate against what can be counted without a GPU: models, caches, optimizers, graphs."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from documents import ROOT
from geometry import NF4, Geometry
from memory import GIB, Run, Teacher, estimate, read

CONFIGS, ACCELERATE = ROOT / "examples" / "configs", ROOT / "examples" / "accelerate"
TINY = Geometry(32, 48, 2, 4, False, kv_heads=2, head_dim=16, vocab=27)


def build(geometry, device="cpu", **overrides):
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(geometry.config(pad_token_id=0, eos_token_id=1, bos_token_id=None, **overrides))


@pytest.mark.parametrize("geometry", [Geometry.of(f"Qwen/Qwen3-{s}") for s in ("0.6B", "1.7B", "4B", "8B", "32B")])
def test_parameters_are_those_of_the_real_model(geometry):
    """Tied (0.6B to 4B) and untied (8B, 32B), built on the meta device."""
    assert geometry.parameters == sum(p.numel() for p in build(geometry, "meta").parameters())


def test_sizes_are_the_published_ones():
    """Qwen3's report gives 1.7B with 1.4B outside the embeddings, 4.0B with 3.6B, 8.2B with 6.95B, 32.8B with 31.2B."""
    published = {"1.7B": (1.7, 1.4), "4B": (4.0, 3.6), "8B": (8.2, 6.95), "32B": (32.8, 31.2)}
    for size, (whole, inner) in published.items():
        geometry = Geometry.of(f"Qwen/Qwen3-{size}")
        assert geometry.parameters / 1e9 == pytest.approx(whole, abs=0.05)
        assert geometry.in_layers / 1e9 == pytest.approx(inner, abs=0.05)


def test_a_local_checkpoint_is_read_and_another_architecture_refused(tmp_path):
    from transformers import LlamaConfig

    student = Geometry.of(str(ROOT / "examples" / "arithmetic" / "student"))
    assert student.parameters == 335_232  # the 0.34 M of its README
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="llama"):
        Geometry.of(str(tmp_path))


def test_lora_parameters_are_pefts():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(TINY), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert TINY.lora(3) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_cache_is_the_real_one():
    """2 tensors x 2 layers x 3 rows x 7 tokens x 2 heads x 16 x 4 bytes = 10,752."""
    cache = build(TINY)(torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
    assert (
        TINY.kv_bytes(3, 7, 4) == 10_752 == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_optimizer_are_real_adamws(dtype):
    """Trained in its own dtype a model has gradients of its size and two moments; the step counters are not counted."""
    model = build(TINY).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    parts = estimate(Run(TINY, (), rows=1, batch=1, completion=8, weight_bytes=dtype.itemsize))
    assert parts["student weights"] * GIB == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] * GIB == sum(p.grad.nbytes for p in model.parameters())
    assert parts["optimizer"] * GIB == moments


def stored_by_layer(dtype, autocast, lora, dropout):
    """Bytes a token that autograd saves for the third layer, without weights and their copies."""
    from peft import LoraConfig, get_peft_model

    tokens, sizes = 304, []
    for layers in (2, 3):
        geometry = Geometry(128, 384, layers, 4, False, kv_heads=2, head_dim=64, vocab=64)
        model = build(geometry, attn_implementation="sdpa").to(dtype)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
            model.enable_input_require_grads()
        model.train()
        own = {p.data_ptr() for p in model.parameters()}
        shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
        saved = {}

        def pack(tensor, own=own, shapes=shapes, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address is used twice
            return tensor

        backbone = model.get_base_model().model if lora else model.model
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            output = backbone(torch.ones(1, tokens, dtype=torch.long), use_cache=False)
        sizes.append(sum(size for size, _ in saved.values()))
        del output
    return (sizes[1] - sizes[0]) / tokens, geometry


@pytest.mark.parametrize(
    ("dtype", "autocast", "lora", "dropout"),
    [
        (torch.bfloat16, False, False, 0.0),
        (torch.float32, True, False, 0.0),
        (torch.bfloat16, True, True, 0.05),
        (torch.float32, True, True, 0.0),
    ],
    ids=["bf16", "autocast", "lora", "lora without dropout"],
)
def test_a_layer_stores_what_autograd_saves(dtype, autocast, lora, dropout):
    """Within 3 %: statistics of norms and attention and LoRA's narrow tensors are not counted."""
    measured, geometry = stored_by_layer(dtype, autocast, lora, dropout)
    assert geometry.stored(dtype.itemsize, lora, dropout > 0) == pytest.approx(measured, rel=0.03)


def test_4_bit_weights_are_bitsandbytes_own(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    geometry = Geometry(128, 256, 2, 4, True, kv_heads=2, head_dim=32, vocab=64)
    build(geometry).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=settings)
    quantised = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert sum(p.nbytes for p in quantised) == geometry.in_layers / 2
    scales = sum(p.quant_state.absmax.nbytes + p.quant_state.state2.absmax.nbytes for p in quantised)
    assert geometry.in_layers * (NF4 - 0.5) == pytest.approx(scales, rel=0.02)
    rest = sum(p.nbytes for p in model.parameters() if not hasattr(p, "quant_state"))
    assert geometry.weights(2, in_4bit=True) == pytest.approx(geometry.in_layers * NF4 + rest)


def test_zero_divides_as_the_paper_says():
    """ZeRO paper, figure 1: 7.5B parameters, 64 GPUs, K = 12: 120 GB undivided, 16.6 with gradients and optimizer
    divided, 1.9 with weights too. 7.5e9 x 16 = 120e9; 7.5e9 x (2 + 14 / 64) = 16.64e9; 120e9 / 64 = 1.875e9."""
    sized = Geometry(4096, 12288, 32, 32, False, vocab=32)
    count = sized.parameters
    held = {}
    for stage in ("zero2", "zero3"):
        parts = estimate(Run(sized, (), rows=1, batch=1, completion=8, sharding=stage, world=64))
        held[stage] = sum(parts[name] for name in ("student weights", "gradients", "optimizer")) * GIB / count * 7.5
    assert held["zero2"] == pytest.approx(16.64, abs=0.01)
    assert held["zero3"] == pytest.approx(1.875, abs=0.001)


def test_parts_by_hand():
    """Qwen3-1.7B, fp32 masters, batch 2 of 8 rows, 512 + 512 tokens, DDP on two GPUs, in process a 4B in bf16.

    Parameters 151936 x 2048 + 28 x (2048 x 2048 x 2 + 2 x 2048 x 1024 + 3 x 2048 x 6144 + 2 x 2048 + 2 x 128) + 2048
    = 1,720,574,976; the 4B's 4,022,468,096. Cache 2 x 28 x 8 x 1024 x 8 x 128 x 4 bytes = 1.75 GiB. Head: a tile of
    1024 x 32768 x 2, a copy of its weights 32768 x 2048 x 2 and of the states 1024 x 2048 x 4; then the gradients of
    states and head, 151936 x 2048 x 4 bytes. Autocast: bf16 copies of the layers' 28 x 50,331,648 = 1,409,286,144.
    """
    student, teacher = Geometry.of("Qwen/Qwen3-1.7B"), Geometry.of("Qwen/Qwen3-4B")
    parts = estimate(Run(student, (Teacher(teacher),), rows=8, batch=2, completion=512, sharding="ddp", world=2))
    size = 1_720_574_976 / GIB
    assert parts["student weights"] == parts["gradients"] == parts["communication buffers"] == 4 * size
    assert parts["optimizer"] == 8 * size
    assert parts["teacher weights"] == 2 * 4_022_468_096 / GIB
    assert parts["generation: KV cache"] == 1.75
    head, coming = 1024 * 32768 * 2 + 32768 * 2048 * 2 + 1024 * 2048 * 4, 1024 * 2048 * 4 + 151936 * 2048 * 4
    assert parts["training: head"] == pytest.approx(head / GIB)
    assert parts["training: head's gradients"] == pytest.approx(coming / GIB)
    assert parts["training: autocast copies"] == pytest.approx((2 * 1_409_286_144 - coming) / GIB)
    # checkpoints: 28 layers of 2 x 1024 tokens x 2048 x 4 bytes; the last norm; one layer in full and what is in flight
    layer = 26 * 2048 + 8 * 6144 + 10 * 2048 + 10 * 1024 + 8 * 2048 + 6 * 6144
    kept = 2048 * 28 * 2048 * 4
    assert parts["training: activations"] == pytest.approx((kept + 2048 * 13 * 2048) / GIB)
    assert parts["backward: activations and gradients"] == pytest.approx((kept + 151936 * 2048 * 4) / GIB)
    assert parts["backward: a layer"] == pytest.approx(2048 * layer / GIB)
    assert parts["backward: autocast copies"] == pytest.approx(2 * 50_331_648 / GIB)
    held = 20 * size + parts["teacher weights"]
    training = sum(value for name, value in parts.items() if name.startswith("training: "))
    assert training > sum(value for name, value in parts.items() if name.startswith("backward: "))
    assert parts["overhead"] == pytest.approx(2 + 0.1 * (held + training))
    assert parts["peak"] == pytest.approx(held + training + parts["overhead"])


def test_what_makes_it_larger_and_smaller():
    """Without checkpointing every layer stores; vLLM replaces the cache by its share, and asleep it is not held."""
    student = Geometry.of("Qwen/Qwen3-0.6B")
    run = Run(student, (), rows=64, batch=4, completion=1024, weight_bytes=2)
    without = estimate(replace(run, checkpointing=False))["training: activations"]
    layers = 28 * (16 * 1024 + 8 * 3072 + 10 * 2048 + 10 * 1024)
    assert without == pytest.approx(4 * 1536 * (layers + 13 * 1024) / GIB)
    assert estimate(run)["training: activations"] < without / 5
    awake, asleep = (estimate(replace(run, vllm=8.0, vllm_sleeps=sleeps)) for sleeps in (False, True))
    assert awake["vLLM"] == asleep["generation: vLLM"] == 8.0
    assert "generation: KV cache" not in awake | asleep
    assert asleep["peak"] < awake["peak"]
    offloaded = estimate(replace(run, sharding="zero3", world=8, offload=True))
    assert not {"student weights", "gradients", "optimizer"} & set(offloaded)


def test_gradients_of_a_single_backward_pass_come_as_activations_go():
    """Qwen3-0.6B, 596,049,920 parameters in fp32: 2.2 GiB, more than few tokens keep; sharding holds them always."""
    run = Run(Geometry.of("Qwen/Qwen3-0.6B"), (), rows=1, batch=1, completion=64, prompt=64, accumulates=False)
    parts = estimate(run)
    assert "gradients" not in parts
    assert parts["backward: activations and gradients"] == pytest.approx(4 * 596_049_920 / GIB)
    for more in ({"accumulates": True}, {"sharding": "ddp"}):
        assert estimate(replace(run, **more))["gradients"] == pytest.approx(4 * 596_049_920 / GIB)


def test_the_head_of_a_tilted_target_by_hand():
    """Both heads side by side in the student's precision: 151936 x (2048 + 1024) x 4 bytes, and no second student."""
    student, teacher = Geometry.of("Qwen/Qwen3-0.6B"), Geometry.of("Qwen/Qwen3-1.7B")
    run = Run(student, (Teacher(teacher),), 8, 8, 512, full=True, lora_rank=8)
    current, initial = (estimate(replace(run, initial=initial)) for initial in (False, True))
    assert initial["training: head"] - current["training: head"] == pytest.approx(151936 * 3072 * 4 / GIB)
    assert "initial policy" not in initial


CHECKED = [
    ("qwen3_full_zero3_server", "zero3", 80),
    ("qwen3_lora_24gb", "single_gpu", 24),
    ("qwen3_qlora_16gb", "single_gpu", 16),
]


def table(recipe, launch):
    return estimate(read(CONFIGS / f"{recipe}.yaml", ACCELERATE / f"{launch}.yaml"))


@pytest.mark.parametrize(("recipe", "launch", "gpu"), CHECKED, ids=[name for name, *_ in CHECKED])
def test_recipes_say_what_the_estimate_says_and_fit(recipe, launch, gpu):
    """The header names every part to 0.1 GiB; the peak leaves a tenth of the GPU (sold in GB, of 10^9 bytes) free."""
    comment = [line for line in (CONFIGS / f"{recipe}.yaml").read_text().splitlines() if line.startswith("#")]
    header = " ".join(line.removeprefix("#").strip() for line in comment)
    parts = table(recipe, launch)
    said = "; ".join(f"{name} {size:.1f}" for name, size in parts.items())
    assert f"Memory of one GPU in GiB, an estimate (examples/memory.py), not measured: {said}." in header
    assert "NOT RUN HERE" in header
    assert parts["peak"] < 0.95 * gpu * 1e9 / GIB
    if "server" in recipe:
        weights = Geometry.of("Qwen/Qwen3-32B").weights(2) / GIB
        assert f"The server needs {weights:.1f} for the teacher's weights" in header


def test_documented_peaks_are_the_estimates():
    import re

    rows = re.findall(
        r"^\| `(\w+)\.yaml` \| `(\w+)\.yaml` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "scale-out.md").read_text(),
        re.M,
    )
    assert {(recipe, launch) for recipe, launch, _ in CHECKED} <= {row[:2] for row in rows}
    for recipe, launch, *figures in rows:
        parts = table(recipe, launch)
        held = [sum(v for k, v in parts.items() if ": " not in k and k not in ("overhead", "peak"))]
        phases = ("generation", "training", "backward")
        generation, turn, back = (sum(v for k, v in parts.items() if k.startswith(f"{p}: ")) for p in phases)
        expected = [*held, generation, max(turn, back), parts["overhead"], parts["peak"]]
        assert figures == [f"{value:.1f}" for value in expected], (recipe, launch)


def test_the_command_prints_the_table():
    command = ["examples/memory.py", "--config", "examples/configs/qwen3_qlora_16gb.yaml"]
    command += ["--accelerate_config", "examples/accelerate/single_gpu.yaml"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    for name, size in table("qwen3_qlora_16gb", "single_gpu").items():
        assert f"{size:8.2f} GiB  {name}\n" in run.stdout
    assert "an estimate, not measured" in run.stdout


def test_an_offloaded_teacher_by_hand():
    """Qwen3-4B beside 8 rows of 512 + 512 tokens, batch 2: a layer of 2560 x 4096 x 2 + 2 x 2560 x 1024 +
    3 x 2560 x 9728 + 2 x 2560 + 2 x 128 = 100,930,816 parameters; what stays is 151936 x 2560 + 2560. All 8 rows are
    scored at once, 8192 tokens being below 32,768, with 8 x 2560 + 6 x 9728 bytes a token in flight."""
    student, teacher = Geometry.of("Qwen/Qwen3-1.7B"), Geometry.of("Qwen/Qwen3-4B")
    run = Run(student, (Teacher(teacher),), rows=8, batch=2, completion=512, weight_bytes=2, teacher_rows=2)
    held, parts = estimate(run), estimate(replace(run, teacher_offload=True))
    layer, stays = 2 * 100_930_816 / GIB, 2 * (151936 * 2560 + 2560) / GIB
    assert held["teacher weights"] == pytest.approx(stays + 36 * layer)
    assert parts["teacher weights"] == pytest.approx(stays)
    assert parts["scoring: weights brought"] == pytest.approx(layer)
    assert parts["teacher phase: weights brought"] == pytest.approx(36 * layer)
    assert parts["scoring: activations"] == pytest.approx(8 * 1024 * (8 * 2560 + 6 * 9728) / GIB)
    assert held["scoring: activations"] == pytest.approx(2 * 1024 * (8 * 2560 + 6 * 9728) / GIB)
    assert "teacher states" not in parts
    full = estimate(replace(run, teacher_offload=True, full=True))
    assert full["teacher states"] == pytest.approx(2 * 8 * 512 * 2560 / GIB)
    long = estimate(replace(run, teacher_offload=True, rows=64))  # 65,536 tokens: half of them at once
    assert long["scoring: activations"] == pytest.approx(32 * 1024 * (8 * 2560 + 6 * 9728) / GIB)
    assert long["peak"] < estimate(replace(run, rows=64))["peak"] - 30 * layer


def test_what_stays_of_a_real_offloaded_teacher():
    """Bytes that are not on the meta device, with tied embeddings and without, and of the largest block."""
    from sg_opd.teachers.local import BlockOffload

    for tied in (True, False):
        geometry = replace(TINY, tied=tied)
        model = build(geometry).to(torch.bfloat16)
        offload = BlockOffload(model, torch.device("cpu"))
        stays = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        parts = estimate(Run(TINY, (Teacher(geometry),), rows=1, batch=1, completion=8, teacher_offload=True))
        assert parts["teacher weights"] * GIB == pytest.approx(stays)
        largest = max(sum(p.nbytes for p in block.parameters()) for block in offload.blocks)
        assert parts["scoring: weights brought"] * GIB == pytest.approx(largest)


def test_what_is_documented_of_an_offloaded_teacher():
    import re

    text = (ROOT / "docs" / "scale-out.md").read_text().replace("\n", " ")
    said = re.search(
        r"falls from ([\d.]+) to ([\d.]+) GiB, and to ([\d.]+) with `--teacher_phase_steps 0`", text
    ).groups()
    run = read(CONFIGS / "qwen3_lora_24gb.yaml", ACCELERATE / "single_gpu.yaml")
    runs = run, replace(run, teacher_offload=True), replace(run, teacher_offload=True, teacher_rows=0)
    assert list(said) == [f"{estimate(one)['peak']:.1f}" for one in runs]


def test_a_recipe_says_whether_its_teacher_is_offloaded(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((CONFIGS / "qwen3_lora_24gb.yaml").read_text() + "teacher_offload: true\n")
    assert read(recipe, ACCELERATE / "single_gpu.yaml").teacher_offload is True
    assert read(CONFIGS / "qwen3_lora_24gb.yaml", ACCELERATE / "single_gpu.yaml").teacher_offload is False


def test_the_top_k_estimator_by_hand():
    """Qwen3-0.6B in fp32, k = 64, 8 rows of 512 + 512 tokens, batch 2, beside a 1.7B. A token of the rows keeps 65 ids
    and 66 log-probabilities of 4 bytes; a tile of 1,024 positions has 8,192 ids and a spare column, in fp32."""
    student, teacher = Geometry.of("Qwen/Qwen3-0.6B"), Geometry.of("Qwen/Qwen3-1.7B")
    run = Run(student, (Teacher(teacher),), rows=8, batch=2, completion=512, top_k=64, lora_rank=8)
    parts, tile = estimate(run), 4 * 1024 * 8193
    assert parts["likeliest ids"] * GIB == 8 * 512 * (65 * 4 + 66 * 4)
    states, weights, columns = 1024 * 1024 * 4, 8192 * 1024 * 2, 1024 * 48 * 66
    assert parts["training: head"] * GIB == pytest.approx(states + weights + 5 * tile + columns)
    assert parts["scoring: head"] * GIB == pytest.approx(4 * tile)
    long = estimate(replace(run, completion=4096))  # 2,048 positions a tile at most
    assert long["scoring: head"] * GIB == pytest.approx(4 * 4 * 2048 * 8193)
    served = estimate(replace(run, teachers=()))
    assert "scoring: head" not in served
    for name in ("likeliest ids", "training: head"):
        assert served[name] == parts[name]


def peak_of(function):
    """The most bytes that the CPU's allocator held at once while `function` ran, beside what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_the_top_k_kernel_takes_what_is_said():
    """Of its tiles what the allocator counts, and of the columns beside them no more; what is kept, to the byte."""
    from memory import top_k_tiles

    from sg_opd.method.buckets import Buckets
    from sg_opd.method.divergence import Head
    from sg_opd.method.top_k import likeliest, top_k_per_token

    torch.manual_seed(0)
    positions, k, geometry = 256, 8, replace(TINY, vocab=3 * 8192)
    head, ids = Head(torch.randn(geometry.vocab, 32)), torch.randint(geometry.vocab, (positions,))
    states = torch.randn(1, positions, 32, requires_grad=True)
    of_teacher = states[0].detach(), head, ids, k, geometry.vocab, 1.0
    kept = likeliest(*of_teacher)
    run = Run(geometry, (), rows=1, batch=1, completion=positions, top_k=k)
    assert estimate(run)["likeliest ids"] * GIB == pytest.approx(sum(part.nbytes for part in kept))
    measured = peak_of(lambda: likeliest(*of_teacher))
    assert top_k_tiles(geometry, positions, "teacher") == pytest.approx(measured, rel=0.02)

    def train():
        target, gated = Buckets(*(part.unsqueeze(0) for part in kept)), torch.ones(1, positions, dtype=torch.bool)
        given = states, head, target, ids.unsqueeze(0), gated, 1.0, lambda student, teacher: torch.ones_like(student)
        top_k_per_token(*given)[0].sum().backward()

    assert top_k_tiles(geometry, positions, "student") == pytest.approx(peak_of(train), rel=0.02)


def test_several_teachers_by_hand():
    """A 4B of 4,022,468,096 parameters and an 8B of 8,190,735,360 (of which 6,945,767,424 in 4 bits), hidden 2,560 and
    4,096, beside a 1.7B of hidden 2,048: the weights add up, each scores in its turn, states are of the wider."""
    student, small, large = (Geometry.of(f"Qwen/Qwen3-{size}") for size in ("1.7B", "4B", "8B"))
    teachers = Teacher(small), Teacher(large, in_4bit=True)
    run = Run(student, teachers, rows=8, batch=2, completion=512, full=True, initial=True, lora_rank=8)
    parts, alone = estimate(run), estimate(replace(run, teachers=teachers[1:]))
    of_large = 6_945_767_424 * NF4 + 2 * (8_190_735_360 - 6_945_767_424)
    assert parts["teacher weights"] * GIB == pytest.approx(2 * 4_022_468_096 + of_large)
    assert parts["scoring: activations"] * GIB == pytest.approx(2 * 1024 * (8 * 4096 + 6 * 12288))
    assert parts["scoring: activations"] == alone["scoring: activations"]
    # the target's heads, one for each teacher, and no wider states
    assert parts["training: head"] - alone["training: head"] == pytest.approx(4 * 151936 * (2560 + 2048) / GIB)
    single = [estimate(replace(run, batch=1, teachers=given)) for given in (teachers, teachers[1:])]
    assert single[0]["training: head"] == single[1]["training: head"]  # a row has one teacher
    assert "initial policy" not in parts

    trained = replace(run, initial=False, lora_rank=0)
    table = 4 * 151936 * 2048 / GIB
    one, two = (estimate(replace(trained, teachers=given)) for given in (teachers[1:], teachers))
    assert two["training: head's gradients"] - one["training: head's gradients"] == pytest.approx(table)
    assert two["backward: activations and gradients"] == one["backward: activations and gradients"]
    both = Teacher(small), Teacher(large)
    offloaded = estimate(replace(trained, teacher_offload=True, teachers=both))
    stays = 2 * (151936 * 2560 + 2560) + 2 * (2 * 151936 * 4096 + 4096)
    assert offloaded["teacher weights"] * GIB == pytest.approx(stays)
    assert offloaded["teacher states"] * GIB == 2 * 8 * 512 * 4096


def test_the_student_before_training_as_a_teacher_by_hand():
    """Without LoRA a copy of the 1,720,574,976 parameters in fp32; with one nothing, but its turn of scoring."""
    student = Geometry.of("Qwen/Qwen3-1.7B")
    run = Run(student, (Teacher(student, initial=True),), rows=8, batch=2, completion=512, teacher_offload=True)
    parts = estimate(run)
    assert parts["initial policy"] * GIB == 4 * 1_720_574_976
    assert "teacher weights" not in parts
    assert estimate(replace(run, initial=True))["initial policy"] == parts["initial policy"]
    assert parts["scoring: activations"] * GIB == pytest.approx(2 * 1024 * (8 * 2048 + 6 * 6144))
    assert "scoring: weights brought" not in parts
    assert "initial policy" not in estimate(replace(run, lora_rank=8))


def test_a_recipe_of_several_teachers_is_read(tmp_path, monkeypatch):
    """One loaded, one that is the student before training; one on a server is not in this process."""
    monkeypatch.chdir(ROOT)
    run = read(CONFIGS / "arithmetic_two.yaml", ACCELERATE / "single_gpu.yaml")
    teacher, student = (Geometry.of(f"examples/arithmetic/{name}") for name in ("teacher", "student"))
    assert run.teachers == (Teacher(teacher), Teacher(student, initial=True))
    assert (run.full, run.top_k) == (True, 0)
    recipe = tmp_path / "recipe.yaml"
    text = (CONFIGS / "arithmetic_two.yaml").read_text().replace("estimator: full", "estimator: top_k")
    recipe.write_text(text.replace("sums: initial", "sums: {server_url: 'http://127.0.0.1:8000'}"))
    run = read(recipe, ACCELERATE / "single_gpu.yaml")
    assert run.teachers == (Teacher(teacher),)
    assert (run.full, run.top_k) == (False, 64)
