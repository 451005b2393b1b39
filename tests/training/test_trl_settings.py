"""What docs/migrating.md promises of GRPOTrainer's settings: a short run each, and what is refused by name."""

import copy
import logging

import pytest
import torch
from chatting import byte_tokenizer
from datasets import Dataset
from peft import LoraConfig
from trainers import (
    LOSS_TYPES,
    Recorder,
    assert_same_weights,
    assert_same_weights_exactly,
    coin_verifier,
    decided,
    make_config,
    plain_logits,
)
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from sg_opd import MathVerifier, SGOPDTrainer
from sg_opd.evaluation.evaluator import tokenize_prompts

# --- tools -------------------------------------------------------------------------------------------------------


ASKED = Dataset.from_list([{"prompt": [{"role": "user", "content": f"How much is {i} + 1?"}]} for i in range(4)])
CALL = '<tool_call>\n{"name": "successor", "arguments": {"number": 4}}\n</tool_call>'


def successor(number: int) -> str:
    """
    The number after a number.

    Args:
        number: any number.
    """
    return f"it is {number + 1}"


class Calling(Recorder):
    """The first turn of every other rollout is a call of the tool; other turns are the model's own samples."""

    calls = 0

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.calls == 0:
            call = [*self._tokenizer(CALL)["input_ids"], self._tokenizer.eos_token_id]
            ids = [call if row % 2 == 0 else own[:8] for row, own in enumerate(ids)]
        else:
            ids = [own[:6] for own in ids]
        self.calls += 1
        return ids, logprobs


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_tools(estimator, chat, chat_model, tmp_path):
    """What a tool returned is read by both models and trained on by none; the rest of the row is."""
    student, teacher = chat_model(1), chat_model(2)
    simulated, copy_of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    args = make_config(
        tmp_path, max_completion_length=300, gradient_accumulation_steps=1, estimator=estimator, learning_rate=0.05
    )
    trainer = Calling(student, teacher, coin_verifier, args, ASKED, processing_class=chat, tools=[successor])
    trainer.train()
    (batch,) = trainer.batches
    logs = trainer.state.log_history[0]
    assert (logs["tools/call_frequency"], logs["tools/failure_frequency"]) == (0.5, 0.0)
    mask = batch["completion_mask"] * batch["tool_mask"]
    results = [
        chat.decode(ids[(own == 1) & (tool == 0)])
        for ids, own, tool in zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True)
    ]
    assert sorted(bool(text) for text in results) == [False, False, True, True]
    assert all("it is 5" in text and "successor" not in text for text in results if text)
    assert int(batch["num_items_in_batch"]) == int(mask.sum()) < int(batch["completion_mask"].sum())
    logps, advantage, factor = decided(simulated, copy_of_teacher, batch)
    if estimator == "sampled":
        loss = -((logps - logps.detach()).exp() * advantage * mask).sum() / mask.sum()
    else:
        own, taught = ((plain_logits(m, batch).float() / 0.8).log_softmax(-1) for m in (simulated, copy_of_teacher))
        loss = (factor * (own.exp() * (own - taught.detach())).sum(-1) * mask).sum() / mask.sum()
    loss.backward()
    with torch.no_grad():
        for parameter in simulated.parameters():
            parameter -= 0.05 * parameter.grad
    assert_same_weights(student, simulated)
    assert trainer.losses[0] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert logs["gate/factor"] == pytest.approx((factor * mask).sum().item() / mask.sum().item(), rel=1e-5)


# --- rollout_func ------------------------------------------------------------------------------------------------


def scripted(rows, **fields):
    """A `rollout_func` of four completions a prompt, the same for each prompt."""

    def rollout_func(prompts, trainer):
        ids = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)
        given = {name: [values[i % len(rows)] for i in range(len(prompts))] for name, values in fields.items()}
        completions = [list(rows[i % len(rows)]) for i in range(len(prompts))]
        logprobs = [[-1.0] * len(row) for row in completions]
        return {"prompt_ids": ids["input_ids"], "completion_ids": completions, "logprobs": logprobs, **given}

    return rollout_func


