"""What ran where: the README's table, from the tests that are there and from the results of the GPU.

python benchmarks/ran.py    # fills the README anew
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from pages import filled, table

from sg_opd.evaluation.results import read_json

PAGE = ROOT / "README.md"
GPU = ROOT / "benchmarks" / "results" / "gpu"
NO = "not yet"


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        name: as the table has it.
        tests: that run it on the CPU, as `file::function` below tests/; none where nothing did.
        how: where they run.
        gpu: cases of the GPU's agreement with the CPU that need it; none where it did not run there.
    """

    name: str
    tests: tuple[str, ...] = ()
    how: str = "in the tests"
    gpu: tuple[str, ...] = ()


FEATURES = (
    Feature(
        "full fine-tuning, estimators `sampled` and `full`",
        ("test_trainer.py::test_update_equals_the_loss_on_plain_logits",),
        gpu=("full/sampled", "full/full"),
    ),
    Feature(
        "estimator `top_k`",
        ("training/test_top_k_training.py::test_two_steps_are_the_full_estimators_where_k_is_the_vocabulary",),
    ),
    Feature(
        "LoRA",
        ("test_trainer.py::test_lora_starts_from_the_base_model_as_reference",),
        gpu=("lora/sampled", "lora/full", "lora/sampled, initial"),
    ),
    Feature(
        "initial reference, gradient checkpointing, `teacher_offload`",
        (
            "test_trainer.py::test_gradient_checkpointing_changes_nothing",
            "teachers/test_offload.py::test_a_run_is_the_same_bit_for_bit",
        ),
        gpu=("full/full, initial", "full/full, gradient checkpointing", "full/full, teacher_offload"),
    ),
    Feature(
        "a killed run resumed, bit for bit",
        ("checkpoints/test_resume.py::test_killed_and_resumed_is_not_killed",),
        gpu=("resume, full/sampled", "resume, lora/full, initial"),
    ),
    Feature(
        "several teachers, prompts of their own, the student as its own teacher",
        (
            "training/test_several_teachers.py::test_update_by_hand",
            "training/test_teacher_prompts.py::test_update_by_hand",
        ),
    ),
    Feature(
        "QLoRA, both models in 4 bits",
        ("teachers/test_quantization.py::test_qlora_trains_the_adapter_on_a_4_bit_student",),
    ),
    Feature(
        "teacher on a vLLM server",
        ("teachers/test_vllm.py::test_four_steps_give_the_weights_of_the_teacher_in_process",),
        "a real vLLM",
    ),
    Feature(
        "student's answers by vLLM in the trainer",
        ("teachers/test_vllm.py::test_student_rollouts_from_a_colocated_engine",),
        "a real vLLM",
    ),
    Feature(
        "DDP, ZeRO-2, ZeRO-3, FSDP2",
        ("test_distributed.py::test_losses_metrics_and_weights_are_a_single_processs",),
        "in two processes",
    ),
    Feature(
        "the Qwen3 recipes",
        ("examples/test_launch.py::test_each_accelerate_config_trains",),
        "with small models",
    ),
    Feature("several GPUs; student's answers by TRL's vLLM server, which needs NCCL; multimodal models"),
)


def missing_tests() -> list[str]:
    """Tests that a row names and that are not there."""
    named = {test for feature in FEATURES for test in feature.tests}
    return sorted(test for test in named if not _is_there(test))


def _is_there(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    found = ast.parse(path.read_text()).body if path.is_file() else []
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in found)


def ran_table(folder: Path = GPU) -> str:
    """The table; a GPU is named where all cases of a feature agreed with the CPU there. What ran alike shares a row."""
    agrees = read_json(folder / "judged.json")["agrees"]
    device = read_json(folder / "agreement.json")["about"]["device"].split()[1]
    rows: dict[tuple[str, str], list[str]] = {}
    for feature in FEATURES:
        on_gpu = feature.gpu and all(agrees.get(case) for case in feature.gpu)
        where = feature.how if feature.tests else NO, device if on_gpu else NO
        rows.setdefault(where, []).append(feature.name)
    return table(["", "CPU", "GPU"], [["; ".join(names), *where] for where, names in rows.items()], left=3)


if __name__ == "__main__":
    if missing := missing_tests():
        sys.exit(f"No such tests: {', '.join(missing)}. Name the tests in {Path(__file__).name} as they are.")
    PAGE.write_text(filled(PAGE.read_text(), {"what ran where": ran_table()}, whole=False))
