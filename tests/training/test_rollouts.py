"""Rollouts collected earlier, in the dataset's column `teacher_completions`: taken before the teacher is asked."""

import pytest
from scoring import Countdown
from trainers import Recorder, make_config

from sg_opd.data import prepare_dataset

PHASE = {"temperature": 1.0, "teacher_phase_steps": 10, "teacher_phase_fraction": 0.5}


class Asked(Countdown):
    """Notes for how many prompts it is asked, and proposes what is never endorsed."""

    def __init__(self):
        self.asked = []

    def propose(self, prompt_ids, candidates=1):
        self.asked.append(len(prompt_ids))
        return [[[3, 1]] * candidates for _ in prompt_ids]


def says_8(prompts, completions, **kwargs):
    return [1.0 if "8" in completion[-1]["content"] else 0.0 for completion in completions]


@pytest.fixture
def run(make_model, tokenizer, dataset, tmp_path):
    """One step on rows with a column `teacher_completions`, 8 rollouts of 2 prompts, 2 slots each."""

    def run(column, **overrides):
        rows = dataset.select(range(2)).add_column("teacher_completions", [column] * 2)
        teacher = Asked()
        args = make_config(tmp_path, **{**PHASE, **overrides})
        trainer = Recorder(make_model(1), teacher, says_8, args, rows, processing_class=tokenizer)
        trainer.train()
        taken = [
            ids[mask.bool()].tolist()
            for batch in trainer.batches
            for ids, mask, mine in zip(
                batch["completion_ids"], batch["completion_mask"], batch["from_teacher"], strict=True
            )
            if mine
        ]
        return taken, teacher, trainer

    return run


def text_ids(tokenizer, text):
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_each_slot_takes_an_endorsed_one_of_its_own(run, tokenizer):
    """Two slots a prompt: the first has collected[0::2], the second collected[1::2]; of these the first with an 8."""
    taken, teacher, trainer = run(["1+7=7", "2*4=8", "8-0=8", "0+8=8"])
    first, second = text_ids(tokenizer, "8-0=8"), text_ids(tokenizer, "2*4=8")
    assert sorted(taken) == sorted([first, second] * 2)
    assert teacher.asked == []
    assert trainer.state.log_history[0]["teacher/endorsed"] == 1.0


def test_the_teacher_is_asked_for_what_is_left(run, tokenizer):
    """One is endorsed and one is not; the teacher is asked for the other slot of each prompt, and fails to please."""
    taken, teacher, _ = run(["1+8", "2+2"])
    assert taken == [text_ids(tokenizer, "1+8")] * 2
    assert teacher.asked == [2]


def test_token_ids_that_end_in_time_are_taken(run, tokenizer):
    """Ids are taken as they are up to their first EOS; without one, or beyond the length limit, they take no row."""
    eight, eos = tokenizer("8")["input_ids"][0], tokenizer.eos_token_id
    taken, teacher, _ = run([[eight, eos, eight], [eight, eight]])
    assert taken == [[eight, eos]] * 2
    assert teacher.asked == [2]
    taken, _, _ = run(["8" + tokenizer.eos_token, "2"])  # as text that was decoded with its special tokens
    assert taken == [[eight, eos]] * 2
    taken, teacher, _ = run([[eight] * 16 + [eos], [eight, eos]])
    assert taken == [[eight, eos]] * 2


def test_a_proposal_without_tokens_did_not_end(run, tokenizer, monkeypatch):
    eight, eos = tokenizer("8")["input_ids"][0], tokenizer.eos_token_id
    proposals = [[[], [eight, eos]], [[], []], [[], [eight, eos]], [[], []]]
    monkeypatch.setattr(Asked, "propose", lambda self, prompt_ids, candidates=1: proposals)
    taken, _, _ = run(None)
    assert taken == [[eight, eos]] * 2


def test_none_and_no_phase(run):
    taken, teacher, _ = run(None)
    assert taken == []
    assert teacher.asked == [4]
    taken, teacher, _ = run(["8"] * 4, teacher_phase_steps=0)
    assert taken == []
    assert teacher.asked == []


def test_another_form_is_refused(run):
    with pytest.raises(ValueError, match="`teacher_completions` in `train_dataset`, row 0: expected a list of texts"):
        run("8")
    with pytest.raises(ValueError, match="row 0: expected a list of texts, or of non-empty lists of token ids"):
        run([[]])


def test_prepare_dataset_keeps_the_column(dataset):
    rows = [{"question": "1+1", "answer": "2", "teacher_completions": ["2"], "level": 1}]
    from datasets import Dataset

    prepared = prepare_dataset(Dataset.from_list(rows))
    assert set(prepared.column_names) == {"prompt", "solution", "teacher_completions"}
    assert prepared[0]["teacher_completions"] == ["2"]
