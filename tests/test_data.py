"""The usual forms of mathematics sets and benchmarks; datasets that are refused or warned of before training."""

import json
import logging

import PIL.Image
import pytest
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Image, IterableDataset

from sg_opd import MathVerifier, data
from sg_opd.data import (
    INSTRUCTION,
    TASKS,
    check_batch,
    check_dataset,
    check_datasets,
    check_held_out,
    load_data,
    load_task,
    prepare_dataset,
)

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


def check(train, held_out=None, **settings):
    """As the trainer does, with a verifier that reads no `solution` unless told."""
    given = {
        "unparseable": None,
        "required": True,
        "remove_unused_columns": False,
        "teacher_phase": False,
        "generation_batch_size": 4,
        "num_generations": 4,
        **settings,
    }
    check_datasets(train, held_out, **given)


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


def test_solutions_that_do_not_parse(caplog):
    """They are asked for at once, with what the verifier says of them; only all of them are an error."""
    rows = Dataset.from_list([{"prompt": "p", "solution": solution} for solution in ("?", None, "4", "", "5", "?")])

    def unparseable(solutions):
        return [row for row, solution in enumerate(solutions) if solution not in ("4", "5")]

    with caplog.at_level(logging.WARNING):
        check({"a": rows}, unparseable=unparseable)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "4 of the 6 reference answers checked in `train_dataset['a']` cannot be parsed, first row 0" in said
    assert "row 0: '?'; row 1: 'None'; row 3: ''." in said
    with pytest.raises(ValueError, match="abstain on every row"):
        check(rows.select([0, 1, 3, 5]), unparseable=unparseable)


def test_columns_that_the_trainer_would_drop():
    rows = Dataset.from_list([{"prompt": "p", "solution": "4"}] * 4)
    check(rows, remove_unused_columns=True)
    with pytest.raises(ValueError, match="`remove_unused_columns=True` would drop the column 'solution'"):
        check(rows, unparseable=all_parse, remove_unused_columns=True)


def test_a_training_dataset_is_required_without_environments():
    check(None, required=False)
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
        check(rows, teacher_phase=True)


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
