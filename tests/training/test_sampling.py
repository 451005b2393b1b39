"""Nothing of a checkpoint's generation_config.json shapes what is sampled, in training, by a teacher, or evaluated."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from trainers import MIXED, Recorder, assert_same_weights_exactly, coin_verifier, make_config
from transformers import AutoModelForCausalLM, GenerationConfig
from trl.generation.vllm_generation import VLLMGeneration

from sg_opd.evaluation.comparison import compare
from sg_opd.evaluation.evaluator import EvaluationCallback, evaluate_model
from sg_opd.teachers.sampling import NEUTRAL, SERVED, TOKEN_IDS, only_stated, run_sampling, without_effect
from sg_opd.training.rollouts import state_sampling

LEAKS = [{"min_p": 0.99}, {"no_repeat_ngram_size": 3}, {"typical_p": 0.2}, {"num_beams": 4}]
REPEATING = {"temperature": 0.3, "max_completion_length": 32}  # so that random models repeat three tokens
QWEN3 = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


class Sampled(Recorder):
    """Keeps, in training and in evaluation, the ids of every rollout that the student generates."""

    def __init__(self, *args, **kwargs):
        self.generated = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, *args, **kwargs):
        ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        self.generated.append((self.model.training, ids))
        return ids, logprobs


@pytest.fixture
def spoiled(pair, tmp_path):
    """`spoiled(role, settings)`: the path of a copy of that model whose file has these settings too."""

    def copy(role, settings):
        folder = tmp_path / f"{role} with {', '.join(settings)}"
        shutil.copytree(pair / role, folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True} | settings))
        return str(folder)

    return copy


@pytest.fixture
def trained(tokenizer, dataset, tmp_path):
    """Two steps with teacher rollouts, then an evaluation, each from a fresh seed."""

    def train(student, teacher, peft_config=None, **overrides):
        args = make_config(tmp_path / "out", **{**MIXED, "max_steps": 2, **REPEATING, **overrides})
        trainer = Sampled(
            student, teacher, coin_verifier, args, dataset, dataset.select(range(4)), peft_config=peft_config
        )
        callback = EvaluationCallback(trainer, dataset.select(range(2)), num_samples=2, every_steps=2)
        trainer.add_callback(callback)
        trainer.train()
        torch.manual_seed(3)
        trainer.evaluate()
        return trainer

    return train


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: next(iter(leak)))
def test_training_is_that_of_the_clean_checkpoints(pair, spoiled, trained, leak, caplog):
    """Student rollouts, the teacher's proposals, evaluation and its callback: the same ids, weights and log."""
    clean = trained(str(pair / "student"), str(pair / "teacher"))
    assert "generation_config.json" not in caplog.text
    leaking = trained(spoiled("student", leak), spoiled("teacher", leak))
    assert {training for training, _ in clean.generated} == {True, False}
    assert leaking.generated == clean.generated
    taken = torch.cat([batch["from_teacher"] for batch in clean.batches])
    assert 0 < taken.sum() < len(taken)
    for got, want in zip(leaking.batches, clean.batches, strict=True):
        assert torch.equal(got["completion_ids"], want["completion_ids"])
    assert_same_weights_exactly(leaking.model, clean.model)
    figures = [
        [{k: v for k, v in entry.items() if k.startswith("eval_avg")} for entry in run.state.log_history]
        for run in (leaking, clean)
    ]
    assert figures[0] == figures[1]
    ((name, value),) = leak.items()
    for role in ("student", "teacher"):
        assert caplog.text.count(f"The generation_config.json of the {role} sets {name}={value}, ") == 1


def test_a_student_with_an_adapter_leaves_it_out_too(pair, spoiled, trained):
    """peft has its model generate by the config that the wrapper shows."""
    leak = {**LEAKS[1], **LEAKS[2]}
    runs = [
        trained(student, str(pair / "teacher"), LoraConfig(r=2, target_modules=["q_proj"]))
        for student in (str(pair / "student"), spoiled("student", leak))
    ]
    assert runs[0].generated == runs[1].generated


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
def test_a_checkpoint_keeps_the_file_that_was_brought(spoiled, pair, trained, tmp_path, peft):
    brought = {name: value for leak in LEAKS for name, value in leak.items()}
    config = LoraConfig(r=2, target_modules=["q_proj"]) if peft else None
    trainer = trained(spoiled("student", brought), str(pair / "teacher"), config, save_strategy="steps", save_steps=1)
    (path,) = tmp_path.glob("student with */generation_config.json")
    own = json.loads(path.read_text())
    if peft:
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "out" / "checkpoint-2")
    for step in (2,) if peft else (1, 2):
        kept = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "generation_config.json").read_text())
        assert {n: v for n, v in kept.items() if n != "transformers_version"} == {
            n: v for n, v in own.items() if n != "transformers_version"
        }


def test_what_the_user_states_wins_and_is_no_news(pair, spoiled, trained, caplog):
    """The same settings in the run: with and without the file they are the same rollouts, others than without them."""
    stated = {"min_p": 0.5, "generation_kwargs": {"no_repeat_ngram_size": 3}}
    of_file = {"min_p": 0.5, "no_repeat_ngram_size": 3}
    clean = trained(str(pair / "student"), str(pair / "teacher"), **stated)
    leaking = trained(spoiled("student", of_file), str(pair / "teacher"), **stated)
    assert leaking.generated == clean.generated
    assert "generation_config.json" not in caplog.text
    assert trained(str(pair / "student"), str(pair / "teacher")).generated != clean.generated


