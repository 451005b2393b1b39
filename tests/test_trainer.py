"""SGOPDTrainer: its updates against SignGatedLoss on plain logits of unpatched copies, and the life of a run."""

import copy
import math

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers import (
    MIXED,
    Recorder,
    assert_same_weights,
    assert_same_weights_exactly,
    coin_verifier,
    expected_loss,
    make_config,
    plain_logits,
    sgd_step,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from sg_opd import SGOPDTrainer, SignGatedLoss
from sg_opd.method.gate import GateDecision, GateSettings, decide, verdict_sign
from sg_opd.method.loss import gated_divergence
from sg_opd.training.metrics import METRICS
from sg_opd.training.rollouts import Generated, Rollouts


@pytest.mark.parametrize("rollout_loss", ["gated", "nll"])
@pytest.mark.parametrize("reference_policy", ["current", "initial"])
@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
def test_update_equals_the_loss_on_plain_logits(
    estimator, reference_policy, rollout_loss, make_model, tokenizer, dataset, tmp_path
):
    """Two micro-batches of four rows, mixed with teacher rows, temperature 0.8: the step of an unpatched copy."""
    student, teacher = make_model(1), make_model(2, hidden_size=48)
    copy_of_student, copy_of_teacher, initial = copy.deepcopy(student), copy.deepcopy(teacher), copy.deepcopy(student)
    args = make_config(
        tmp_path,
        estimator=estimator,
        reference_policy=reference_policy,
        teacher_rollout_loss=rollout_loss,
        gate_extrapolation=1.8,
        gate_interpolation=0.6,
        gate_dead_zone=0.1,
        **({"teacher_top_k": 5} if estimator == "top_k" else {}),
        **MIXED,
    )
    with torch.no_grad():  # a reference that differs from the student, or the initial policy would show nothing
        for parameter in initial.parameters():
            parameter.add_(0.01)
    trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    if reference_policy == "initial":
        trainer.accelerator.unwrap_model(trainer.initial_policy.frozen).load_state_dict(initial.state_dict())
    trainer.train()
    from_teacher = torch.cat([batch["from_teacher"] for batch in trainer.batches])
    assert 0 < from_teacher.sum() < len(from_teacher)
    divisor = sum(batch["completion_mask"].sum() for batch in trainer.batches)
    settings = {"estimator": estimator, "dead_zone": 0.1, "temperature": 0.8, "top_k": 5}
    loss_fn = SignGatedLoss(extrapolation=1.8, interpolation=0.6, **settings)
    reference = initial if reference_policy == "initial" else None
    losses = [
        expected_loss(copy_of_student, copy_of_teacher, reference, batch, loss_fn, divisor, rollout_loss == "nll")
        for batch in trainer.batches
    ]
    assert trainer.losses == pytest.approx([loss.item() for loss in losses], rel=1e-4, abs=1e-6)
    sgd_step(copy_of_student, losses)
    assert_same_weights(student, copy_of_student)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_two_iterations_keep_the_first_decision(estimator, make_model, tokenizer, dataset, tmp_path):
    """`num_iterations=2`: the second step uses the gate and the old log-probs from before the first."""
    student, teacher = make_model(1), make_model(2)
    simulated, copy_of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    args = make_config(tmp_path, estimator=estimator, num_iterations=2, gradient_accumulation_steps=1, max_steps=2)
    trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    batch = trainer.batches[0]
    assert batch["completion_ids"].equal(trainer.batches[1]["completion_ids"])
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    teacher_logits = plain_logits(copy_of_teacher, batch).detach() / 0.8
    decision = old = None
    for step in range(2):
        logits = plain_logits(simulated, batch) / 0.8
        logps = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        if step == 0:
            old = logps.detach()
            teacher_logps = teacher_logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            signs = verdict_sign(batch["verifier_labels"])
            decision = decide(old, teacher_logps, signs, mask, GateSettings(1.8, 1.0))
        if estimator == "full":
            per_token = gated_divergence(logits, teacher_logits, decision.factor)
        else:
            ratio, advantage = (logps - old).exp(), decision.advantage
            per_token = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = (per_token * mask).sum() / mask.sum()
        assert trainer.losses[step] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        sgd_step(simulated, [loss])
    assert_same_weights(student, simulated)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_any_split_of_the_batch_gives_the_same_update(estimator, make_model, tokenizer, dataset, tmp_path):
    updates = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        student = make_model(1)
        args = make_config(
            tmp_path,
            estimator=estimator,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **MIXED,
        )
        SGOPDTrainer(student, make_model(2), coin_verifier, args, dataset, processing_class=tokenizer).train()
        updates.append(student)
    assert_same_weights(updates[0], updates[1], tolerance=1e-6)
    assert_same_weights(updates[0], updates[2], tolerance=1e-6)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_a_teacher_equal_to_the_student_teaches_nothing(estimator, make_model, tokenizer, dataset, tmp_path, caplog):
    student, before = make_model(1), make_model(1)
    trainer = Recorder(
        student,
        make_model(1),
        coin_verifier,
        make_config(tmp_path, estimator=estimator),
        dataset,
        processing_class=tokenizer,
    )
    assert "the same model" in caplog.text
    trainer.train()
    assert trainer.losses == pytest.approx([0.0, 0.0], abs=1e-6)
    assert_same_weights(student, before, tolerance=1e-6)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_lora_starts_from_the_base_model_as_reference(estimator, make_model, tokenizer, dataset, tmp_path):
    """A new adapter switched off is the initial policy: the update is the loss's, and only the adapter moves."""
    student = make_model(1)
    base, copy_of_teacher = copy.deepcopy(student), make_model(2)
    args = make_config(tmp_path, estimator=estimator, reference_policy="initial", gate_interpolation=0.5)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = Recorder(
        student, make_model(2), coin_verifier, args, dataset, processing_class=tokenizer, peft_config=adapter
    )
    adapted = copy.deepcopy(trainer.model)
    adapted.get_base_model().__dict__.pop("forward")
    assert trainer.initial_policy.frozen is None
    trainer.train()
    loss_fn = SignGatedLoss(extrapolation=1.8, interpolation=0.5, estimator=estimator, temperature=0.8)
    divisor = sum(batch["completion_mask"].sum() for batch in trainer.batches)
    losses = [expected_loss(adapted, copy_of_teacher, base, b, loss_fn, divisor, False) for b in trainer.batches]
    assert trainer.losses == pytest.approx([loss.item() for loss in losses], rel=1e-4, abs=1e-6)
    sgd_step(adapted, losses)
    assert_same_weights(trainer.model, adapted)


def test_an_adapter_lent_as_reference_has_no_dropout(make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, reference_policy="initial")
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    student = get_peft_model(make_model(1), adapter)
    trainer = Recorder(student, make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    trainer.model.train()
    with trainer.initial_policy.lend() as policy:
        scores = [trainer.completion_logps(policy, trainer.batches[0]) for _ in range(2)]
    assert scores[0].equal(scores[1])
    assert trainer.model.training


def test_settings_of_generation_are_kept_beside_the_suppressed_ids(make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, generation_kwargs={"suppress_tokens": [7]})
    trainer = SGOPDTrainer(make_model(1, 30), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    assert trainer.generation_config.suppress_tokens == [7, *range(len(tokenizer), 30)]


def test_several_generations_of_one_step_round_by_themselves(make_model, tokenizer, dataset, tmp_path):
    """Four generations within an optimizer step are four parts of its global batch of prompts."""
    args = make_config(
        tmp_path,
        steps_per_generation=1,
        gradient_accumulation_steps=4,
        **{**MIXED, "teacher_phase_fraction": 0.375, "teacher_phase_schedule": "constant"},
    )
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    seen = [int(batch["slot"].sum()) for batch in trainer.batches]
    assert seen == trainer.teacher_phase.slots(0, 4, 4).tolist()
    assert set(seen) == {1, 2}


def test_a_peft_model_keeps_a_frozen_copy_of_its_adapter(make_model, tokenizer, dataset, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = get_peft_model(make_model(1), config)
    initial = {name: p.detach().clone() for name, p in student.named_parameters() if ".default." in name}
    reference = copy.deepcopy(student)
    args = make_config(tmp_path, reference_policy="initial", max_steps=2, learning_rate=1.0)
    trainer = Recorder(student, make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    # the second step's reference is still the adapter as it was passed in, not the base model and not the trained one
    batch = trainer.batches[2]
    ids = batch["completion_ids"]
    logps = (plain_logits(reference, batch) / 0.8).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    mask = batch["completion_mask"]
    torch.testing.assert_close(batch["initial_per_token_logps"] * mask, logps.detach() * mask, rtol=1e-4, atol=1e-5)
    now = dict(trainer.model.named_parameters())
    for name, value in initial.items():
        assert now[name.replace(".default.", ".ref.")].equal(value)
        assert not now[name.replace(".default.", ".ref.")].requires_grad
    assert any(not now[name].equal(value) for name, value in initial.items())


FACTORS = {"opd": {1.0}, "exopd": {1.25}, "opdvr": {0.0, 1.0}, "grpd": {0.0, 1.0}, "rg-opd": {0.0, 1.0}}
FACTORS |= {"power-opd": {1.0}, "opd-grpo": {1.0}, "sg-opd": {1.0, 1.8}, "sg-opd-lite": {1.0, 1.8}}


@pytest.mark.parametrize(("preset", "factors"), FACTORS.items())
def test_presets(preset, factors, make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, preset=preset, teacher_phase_steps=None, max_steps=2)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    seen = {round(v, 4) for inputs in trainer._buffered_inputs for v in inputs["decision"]["factor"].unique().tolist()}
    assert seen <= factors
    assert len(seen) == len(factors)
    assert (trainer.initial_policy is not None) == (preset in ("exopd", "sg-opd"))
    assert trainer.teacher_phase.steps == {"sg-opd": 2, "sg-opd-lite": 1}.get(preset, 0)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_padded_vocabularies(estimator, make_model, tokenizer, dataset, tmp_path):
    """A head padded to 40 ids on either side: no id beyond the shared ones is sampled; the update is the loss's."""
    size = len(tokenizer)
    for student_size, teacher_size in ((40, size), (size, 40)):
        student, teacher = make_model(1, student_size), make_model(2, teacher_size)
        simulated, copy_of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        args = make_config(tmp_path, estimator=estimator, **MIXED)
        trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
        trainer.train()
        assert max(batch["completion_ids"].max() for batch in trainer.batches) < size
        divisor = sum(batch["completion_mask"].sum() for batch in trainer.batches)
        loss_fn = SignGatedLoss(estimator=estimator, temperature=0.8)
        losses = [expected_loss(simulated, copy_of_teacher, None, b, loss_fn, divisor, False) for b in trainer.batches]
        sgd_step(simulated, losses)
        assert_same_weights(student, simulated)


def test_teacher_rows_are_endorsed_ended_and_in_their_slots(make_model, tokenizer, dataset, tmp_path):
    """No row of the teacher is unendorsed or truncated; slots are the last of a group; one proposal call a step."""
    calls = []
    args = make_config(tmp_path, max_steps=3, gradient_accumulation_steps=1, **{**MIXED, "teacher_phase_steps": 2})
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    propose = trainer.teacher.propose

    def counted(prompt_ids, candidates):
        calls.append((trainer.state.global_step, len(prompt_ids)))
        return propose(prompt_ids, candidates)

    trainer.teacher.propose = counted
    trainer.train()
    assert [step for step, _ in calls] == [0, 1]
    eos = tokenizer.eos_token_id
    seen = 0
    for batch in trainer.batches:
        for row in batch["from_teacher"].nonzero().flatten().tolist():
            length = int(batch["completion_mask"][row].sum())
            ids = batch["completion_ids"][row, :length].tolist()
            assert ids[-1] == eos
            assert coin_verifier(None, None, [ids]) == [1.0]
            assert batch["verifier_labels"][row] == 1.0
            assert batch["slot"][row]
            assert batch["row"][row] % 4 >= 2
            seen += 1
    assert seen > 0


def test_metrics_speak_of_student_rows_and_are_all_defined(make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, **MIXED)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert {name for name in METRICS if not name.startswith("rest/")} <= set(logs)  # those are of top_k
    assert not {name for name in logs if name.split("/")[0] in ("gate", "delta", "verdict", "teacher")} - set(METRICS)
    rows = {k: torch.cat([b[k] for b in trainer.batches]) for k in ("verifier_labels", "from_teacher", "slot")}
    student = rows["verifier_labels"][~rows["from_teacher"]]
    assert logs["verdict/correct"] == pytest.approx((student == 1).float().mean().item())
    assert logs["verdict/incorrect"] == pytest.approx((student == 0).float().mean().item())
    assert logs["verdict/abstained"] == pytest.approx(student.isnan().float().mean().item())
    assert logs["teacher/slot_share"] == 0.5
    assert logs["teacher/endorsed"] == pytest.approx((rows["from_teacher"].sum() / rows["slot"].sum()).item())
    graded = student[~student.isnan()]
    assert logs["reward"] == pytest.approx(graded.mean().item())
    decisions = [GateDecision(**inputs["decision"]) for inputs in trainer._buffered_inputs]
    masks = [inputs["completion_mask"].bool() for inputs in trainer._buffered_inputs]
    delta = torch.cat([d.delta[m] for d, m in zip(decisions, masks, strict=True)])
    case = torch.cat([d.case[m] for d, m in zip(decisions, masks, strict=True)])
    assert logs["gate/consensus"] == pytest.approx((case == 1).float().mean().item(), abs=1e-6)
    assert logs["gate/conflict"] == pytest.approx((case == -1).float().mean().item(), abs=1e-6)
    for percent in (1, 5, 50, 95, 99):
        assert logs[f"delta/p{percent:02}"] == pytest.approx(delta.quantile(percent / 100).item(), abs=1e-5)
    sizes = sorted(delta.abs().tolist(), reverse=True)
    assert logs["delta/top_share"] == pytest.approx(sum(sizes[: math.ceil(len(sizes) / 100)]) / sum(sizes), rel=1e-4)
    losses = torch.cat([-d.advantage[m] for d, m in zip(decisions, masks, strict=True)])
    taught = torch.cat(
        [b["from_teacher"].unsqueeze(1).expand(m.shape)[m] for b, m in zip(trainer.batches, masks, strict=True)]
    )
    assert logs["loss/teacher"] == pytest.approx(losses[taught].mean().item(), rel=1e-4)
    assert logs["loss/student"] == pytest.approx(losses[~taught].mean().item(), rel=1e-4)


def test_evaluation_generates_and_grades_without_the_teacher(make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, **MIXED)
    trainer = SGOPDTrainer(
        make_model(1), make_model(2), coin_verifier, args, dataset, dataset.select(range(4)), processing_class=tokenizer
    )

    def never(*_, **__):
        raise AssertionError("the teacher was called")

    trainer.teacher.model.forward = never
    trainer.teacher.propose = never
    metrics = trainer.evaluate()
    assert "eval_loss" not in metrics
    shares = [metrics[f"eval_verdict/{name}"] for name in ("correct", "incorrect", "abstained")]
    assert sum(shares) == pytest.approx(1.0)
    assert 0.0 <= metrics["eval_reward"] <= 1.0
    assert "eval_completions/mean_length" in metrics
    assert "eval_teacher/slot_share" not in metrics


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_resume_equals_no_interruption(estimator, make_model, tokenizer, dataset, tmp_path):
    """Four steps, the teacher phase ending at the third: bit-identical weights with a stop after two."""

    def run(name, **kwargs):
        args = make_config(
            tmp_path / name,
            max_steps=4,
            optim="adamw_torch",
            learning_rate=1e-3,
            estimator=estimator,
            save_strategy="steps",
            save_steps=2,
            **{**MIXED, "teacher_phase_steps": 3},
        )
        trainer = SGOPDTrainer(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
        trainer.train(**kwargs)
        return trainer

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights_exactly(whole.model, resumed.model)
    ignored = ("runtime", "per_second", "step_time", "train_loss")
    for step in (3, 4):
        logs = [
            {k: v for k, v in entry.items() if not any(part in k for part in ignored)}
            for trainer in (whole, resumed)
            for entry in trainer.state.log_history
            if entry["step"] == step and "loss" in entry
        ]
        assert len(logs) == 2
        assert logs[0] == logs[1]


def test_checkpoint_card_and_table(make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, save_strategy="steps", save_steps=1, log_completions=True, **MIXED)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    text = (tmp_path / "README.md").read_text()
    for part in (
        "SG-OPD",
        "2606.09304",
        "| `gate_extrapolation` | `1.8` |",
        "| `preset` | `sg-opd-lite` |",
        "sg-opd\n",
    ):
        assert part in text
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert_same_weights_exactly(reloaded, trainer.model)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert set(table["source"]) == {"student", "teacher"}
    assert set(table["verdict"]) <= {"correct", "incorrect", "abstained"}
    expected = {}
    for inputs in trainer._buffered_inputs:
        mask = inputs["completion_mask"]
        mean = (inputs["decision"]["advantage"] * mask).sum(1) / mask.sum(1)
        expected.update(zip(inputs["row"].tolist(), mean.tolist(), strict=True))
    assert table["advantage"].tolist() == pytest.approx([expected[row] for row in range(8)], abs=1e-6)


def test_the_table_after_an_evaluation_is_of_the_rows_trained_on(make_model, tokenizer, dataset, tmp_path):
    """One generation for four steps, an evaluation after the second: the third table has the generation's prompts, and
    the advantages of the three micro-batches that were trained on."""
    args = make_config(
        tmp_path, max_steps=4, gradient_accumulation_steps=1, steps_per_generation=4, log_completions=True,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    train, held_out = dataset.select(range(8)), dataset.select(range(8, 10))
    trainer = Recorder(
        make_model(1), make_model(2), coin_verifier, args, train, eval_dataset=held_out, processing_class=tokenizer
    )
    trainer.train()
    expected = {}
    for inputs in trainer._buffered_inputs:
        mask = inputs["completion_mask"]
        mean = (inputs["decision"]["advantage"] * mask).sum(1) / mask.sum(1)
        texts = tokenizer.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        expected.update(zip(inputs["row"].tolist(), zip(texts, mean.tolist(), strict=True), strict=True))
    asked = {row["prompt"][0]["content"] for row in train}
    table = pd.read_parquet(tmp_path / "completions" / "completions_00003.parquet")
    assert len(table) == 16
    for row, (prompt, completion, advantage) in enumerate(table[["prompt", "completion", "advantage"]].values):
        assert prompt[0]["content"] in asked
        assert completion[0]["content"] == expected[row][0]
        assert math.isnan(advantage) or advantage == pytest.approx(expected[row][1], abs=1e-6)
    assert table["advantage"].isna().sum() == 4
    assert len(trainer._eval_logs["prompt"]) == 8  # of the last of two evaluations, four completions a question


def test_logging_waits_for_no_other_rank(make_model, tokenizer, dataset, tmp_path, monkeypatch):
    """A callback may log on one rank alone, as under GRPOTrainer: `log` enters nothing that all ranks must enter."""
    args = make_config(tmp_path, max_steps=2, log_completions=True)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    inside = []

    class Talkative(TrainerCallback):
        def on_step_end(self, *_, **kwargs):
            def collective(*_, **kwargs):
                inside.append("a collective")

            with monkeypatch.context() as patch:
                for name in ("gather", "reduce", "gather_object", "broadcast"):
                    patch.setattr(f"accelerate.Accelerator.{name}", collective, raising=False)
                patch.setattr("sg_opd.training.metrics.gather", collective)
                trainer.log({"note": 1.0})

    trainer.add_callback(Talkative())
    trainer.train()
    assert inside == []
    assert [entry["note"] for entry in trainer.state.log_history if "note" in entry] == [1.0, 1.0]
    assert all("gate/consensus" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_the_callers_arguments_stay_as_they_are(make_model, tokenizer, dataset, tmp_path):
    make_model(1).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    args = make_config(tmp_path / "out", model_init_kwargs={"dtype": "float32"})
    before = copy.deepcopy(args.to_dict())
    SGOPDTrainer(str(tmp_path / "student"), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    assert args.model_init_kwargs == {"dtype": "float32"}
    assert args.to_dict() == before


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_generations_of_one_step_are_each_divided_by_their_own_tokens(
    estimator, make_model, tokenizer, dataset, tmp_path
):
    """Two generations a step, as docs/method.md says: the loss of each micro-batch is its sum over twice its tokens."""
    args = make_config(tmp_path, estimator=estimator, steps_per_generation=1, gate_interpolation=0.5)
    student, teacher = make_model(1), make_model(2)
    copies = copy.deepcopy(student), copy.deepcopy(teacher)
    trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    loss_fn = SignGatedLoss(extrapolation=1.8, interpolation=0.5, estimator=estimator, temperature=0.8)
    tokens = [batch["completion_mask"].sum() for batch in trainer.batches]
    assert tokens[0] != tokens[1]
    for batch, own, loss in zip(trainer.batches, tokens, trainer.losses, strict=True):
        expected = expected_loss(*copies, None, batch, loss_fn, 2 * own, nll=False)
        assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_one_generation_a_prompt(make_model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path, num_generations=1, per_device_train_batch_size=3, gradient_accumulation_steps=1)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    assert len(trainer.batches[0]["prompt_ids"].unique(dim=0)) == 3
    assert math.isfinite(trainer.losses[0])


def test_an_eos_that_is_the_pad_token_is_trained_on(make_model, tokenizer, dataset, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    args = make_config(tmp_path, max_completion_length=40)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    ends = 0
    for batch in trainer.batches:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            trained = ids[mask.bool()].tolist()
            assert tokenizer.eos_token_id not in trained[:-1]
            ends += trained[-1] == tokenizer.eos_token_id
    assert ends > 0


def test_truncated_completions_are_masked_on_request(make_model, tokenizer, dataset, tmp_path):
    """All rows truncated at two tokens: nothing is trained, and the step is still taken."""
    student, before = make_model(1), make_model(1)
    args = make_config(tmp_path, max_completion_length=1, mask_truncated_completions=True)
    trainer = Recorder(student, make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.generation_config.suppress_tokens = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    trainer.train()
    assert trainer.losses == [0.0, 0.0]
    assert_same_weights_exactly(student, before)


def test_abstentions_are_not_warned_of_row_by_row(make_model, tokenizer, dataset, tmp_path, caplog):
    def abstain(prompts, completions, **kwargs):
        return [None] * len(completions)

    trainer = Recorder(
        make_model(1), make_model(2), abstain, make_config(tmp_path), dataset, processing_class=tokenizer
    )
    trainer.train()
    assert "returned None" not in caplog.text
    assert trainer.state.log_history[0]["verdict/abstained"] == 1.0
    assert trainer.state.log_history[0]["gate/neutral"] == 1.0


def test_engine_log_probs_of_teacher_rows_are_nan(make_model, tokenizer, dataset, tmp_path):
    """What vLLM reports for the student's own rollout must not weigh the teacher's; NaN is a ratio of exactly 1."""
    args = make_config(tmp_path, **MIXED)
    trainer = Recorder(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    rows = [row for row in dataset.select(range(2)) for _ in range(4)]
    prompts = [row["prompt"] for row in rows]
    prompt_ids = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"] for p in prompts
    ]
    output = (prompt_ids, [[5, 6]] * 8, None, ["own"] * 8, [[-0.1, -0.2] for _ in rows], {}, None, [])
    trainer._rollouts = Rollouts(rows, coin_verifier, trainer.state)
    trainer._mix(Generated(prompts, *output[:2], *output[3:5]))
    taken = trainer._rollouts.taken
    assert taken
    for row in range(8):
        if row in taken:
            assert output[1][row] == taken[row].token_ids
            assert len(output[4][row]) == len(output[1][row])
            assert all(math.isnan(x) for x in output[4][row])
        else:
            assert (output[1][row], output[3][row], output[4][row]) == ([5, 6], "own", [-0.1, -0.2])


def test_the_teacher_is_frozen_and_left_as_it_was(make_model, tokenizer, dataset, tmp_path):
    teacher, before = make_model(2), make_model(2)
    SGOPDTrainer(
        make_model(1), teacher, coin_verifier, make_config(tmp_path), dataset, processing_class=tokenizer
    ).train()
    assert_same_weights_exactly(teacher, before)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_models_by_path_in_their_checkpoints_dtype(make_model, tokenizer, dataset, tmp_path):
    """The documented way: both models by path; the teacher keeps its dtype, the tokenizers are compared."""
    make_model(1).save_pretrained(tmp_path / "student")
    make_model(2).to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(tmp_path / name)
    args = make_config(
        tmp_path / "out", reference_policy="initial", teacher_model_name_or_path=str(tmp_path / "teacher")
    )
    trainer = SGOPDTrainer(str(tmp_path / "student"), args=args, train_dataset=dataset, verifier=coin_verifier)
    assert trainer.teacher.unwrapped.dtype == torch.bfloat16
    assert trainer.model.dtype == torch.float32
    frozen = trainer.accelerator.unwrap_model(trainer.initial_policy.frozen)
    assert_same_weights_exactly(frozen, trainer.model)
    trainer.train()
    assert any(not a.equal(b) for a, b in zip(frozen.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_gradient_checkpointing_changes_nothing(estimator, peft, make_model, tokenizer, dataset, tmp_path):
    """TRL's default is on; the teacher and the reference are scored without it."""
    results = []
    for checkpointing in (False, True):
        args = make_config(tmp_path, estimator=estimator, gradient_checkpointing=checkpointing, preset="exopd", **MIXED)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if peft else None
        trainer = Recorder(
            make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer, peft_config=config
        )
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        results.append(trainer)
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-6)
    assert_same_weights(results[0].model, results[1].model, tolerance=1e-7)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_bf16_mixed_precision_stays_close(estimator, make_model, tokenizer, dataset, tmp_path):
    """Under autocast the models compute in bf16: the loss on the same rollouts agrees to bf16's two to three digits."""
    args = make_config(tmp_path, estimator=estimator, bf16=True, temperature=1.0)
    student, teacher = make_model(1), make_model(2)
    plain, copy_of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    divisor = sum(batch["completion_mask"].sum() for batch in trainer.batches)
    loss_fn = SignGatedLoss(estimator=estimator)
    expected = [
        expected_loss(plain, copy_of_teacher, None, batch, loss_fn, divisor, False).item() for batch in trainer.batches
    ]
    assert trainer.losses != pytest.approx(expected, rel=1e-6)  # or bf16 was not in use
    assert trainer.losses == pytest.approx(expected, rel=0.05, abs=0.01)


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
def test_plain_text_prompts(streamed, make_model, tokenizer, dataset, tmp_path):
    """Prompts as text instead of messages; completions reach the verifier as text."""
    rows = dataset.map(lambda row: {"prompt": row["prompt"][0]["content"]})
    seen = []

    def verifier(prompts, completions, completion_ids, solution, **kwargs):
        seen.extend(completions)
        assert all(isinstance(x, str) for x in (*prompts, *completions, *solution))
        return coin_verifier(prompts, completions, completion_ids)

    args = make_config(tmp_path, **MIXED)
    rows = rows.to_iterable_dataset() if streamed else rows
    trainer = Recorder(make_model(1), make_model(2), verifier, args, rows, processing_class=tokenizer)
    trainer.train()
    assert len(seen) >= 8
    assert any(batch["from_teacher"].any() for batch in trainer.batches)


def test_more_generation_than_accumulation(make_model, tokenizer, dataset, tmp_path):
    """`steps_per_generation` 4 with 2 accumulation steps: two optimizer steps on one generation."""
    for estimator in ("sampled", "full"):
        args = make_config(
            tmp_path, estimator=estimator, steps_per_generation=4, max_steps=2, per_device_train_batch_size=2, **MIXED
        )
        student, teacher = make_model(1), make_model(2)
        simulated, copy_of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
        trainer.train()
        assert len(trainer.batches) == 4
        tokens = sum(batch["completion_mask"].sum() for batch in trainer.batches)
        loss_fn = SignGatedLoss(estimator=estimator, temperature=0.8)
        # the first optimizer step: its two micro-batches, divided by their share of the generation's tokens
        losses = [
            expected_loss(simulated, copy_of_teacher, None, batch, loss_fn, tokens / 2, False)
            for batch in trainer.batches[:2]
        ]
        assert trainer.losses[:2] == pytest.approx([loss.item() for loss in losses], rel=1e-4, abs=1e-6)
