"""The study's arms: each trains a world's student on the same budget of rollouts, and says what it used.

What the package offers is a table of settings (`ARMS`). What only the study needs is here: a teacher phase that takes
teacher rollouts whatever the verifier says, a gate per entry of the vocabulary, and the arms that other trainers run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from worlds import World

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer, TeacherPhaseSampler
from sg_opd.evaluation.evaluator import evaluate_model
from sg_opd.method.divergence import head_of, last_hidden_state, sequence
from sg_opd.method.gate import verdict_sign
from sg_opd.method.rules import CONFLICT, CONSENSUS

ROLLOUTS = 128  # completions a step, in every arm
GENERATIONS = 4  # of a prompt; GRPO's groups are twice as large
GRPO_GENERATIONS = 8
LOGGING_STEPS = 5
WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        title: as tables and plots name it.
        settings: fields of `SGOPDConfig`; of no meaning to other trainers.
        trainer: which function of `TRAINERS` trains it.
        main: whether it gets all seeds.
        everywhere: whether it runs in both worlds, or in the second only.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: str = "sg-opd"
    main: bool = False
    everywhere: bool = True


LITE = {"preset": "sg-opd-lite"}
# the arms of the earlier study
ARMS = {
    "opd": Arm("OPD", {"preset": "opd"}, main=True),
    "exopd": Arm("ExOPD", {"preset": "exopd"}, main=True),
    "opdvr": Arm("OPDVR", {"preset": "opdvr"}, main=True),
    "sg-opd-lite": Arm("SG-OPD lite", LITE, main=True),
    "no-gate": Arm("SG-OPD lite without gate", {**LITE, "gate_extrapolation": 1.0}, main=True),
    "no-phase": Arm("SG-OPD lite without phase", {**LITE, "teacher_phase_steps": 0}, main=True),
    "initial": Arm("SG-OPD lite, initial reference", {**LITE, "reference_policy": "initial"}),
    "nll": Arm("SG-OPD lite, nll on teacher rows", {**LITE, "teacher_rollout_loss": "nll"}),
    "unendorsed": Arm("SG-OPD lite, unendorsed phase", LITE, trainer="unendorsed"),
    "entry-gate": Arm("SG-OPD lite, gate per vocabulary entry", LITE, trainer="entry-gate", everywhere=False),
    "distillation": Arm("TRL DistillationTrainer", trainer="distillation"),
    "grpo": Arm("GRPO, verifier alone", trainer="grpo"),
    "sft": Arm("SFT on endorsed teacher rollouts", trainer="sft"),
}
# and of the family of gates; what they share with the others is the same arm
FAMILY = {
    **{name: ARMS[name] for name in ("opd", "sg-opd-lite", "opdvr", "grpo")},
    "sg-opd": Arm("SG-OPD", {"preset": "sg-opd"}, main=True),
    "r2-opd": Arm("R2-OPD", {"preset": "r2-opd"}, main=True),
    "grpd": Arm("GRPD", {"preset": "grpd"}),
    "rg-opd": Arm("RG-OPD", {"preset": "rg-opd"}),
    "opd-sampled": Arm("OPD, sampled", {"preset": "opd", "estimator": "sampled"}),
    "power-opd": Arm("PowerOPD", {"preset": "power-opd", "estimator": "sampled"}),
    "opd-grpo": Arm("OPD + 0.1 reward", {"preset": "opd-grpo", "estimator": "sampled", "advantage_weight": 0.1}),
    "opd-grpo-1": Arm("OPD + 1.0 reward", {"preset": "opd-grpo", "estimator": "sampled", "advantage_weight": 1.0}),
    **{
        f"opd-top-{k}": Arm(f"OPD, top_k {k}", {"preset": "opd", "estimator": "top_k", "teacher_top_k": k})
        for k in (4, 16)
    },
    # the teacher is the reader before training, which sees the worked solution
    "reader-opd": Arm("OPD", {"preset": "opd"}, trainer="self"),
    "reader-lite": Arm("SG-OPD lite", LITE, trainer="self"),
    # the gate alone: no teacher phase; `factors` against the initial policy, `sign` against the current one
    "factors": Arm("factors", {"preset": "opd", "reference_policy": "initial"}),
    "sign": Arm("sign gate", {"preset": "opd", "gate_extrapolation": 1.8, "gate_interpolation": 1.0}),
}


@cache
def verifier() -> MathVerifier:
    """One for the whole process: its workers are started once."""
    return MathVerifier()


def load(path: str) -> tuple[PreTrainedModel, Any]:
    """A model, on the GPU where there is one, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(path)


