"""What is refused or warned of before the first step."""

import copy
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from sg_opd.training.checks import (
    by_main_process,
    check_arguments,
    check_set_up,
)
from sg_opd.training.datasets import check_dataset, has_images, rows_to_check
from sg_opd.training.models import check_tokenizers, same_weights
from sg_opd.training.prompts import check_prompts


def coin(prompts, completions, **kwargs):
    return [1.0 for _ in completions]


@pytest.fixture
def build(make_model, tokenizer, dataset, tmp_path):
    """A trainer with some arguments replaced."""

    def build(config=None, **overrides):
        settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none", **(config or {})}
        kwargs = {
            "model": make_model(1),
            "teacher_model": make_model(2),
            "verifier": coin,
            "args": SGOPDConfig(per_device_train_batch_size=8, max_completion_length=8, **settings),
            "train_dataset": dataset,
            "processing_class": tokenizer,
            **overrides,
        }
        return SGOPDTrainer(**kwargs)

    return build


def test_arguments_that_cannot_work(build, make_model, tmp_path):
    with pytest.raises(ValueError, match=r"`reward_funcs`.*`verifier`"):
        build(reward_funcs=[coin])
    with pytest.raises(ValueError, match="No teacher"):
        build(teacher_model=None)
    model = make_model(1)
    with pytest.raises(ValueError, match="very object"):
        build(model=model, teacher_model=model)
    with pytest.raises(TypeError, match="SGOPDConfig"):
        build(args=GRPOConfig(str(tmp_path), bf16=False, use_cpu=True))
    with pytest.raises(TypeError, match="`verifier`"):
        build(verifier="math")
    with pytest.raises(FileNotFoundError, match=r"`teacher_model`: there is no folder '/nowhere/teacher'"):
        build(teacher_model="/nowhere/teacher")
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        build(train_dataset=None)
    with pytest.raises(TypeError, match="`teacher_model`"):
        build(teacher_model=3)
    with pytest.raises(ValueError, match=r"`tools`.*teacher_phase_steps=0"):
        build(tools=[lambda: None])
    with pytest.raises(ValueError, match="`rollout_func`"):
        build(rollout_func=lambda: None)
    with pytest.raises(ValueError, match="`teacher_model_init_kwargs`"):
        build(config={"teacher_model_init_kwargs": {"dtype": "float32"}})
    with pytest.raises(ValueError, match="eval_dataset"):
        build(config={"eval_strategy": "steps"})


