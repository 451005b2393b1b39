"""The usual forms of mathematics sets -> `prompt` and `solution`."""

import json

import pytest
from datasets import Dataset, DatasetDict

from sg_opd.data import INSTRUCTION, load_data, prepare_dataset

ASKED = [{"role": "user", "content": f"What is 2+2?\n{INSTRUCTION}"}]
FORMS = {
    "gsm8k": ({"question": "What is 2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "4"),
    "math": ({"problem": "What is 2+2?", "solution": r"It is $\boxed{4}$.", "level": "1"}, r"It is $\boxed{4}$."),
    "math-500": ({"problem": "What is 2+2?", "solution": r"It is $\boxed{4}$.", "answer": "4"}, "4"),
    "aime": ({"problem": "What is 2+2?", "answer": 4}, "4"),
    "deepmath": ({"question": "What is 2+2?", "final_answer": "4", "r1_solution_1": "..."}, "4"),
    "lists": ({"question": "What is 2+2?", "final_answer": ["4"]}, "4"),
    "longer lists": ({"question": "What is 2+2?", "final_answer": ["100", "200"]}, r"\{100, 200\}"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    row, gold = FORMS[form]
    prepared = prepare_dataset(Dataset.from_list([row]))
    assert prepared.column_names == ["prompt", "solution"] or set(prepared.column_names) == {"prompt", "solution"}
    assert prepared[0] == {"prompt": ASKED, "solution": gold}


def test_dapo():
    row = {
        "prompt": [{"role": "user", "content": "Solve it."}],
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "data_source": "math_dapo",
    }
    prepared = prepare_dataset(Dataset.from_list([row]))
    assert prepared[0] == {"prompt": row["prompt"], "solution": "34"}


def test_dapos_frame_around_a_problem_gives_way_to_the_box():
    frame = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    row = {"prompt": [{"role": "user", "content": frame.format("What is 2+2?")}], "reward_model": {"ground_truth": "4"}}
    assert prepare_dataset(Dataset.from_list([row]))[0] == {"prompt": ASKED, "solution": "4"}


def test_a_prepared_dataset_stays_as_it_is():
    dataset = Dataset.from_list([{"prompt": "2+2=", "solution": "4", "source": "x"}])
    assert prepare_dataset(dataset) is dataset


def test_a_question_that_asks_for_a_box_is_left_alone():
    question = r"What is 2+2? Answer in \boxed{}."
    prepared = prepare_dataset(Dataset.from_list([{"question": question, "answer": "4"}]))
    assert prepared[0]["prompt"] == [{"role": "user", "content": question}]
    bare = prepare_dataset(Dataset.from_list([{"question": "2+2?", "answer": "4"}]), instruction=None)
    assert bare[0]["prompt"] == [{"role": "user", "content": "2+2?"}]


def test_splits_and_streams():
    rows = Dataset.from_list([FORMS["aime"][0]] * 2)
    assert set(prepare_dataset(DatasetDict(train=rows, test=rows))) == {"train", "test"}
    assert next(iter(prepare_dataset(rows.to_iterable_dataset()))) == {"prompt": ASKED, "solution": "4"}


def test_unknown_columns_are_named():
    with pytest.raises(ValueError, match="'text', 'label'"):
        prepare_dataset(Dataset.from_list([{"text": "a", "label": 1}]))


def test_local_files(tmp_path):
    rows = [{"question": "What is 2+2?", "answer": "4"}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        assert load_data(str(tmp_path / f"a.{suffix}"))[2] == rows[2]
    with pytest.raises(ValueError, match=r"one file, .*'train'; 'test' needs"):
        load_data(str(tmp_path / "a.jsonl"), "test")
    (tmp_path / "folder").mkdir()
    for name in ("train", "test"):
        (tmp_path / "folder" / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "4"}))
    assert load_data(str(tmp_path / "folder"), "test")["question"][:] == ["test"]
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl"):
        load_data(str(tmp_path / "b.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="expected one of"):
        load_data(str(tmp_path / "a.csv"))
