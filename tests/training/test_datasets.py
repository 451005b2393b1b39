"""Datasets that are refused or warned of before training."""

import logging
import math

import PIL.Image
import pytest
from accelerate import PartialState
from datasets import Dataset, Image, IterableDataset

from sg_opd import MathVerifier, SGOPDConfig
from sg_opd.evaluation.evaluator import Draws
from sg_opd.training.datasets import check_batch, check_dataset, check_datasets, check_held_out, questions
from sg_opd.verifiers.verdicts import GIVEN, checked_verdicts


def check(train, held_out=None, unparseable=None, turns=None, **settings):
    """As the trainer does, with a verifier that reads no `solution` unless told, and batches of four."""
    given = {"teacher_phase_steps": 0, "per_device_train_batch_size": 4, "num_generations": 4, **settings}
    args = SGOPDConfig("out", bf16=False, use_cpu=True, report_to="none", gradient_accumulation_steps=1, **given)
    check_datasets(train, held_out, unparseable, args, turns)


@pytest.fixture(autouse=True)
def _state_of_accelerate():
    PartialState(cpu=True)  # which its loggers ask for the main process


def all_parse(solutions):
    return []


def user(text):
    return [{"role": "user", "content": text}]


PROMPTS = {
    "empty text": ("", r"`prompt` in `train_dataset`, row 2 is empty: ''\."),
    "white space": ("  \n", "row 2 is empty"),
    "none": (None, "row 2 is empty: None"),
    "a number": (7, r"row 2: expected text, or a list of messages .*, got '7'.*prepare_dataset"),
    "texts": (["What?"], "row 2: expected text, or a list of messages"),
    "no content": ([{"role": "user"}], "row 2: expected text"),
    "no content, no calls": ([{"role": "assistant", "content": None}], "row 2: expected text"),
    "no role": ([{"content": "What?"}], "row 2: expected text"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name):
    """As rows of a list, where each row may be of another type."""
    value, words = PROMPTS[name]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    rows = [{"prompt": [*user("p"), call]}, {"prompt": user("q")}, {"prompt": value}]
    with pytest.raises(ValueError, match=words):
        check_dataset("train_dataset", rows, None)
    check_dataset("train_dataset", rows[:2], None)


@pytest.mark.parametrize("column", GIVEN)
def test_columns_that_no_verifier_can_be_given(column):
    rows = Dataset.from_list([{"prompt": "p", "solution": "4", column: "x"}] * 4)
    said = rf"^`{{}}` has the column {column!r}: a verifier is given something else by that name\. Rename it"
    good = rows.remove_columns(column)
    with pytest.raises(ValueError, match=said.format("train_dataset")):
        check(rows)
    with pytest.raises(ValueError, match=said.format("eval_dataset")):
        check(good, rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=said.format("dataset")):
        Draws(None, None, rows, None, None, num_samples=1, batch_size=1, seed=0)
    check(good.add_column("verifier", ["x"] * 4))
    assert checked_verdicts(lambda prompts, verifier, **columns: verifier, ["p"], ["c"], verifier=[1]) == [1.0]


def test_solutions_of_a_wrong_type():
    rows = Dataset.from_list([{"prompt": "p", "solution": {"value": "4"}}])
    with pytest.raises(ValueError, match=r"`solution` in `eval_dataset`, row 0: expected text, a number or None, got "):
        check_dataset("eval_dataset", rows, all_parse)
    for solution in (4, 2.5, "4"):
        check_dataset("eval_dataset", Dataset.from_list([{"prompt": "p", "solution": solution}]), all_parse)


@pytest.mark.parametrize("collected", ["text", [1, 2], [[]], [["a"]], [[1], None]], ids=repr)
def test_collected_completions_of_a_wrong_type(collected):
    rows = [{"prompt": "p", "teacher_completions": None}, {"prompt": "p", "teacher_completions": ["text", [1, 2]]}]
    check_dataset("train_dataset", rows, None)
    with pytest.raises(ValueError, match=r"`teacher_completions` in `train_dataset`, row 2: expected a list of texts"):
        check_dataset("train_dataset", [*rows, {"prompt": "p", "teacher_completions": collected}], None)


def test_content_in_parts():
    """Text in parts is the same question as in one text; a part of it may be an image."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]}]
    rows = Dataset.from_list([{"prompt": parts}] * 4)
    check_dataset("train_dataset", rows, None)
    assert list(questions(rows)) == list(questions(Dataset.from_list([{"prompt": user("What is 2+2?")}] * 4)))
    image = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "tool_calls": [{"type": "f"}]}]
    with pytest.raises(ValueError, match="has images"):
        check_dataset("train_dataset", [{"prompt": image}], None, teacher_phase=True)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
def test_rows_in_a_format(form, streamed):
    rows = Dataset.from_list([{"prompt": user("a"), "solution": 4}] * 4)
    rows = rows.to_iterable_dataset() if streamed else rows
    with pytest.raises(
        ValueError, match=rf"`train_dataset` gives its rows in the format '{form}'.*with_format\(None\)"
    ):
        check(rows.with_format(form))
    check(rows.with_format(form).with_format(None), unparseable=all_parse)


@pytest.mark.parametrize("known", [False, True], ids=["no columns", "columns"])
def test_streams_without_rows(known):
    """In training and in evaluation, whether the columns are known or not."""
    rows = Dataset.from_list([{"prompt": "p"}] * 4)
    empty = IterableDataset.from_generator(lambda: iter([]))
    if known:
        empty = rows.to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        check(empty)
    with pytest.raises(ValueError, match=r"`eval_dataset\['x'\]` is empty"):
        check(rows, {"x": empty})


def test_environments_supply_prompts():
    rows = Dataset.from_list([{"level": 1}] * 4)
    check(rows, rows.to_iterable_dataset(), turns="environment_factory")
    with pytest.raises(ValueError, match="lacks the column 'prompt'"):
        check(rows)
    with pytest.raises(ValueError, match="lacks the column 'solution'"):
        check(rows, unparseable=all_parse, turns="environment_factory")
    with pytest.raises(ValueError, match="row 0 is empty"):
        check(Dataset.from_list([{"prompt": ""}] * 4), turns="environment_factory")


@pytest.mark.parametrize("turns", ["tools", "environment_factory"])
def test_text_prompts_where_a_rollout_has_turns(turns):
    """In GRPOTrainer an AttributeError or a TypeError, after the first generation."""
    with pytest.raises(ValueError, match=rf"`prompt` in `train_dataset`, row 2 is text, but with `{turns}` .*messages"):
        check_dataset(
            "train_dataset", [{"prompt": user("p")}, {"prompt": user("p")}, {"prompt": "p"}], None, turns=turns
        )
    check(Dataset.from_list([{"prompt": user("p")}] * 4), turns=turns)


def test_answers_that_are_missing(caplog):
    """None and NaN are no answers: they are counted, as `MathVerifier` will abstain on them."""
    verifier = MathVerifier(workers=1)
    rows = Dataset.from_dict({"prompt": ["p"] * 4, "solution": [4.0, math.nan, 5.0, None]})
    assert verifier([r"\boxed{4}"] * 4, rows["solution"]) == [1.0, None, 0.0, None]
    with caplog.at_level(logging.WARNING):
        check_dataset("train_dataset", rows, verifier.unparseable)
    assert "2 of the 4 reference answers checked in `train_dataset` cannot be parsed, first row 1: 'nan'" in caplog.text
    verifier.close()


def test_solutions_that_do_not_parse(caplog):
    """They are asked for at once, with what the verifier says of them; only all of them are an error."""
    rows = Dataset.from_list([{"prompt": "p", "solution": solution} for solution in ("?", None, "4", "", "5", "?")])

    def unparseable(solutions):
        return [row for row, solution in enumerate(solutions) if solution not in ("4", "5")]

    with caplog.at_level(logging.WARNING):
        check(rows, unparseable=unparseable)
    (said,) = [record.getMessage() for record in caplog.records if "reference answers" in record.getMessage()]
    assert "4 of the 6 reference answers checked in `train_dataset` cannot be parsed, first row 0" in said
    assert "row 0: '?'; row 1: 'None'; row 3: ''." in said
    with pytest.raises(ValueError, match="abstain on every row"):
        check(rows.select([0, 1, 3, 5]), unparseable=unparseable)


def test_columns_that_the_trainer_would_drop():
    rows = Dataset.from_list([{"prompt": "p", "solution": "4"}] * 4)
    check(rows, remove_unused_columns=True)
    with pytest.raises(ValueError, match="`remove_unused_columns=True` would drop the column 'solution'"):
        check(rows, unparseable=all_parse, remove_unused_columns=True)


def test_a_training_dataset_is_required_without_environments():
    check(None, turns="environment_factory")
    with pytest.raises(ValueError, match="is a dict of splits, 'train': pass one"):
        check_datasets({"train": "any"}, None, None, None, None)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        check(None)


def test_rows_made_by_a_transform(caplog):
    """The column `prompt` is made when a row is read; nothing is warned of, since all rows would have to be made."""
    rows = Dataset.from_list([{"question": "a", "solution": "1"}] * 3)
    rows.set_transform(lambda batch: {"prompt": batch["question"], "solution": batch["solution"]})
    check(rows, unparseable=all_parse)
    assert not caplog.records


def test_images_are_decoded_of_one_row_only(caplog, monkeypatch):
    """One question about eight pictures is no repeated question."""
    decoded = []
    decode = Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    pictures = [PIL.Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(8)]
    rows = Dataset.from_dict({"prompt": [user("What?")] * 8, "solution": ["1"] * 8, "image": pictures})
    rows = rows.cast_column("image", Image())
    with caplog.at_level(logging.WARNING):
        check(rows, unparseable=all_parse)
    assert not caplog.records
    assert 1 <= len(decoded) <= 2
    with pytest.raises(ValueError, match=r"`train_dataset` has images.*teacher_phase_steps=0"):
        check(rows, teacher_phase_steps=1)


def test_a_batch_larger_than_the_dataset(dataset):
    """Eight completions, one a prompt: eight prompts. GRPOTrainer would train no step, and say so at its end."""
    with pytest.raises(ValueError, match=r"has 7 rows, but one generation takes 8 prompts .*num_generations=1"):
        check_batch(dataset.select(range(7)), 8, 1)
    check_batch(dataset.select(range(8)), 8, 1)
    check_batch(IterableDataset.from_generator(lambda: iter([{"prompt": "p"}])), 8, 1)


def test_questions_that_are_held_out_too(caplog):
    """Three of four held-out questions are trained on: one under another system message, one with other spaces."""
    train = Dataset.from_list([{"prompt": user(q)} for q in ("a", "b  c", "d", "e", "e")])
    system = [{"role": "system", "content": "Think."}]
    held_out = Dataset.from_list([{"prompt": p} for p in (user("a"), user("b c"), system + user("d"), user("new"))])
    with caplog.at_level(logging.WARNING):
        check_held_out(train, held_out)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("1 of the 5 rows of `train_dataset` repeat an earlier row's question.")
    assert "3 of the 4 questions of `eval_dataset` are in `train_dataset` too" in said[1]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check(train.select(range(4)), {"x": held_out.select([3]), "y": held_out})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "3 of the 4 questions of `eval_dataset['y']`" in said
