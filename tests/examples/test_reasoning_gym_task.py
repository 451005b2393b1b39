"""Tasks of reasoning_gym as dataset and verifier, and the recipe that trains on one."""

import ast
import inspect
import json
import subprocess
import sys
import textwrap

import evaluate
import pytest
import reasoning_gym_task
import train
from documents import ROOT
from reasoning_gym.factory import DATASETS
from reasoning_gym_task import RUNS_ANSWERS, TaskVerifier, rows_of, verdict
from trl import ModelConfig

from sg_opd import SGOPDConfig
from sg_opd.verifiers import load_verifier


@pytest.fixture(scope="module", autouse=True)
def workers():
    yield
    verdict.close()


def entry(words, **changed):
    """Of word_sorting, whose answer `words` is."""
    kept = {"task": "word_sorting", "settings": {}, "answer": ", ".join(words), "metadata": {"sorted_words": words}}
    return json.dumps(kept | changed)


ABC = entry(["a", "b", "c"])


@pytest.mark.parametrize(
    ("completion", "row", "threshold", "expected"),
    [
        ("first a. <answer>a, b, c</answer>", ABC, 1.0, 1.0),
        ("<answer>c</answer> no: <answer> a,b,c\n</answer> so it is", ABC, 1.0, 1.0),
        ("<think><answer>c, b, a</answer></think><answer>a, b, c</answer>", ABC, 1.0, 1.0),
        ("<answer>a, c, b</answer>", ABC, 1.0, 0.0),  # one of three in its place: a third
        ("<answer>a, c, b</answer>", ABC, 0.3, 1.0),
        ("<answer>b, c, a</answer>", ABC, 0.3, 0.0),  # none in its place, but the right words: 0.2
        ("<answer>b, c, a</answer>", ABC, 0.2, 1.0),
        ("<answer></answer>", ABC, 0.2, 0.0),
        ("a, b, c", ABC, 0.2, 0.0),
        ("<think>is it <answer>a, b, c</answer>", ABC, 0.2, 0.0),  # nothing is said yet
        ("<answer>a, b, c</answer>", None, 1.0, None),
        ("<answer>a, b, c</answer>", entry([], metadata={}), 1.0, None),  # its score_answer raises
    ],
)
@pytest.mark.parametrize("form", [str, lambda text: [{"role": "assistant", "content": text}]], ids=["text", "chat"])
def test_verdicts(completion, row, threshold, expected, form):
    """word_sorting's scores by hand: the share of words in their place, 0.2 at least for the right words."""
    assert verdict([form(completion)], entry=[row], threshold=[threshold], prompts=["?"]) == [expected]


def test_an_answer_that_never_ends_is_abstained_on():
    judge = TaskVerifier(timeout=3.0, workers=1, runs_answers=True)
    (row,) = rows_of("binary_matrix", 1, {}, runs_answers=True)
    never, right = "<answer>9**9**9**9</answer>", f"<answer>{row['solution']}</answer>"
    assert judge([never, right], entry=[row["entry"]] * 2, threshold=[1.0] * 2) == [None, 1.0]
    judge.close()


@pytest.mark.parametrize("task", sorted(RUNS_ANSWERS))
def test_answers_run_only_where_asked_to(task):
    """Rows that came from elsewhere name the task as well; no worker starts."""
    judge = TaskVerifier(workers=1)
    rows = [ABC, entry([], task=task, metadata={})]
    with pytest.raises(ValueError, match=rf"^`entry` of row 1 is of the task {task}, .*:verdict_running_answers`"):
        judge(["<answer>0</answer>"] * 2, entry=rows, threshold=[1.0] * 2)
    assert judge._grader.pool == []


def test_the_verifier_that_runs_answers():
    (row,) = rows_of("binary_matrix", 1, {}, runs_answers=True)
    given = {"entry": [row["entry"]], "threshold": [1.0]}
    named = load_verifier("reasoning_gym_task:verdict_running_answers")
    assert named([f"<answer>{row['solution']}</answer>"], **given) == [1.0]
    named.close()


@pytest.mark.parametrize("row", ["no JSON", "5", '{"metadata": 1}'])
def test_an_entry_that_is_none(row):
    with pytest.raises(ValueError, match=r"^`entry` of row 0 is not what this script writes"):
        verdict(["<answer>0</answer>"], entry=[row], threshold=[1.0])


def test_the_tasks_that_run_answers():
    """By the sources: which `score_answer` hands the answer, or what it made of it, to what compiles Python."""
    found = set()
    for task, (dataset, _) in DATASETS.items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(dataset.score_answer)))
        for node in ast.walk(tree):
            called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            named = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if called in ("eval", "exec", "parse_expr") and "answer" in named:
                found.add(task)
    assert found == RUNS_ANSWERS