def test_the_model_below_the_students_adapter_is_no_teacher(build, make_model):
    """It would be frozen with its adapter, of which nothing would be trained; a copy of it is one."""
    base = make_model(1)
    copied = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for teacher in (base, model, {"a": base}):
        with pytest.raises(ValueError, match=r"below its adapter.*`copy.deepcopy`.*teacher_model='initial'"):
            build(model=model, teacher_model=teacher)
    with pytest.raises(ValueError, match="below its adapter"):
        build(model=base, teacher_model=model)
    build(model=model, teacher_model=copied)
    assert any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapted_model_can_be_given_again(build, make_model, beta):
    """After an error, and once it was trained: the initial policy is the adapter as it is then."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(1), lora)
    settings = {"reference_policy": "initial", "beta": beta}
    with pytest.raises(ValueError, match="cannot share a tokenizer"):
        build(settings, model=model, teacher_model=make_model(2, vocab_size=20))
    weights = {name: weight for name, weight in model.named_parameters() if ".default." in name}
    for value in (0.25, 0.5):
        for weight in weights.values():
            weight.data.fill_(value)
        build(settings, model=model)
        for name in weights:
            assert model.get_parameter(name.replace(".default.", ".ref.")).unique().tolist() == [value]
    assert model.active_adapter == "default"
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == weights.keys()


def test_an_adapter_called_ref_is_not_dropped(build, make_model):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(1), lora, adapter_name="ref")
    with pytest.raises(ValueError, match=r"adapter of its own called 'ref'.*model.delete_adapter\('ref'\)"):
        build({"reference_policy": "initial"}, model=model)


def test_datasets(build, dataset):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        build(train_dataset=dataset.select([]))
    with pytest.raises(ValueError, match=r"lacks the column 'solution'; it has 'prompt'"):
        build(verifier=MathVerifier(), train_dataset=dataset.remove_columns("solution"))
    with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` lacks the columns 'prompt'"):
        build(verifier=MathVerifier(), eval_dataset={"a": dataset, "b": Dataset.from_list([{"text": "x"}])})
    with pytest.raises(ValueError, match="`remove_unused_columns=True`"):
        build(verifier=MathVerifier(), config={"remove_unused_columns": True})
    with pytest.raises(ValueError, match="images"):
        build(train_dataset=dataset.add_column("image", [None] * 16))
    build(train_dataset=dataset.remove_columns("solution"))  # a verifier of one's own needs no `solution`


def test_a_stream_is_checked_by_its_first_row(build):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "p"}]))
    with pytest.raises(ValueError, match="'solution'"):
        build(verifier=MathVerifier(), train_dataset=stream)


def test_reference_answers_that_do_not_parse(caplog):
    solutions = [r"\ldots", None, "4", "", "5", r"\ldots"]
    rows = Dataset.from_list([{"prompt": "p", "solution": solution} for solution in solutions])
    verifier = MathVerifier(workers=1)
    with caplog.at_level(logging.WARNING):
        check_dataset("train_dataset", rows, verifier.unparseable)
    assert "4 of the 6 reference answers checked in `train_dataset`" in caplog.text
    assert r"row 0: '\\ldots'; row 1: 'None'; row 3: ''." in caplog.text
    with pytest.raises(ValueError, match="abstain on every row"):
        check_dataset("train_dataset", rows.select([0, 1]), verifier.unparseable)
    verifier.close()


def test_tokenizers(build, tokenizer, make_model, tmp_path, caplog):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|more|>"])
    with pytest.raises(ValueError, match=r"1 tokens have other ids, first '<\|more\|>'"):
        check_tokenizers(tokenizer, other)
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{{ messages }}"
    check_tokenizers(tokenizer, templated)
    assert "different chat templates" in caplog.text
    make_model(2, vocab_size=40).save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="different tokenizers"):
        build(teacher_model=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match="cannot share a tokenizer"):
        build(teacher_model=make_model(2, vocab_size=20))


def test_different_ends_are_warned_of(build, make_model, caplog):
    teacher = make_model(2)
    teacher.generation_config.eos_token_id = [0, 1]
    build(teacher_model=teacher)
    assert "([1] and [0, 1])" in caplog.text


def test_prompts_and_the_context(build, make_model, caplog):
    with pytest.raises(ValueError, match=r"16 prompts in `train_dataset` fill the models' context of 8 tokens"):
        build(teacher_model=make_model(2, max_position_embeddings=8))
    rows = Dataset.from_list([{"prompt": [1] * 5}, {"prompt": [1] * 9}])
    with pytest.raises(ValueError, match="first row 1"):
        check_prompts(rows, lambda prompts: (prompts,), 4, 9, None, served=False)
    check_prompts(rows, lambda prompts: (prompts,), 4, None, 10, served=False)
    assert "longest prompt in `train_dataset` (9 tokens) and `max_completion_length` (4)" in caplog.text


def test_a_large_dataset_is_checked_evenly():
    assert list(rows_to_check(3)) == [0, 1, 2]
    assert len(rows_to_check(10_000)) == 10_000
    assert 3_000 <= len(rows_to_check(33_333)) <= 10_000
    assert rows_to_check(33_333)[-1] > 33_000


def test_an_identical_teacher_is_warned_of_under_an_adapter_too(build, make_model, caplog):
    build(teacher_model=make_model(1), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert "the same model" in caplog.text
    caplog.clear()
    build(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert "the same model" not in caplog.text


def test_of_two_models_from_one_path_the_weights_are_compared(build, tokenizer, make_model, tmp_path, caplog):
    """In the narrower precision. Where a shard leaves none, the path counts, with its revision."""
    make_model(1).save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype) for dtype in ("float32", "bfloat16")]
    build(model=models[0], teacher_model=models[1])
    assert "the same model" in caplog.text
    caplog.clear()
    models[1].model.norm.weight.data += 0.5
    build(model=models[0], teacher_model=models[1])
    assert "the same model" not in caplog.text
    for model in models:
        model.lm_head.weight.data = torch.empty(0)
    assert same_weights(*models)
    models[1].config._commit_hash = "another"
    assert not same_weights(*models)


def test_a_cut_off_sampling_distribution_is_warned_of_with_an_engine_correction(tmp_path, caplog):
    for top_p, warned in ((1.0, False), (0.9, True)):
        args = SGOPDConfig(str(tmp_path), bf16=False, use_cpu=True, use_vllm=True, top_p=top_p, report_to="none")
        check_arguments("teacher", "student", coin, args, None, {})
        assert ("top_p, top_k or min_p" in caplog.text) == warned


def test_images_within_messages_are_found():
    text = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    image = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}
    assert [has_images({"prompt": [m]}) for m in (text, image)] == [False, True]
    assert not has_images({"prompt": "plain"})


def test_full_estimator_with_soft_caps(build, make_model):
    capped = make_model(1)
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        build(model=capped, config={"estimator": "full", "reference_policy": "initial"})


def test_full_estimator_under_fsdp(build):
    """Version 2 is fine, version 1 is refused; neither can be switched on without several processes."""
    trainer = build(config={"estimator": "full"})
    models = trainer.args, trainer.model, trainer.teacher
    check_set_up(*models, multimodal=False, fsdp_version=2, vocabulary=8)
    with pytest.raises(ValueError, match=r"FSDP version 1.*fsdp_version: 2.*'sampled'"):
        check_set_up(*models, multimodal=False, fsdp_version=1, vocabulary=8)


def test_a_teacher_that_is_no_causal_model(build, tokenizer):
    """Without a head, with an encoder, and with a head that looks at both sides."""
    from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

    size = {"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match=r"The teacher \(BertModel\) has no language-model head"):
        build(teacher_model=BertModel(BertConfig(**size)))
    with pytest.raises(ValueError, match=r"The teacher \(T5ForConditionalGeneration\) is an encoder-decoder"):
        build(teacher_model=T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match=r"The teacher \(BertForMaskedLM\) is no model that generates"):
        build(teacher_model=BertForMaskedLM(BertConfig(**size)))


def test_a_dataset_smaller_than_one_generation(build, dataset):
    with pytest.raises(ValueError, match="one generation takes 8 prompts"):
        build(config={"num_generations": 1, "preset": "opd"}, train_dataset=dataset.select(range(7)))


@pytest.mark.parametrize("main", [True, False])
def test_one_process_reads_the_reference_answers_for_all(main, monkeypatch):
    """Each rank would start a worker a core, all for the same answers."""
    asked = []
    monkeypatch.setattr("accelerate.PartialState.is_main_process", main)
    monkeypatch.setattr("sg_opd.training.checks.broadcast_object_list", lambda found: found if main else [[1]])
    unparseable = by_main_process(lambda answers: asked.append(answers) or [0])
    assert unparseable(["?", "2"]) == ([0] if main else [1])
    assert asked == ([["?", "2"]] if main else [])