def common(world: World, steps: int, learning_rate: float, seed: int, output: Path) -> dict[str, Any]:
    """The training arguments that all arms share."""
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": ROLLOUTS,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(WARM_UP * steps),
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": LOGGING_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class EndorseAll(TeacherPhaseSampler):
    """Takes a slot's first teacher rollout that ended, and notes what the verifier said of it."""

    def __init__(self, *args: Any, verdicts: dict[int, float | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verdicts = verdicts

    def fill(self, rows: Sequence[int], propose: Any, endorse: Any) -> dict:
        def endorse_all(rows: Sequence[int], proposals: Sequence) -> list[float]:
            self.verdicts.update(zip(rows, endorse(rows, proposals), strict=True))
            return [1.0] * len(rows)

        return super().fill(rows, propose, endorse_all)


class UnendorsedTrainer(SGOPDTrainer):
    """The teacher phase without its verifier: wrong teacher rollouts are mixed in too, with their true verdicts."""

    @property
    def teacher_phase(self) -> EndorseAll:
        args, steps = self.args, self.args.teacher_phase_length(self.state.max_steps)
        settings = args.teacher_phase_fraction, steps, args.teacher_phase_schedule
        return EndorseAll(*settings, seed=args.seed, verdicts=self.verdicts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.verdicts: dict[int, float | None] = {}
        output = super()._generate_and_score_completions(inputs)
        for row, verdict in self.verdicts.items():
            if output["from_teacher"][row]:
                output["verifier_labels"][row] = float("nan") if verdict is None else verdict
        return output


class EntryGateTrainer(SGOPDTrainer):
    """The exact expectation of the gated sampled estimator at fixed verdict: a gate per entry of the vocabulary.

    `-sum_v stopgrad(pi_S(v) lambda(s delta(v)) delta(v)) log pi_S(v)`, on whole logits: for small vocabularies only.
    """

    def _divergence_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        mask, ids = self._loss_mask(inputs), inputs["completion_ids"]

        def logps(model: Any) -> torch.Tensor:
            states = last_hidden_state(model, *sequence(inputs), ids.size(1))
            return torch.log_softmax(states @ head_of(model).weight.T / self.temperature, dim=-1)

        with torch.no_grad():
            teacher = logps(self.teacher.unwrapped)
        student = logps(self.accelerator.unwrap_model(model))
        taken = [p.detach().gather(2, ids.unsqueeze(2)).squeeze(2) for p in (student, teacher)]
        decision = self._decide(inputs, student=taken[0], teacher=taken[1])
        per_token = entry_gated(student, teacher, inputs["verifier_labels"], *self._factors())
        entropy = -(student.detach().exp() * student.detach()).sum(-1)
        self._meter.update(decision, per_token, mask, inputs["from_teacher"], mask, {"entropy": entropy})
        return torch.where(mask, per_token, 0.0).sum() / self._divisor(inputs)

    def _factors(self) -> tuple[float, float]:
        return self.args.gate_extrapolation, self.args.gate_interpolation


def entry_gated(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, extrapolation: float, interpolation: float
) -> torch.Tensor:
    """The loss of each position, (B, T), from log-probabilities (B, T, V) and verdicts (B,)."""
    delta = (teacher - student).detach()
    case = torch.sign(verdict_sign(labels)[:, None, None] * delta)
    factor = torch.ones_like(delta)
    factor = factor.masked_fill(case == CONSENSUS, extrapolation).masked_fill(case == CONFLICT, interpolation)
    return -((student.detach().exp() * factor * delta) * student).sum(-1)


def train_sg_opd(
    world: World, arguments: dict, settings: dict, trainer: type[SGOPDTrainer] = SGOPDTrainer, alone: bool = False
) -> Trainer:
    """With the world's teacher; `alone` the reader with itself before training, which sees the worked solution too."""
    return trainer(
        model=world.reader if alone else world.student,
        teacher_model="initial" if alone else world.teacher,
        verifier=verifier(),
        args=config_of(world, arguments, settings),
        train_dataset=world.split("train", hinted=alone),
    )


def config_of(world: World, arguments: dict[str, Any], settings: dict[str, Any]) -> SGOPDConfig:
    """The configuration of an arm: the arguments that all share, and its settings over those of the study."""
    ours = {"estimator": "full", "num_generations": GENERATIONS, "temperature": 1.0}
    return SGOPDConfig(**arguments, **ours | settings, max_completion_length=world.max_completion_length)


def train_grpo(world: World, arguments: dict, settings: dict) -> Trainer:
    config = GRPOConfig(
        **arguments, num_generations=GRPO_GENERATIONS, max_completion_length=world.max_completion_length
    )
    return GRPOTrainer(model=world.student, reward_funcs=verifier(), args=config, train_dataset=world.split("train"))


def train_distillation(world: World, arguments: dict, settings: dict) -> Trainer:
    config = DistillationConfig(**arguments, max_completion_length=world.max_completion_length)
    return DistillationTrainer(
        model=world.student, teacher_model=world.teacher, args=config, train_dataset=world.split("train")
    )


def train_sft(world: World, arguments: dict, settings: dict) -> Trainer:
    """As many teacher rollouts as the others have student rollouts; the endorsed ones are the training set."""
    folder = Path(arguments["output_dir"]) / "teacher"
    rows = endorsed_rollouts(world, arguments["max_steps"] * ROLLOUTS, arguments["seed"], folder)
    model, tokenizer = load(world.student)
    return SFTTrainer(model=model, args=SFTConfig(**arguments), train_dataset=rows, processing_class=tokenizer)


def endorsed_rollouts(world: World, count: int, seed: int, folder: Path) -> Dataset:
    """Of `count` teacher rollouts, `GENERATIONS` a question, those that ended and were graded correct.

    All of them are kept in `folder`, with their verdicts.
    """
    model, tokenizer = load(world.teacher)
    questions = world.split("train", count // GENERATIONS)
    evaluate_model(
        model,
        tokenizer,
        questions,
        verifier(),
        GENERATIONS,
        world.max_completion_length,
        batch_size=512,
        seed=seed,
        progress=False,
        output_dir=folder,
    )
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    if not any(sample["verdict"] == 1.0 and sample["finish_reason"] == "stop" for sample in samples):
        raise ValueError(f"None of the {count} teacher rollouts in {folder} is endorsed: there is nothing to train on.")
    return Dataset.from_list(
        [
            {
                "prompt": questions[int(sample["question_id"])]["prompt"],
                "completion": [{"role": "assistant", "content": sample["completion"]}],
            }
            for sample in samples
            if sample["verdict"] == 1.0 and sample["finish_reason"] == "stop"
        ]
    )


TRAINERS = {
    "sg-opd": train_sg_opd,
    "unendorsed": lambda *given: train_sg_opd(*given, trainer=UnendorsedTrainer),
    "entry-gate": lambda *given: train_sg_opd(*given, trainer=EntryGateTrainer),
    "self": lambda *given: train_sg_opd(*given, alone=True),
    "grpo": train_grpo,
    "distillation": train_distillation,
    "sft": train_sft,
}


def trainer_of(
    world: World, arm: Arm, changes: dict[str, Any], steps: int, learning_rate: float, seed: int, output: Path
) -> Trainer:
    """The trainer of one run, ready to train; `changes` are further settings, over the arm's."""
    arguments = common(world, steps, learning_rate, seed, output)
    return TRAINERS[arm.trainer](world, arguments, {**arm.settings, **changes})


def budget(arm: Arm, trainer: Trainer, history: list[dict[str, float]]) -> dict[str, int]:
    """Completions that the student sampled, that the teacher sampled, and that the teacher scored."""
    total = trainer.args.max_steps * ROLLOUTS
    if arm.trainer == "sft":
        return {"student_rollouts": 0, "teacher_rollouts": total, "teacher_scored": 0}
    shares = [entry["teacher/slot_share"] for entry in history if "teacher/slot_share" in entry]
    slots = round(total * sum(shares) / len(shares)) if shares else 0
    scored = 0 if arm.trainer == "grpo" else total
    return {"student_rollouts": total, "teacher_rollouts": slots, "teacher_scored": scored}
