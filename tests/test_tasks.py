"""Each benchmark from a small local file of its form on the hub, and what is refused."""

import json

import pytest

from sg_opd.data import INSTRUCTION, TASKS, load_task

# one row of each dataset on the hub, shortened; what is read, and the id and gold that come out
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
    row, id, gold = ROWS[name]
    path = tmp_path / (f"{TASKS[name].split}.jsonl" if as_folder else "rows.jsonl")
    path.write_text(json.dumps(row) + "\n")
    dataset = load_task(name, str(tmp_path if as_folder else path))
    assert dataset.to_list() == [
        {"id": id, "prompt": [{"role": "user", "content": f"P\n{INSTRUCTION}"}], "solution": gold}
    ]
    assert load_task(name, str(path if not as_folder else tmp_path), None)[0]["prompt"][0]["content"] == "P"


@pytest.mark.parametrize("name", TASKS)
def test_the_gold_of_a_task_is_graded(name):
    from sg_opd import MathVerifier

    verifier = MathVerifier(workers=1)
    gold = ROWS[name][2]
    assert verifier([rf"\boxed{{{gold}}}", r"\boxed{12345}"], [gold, gold]) == [1.0, 0.0]
    verifier.close()


def test_the_hub_is_asked_for_the_tasks_dataset(monkeypatch):
    from sg_opd import data as tasks

    asked = []
    monkeypatch.setattr(
        tasks, "load_data", lambda *args: asked.append(args) or tasks.Dataset.from_list([ROWS["gsm8k"][0]])
    )
    load_task("gsm8k")
    assert asked == [("openai/gsm8k", "test", "main")]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no task 'aime23'; there are aime24, aime25"):
        load_task("aime23")
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        load_task("aime24", str(tmp_path / "nowhere"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "P", "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: the task aime25 needs 'problem', 'problem_idx'.*'question'"):
        load_task("aime25", str(tmp_path / "rows.jsonl"))