@pytest.mark.parametrize("task", ["word_ladder", "knights_knaves", "time_intervals", "graph_color"])
def test_rows(task):
    """What a row asks and keeps; the task's own answer is correct, where it has one."""
    rows = list(rows_of(task, 3, {}, seed=1, threshold=0.5))
    assert len({row["prompt"][0]["content"] for row in rows}) == 3
    for row in rows:
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert message["content"].endswith("\nProvide your final answer between <answer> and </answer> tags.")
        assert row["threshold"] == 0.5
        assert json.loads(row["entry"])["answer"] == row["solution"]
    answers = [f"<answer>{row['solution']}</answer>" for row in rows]
    given = {"entry": [row["entry"] for row in rows], "threshold": [1.0] * 3}
    assert verdict(answers, **given) == [0.0 if task == "graph_color" else 1.0] * 3
    assert verdict(["<answer>no</answer>"] * 3, **given) == [0.0] * 3


@pytest.mark.parametrize(
    ("task", "changed", "said"),
    [
        ("word_sort", {}, "`task`: reasoning_gym has no 'word_sort'; it has ab, acre,"),
        ("composite", {}, "`task`: reasoning_gym has no 'composite'"),
        ("n_queens", {}, "`task`: n_queens scores an answer by running it as Python"),
        ("rearc", {}, "`task`: rearc scores its own answer"),  # of tuples, which JSON has not
        ("word_sorting", {"settings": {"words": 3}}, "`settings`: word_sorting does not take"),
        ("word_sorting", {"settings": {"min_words": 9, "max_words": 3}}, "max_words must be >= min_words"),
        ("word_sorting", {"threshold": 0.0}, "`threshold` must be in (0, 1], got 0.0"),
        ("count_bits", {"count": 4, "settings": {"min_n": 1, "max_n": 3}}, "`count`: count_bits has 3 different"),
    ],
)
def test_what_makes_no_rows(task, changed, said):
    with pytest.raises(ValueError, match=r"^`") as raised:
        list(rows_of(task, **({"count": 1, "settings": {}} | changed)))
    assert said in str(raised.value)


def test_a_verifier_that_is_not_there_ends_before_anything_is_loaded():
    arguments = {"dataset_name": "./no.jsonl", "verifier": "no_such_module:f"}
    config = SGOPDConfig("out", bf16=False, use_cpu=True, teacher_model_name_or_path="./no")
    with pytest.raises(ModuleNotFoundError, match="`verifier`"):
        train.main(train.TrainArguments(**arguments), config, ModelConfig(model_name_or_path="./no"))
    with pytest.raises(ModuleNotFoundError, match="`verifier`"):
        evaluate.main(evaluate.EvaluationArguments("./no", "out", **arguments))


def test_the_recipe_from_data_to_evaluation(tmp_path, monkeypatch):
    """Two steps and an evaluation of what they made: every answer judged, some correct, and the answers' texts kept."""
    settings = json.dumps({"min_word_len": 4, "max_word_len": 8})
    made = ["--output", str(tmp_path), "--train", "64", "--test", "8", "--settings", settings]
    monkeypatch.setattr(sys, "argv", ["reasoning_gym_task.py", "spell_backward", *made])
    reasoning_gym_task.main()
    options = {"dataset_name": tmp_path, "output_dir": tmp_path / "out", "max_steps": 2, "logging_steps": 2}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    run = subprocess.run(
        [sys.executable, "examples/train.py", "--config", "examples/configs/spelling.yaml", *given],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
    )
    assert run.returncode == 0, run.stderr
    (logged, *_) = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert logged["verdict/abstained"] == 0
    assert 0 < logged["verdict/correct"] < 1
    evaluate.main(
        evaluate.EvaluationArguments(
            str(tmp_path / "out"), str(tmp_path / "result"), dataset_name=str(tmp_path),
            verifier="reasoning_gym_task:verdict", num_samples=4, max_completion_length=16,
        )
    )  # fmt: skip
    samples = [json.loads(line) for line in (tmp_path / "result" / "samples.jsonl").read_text().splitlines()]
    words = [row["solution"] for row in map(json.loads, (tmp_path / "test.jsonl").read_text().splitlines())]
    assert len(samples) == 4 * len(words) == 32
    for number, sample in enumerate(samples):
        right = (sample["answer"] or "").lower() == words[number // 4].lower()
        assert sample["verdict"] == right
        if right:
            assert f"<answer>{sample['answer']}</answer>" in sample["completion"]
    assert any(sample["verdict"] for sample in samples)
