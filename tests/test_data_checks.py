"""Datasets that are refused or warned of before the first step."""

import logging

import PIL.Image
import pytest
from datasets import Dataset, Image, IterableDataset

from sg_opd import MathVerifier, SGOPDConfig
from sg_opd.data import check_batch, check_dataset, check_datasets, check_held_out


@pytest.fixture
def args(tmp_path):
    return SGOPDConfig(str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=8, num_generations=4)


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
def test_prompts(name, args):
    """As rows of a list, where each row may be of another type."""
    value, words = PROMPTS[name]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    rows = [{"prompt": [*user("p"), call]}, {"prompt": user("q")}, {"prompt": value}]
    with pytest.raises(ValueError, match=words):
        check_dataset("train_dataset", rows, len, args)
    check_dataset("train_dataset", rows[:2], len, args)


def test_golds_of_a_wrong_type(args):
    rows = Dataset.from_list([{"prompt": "p", "solution": {"value": "4"}}])
    with pytest.raises(ValueError, match=r"`solution` in `eval_dataset`, row 0: expected text, a number or None, got "):
        check_dataset("eval_dataset", rows, MathVerifier(), args)
    for gold in (4, 2.5, "4"):
        check_dataset("eval_dataset", Dataset.from_list([{"prompt": "p", "solution": gold}]), MathVerifier(), args)


def test_rows_made_by_a_transform(args, caplog):
    """The column `prompt` is made when a row is read; nothing is warned of, since all rows would have to be made."""
    rows = Dataset.from_list([{"question": "a", "solution": "1"}] * 3)
    rows.set_transform(lambda batch: {"prompt": batch["question"], "solution": batch["solution"]})
    check_datasets(rows, None, MathVerifier(), SGOPDConfig(args.output_dir, bf16=False, use_cpu=True,
                   per_device_train_batch_size=2, num_generations=2), None)  # fmt: skip
    assert not caplog.records


def test_images_are_decoded_of_one_row_only(args, caplog, monkeypatch):
    """One question about three pictures is no repeated question."""
    decoded = []
    decode = Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    pictures = [PIL.Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(8)]
    rows = Dataset.from_dict({"prompt": [user("What?")] * 8, "solution": ["1"] * 8, "image": pictures})
    rows = rows.cast_column("image", Image())
    settings = {"per_device_train_batch_size": 4, "num_generations": 4, "teacher_phase_steps": 0}
    args = SGOPDConfig(args.output_dir, bf16=False, use_cpu=True, **settings)
    with caplog.at_level(logging.WARNING):
        check_datasets(rows, None, MathVerifier(), args, None)
    assert not caplog.records
    assert len(decoded) <= 2


def test_a_batch_larger_than_the_dataset(args, dataset):
    """Two rows of eight rollouts, four a prompt: two prompts; the parent would train no step, and say so at its end."""
    args = SGOPDConfig(args.output_dir, bf16=False, use_cpu=True, per_device_train_batch_size=8, num_generations=1)
    with pytest.raises(ValueError, match=r"has 7 rows, but one generation takes 8 prompts .*num_generations=1"):
        check_batch(dataset.select(range(7)), args)
    check_batch(dataset.select(range(8)), args)
    check_batch(IterableDataset.from_generator(lambda: iter([{"prompt": "p"}])), args)


def test_questions_that_are_held_out_too(args, caplog):
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
        check_datasets(train.select(range(4)), {"x": held_out.select([3]), "y": held_out}, len, args, None)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "3 of the 4 questions of `eval_dataset['y']`" in said