def test_rollout_func(make_model, tokenizer, dataset, tmp_path):
    """Its completions are trained on where its `env_mask` is 1, and its other fields reach the verifier."""
    student, teacher = make_model(1), make_model(2)
    simulated, copy_of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    seen = []

    def verifier(prompts, completions, completion_ids, score, **kwargs):
        seen.extend(score)
        return score

    rows = [[7, 8, 9, 1], [7, 8, 10, 11, 1], [9, 1], [12, 13, 14]]
    masks = [[1, 0, 0, 1], [1] * 5, [1, 1], [0, 0, 0]]
    function = scripted(rows, env_mask=masks, score=[1, 0, None, 1])
    args = make_config(tmp_path, gradient_accumulation_steps=1)
    trainer = Recorder(student, teacher, verifier, args, dataset, processing_class=tokenizer, rollout_func=function)
    trainer.train()
    (batch,) = trainer.batches
    assert seen == [1, 0, None, 1]
    mask = batch["completion_mask"] * batch["tool_mask"]
    assert int(mask.sum()) == 9 == int(batch["num_items_in_batch"])
    logps, advantage, factor = decided(simulated, copy_of_teacher, batch)
    assert trainer.state.log_history[0]["gate/factor"] == pytest.approx((factor * mask).sum().item() / 9, rel=1e-5)
    (-(logps * advantage * mask).sum() / 9).backward()
    with torch.no_grad():
        for parameter in simulated.parameters():
            parameter -= 0.05 * parameter.grad
    assert_same_weights(student, simulated)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_an_id_that_the_teacher_lacks(estimator, make_model, tokenizer, dataset, tmp_path):
    """The student's head has 40 ids, the teacher's as many as the tokenizer."""
    rows = [[7, 1], [7, 1], [8, 39, 1], [7, 1]]
    args = make_config(tmp_path, gradient_accumulation_steps=1, estimator=estimator)
    models = make_model(1, 40), make_model(2)
    trainer = SGOPDTrainer(
        *models, coin_verifier, args, dataset, processing_class=tokenizer, rollout_func=scripted(rows)
    )
    with pytest.raises(
        ValueError, match=rf"returned the token 39 in `completion_ids`, row 2, .* the ids below {len(tokenizer)} only"
    ):
        trainer.train()


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
def test_each_of_several_evaluation_sets_has_its_own_metrics(streamed, make_model, tokenizer, dataset, tmp_path):
    """And the best model can be chosen by one: here the set is better at the first evaluation than at the second."""
    sets = {"good": dataset.select(range(4)), "bad": dataset.select(range(4, 8)), "eval": dataset.select(range(8, 10))}
    verdicts = {"good": [1, 1, 1, 0], "bad": [0, 0, 1, 0], "eval": [None, 1]}
    sets = {name: rows.add_column("verdict", verdicts[name]) for name, rows in sets.items()}
    sets = {name: rows.to_iterable_dataset() if streamed else rows for name, rows in sets.items()}

    def verifier(prompts, completions, trainer_state, verdict=None, **kwargs):
        if verdict is None:
            return [1.0] * len(completions)
        return [0 if trainer_state.global_step == 2 and v else v for v in verdict]

    args = make_config(
        tmp_path, max_steps=2, per_device_eval_batch_size=4, eval_strategy="steps", save_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_good_reward", greater_is_better=True,
    )  # fmt: skip
    trainer = SGOPDTrainer(make_model(1), make_model(2), verifier, args, dataset, sets, processing_class=tokenizer)
    trainer.train()
    logs = [
        {k: v for entry in trainer.state.log_history if entry["step"] == s for k, v in entry.items()} for s in (1, 2)
    ]
    expected = [("good", 0.75, 0.0, 0.25), ("bad", 0.25, 0.0, 0.75), ("eval", 1.0, 0.5, 0.0)]
    for name, reward, abstained, incorrect in expected:
        assert logs[0][f"eval_{name}_reward"] == pytest.approx(reward)
        assert logs[0][f"eval_{name}_verdict/abstained"] == abstained
        assert logs[0][f"eval_{name}_verdict/incorrect"] == incorrect
        assert logs[0][f"eval_{name}_completions/mean_length"] > 0
        assert logs[1][f"eval_{name}_reward"] == 0.0
    assert not {"eval_reward", "eval_verdict/correct"} & (set(logs[0]) | set(logs[1]))
    assert trainer.state.best_metric == 0.75
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    plain = trainer.evaluate(dataset.select(range(2)))  # one set afterwards: its names are the plain ones
    assert plain["eval_reward"] == 1.0
    assert not any(key.startswith(("eval_good", "eval_eval")) for key in plain)


