"""What a newcomer runs: examples/train.py in real processes, the demo's pieces, the notebook, the embedded world."""

import json
import subprocess
import sys

import nbformat
import pytest
import train
from datasets import Dataset, IterableDataset
from documents import ROOT
from nbconvert.preprocessors import ExecutePreprocessor
from problems import held_out_questions, make_problems, make_tokenizer
from trl import ModelConfig

from sg_opd import SGOPDConfig

ARITHMETIC = ROOT / "examples" / "arithmetic"


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=540)


def test_train_py_without_arguments_reads_the_embedded_recipe(tmp_path):
    """Two steps of the recipe through `accelerate launch`: exit code 0, progress, a saved student that loads."""
    from transformers import AutoModelForCausalLM

    result = run(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "examples/train.py",
        "--max_steps", "2", "--per_device_train_batch_size", "8",
        "--logging_steps", "1", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2/2" in result.stderr
    assert f"The student is saved in {tmp_path / 'out'}." in result.stdout
    before = AutoModelForCausalLM.from_pretrained(ARITHMETIC / "student").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_train_py_with_lora_and_local_files_of_another_form(tmp_path):
    """question/answer rows from a JSON Lines file, LoRA, a checkpoint, and a resumed run."""
    rows = [{"question": row["question"] + r" \boxed", "answer": row["answer"]} for row in make_problems(8, seed=1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [
        "examples/train.py", "--config", "examples/configs/arithmetic.yaml", "--dataset_name", tmp_path / "rows.jsonl",
        "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj",
        "--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "1",
        "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    result = run(*common, "--max_steps", "1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").exists()
    result = run(*common, "--max_steps", "2", "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_train_py_streams_where_asked_to(tmp_path, monkeypatch):
    """The trainer gets the same rows, as a stream, from a folder and from a file."""
    built = []
    monkeypatch.setattr(train, "SGOPDTrainer", lambda **given: built.append(given["train_dataset"]) or 1 / 0)
    config = SGOPDConfig(tmp_path, bf16=False, use_cpu=True, report_to="none")
    for name in (ARITHMETIC / "data", ARITHMETIC / "data" / "train.jsonl"):
        for streaming in (False, True):
            given = train.TrainArguments(dataset_name=str(name), dataset_streaming=streaming)
            with pytest.raises(ZeroDivisionError):
                train.main(given, config, ModelConfig(str(ARITHMETIC / "student")))
    assert [type(dataset) for dataset in built] == [Dataset, IterableDataset] * 2
    assert len({json.dumps(next(iter(dataset))) for dataset in built}) == 1


def test_train_py_fails_loudly(tmp_path):
    result = run("examples/train.py", "--model_name_or_path", "x", "--bf16", "false", "--use_cpu", "true")
    assert result.returncode != 0
    assert "Set `dataset_name` and `model_name_or_path`" in result.stderr
    result = run("examples/train.py", "--gate_extrapolation", "-1")
    assert result.returncode != 0
    assert "`gate_extrapolation` must be a number, finite and >= 0" in result.stderr
    for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name"):
        result = run("examples/train.py", "--config", "examples/configs/arithmetic.yaml", f"--{name}", "examples/nope")
        assert result.returncode != 0
        assert f"FileNotFoundError: `{name}`: there is no f" in result.stderr
        assert "Loading" not in result.stderr  # weights have a progress bar, and a dataset too
        assert "Generating" not in result.stderr


def evaluate(model, folder, *options):
    common = ["--num_samples", "2", "--max_completion_length", "64", "--batch_size", "64"]
    return run("examples/evaluate.py", "--model_name_or_path", model, "--output_dir", folder, *common, *options)


def test_evaluate_py_and_its_comparison(tmp_path):
    """The embedded models on 40 questions: what the demo measures on all of them, and a difference that is seen."""
    lines = (ARITHMETIC / "data" / "test.jsonl").read_text().splitlines(keepends=True)[:40]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    data = ("--dataset_name", tmp_path / "rows.jsonl")
    for name in ("student", "teacher"):
        result = evaluate(ARITHMETIC / name, tmp_path / name, *data)
        assert result.returncode == 0, result.stderr
        assert "80/80" in result.stderr  # the progress bar
        assert "40 questions, 2 samples each" in result.stdout
    means = {
        name: json.loads((tmp_path / name / "result.json").read_text())["figures"]["avg@2"]["mean"]
        for name in ("student", "teacher")
    }
    assert 5 < means["student"] < 50 < means["teacher"] < 95
    files = [tmp_path / name / "result.json" for name in ("student", "teacher")]
    result = run("examples/evaluate.py", "compare", *files)
    assert result.returncode == 0, result.stderr
    (line,) = [line.split() for line in result.stdout.splitlines() if line.startswith("avg@2")]
    before, after = means["student"], means["teacher"]
    assert line[1:4] == [f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"]
    several = run("examples/evaluate.py", "compare", "--baseline", *files[:1] * 2, "--other", *files[1:] * 2)
    assert "intervals over 2 runs and questions" in several.stdout


def test_evaluate_py_on_an_adapter_and_a_task(tmp_path):
    """A LoRA so large that it takes all the student can do away; a local file of the form of GSM8K."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ARITHMETIC / "student")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 10)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(ARITHMETIC / "student").save_pretrained(tmp_path / "adapter")
    lines = (ARITHMETIC / "data" / "test.jsonl").read_text().splitlines(keepends=True)[:30]
    (tmp_path / "test.jsonl").write_text("".join(lines))
    assert evaluate(tmp_path / "adapter", tmp_path / "mine", "--dataset_name", tmp_path).returncode == 0
    content = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert len(content["questions"]) == 30
    assert content["figures"]["avg@2"]["mean"] < 10  # of 28 before; a number at random may be right

    rows = [{"question": row["question"], "answer": f"so\n#### {row['answer']}"} for row in make_problems(3, seed=1)]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ("--task", "gsm8k", "--dataset_name", tmp_path / "gsm8k.jsonl")
    assert evaluate(ARITHMETIC / "student", tmp_path / "task", *task).returncode == 0
    content = json.loads((tmp_path / "task" / "result.json").read_text())
    assert content["settings"]["task"] == "gsm8k"
    assert [question["id"] for question in content["questions"]] == ["0", "1", "2"]


def test_evaluate_py_fails_loudly(tmp_path):
    result = evaluate("./nope", tmp_path, "--dataset_name", "./nope.jsonl")
    assert "FileNotFoundError: `model_name_or_path`: there is no folder './nope'" in result.stderr
    result = evaluate(ARITHMETIC / "student", tmp_path, "--dataset_name", "./nope.jsonl")
    assert "FileNotFoundError: `dataset_name`: there is no file or folder './nope.jsonl'" in result.stderr
    result = evaluate(ARITHMETIC / "student", tmp_path)
    assert "Set `task` or `dataset_name`." in result.stderr
    result = evaluate(ARITHMETIC / "student", tmp_path, "--task", "aime23")
    assert "there is no task 'aime23'" in result.stderr.casefold()
    result = run("examples/evaluate.py", "compare", "one.json")
    assert result.returncode == 2
    assert "give two results, or --baseline and --other" in result.stderr


def test_the_demo_writes_its_result(tmp_path):
    """The demo with two small steps: the table, result.json's keys and the curve."""
    small = ("--max_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1")
    result = run("examples/arithmetic/demo.py", "--seed", "3", "--output", tmp_path, *small)
    assert result.returncode == 0, result.stderr
    assert "avg@8" in result.stdout
    summary = json.loads((tmp_path / "result.json").read_text())
    assert summary["seed"] == 3
    assert summary["train_seconds"] > 0
    for name in ("student_before", "student_after", "opd", "teacher"):
        assert 0 <= summary[name]["avg@8"] <= summary[name]["pass@8"] <= 100
    # the shipped checkpoints: a teacher that is good but not perfect, a student that can do some
    assert 70 <= summary["teacher"]["avg@8"] <= 90
    assert 10 <= summary["student_before"]["avg@8"] <= 40
    for name in ("opd", "sg-opd-lite"):  # what docs/evaluation.md evaluates
        written = {path.name for path in (tmp_path / name).iterdir()}
        assert {"model.safetensors", "tokenizer.json", "gate_samples.html"} <= written
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "Correct rollouts" in (tmp_path / "curves.html").read_text()


def test_the_embedded_data_is_what_the_script_makes():
    texts = ((ARITHMETIC / "data" / f"{name}.jsonl").read_text() for name in ("train", "test"))
    train, test = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert {row["prompt"][0]["content"] for row in test} == held_out_questions()
    assert not held_out_questions() & {row["prompt"][0]["content"] for row in train}
    assert (len(train), len(test)) == (4000, 200)


@pytest.mark.parametrize("slip", [0.0, 0.5])
def test_problems_add_up(slip):
    """Every line of a worked solution follows from the one before; without slips each result is right."""
    for row in make_problems(200, seed=3, slip=slip):
        *lines, box = row["solution"].split("\n")
        value = row["question"].split(",")[0].removeprefix("Start with ")
        wrong = 0
        for line in lines:
            left, result = line.split("=")
            assert left.startswith(value)
            wrong += eval(left) != int(result)
            value = result
        assert box == f"\\boxed{{{value}}}"
        assert row["answer"] == value
        if not slip:
            assert wrong == 0
    tokenizer = make_tokenizer()
    ids = tokenizer(row["question"] + row["solution"])["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == row["question"] + row["solution"]


# what the outputs of each notebook must hold: text, how many pictures, and how many views of a rollout
NOTEBOOKS = {
    "quickstart": (["student before", "student after", "teacher"], 1, 2),
    "sign_gate": (["first  0.470  consensus", "loss -0.0510", "of 32 are correct", "Start with"], 1, 1),
    "real_model": (["step 15: consensus has 17% of the tokens and 100% of abs(delta)"], 1, 1),
    "lora_single_gpu": (["trainable params: 43,776", "student before", "student after", "merged, from disk"], 1, 0),
}


def test_every_notebook_is_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stripped(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_from_a_clean_kernel(name, tmp_path, monkeypatch):
    """Every cell, its assertions among them, in a folder of its own; the outputs hold what the reader is promised."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # with a GPU, one would train real models from the hub
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    source = notebook.cells[1].source
    assert "Path.cwd()" in source
    notebook.cells[1].source = f"import os\nos.chdir({str(ROOT)!r})\n{source}\nos.chdir({str(tmp_path)!r})"
    ExecutePreprocessor(timeout=400).preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    text = "\n".join(found.get("text/plain", "") for found in data) + "\n".join(o.get("text", "") for o in outputs)
    words, pictures, views = NOTEBOOKS[name]
    for word in words:
        assert word in text
    assert sum("image/png" in found for found in data) == pictures
    assert sum("srcdoc=" in found.get("text/html", "") for found in data) == views