@pytest.mark.parametrize("leak", [*LEAKS, QWEN3], ids=lambda leak: next(iter(leak)))
def test_an_evaluation_is_that_of_the_clean_checkpoint(pair, spoiled, tokenizer, dataset, leak, caplog):
    def evaluated(path, **sampling):
        model = AutoModelForCausalLM.from_pretrained(path)
        more = {"progress": False, **REPEATING, **sampling}
        return evaluate_model(model, tokenizer, dataset.select(range(4)), coin_verifier, 4, **more)

    clean, leaking = evaluated(pair / "student"), evaluated(spoiled("student", leak))
    assert leaking.questions == clean.questions
    assert compare(clean, leaking).differing == ()
    named = ", ".join(f"{name}={value}" for name, value in leak.items())
    assert caplog.text.count("generation_config.json of the model sets ") == 1
    assert f"generation_config.json of the model sets {named}, which does not count here" in caplog.text


def test_settings_say_what_shaped_the_samples(pair, tokenizer, dataset, tmp_path, caplog):
    """By the library's names, the same set whatever is asked for; `compare` says aloud where two results differ."""
    model, results = AutoModelForCausalLM.from_pretrained(pair / "student"), []
    for name, asked in (("plain", {}), ("narrow", {"min_p": 0.9, "temperature": 0.5, "repetition_penalty": 1.2})):
        folder = tmp_path / name
        more = {"max_completion_length": 12, "progress": False, "output_dir": folder, **asked}
        results.append(evaluate_model(model, tokenizer, dataset.select(range(4)), coin_verifier, 4, **more))
        settings = json.loads((folder / "settings.json").read_text())
        stated = {**NEUTRAL, "temperature": 1.0, "max_completion_length": 12, **asked}
        assert {setting: settings[setting] for setting in stated} == stated
    assert results[0].questions != results[1].questions
    assert "sampled differently" not in caplog.text
    told = compare(*results)
    assert set(told.sampling) == {"min_p", "temperature", "repetition_penalty"}
    assert told.sampling["min_p"] == ("0.0", "0.9")
    assert str(told).startswith("WARNING: the results were sampled differently")
    assert "min_p: 0.0 against 0.9; repetition_penalty: 1.0 against 1.2; temperature: 1.0 against 0.5" in caplog.text


def test_an_older_result_may_have_been_sampled_otherwise(pair, tokenizer, dataset):
    """One of a version that recorded fewer settings: what it does not say is named."""
    model = AutoModelForCausalLM.from_pretrained(pair / "student")
    result = evaluate_model(model, tokenizer, dataset.select([0]), coin_verifier, 2, 8, progress=False)
    older = {name: value for name, value in result.settings.items() if name != "typical_p"}
    told = compare(type(result)(result.num_samples, result.figures, result.questions, older, {}), result)
    assert told.sampling == {"typical_p": ("not recorded", "1.0")}


def test_within_every_setting_but_token_ids_is_the_librarys():
    """Of all fields that the installed transformers has, and one that it does not have."""
    own = GenerationConfig()
    for number, name in enumerate(vars(own)):
        setattr(own, name, number + 100)
    own.of_a_later_version = "shapes"
    before, model = dict(vars(own)), SimpleNamespace(generation_config=own)
    with only_stated(model):
        assert model.generation_config is own
        ids = {name: before[name] for name in TOKEN_IDS}
        assert vars(own) == {**vars(GenerationConfig()), **ids}
    assert vars(own) == before
    with pytest.raises(KeyError), only_stated(model):
        raise KeyError
    assert vars(own) == before


@pytest.mark.parametrize(
    ("own", "used", "said"),
    [
        ({"eos_token_id": 3, "max_length": 20, "use_cache": False, "transformers_version": "5"}, {}, ""),
        ({"top_k": 0, "top_p": 1.0, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": None}, {}, ""),
        ({"renormalize_logits": False, "bad_words_ids": []}, {}, ""),
        ({"top_k": 50, "temperature": 0.6}, {"top_k": 0, "temperature": 0.6}, "top_k=50"),
        ({"suppress_tokens": [7], "forced_eos_token_id": 1}, {}, "suppress_tokens=[7], forced_eos_token_id=1"),
        ({"presence_penalty": 1.5, "chat_format": "chatml"}, {}, "presence_penalty=1.5"),
        ({"do_sample": True}, {"do_sample": False}, "do_sample=True"),
        ({"guidance_scale": 1.0, "prompt_lookup_num_tokens": 3, "early_stopping": True}, {}, ""),
        ({"top_k": -1}, {"top_k": 0}, ""),
    ],
)
def test_what_is_named(own, used, said):
    assert without_effect(own, used) == said


def test_a_run_samples_by_its_fields_and_generation_kwargs(tmp_path):
    args = make_config(tmp_path, top_p=0.9, top_k=None, generation_kwargs={"min_p": 0.1, "presence_penalty": 0.5})
    assert args.top_k == 0  # None would be transformers' default of 50
    shared = {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.0}
    assert run_sampling(args) == shared
    assert run_sampling(args, SERVED) == {**shared, "presence_penalty": 0.5, "frequency_penalty": 0.0}


def test_a_vllm_engine_is_sent_what_a_file_could_fill_in(make_model, tmp_path):
    """What the user sends wins, and the user's own dict stays as it is."""
    args = make_config(tmp_path, generation_kwargs={"presence_penalty": 0.5})
    generation = object.__new__(VLLMGeneration)
    generation.generation_kwargs = args.generation_kwargs
    state_sampling(args, make_model(1), [7], generation)
    sent = {"presence_penalty": 0.5, "frequency_penalty": 0.0, "logit_bias": {7: -100.0}}
    assert generation.generation_kwargs == sent
    assert args.generation_kwargs == {"presence_penalty": 0.5}
