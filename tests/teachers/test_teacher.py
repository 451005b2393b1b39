"""A teacher in this process against plain logits, and teachers of a user's own."""

import math

import pytest
import torch
from scoring import COMPLETIONS, PROMPTS, Countdown, expected_logps
from trainers import Recorder, coin_verifier, make_config

from sg_opd import SGOPDTrainer
from sg_opd.teachers.local import load_teacher, sequence_logps
from sg_opd.teachers.protocol import Teacher, TeacherError, TopScores, as_lists, ask, ask_top
from sg_opd.teachers.several import Teachers


def test_padded_rows_become_lists():
    ids = torch.tensor([[0, 5, 6], [7, 8, 0]])
    assert as_lists(ids, torch.tensor([[0, 1, 1], [1, 1, 0]])) == [[5, 6], [7, 8]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_local_scores_are_the_models(temperature, make_model, tokenizer, dataset, tmp_path):
    """Rows of unequal length, one empty, in chunks of two: log-softmax(logits / temperature) of the plain model."""
    args = make_config(tmp_path, temperature=temperature, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    teacher = make_model(2)
    plain = make_model(2)
    plain.get_output_embeddings().weight.data /= temperature
    trainer = SGOPDTrainer(make_model(1), teacher, coin_verifier, args, dataset, processing_class=tokenizer)
    assert isinstance(trainer.teacher, Teacher)
    assert trainer.teacher.context == 256
    scored = trainer.teacher.score([*PROMPTS, [5]], [*COMPLETIONS, []])
    assert scored[3].shape == (0,)
    for got, prompt, completion in zip(scored[:3], PROMPTS, COMPLETIONS, strict=True):
        torch.testing.assert_close(got, expected_logps(plain, prompt, completion), rtol=0, atol=2e-5)
    assert [row.shape for row in trainer.teacher.score(PROMPTS, [[], [], []])] == [(0,)] * 3


def test_every_policy_has_the_head_of_the_students_precision(make_model, tokenizer, dataset, tmp_path):
    """bf16 weights with `cast_lm_head_to_fp32`: log-softmax of fp32 logits, which bf16 ones miss by 1e-3 and more."""
    settings = {"cast_lm_head_to_fp32": True, "reference_policy": "initial", "temperature": 1.0}
    models = (make_model(seed).bfloat16() for seed in (1, 2))
    trainer = SGOPDTrainer(
        *models, coin_verifier, make_config(tmp_path, **settings), dataset, processing_class=tokenizer
    )
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5]])
    policies = {1: [trainer.model, trainer.initial_policy.frozen], 2: [trainer.teacher.model]}
    for seed, of_seed in policies.items():
        plain = make_model(seed).bfloat16()
        with torch.no_grad():
            states, head = plain.base_model(ids).last_hidden_state[0, :-1], plain.get_output_embeddings().weight
            expected = (states.float() @ head.float().T).log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            rounded = (states @ head.T).log_softmax(-1, dtype=torch.float32).gather(1, ids[0, 1:, None]).squeeze(1)
        assert (rounded - expected).abs().max() > 1e-3
        for policy in of_seed:
            torch.testing.assert_close(sequence_logps(trainer, policy, ids[0].tolist()), expected, rtol=0, atol=1e-5)


def test_any_object_of_the_protocol_can_teach(make_model, tokenizer, dataset, tmp_path):
    assert isinstance(Countdown(), Teacher)
    args = make_config(tmp_path, temperature=1.0)
    trainer = Recorder(make_model(1), Countdown(), coin_verifier, args, dataset, processing_class=tokenizer)
    trainer.train()
    for batch in trainer.batches:
        mask, logps = batch["completion_mask"].bool(), batch["teacher_per_token_logps"]
        expected = -torch.arange(1.0, mask.size(1) + 1).expand(mask.shape)
        assert torch.equal(logps[mask], expected[mask])
        assert (logps[~mask] == 0).all()
    with pytest.raises(ValueError, match="estimator='full' needs a model in this process as teacher, not a Countdown"):
        SGOPDTrainer(
            make_model(1), Countdown(), coin_verifier, make_config(tmp_path, estimator="full"), dataset,
            processing_class=tokenizer,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[-1.0, -2.0]], r"countdown scored rows of \[2\] tokens, but the batch has \[3, 1\]"),
        ([[-1.0, -2.0], [-1.0]], r"rows of \[2, 1\] tokens, but the batch has \[3, 1\]"),
        ([[-1.0, math.nan, -2.0], [-1.0]], "gives token 6 the log-probability nan"),
        ([[-1.0, -9999.0, -2.0], [-1.0]], "gives token 6 the log-probability -9999, .* Set `log_ratio_clip`"),
        ([[-1.0, -2.0, -math.inf], [-1.0]], "gives token 7 the log-probability -inf"),
    ],
    ids=str,
)
def test_answers_that_cannot_be_trained_on(answer, message):
    """Two completions, of three tokens and of one."""
    batch = {
        "prompt_ids": torch.tensor([[3], [4]]), "prompt_mask": torch.ones(2, 1),
        "completion_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]), "completion_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }  # fmt: skip
    teacher = Countdown()
    teacher.score = lambda prompts, completions: [torch.tensor(row) for row in answer]
    with pytest.raises(TeacherError, match=message):
        ask(teacher, batch, None)
    if "Set `log" in message or "inf" in message:  # a clip bounds what minus infinity does
        assert ask(teacher, batch, 2.0)[0].tolist() == answer[0]