@pytest.mark.parametrize("metric", ["eval_reward", "reward", "eval_verdict/correct", "eval_god_reward"])
def test_a_best_metric_that_no_set_of_several_logs(metric, dataset, tmp_path):
    args = make_config(tmp_path, eval_strategy="steps", metric_for_best_model=metric, greater_is_better=True)
    with pytest.raises(ValueError, match=rf"`metric_for_best_model='{metric}'`.*'eval_a_reward', 'eval_b_reward'"):
        SGOPDTrainer("none/student", "none/teacher", coin_verifier, args, dataset, {"a": dataset, "b": dataset})


# --- mixtures of experts -----------------------------------------------------------------------------------------


@pytest.fixture
def make_moe(tokenizer):
    def make(seed):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4,
            num_experts_per_tok=2, max_position_embeddings=256, tie_word_embeddings=False, decoder_sparse_step=1,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, router_aux_loss_coef=0.01,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(10)
        return model

    return make


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.5])
def test_a_mixture_of_experts(coefficient, make_moe, tokenizer, dataset, tmp_path):
    """The gate's loss and, with the sampled estimator, the router's, as the model itself computes that."""
    student, teacher = make_moe(1), make_moe(2)
    simulated, copy_of_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    args = make_config(tmp_path, router_aux_loss_coef=coefficient)
    trainer = Recorder(student, teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    tokens = sum(batch["completion_mask"].sum() for batch in trainer.batches)
    losses = []
    for batch in trainer.batches:
        logps, advantage, _ = decided(simulated, copy_of_teacher, batch)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        router = simulated(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
        weight = 0.01 if coefficient is None else coefficient
        losses.append(-(logps * advantage * batch["completion_mask"]).sum() / tokens + weight * router / 2)
    sum(losses).backward()
    with torch.no_grad():
        for parameter in simulated.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert_same_weights(student, simulated)
    assert ("aux_loss" in trainer.state.log_history[0]) == (coefficient != 0.0)


def test_a_mixture_of_experts_and_the_full_estimator(make_moe, make_model, tokenizer, dataset, tmp_path):
    """Refused before a model is loaded: the teacher's name is none, and of the student there is a config alone."""
    make_moe(1).config.save_pretrained(tmp_path / "student")
    for student in (str(tmp_path / "student"), make_moe(1)):
        args = make_config(tmp_path / "out", estimator="full")
        with pytest.raises(ValueError, match=r"no router loss.*0\.01.*`router_aux_loss_coef=0\.0`"):
            SGOPDTrainer(student, "none/teacher", coin_verifier, args, dataset, processing_class=tokenizer)
    args = make_config(tmp_path / "out", estimator="full", router_aux_loss_coef=0.0)
    student, before = make_moe(1), make_moe(1)
    trainer = Recorder(student, make_moe(2), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    assert any(not a.equal(b) for a, b in zip(student.parameters(), before.parameters(), strict=True))


# --- masks, adapters, abstentions --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "full"])
def test_all_rows_truncated_and_masked(loss_type, make_model, tokenizer, dataset, tmp_path):
    """Nothing is trained, whatever the loss divides by; the loss is 0, not NaN."""
    student, before = make_model(1), make_model(1)
    own = {"estimator": "full"} if loss_type == "full" else {"loss_type": loss_type}
    args = make_config(tmp_path, max_completion_length=2, mask_truncated_completions=True, **own)
    rows = [[7, 8], [9, 9], [8, 8], [9, 7]]
    trainer = Recorder(
        student, make_model(2), coin_verifier, args, dataset, processing_class=tokenizer, rollout_func=scripted(rows)
    )
    trainer.train()
    assert trainer.losses == [0.0, 0.0]
    assert_same_weights_exactly(student, before)


def test_an_adapter_with_gradient_checkpointing(make_model, tokenizer, dataset, tmp_path):
    """The base stays, the adapter moves, and as without checkpointing."""
    adapters = []
    for checkpointing in (False, True):
        student = make_model(1)
        args = make_config(tmp_path, gradient_checkpointing=checkpointing)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = Recorder(
            student, make_model(2), coin_verifier, args, dataset, processing_class=tokenizer, peft_config=config
        )
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {n: p for n, p in trainer.model.named_parameters() if not p.equal(start[n])}
        assert moved
        assert all("lora_" in name for name in moved)
        adapters.append(moved)
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-5, atol=1e-7)


def test_a_verifier_that_always_abstains_is_told_of_once(make_model, tokenizer, dataset, tmp_path, caplog):
    def unsure(prompts, completions, trainer_state, **kwargs):
        return [None if trainer_state.global_step or answer else 1.0 for answer in completions]

    args = make_config(tmp_path, max_steps=4)
    with caplog.at_level(logging.WARNING, logger="sg_opd"):
        SGOPDTrainer(make_model(1), make_model(2), unsure, args, dataset, processing_class=tokenizer).train()
    told = [record.getMessage() for record in caplog.records if "abstained" in record.getMessage()]
    assert len(told) == 1
    assert "unsure abstained on every rollout since the last log (now at step 1)" in told[0]
    caplog.clear()
    args = make_config(tmp_path, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="sg_opd"):
        SGOPDTrainer(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer).train()
    assert "abstained" not in caplog.text


# --- prompts -----------------------------------------------------------------------------------------------------


def test_text_in_parts_is_read(chat, chat_model, tmp_path):
    """Qwen3's template leaves out content that is a list: the ids are those of the same prompts in one text."""
    batches = []
    for parts in (False, True):
        rows = ASKED
        if parts:
            texts = [row["prompt"][0]["content"] for row in ASKED]
            content = [[{"type": "text", "text": t[:4]}, {"type": "text", "text": t[4:]}] for t in texts]
            rows = Dataset.from_list([{"prompt": [{"role": "user", "content": c}]} for c in content])
        args = make_config(tmp_path, max_completion_length=4, gradient_accumulation_steps=1)
        trainer = Recorder(chat_model(1), chat_model(2), coin_verifier, args, rows, processing_class=chat)
        trainer.train()
        batches.append(trainer.batches[0])
    assert "How much is" in chat.decode(batches[0]["prompt_ids"][0])
    assert batches[0]["prompt_ids"].equal(batches[1]["prompt_ids"])
    own = tokenize_prompts(chat, [row["prompt"] for row in rows])  # those of an evaluation
    assert own == tokenize_prompts(chat, [row["prompt"] for row in ASKED])


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
def test_a_prompt_that_carries_its_bos(streamed, make_model, tmp_path):
    """As text rendered with a chat template: two BOS would stand before every prompt, and in TRL do."""
    tokenizer = byte_tokenizer(bos="<s>")
    assert tokenizer("<s>a")["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    models = [make_model(seed, len(tokenizer), eos_token_id=tokenizer.eos_token_id) for seed in (1, 2)]
    first = 0 if streamed else 3  # of a stream only the first row is looked at
    rows = Dataset.from_dict({"prompt": [f"{'<s>' * (i >= first)}How much is {i} + 1?" for i in range(8)]})
    args = make_config(tmp_path, max_completion_length=4)

    def trainer(rows):
        rows = rows.to_iterable_dataset() if streamed else rows
        return Recorder(*models, coin_verifier, args, rows, processing_class=tokenizer)

    with pytest.raises(
        ValueError, match=rf"row {first} begins with '<s>', and the tokenizer puts another.*removeprefix"
    ):
        trainer(rows)
    mended = trainer(rows.map(lambda row: {"prompt": row["prompt"].removeprefix("<s>")}))
    mended.train()
    ids = mended.batches[0]["prompt_ids"]
    assert ((ids == tokenizer.bos_token_id).sum(1) == 1).all()


def test_prompts_that_never_ask_for_a_box(make_model, tokenizer, dataset, tmp_path, caplog):
    """One warning, with the default verifier alone, and only where the chat template does not ask either."""
    verifier = MathVerifier(workers=1)
    args = make_config(tmp_path)
    wordy = dataset.map(
        lambda row: {"prompt": [{"role": "user", "content": "Tom has 3 boxes of pizza and a shoebox."}]}
    )
    asking = copy.deepcopy(tokenizer)
    asking.chat_template = r"{# Put your answer in \boxed{}. #}" + tokenizer.chat_template
    system = [{"role": "system", "content": "Box your answer."}]
    for rows, judge, reads, told in (
        (dataset, verifier, tokenizer, True),
        (dataset.to_iterable_dataset(), verifier, tokenizer, True),
        (wordy, verifier, tokenizer, True),
        (dataset, coin_verifier, tokenizer, False),
        (dataset, verifier, asking, False),
        (dataset.map(lambda row: {"prompt": system + row["prompt"]}), verifier, tokenizer, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sg_opd"):
            SGOPDTrainer(make_model(1), make_model(2), judge, args, rows, processing_class=reads)
        said = [r.getMessage() for r in caplog.records if r"\boxed{}" in r.getMessage()]
        assert len(said) == told, (judge, reads is asking)
    verifier.close()
