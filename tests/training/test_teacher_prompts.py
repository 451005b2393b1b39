"""A teacher that reads prompts of its own (`teacher_prompt`), another model or the student before training."""

import copy
import itertools
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from fault_proxy import FaultProxy, StandIn
from peft import LoraConfig
from trainers import (
    MIXED,
    Recorder,
    assert_same_weights,
    assert_same_weights_exactly,
    coin_verifier,
    make_config,
    plain_logits,
    sgd_step,
)

from sg_opd import SGOPDTrainer, SignGatedLoss
from sg_opd.training.prompts import check_bos

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
HINT = [{"role": "user", "content": "3*4=12 5+7=12"}]


@pytest.fixture(scope="module")
def hinted(dataset):
    """Each question with a longer prompt of the teacher's, but every fourth: there it has none of its own."""
    hints = [
        None if i % 4 == 3 else [*HINT, {"role": "user", "content": f"{i}+{row['prompt'][0]['content']}"}]
        for i, row in enumerate(dataset)
    ]
    return dataset.add_column("teacher_prompt", hints)


@pytest.fixture
def build(make_model, tokenizer, hinted, tmp_path):
    def build(teacher=None, student=None, rows=None, peft_config=None, trainer=Recorder, **overrides):
        args = make_config(tmp_path, **overrides)
        given = make_model(2, hidden_size=48) if teacher is None else teacher
        rows = hinted if rows is None else rows
        return trainer(
            make_model(1) if student is None else student, given, coin_verifier, args, rows,
            processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip

    return build


def read_prompts(batch, rows, tokenizer):
    """What the teacher must read of each row of a batch, found by what the student read."""

    def ids(messages):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    of_student = {tuple(ids(row["prompt"])): ids(row["teacher_prompt"] or row["prompt"]) for row in rows}
    masked = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    return [of_student[tuple(prompt[mask].tolist())] for prompt, mask in masked]


@torch.no_grad()
def logits_after(model, prompts, batch):
    """Logits of the completion's positions, (B, T, V): each row by itself, after its prompt, without padding."""
    rows = []
    for prompt, ids in zip(prompts, batch["completion_ids"], strict=True):
        logits = model(torch.tensor([[*prompt, *ids.tolist()]])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.stack(rows)


TEACHERS = ["other", "offloaded", "initial", "initial-lora"]
CASES = [*itertools.product(["sampled", "full"], TEACHERS), ("top_k", "initial-lora")]


@pytest.mark.parametrize(("estimator", "kind"), CASES)
def test_update_by_hand(estimator, kind, build, make_model, hinted, tokenizer):
    """A batch with the student's prompts, completions scored after the teacher's: the step of an unpatched copy."""
    settings = {"estimator": estimator, "gate_interpolation": 0.6, "teacher_offload": kind == "offloaded", **MIXED}
    top_k = 4 if estimator == "top_k" else 64
    settings["teacher_top_k"] = top_k
    given = "initial" if kind.startswith("initial") else None
    taught_by = make_model(1) if given else make_model(2, hidden_size=48)
    trainer = build(given, peft_config=LORA if kind == "initial-lora" else None, **settings)
    simulated = copy.deepcopy(trainer.model)
    getattr(simulated, "get_base_model", lambda: simulated)().__dict__.pop("forward")
    trainer.train()
    assert any(batch["from_teacher"].any() for batch in trainer.batches)
    divisor = sum(batch["completion_mask"].sum() for batch in trainer.batches)
    loss_fn = SignGatedLoss(extrapolation=1.8, interpolation=0.6, estimator=estimator, temperature=0.8, top_k=top_k)
    losses = []
    for batch in trainer.batches:
        prompts = read_prompts(batch, hinted, tokenizer)
        taught = logits_after(taught_by, prompts, batch)
        of_rows = batch["completion_ids"], batch["verifier_labels"], batch["completion_mask"]
        losses.append(loss_fn(plain_logits(simulated, batch), taught, *of_rows, None, divisor).loss)
    assert trainer.losses == pytest.approx([loss.item() for loss in losses], rel=1e-4, abs=1e-6)
    assert any(abs(loss) > 1e-3 for loss in trainer.losses)
    sgd_step(simulated, losses)
    assert_same_weights(trainer.model, simulated)


def test_the_student_before_training_stays_and_is_held_once(build, make_model, hinted, tokenizer):
    """Two steps, also against the initial reference: one model beside the student, which after its own prompt is the
    reference and after the teacher's the teacher."""
    settings = {"reference_policy": "initial", "max_steps": 2, "learning_rate": 0.5}
    trainer = build("initial", **settings)
    trainer.train()
    assert trainer.teacher.unwrapped is trainer.accelerator.unwrap_model(trainer.initial_policy.frozen)
    assert trainer.teacher.unwrapped is not trainer.model
    batch, before = trainer.batches[-1], make_model(1)
    ids, mask = batch["completion_ids"].unsqueeze(-1), batch["completion_mask"].bool()

    def logps(logits):
        return (logits / 0.8).log_softmax(-1).gather(-1, ids).squeeze(-1)[mask]

    scored = logps(logits_after(before, read_prompts(batch, hinted, tokenizer), batch))
    torch.testing.assert_close(batch["teacher_per_token_logps"][mask], scored, rtol=1e-4, atol=1e-5)
    referred = logps(plain_logits(before, batch).detach())
    torch.testing.assert_close(batch["initial_per_token_logps"][mask], referred, rtol=1e-4, atol=1e-5)
    moved = logps(plain_logits(trainer.model, batch).detach())
    assert (moved - referred).abs().max() > 0.01
    assert trainer.own_settings()["teacher_model"] == "the student before training"


@pytest.mark.parametrize("teacher", [None, "initial"])
def test_proposals_follow_the_teachers_prompt(teacher, build, hinted, tokenizer):
    asked = []
    trainer = build(teacher, **MIXED)
    propose = trainer.teacher.propose
    trainer.teacher.propose = lambda ids, count: asked.extend(ids) or propose(ids, count)
    trainer.train()
    slots = [
        prompt
        for batch in trainer.batches
        for prompt, slot in zip(read_prompts(batch, hinted, tokenizer), batch["slot"], strict=True)
        if slot
    ]
    assert len(asked) == 4
    assert sorted(asked) == sorted(slots)
    hint = tokenizer(HINT[0]["content"])["input_ids"]
    assert any(prompt[1 : len(hint) + 1] == hint for prompt in asked)


def test_a_server_is_asked_after_the_teachers_prompt(build, make_model, hinted, tokenizer, caplog):
    """As with the model in this process; the student's weights are no fault; the longest prompt is the teacher's."""
    proxy = FaultProxy(StandIn(make_model(1), tokenizer))
    try:
        settings = {"temperature": 1.0, "max_steps": 2}
        with caplog.at_level(logging.WARNING, logger="sg_opd"):
            served = build("served", teacher_server_url=proxy.url, trainer=SGOPDTrainer, **settings)
        assert "scores as the student does" not in caplog.text
        served.train()
        local = build(make_model(1), **settings)
        assert "the same model" not in caplog.text
        local.train()
        for got, want in zip(served.model.parameters(), local.model.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        proxy.upstream.context = 75  # the longest of the student's prompts is 22 tokens long, of the teacher's 41
        assert build("served", teacher_server_url=proxy.url, **settings, max_completion_length=30)
        with pytest.raises(ValueError, match=r"longest teacher prompt in `train_dataset` \(\d+ tokens\).*pass the 75"):
            build("served", teacher_server_url=proxy.url, **settings, max_completion_length=40)
    finally:
        proxy.close()


def test_an_evaluation_reads_the_students_prompts_alone(build, hinted):
    """It asks no teacher: of four rows four prompts are tokenised, in training seven."""
    trainer, read = build(num_generations=1, per_device_eval_batch_size=4, gradient_accumulation_steps=1), []
    tokenize = trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda prompts: read.extend(prompts) or tokenize(prompts)
    trainer.evaluate(hinted.select(range(4)))
    assert sorted(read, key=str) == sorted(hinted["prompt"][:4], key=str)
    read.clear()
    trainer.train()
    assert len(read) == 4 + sum(prompt in hinted["teacher_prompt"] for prompt in read) > 4


def test_a_resumed_run_has_the_student_from_before_training(build, make_model, tmp_path):
    """Killed after step 2 of 4 and built anew from the path: the weights of the run that was not."""
    path = str(tmp_path / "student")
    make_model(1).save_pretrained(path)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
    whole = build("initial", student=path, **settings)
    whole.train()
    resumed = build("initial", student=path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(resumed.batches) == 4
    assert_same_weights_exactly(resumed.model, whole.model)
    assert resumed.batches[0]["teacher_per_token_logps"].equal(whole.batches[4]["teacher_per_token_logps"])


def test_a_teacher_that_reads_what_the_student_reads_is_refused(build, dataset, hinted):
    alike = dataset.add_column("teacher_prompt", dataset["prompt"])
    for rows in (dataset, alike, dataset.add_column("teacher_prompt", [None] * 16)):
        with pytest.raises(ValueError, match=r"`teacher_model='initial'` .* Give `train_dataset` a column 'teacher_p"):
            build("initial", rows=rows)
    with pytest.raises(FileNotFoundError, match=r"`teacher_model`: there is no folder './initial'"):
        build("./initial")
    stream = IterableDataset.from_generator(lambda: iter(hinted.select([3, 0]).to_list()))
    assert build("initial", rows=stream).teacher.name == "the student before training"


@pytest.mark.parametrize(
    "setting", ["teacher_offload", "teacher_model_revision", "teacher_model_init_kwargs", "sync_ref_model"]
)
def test_what_is_for_a_teacher_that_is_loaded(setting, build):
    with pytest.raises(ValueError, match=f"`{setting}.*teacher_model='initial'"):
        build("initial", **{setting: {"dtype": "float32"} if setting.endswith("kwargs") else True})


def test_what_stands_in_the_column(build, hinted, tokenizer, make_model):
    def with_row(value):
        return Dataset.from_list([{**row, "teacher_prompt": value if i == 5 else None} for i, row in enumerate(hinted)])

    for bad, message in ((" ", "is empty"), (7, "expected text, or a list of messages")):
        with pytest.raises(ValueError, match=f"`teacher_prompt` in `train_dataset`, row 5.*{message}"):
            build(rows=with_row(bad))
    assert build(rows=with_row("Start with 3")).teacher  # text beside messages, each tokenised as what it is
    with pytest.raises(
        ValueError, match="1 teacher prompts in `train_dataset` fill the teacher's context of 60 tokens"
    ):
        build(make_model(2, max_position_embeddings=60), rows=with_row("1" * 60))
    with pytest.raises(ValueError, match="`remove_unused_columns=True` would drop the column 'teacher_prompt'"):
        build(remove_unused_columns=True)


def test_text_beside_messages(build, dataset, tokenizer):
    """The student reads messages, the teacher the bare text: its ids have no frame around them."""
    rows = dataset.add_column("teacher_prompt", [row["prompt"][0]["content"] for row in dataset])
    trainer = build(rows=rows)
    trainer.train()
    batch = trainer.batches[0]
    bare = {tuple(tokenizer(text)["input_ids"]) for text in rows["teacher_prompt"]}
    for prompt, mask in zip(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"].bool(), strict=True):
        assert tuple(prompt[mask].tolist()) in bare


def test_a_second_bos_is_refused(build, hinted, tokenizer):
    begins = copy.deepcopy(tokenizer)
    begins.bos_token = begins.unk_token

    class Doubling(type(begins)):
        def __call__(self, text, **kwargs):
            ids = super().__call__(text, **kwargs)
            ids["input_ids"] = [self.bos_token_id, *ids["input_ids"]]
            return ids

    begins.__class__ = Doubling
    rows = Dataset.from_list([{"prompt": "3", "teacher_prompt": None}, {"prompt": "3", "teacher_prompt": "<|unk|>3"}])
    check_bos(rows, begins)
    with pytest.raises(ValueError, match="`teacher_prompt` in `train_dataset`, row 1 begins with"):
        check_bos(rows, begins, "teacher_prompt")
