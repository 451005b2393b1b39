"""The usual forms of mathematics sets and benchmarks."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from sg_opd import MathVerifier, data
from sg_opd.data import (
    INSTRUCTION,
    TASKS,
    as_gold,
    load_data,
    load_task,
    prepare_dataset,
)
from sg_opd.verifiers.answers import reference_answer

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
    row, answer = FORMS[form]
    assert prepare_dataset(Dataset.from_list([row])).to_list() == [{"prompt": ASKED, "solution": answer}]


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


ASKING = (
    r"Put your final answer within \boxed{}.",
    r"Use \boxed{} for the final answer.",
    r"Give your answer as \boxed{answer}.",
    r"Output the final answer inside $\boxed{}$",
    r"Write the solution in the form \boxed{a/b}.",
    r"请把最终答案放在\boxed{}中。",
)
SHOWING = (
    r"A student gave his answer as \boxed{12}. What mistake did he make?",
    r"Tom wrote the result in \boxed{5}. Is he right?",
    r"What is inside \boxed{x}?",
    r"Which digit goes into \boxed{}: 3 + \boxed{} = 7?",
    r"Find the digit such that the result is 3\boxed{}7.",
    r"What is \boxed{2} + 2? Give the answer in metres.",
)


@pytest.mark.parametrize("question", ASKING)
def test_a_question_that_asks_for_a_box_in_other_words(question):
    question = f"What is 2+2? {question}"
    prepared = prepare_dataset(Dataset.from_list([{"question": question, "answer": "4"}]))
    assert prepared[0]["prompt"][0]["content"] == question


@pytest.mark.parametrize("question", SHOWING)
def test_a_question_that_merely_shows_a_box_is_asked_for_one(question):
    prepared = prepare_dataset(Dataset.from_list([{"question": question, "answer": "4"}]))
    assert prepared[0]["prompt"][0]["content"] == f"{question}\n{INSTRUCTION}"


def test_messages_of_content_parts():
    """Parts of text become one text, DAPO's frame is found in them, and an image keeps the message as it is."""

    def parts(*texts):
        return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]

    def prompt(messages):
        return prepare_dataset(Dataset.from_list([{"prompt": messages, "answer": "4"}]))[0]["prompt"]

    assert prompt(parts("What is", " 2+2?")) == [{"role": "user", "content": "What is 2+2?"}]
    frame = "Solve the following math problem step by step. Say so.\n\n{}\n\nRemember to put your answer last."
    assert prompt(parts(*frame.format("What is 2+2?").split("2+", 1)))[0]["content"] == "What is 2?\n" + INSTRUCTION
    image = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "text": None}]}]
    assert prompt(image) == image
    system = [{"role": "system", "content": [{"type": "text", "text": "Box it."}]}, *parts("What?")]
    assert prompt(system) == [{"role": "system", "content": "Box it."}, {"role": "user", "content": "What?"}]


MISSING = (
    None,
    math.nan,
    np.nan,
    np.float32("nan"),
    pd.NA,
    pd.NaT,
    {"ground_truth": None},
    [],
    [None],
    ["4", math.nan],
)


@pytest.mark.parametrize("answer", MISSING, ids=repr)
def test_a_missing_answer(answer):
    assert as_gold(answer) is None


def test_a_heading_beside_a_box_cuts_nothing():
    worked = "So $\\boxed{5}$.\n\n#### Check\nIt fits."
    assert as_gold(worked) == worked
    assert reference_answer(as_gold(worked)) == "5"
    assert as_gold("#### Sum\n2 + 2\n#### 4") == "4"  # of several the last, where there is no box


def test_missing_answers_in_columns():
    """In a column of numbers pandas writes NaN, in one of texts None."""
    for answers, golds in (([4, math.nan], ["4.0", None]), (["4", None], ["4", None]), (["4", math.nan], ["4", None])):
        frame = pd.DataFrame({"question": ["a", "b"], "answer": answers})
        assert prepare_dataset(Dataset.from_pandas(frame))["solution"][:] == golds


