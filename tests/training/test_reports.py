"""What a run says of itself: rollouts that are cut later on or not trained at all, and its model card."""

import copy
import re

import pytest
from peft import LoraConfig
from trainers import Recorder, assert_same_weights_exactly, make_config
from transformers import TrainerCallback

from sg_opd.training.reports import named

NO_END = {"suppress_tokens": [0, 1]}  # the tokenizer's padding and EOS: GRPOTrainer takes either for an end


def all_correct(prompts, completions, **kwargs):
    return [1.0] * len(completions)


@pytest.fixture
def build(make_model, tokenizer, dataset, tmp_path):
    def build(**overrides):
        args = make_config(tmp_path, **{"max_completion_length": 16, "max_steps": 4, **overrides})
        return Recorder(make_model(1), make_model(2), all_correct, args, dataset, processing_class=tokenizer)

    return build


class CutFrom(TrainerCallback):
    """From a step on, no rollout ends."""

    def __init__(self, step, trainer):
        self.step, self.trainer = step, trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.generation_config.suppress_tokens = NO_END["suppress_tokens"]


def shares(trainer):
    return [entry["completions/clipped_ratio"] for entry in trainer.state.log_history if "loss" in entry]


def test_rollouts_that_are_cut_later_on_are_warned_of_once(build, caplog):
    trainer = build()
    trainer.add_callback(CutFrom(2, trainer))
    trainer.train()
    first, second, *later = shares(trainer)
    assert max(first, second) <= 0.5
    assert later == [1.0, 1.0]
    assert "of the first rollouts" not in caplog.text
    text = "100 % of the rollouts since the last log (now at step 3) were cut at max_completion_length=16"
    assert caplog.text.count(text) == caplog.text.count("since the last log") == 1


@pytest.mark.parametrize("step", [1, 2])
def test_the_share_is_that_of_all_steps_since_the_last_log(build, caplog, step):
    """Told where it is cut from the second of three steps on, with their mean; not where the third alone is."""
    trainer = build(logging_steps=3, max_steps=3, max_completion_length=24)
    trainer.add_callback(CutFrom(step, trainer))
    trainer.train()
    (share,) = shares(trainer)
    assert (share > 0.5) == (step == 1)
    assert (f"{100 * share:.0f} % of the rollouts since the last log (now at step 3)" in caplog.text) == (step == 1)


def test_what_the_first_rollouts_were_told_of_is_not_told_again(build, caplog):
    build(max_completion_length=4, generation_kwargs=NO_END).train()
    assert caplog.text.count("100 % of the first rollouts were cut at max_completion_length=4") == 1
    assert "since the last log" not in caplog.text


def test_a_run_that_trains_on_nothing_says_so(build, caplog):
    trainer = build(
        max_completion_length=4,
        generation_kwargs=NO_END,
        mask_truncated_completions=True,
    )
    before = copy.deepcopy(trainer.model)
    trainer.train()
    assert_same_weights_exactly(trainer.model, before)
    assert "100 % of the first rollouts were cut at max_completion_length=4" in caplog.text
    assert caplog.text.count("nothing was trained. Raise `max_completion_length`") == 1
    assert "Every rollout since the last log (now at step 1) was cut at max_completion_length=4" in caplog.text


def card_of(trainer):
    trainer.create_model_card()
    return (trainer.args.output_dir, open(f"{trainer.args.output_dir}/README.md", encoding="utf-8").read())


def test_the_card_of_a_student_in_memory(build):
    folder, card = card_of(build())
    name = folder.rsplit("/", 1)[-1]
    assert f"# Model Card for {name}\n" in card
    assert "a fine-tuned version of a model that was given in memory." in card
    assert f'model="path/to/{name}"' in card
    assert "| `preset` | `sg-opd-lite` |" in card
    assert not re.search(r"\bNone\b", card.split("### SG-OPD settings")[0])


@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_the_card_of_a_student_in_a_folder(pair, dataset, tmp_path, peft):
    """The folders' names are told, the teacher's too, not where they lie."""
    args = make_config(tmp_path / "out")
    student, teacher = str(pair / "student"), str(pair / "teacher")
    _, card = card_of(Recorder(student, teacher, all_correct, args, dataset, peft_config=peft))
    assert "a fine-tuned version of `student`, a model in a local folder." in card
    assert 'model="path/to/out"' in card
    assert "Teacher: `teacher`\n" in card
    assert student not in card
    assert teacher not in card
    assert not re.search(r"\bNone\b", card.split("### SG-OPD settings")[0])


def test_a_card_that_names_the_hub_stays():
    card = 'version of [org/base](https://huggingface.co/org/base). pipeline("text-generation", model="me/mine")'
    assert named(card, "org/base", "out") == card