def test_answers_of_another_type():
    """Lists for tensors, of `score` and of `score_top`, are refused with the teacher's name."""
    one = torch.ones(1, 1, dtype=torch.long)
    batch = {"prompt_ids": one, "prompt_mask": one, "completion_ids": one, "completion_mask": one}
    teacher = Countdown()
    teacher.score = lambda prompts, completions: [[-1.0]]
    with pytest.raises(TeacherError, match=r"^countdown answers `score` with \[-1.0\], a list, where a Tensor is due"):
        ask(teacher, batch, None)
    for answer, said in (
        ((torch.ones(1), one, one), "a tuple, where a TopScores"),
        (TopScores([-1.0], one, one), "a list, where a Tensor"),
    ):
        teacher.score_top = lambda prompts, completions, k, answer=answer: [answer]
        with pytest.raises(TeacherError, match=rf"^countdown answers `score_top` with .*, {said} is due"):
            ask_top(teacher, batch, 1, 8)


def test_an_answer_takes_its_places_in_the_batch():
    """Rows of two, no and one token in a batch that is three wide; where the caller skips, -9999 is minus infinity."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    batch = {"prompt_ids": mask, "prompt_mask": mask, "completion_ids": mask, "completion_mask": mask}
    teacher = Countdown()
    teacher.score = lambda prompts, completions: [torch.tensor([-1.0, -9999.0]), torch.empty(0), torch.tensor([-3.0])]
    assert ask(teacher, batch, 2.0).tolist() == [[-1, -9999, 0], [0, 0, 0], [-3, 0, 0]]
    assert ask(teacher, batch, None, skips=True).tolist() == [[-1, -math.inf, 0], [0, 0, 0], [-3, 0, 0]]


def test_what_is_not_trained_is_not_looked_at():
    """Tokens of tools and environments may have no probability; each of several teachers is told which they are."""
    batch = {
        "prompt_ids": torch.tensor([[3], [4]]), "prompt_mask": torch.ones(2, 1),
        "completion_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [0, 1, 0]]),
    }  # fmt: skip
    teacher = Countdown()
    teacher.score = lambda *asked: [torch.tensor([-1.0, -9999.0, -2.0]), torch.tensor([math.nan, -3.0])][
        -len(asked[0]) :
    ]
    assert ask(teacher, batch, None).tolist() == [[-1, 0, -2], [0, -3, 0]]
    several = Teachers({"a": Countdown(), "b": teacher}, "teacher")
    _, part = several.parts({**batch, "teacher_number": torch.tensor([0, 1])})
    assert ask(teacher, part.batch, None).tolist() == [[0, -3, 0]]
    batch["tool_mask"][1, 0] = 1
    with pytest.raises(TeacherError, match="gives token 8 the log-probability nan"):
        ask(teacher, batch, None)


def test_what_an_object_lacks_to_be_a_teacher_is_named(make_model, tokenizer, dataset, tmp_path):
    class Nearly:
        def score(self):
            pass

    with pytest.raises(TypeError, match="a Nearly is none, and lacks 'propose', 'sharded', 'context', 'name'"):
        SGOPDTrainer(make_model(1), Nearly(), coin_verifier, make_config(tmp_path), dataset, processing_class=tokenizer)


def test_a_teacher_that_is_not_to_be_had_is_named():
    """Without the hub the loader's own words name no model."""
    with pytest.raises(OSError, match="huggingface") as caught:
        load_teacher("nobody/nothing", None, None)
    assert caught.value.__notes__ == ["It was about the teacher, 'nobody/nothing'."]