@pytest.mark.parametrize(
    "question", ["What is 2+2?", [{"role": "user", "content": "What is 2+2?"}]], ids=["text", "chat"]
)
def test_a_thousand_missing_answers_ahead(question):
    """More than are written at a time, by which the type of a column is guessed."""
    rows = [{"prompt": question, "answer": None, "teacher_prompt": None}] * 1001
    last = {"prompt": question, "answer": "4", "teacher_prompt": "It is 4."}
    prepared = prepare_dataset(Dataset.from_list([*rows, last]))
    assert prepared["solution"][:] == [None] * 1001 + ["4"]
    asked = ASKED if isinstance(question, str) else question
    assert prepared[1001] == {"prompt": asked, "solution": "4", "teacher_prompt": "It is 4."}


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
def test_a_format_gives_way_to_plain_values(form, streamed):
    rows = Dataset.from_list([{"question": "What is 2+2?", "answer": 4}])
    rows = rows.to_iterable_dataset() if streamed else rows
    assert next(iter(prepare_dataset(rows.with_format(form)))) == {"prompt": ASKED, "solution": "4"}


def test_a_dataset_without_rows():
    for empty in (IterableDataset.from_generator(lambda: iter([])), Dataset.from_list([])):
        with pytest.raises(ValueError, match="The dataset is empty: it has neither columns nor rows"):
            prepare_dataset(empty)


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


# one row of each dataset on the hub, shortened; what is read, and the id and reference answer that come out
ROWS = {
    "aime24": (
        {"id": 60, "problem": "P", "solution": "long", "answer": "204", "url": "u", "year": "2024"},
        "60",
        "204",
    ),
    "aime25": ({"problem_idx": 1, "answer": 70, "problem": "P", "problem_type": ["Number Theory"]}, "1", "70"),
    "aime26": ({"problem_idx": 2, "answer": 277, "problem": "P"}, "2", "277"),
    "hmmt25": ({"problem_idx": 3, "answer": r"\frac{1}{576}", "problem": "P"}, "3", r"\frac{1}{576}"),
    "amc23": ({"question": "P", "answer": "27.0"}, "0", "27.0"),
    "math500": (
        {
            "problem": "P",
            "solution": r"so \boxed{2}",
            "answer": "2",
            "subject": "s",
            "level": 2,
            "unique_id": "t/1.json",
        },
        "t/1.json",
        "2",
    ),
    "gsm8k": ({"question": "P", "answer": "16 - 7 = <<16-7=9>>9\n#### 9"}, "0", "9"),
}


def test_every_task_has_its_row():
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_task_from_local_files(name, as_folder, tmp_path):
    row, id, answer = ROWS[name]
    path = tmp_path / (f"{TASKS[name].split}.jsonl" if as_folder else "rows.jsonl")
    path.write_text(json.dumps(row) + "\n")
    dataset = load_task(name, str(tmp_path if as_folder else path))
    assert dataset.to_list() == [
        {"id": id, "prompt": [{"role": "user", "content": f"P\n{INSTRUCTION}"}], "solution": answer}
    ]
    assert load_task(name, str(path if not as_folder else tmp_path), None)[0]["prompt"][0]["content"] == "P"


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_answer_of_a_task_is_graded(name):
    verifier = MathVerifier(workers=1)
    answer = ROWS[name][2]
    assert verifier([rf"\boxed{{{answer}}}", r"\boxed{12345}"], [answer, answer]) == [1.0, 0.0]
    verifier.close()


def test_the_hub_is_asked_for_the_tasks_dataset(monkeypatch):
    asked = []
    rows = Dataset.from_list([ROWS["gsm8k"][0]])
    monkeypatch.setattr(data, "load_data", lambda *args: asked.append(args) or rows)
    load_task("gsm8k")
    assert asked == [("openai/gsm8k", "test", "main")]


def test_tasks_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no task 'aime23'; there are aime24, aime25"):
        load_task("aime23")
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        load_task("aime24", str(tmp_path / "nowhere"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "P", "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: the task aime25 needs 'problem', 'problem_idx'.*'question'"):
        load_task("aime25", str(tmp_path / "rows.jsonl"))


def test_rows_of_a_transform_are_prepared_as_it_gives_them():
    rows = Dataset.from_list([{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}])
    rows.set_transform(lambda batch: {**batch, "answer": [f"so #### {text}" for text in batch["answer"]]})
    made = prepare_dataset(rows, instruction=None)
    assert [row["solution"] for row in made] == ["2", "4"]
    assert [row["prompt"][0]["content"] for row in made] == ["1 + 1?", "2 + 2?"]
