"""Environments of TRL's `environment_factory`: who judges their rollouts, and datasets that leave prompts to them."""

import pytest
import torch
from datasets import Dataset
from trainers import Recorder, decided, make_config

from sg_opd import SGOPDTrainer
from sg_opd.evaluation import EvaluationCallback


class Counting:
    """Rewards 1, 0 and None in turn; counts the instances that were made and the rewards that were asked for."""

    made, asked = 0, 0

    def __init__(self):
        type(self).made += 1
        self.number = self.made

    def reset(self, **kwargs):
        return " How much is 4 + 1?"

    def successor(self, number: int) -> str:
        """
        The number after a number.

        Args:
            number: any number.
        """
        return f"it is {number + 1}"

    def get_reward(self):
        type(self).asked += 1
        return (1, 0, None)[self.number % 3]


def silent():
    """An environment without a reward, made by a function."""

    class Silent(Counting):
        get_reward = None

    return Silent()


class Late(Counting):
    async def get_reward(self):
        return (1, 0, None)[self.number % 3]


def test_what_an_environment_cannot_judge(chat, chat_model, tmp_path):
    """A reward that is no verdict is named with its remedy; so is an evaluation in which there are no environments."""

    class Graded(Counting):
        def get_reward(self):
            return 0.3

    args = make_config(tmp_path, max_completion_length=8, gradient_accumulation_steps=1)
    models = chat_model(1), chat_model(2)
    trainer = Recorder(*models, None, args, None, processing_class=chat, environment_factory=Graded)
    with pytest.raises(ValueError, match=r"`get_reward` of Graded returned 0.3.*Pass a `verifier`"):
        trainer.train()
    with pytest.raises(ValueError, match="Pass a `verifier`: the trainer's is the reward of its environments"):
        EvaluationCallback(trainer, [{"prompt": [{"role": "user", "content": "?"}]}], every_steps=1)


@pytest.mark.parametrize("kind", [Counting, Late])
@pytest.mark.parametrize("as_function", [False, True], ids=["class", "function"])
def test_an_environments_reward_is_the_verdict(kind, as_function, chat, chat_model, tmp_path):
    """And nothing else: `reward` is the share of 1 among 1 and 0, each is asked once, and no instance is made twice."""
    kind.made = kind.asked = 0
    args = make_config(tmp_path, max_completion_length=8, gradient_accumulation_steps=1)
    factory = (lambda: kind()) if as_function else kind
    trainer = Recorder(
        chat_model(1), chat_model(2), None, args, None, processing_class=chat, environment_factory=factory
    )
    trainer.train()
    (batch,) = trainer.batches
    assert kind.made == 4
    # instances 1 to 4, in a batch that GRPOTrainer shuffles
    assert sorted(batch["verifier_labels"].nan_to_num(nan=2.0).tolist()) == [0.0, 0.0, 1.0, 2.0]
    logs = trainer.state.log_history[0]
    assert logs["reward"] == logs[f"rewards/{kind.__name__}/mean"] == pytest.approx(1 / 3)
    assert logs["verdict/correct"] == 0.25
    assert logs["verdict/abstained"] == 0.25
    assert kind is Late or kind.asked == 4
    _, advantage, _ = decided(chat_model(1), chat_model(2), batch)
    decision = trainer._buffered_inputs[0]["decision"]["advantage"]
    mask = batch["completion_mask"]
    torch.testing.assert_close(decision * mask, advantage * mask, rtol=1e-4, atol=1e-5)


def test_a_verifier_beside_an_environments_reward(chat, chat_model, tmp_path, caplog):
    """The verifier wins, and may ask the environments itself; GRPOTrainer would add both to `reward`."""
    Counting.made = Counting.asked = 0

    def at_least_half(environments, **kwargs):
        return [float((environment.get_reward() or 0) >= 0.5) for environment in environments]

    args = make_config(tmp_path, max_completion_length=8, gradient_accumulation_steps=1)
    trainer = Recorder(
        chat_model(1), chat_model(2), at_least_half, args, None, processing_class=chat, environment_factory=Counting
    )
    assert "`get_reward` of Counting is not asked, since a `verifier` is given" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == 0.25
    assert Counting.asked == 4
    assert not any("Counting" in name for name in trainer.state.log_history[0])


@pytest.mark.parametrize("data", ["none", "a column of environments"])
def test_environments_that_nobody_judges(data, chat, tmp_path):
    """Before a model is loaded: neither name is one."""
    args, factory, rows = make_config(tmp_path), silent, None
    if data != "none":
        rows, factory = Dataset.from_dict({"environment": ["a", "b"] * 4}), {"a": silent, "b": silent}
    with pytest.raises(
        ValueError, match=r"Pass a `verifier`.* give Silent.* a `get_reward`.* no column 'solution' for MathVerifier"
    ):
        SGOPDTrainer("none/student", "none/teacher", None, args, rows, environment_factory=factory)
    mixed = {"a": silent, "b": Counting}
    rows = Dataset.from_dict({"environment": ["a", "b"] * 4, "solution": ["1"] * 8})
    with pytest.raises(ValueError, match=r"Pass a `verifier`.* only Counting has one"):
        SGOPDTrainer("none/student", "none/teacher", None, args, rows, environment_factory=mixed)


def test_an_environment_supplies_the_prompts(chat, chat_model, tmp_path):
    """A dataset that only says which environment, as GRPOTrainer takes it, in training and in evaluation."""
    Counting.made = 0
    rows = Dataset.from_dict({"environment": ["a"] * 4})
    args = make_config(
        tmp_path, max_completion_length=4, gradient_accumulation_steps=1, eval_strategy="steps", eval_steps=1
    )
    trainer = Recorder(
        chat_model(1), chat_model(2), None, args, rows, rows.select([0]), processing_class=chat,
        environment_factory={"a": Counting},
    )  # fmt: skip
    trainer.train()
    assert "How much is 4 + 1?" in chat.decode(trainer.batches[0]["prompt_ids"][0])
    assert {"eval_reward", "eval_rewards/Counting/mean"} <= set(trainer.state.log_history[-2])
