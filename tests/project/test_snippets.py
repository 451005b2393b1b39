"""Every code block of the documents and of public docstrings is run, checked, or says what it needs.

- `python` blocks run: those of a page one after another in one namespace, in an empty folder that shows `examples`. Two
  things stand in for what is not here, and nothing else: `STAND_INS` for models and data of the hub, and `SMALL` for
  settings that a page leaves open. `GIVEN` are the names that a page takes for granted.
- `bash` blocks are read by a real bash in which every program only notes how it was called; each call then is compared
  with the program's own parser, files and targets (`CHECKS`).
- `yaml` and `json` blocks are parsed; Sphinx's directives are for tests/project/test_docs.py.
- A comment above a block may say `needs: gpu`, `hub` or `network` (it does not run, but what can be checked is), or
  `covered by: tests/test_x.py::test_y`. Any other block is an error.
"""

import functools
import importlib
import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from documents import ROOT, Block, blocks, docstring_blocks, documents, path_name

PAGES = {path_name(path): blocks(path.read_text()) for path in documents()}
DOCSTRINGS = docstring_blocks()
NEEDS = {"gpu", "hub", "network"}

STAND_INS = {
    '"Qwen/Qwen3-1.7B"': '"examples/arithmetic/student"',
    '"Qwen/Qwen3-4B"': '"examples/arithmetic/teacher"',
    'load_dataset("openai/gsm8k", "main", split="train")': (
        'load_dataset("json", data_files="examples/arithmetic/data/train.jsonl", split="train")'
    ),
}
SMALL = {
    "max_steps": 1,
    "max_completion_length": 16,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
}
GIVEN = {
    "docs/evaluation.md": ("trainer", "held_out"),
    "docs/gate-view.md": ("dataset",),
    "docs/merging.md": ("dataset",),
    "docs/metrics.md": ("trained",),
    "docs/teachers.md": ("dataset",),
    "sg_opd.evaluation.evaluator.EvaluationCallback": ("trainer", "held_out"),
    "sg_opd.trainer.SGOPDTrainer": ("dataset",),
}


def ids(pages: dict[str, list[Block]], language: str) -> list[str]:
    return [page for page, some in pages.items() if any(block.language == language for block in some)]


@pytest.mark.parametrize("page", [page for page, some in (PAGES | DOCSTRINGS).items() if some])
def test_every_block_has_a_rule(page):
    for block in (PAGES | DOCSTRINGS)[page]:
        where = f"{page}:{block.line}"
        assert block.needs <= NEEDS, f"{where} needs {block.needs}, known are {NEEDS}"
        if "covered by" in block.marks:
            file, _, test = block.marks["covered by"].partition("::")
            assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{where}: no {block.marks['covered by']}"
        elif block.language in ("yaml", "json"):
            {"yaml": yaml.safe_load, "json": json.loads}[block.language](block.code)
        else:
            directive = page.startswith("docs/") and re.fullmatch(r"\{(eval-rst|toctree)\}", block.language)
            assert directive or block.language in ("python", "bash"), f"{where}: no rule for {block.language!r}"


@pytest.fixture(scope="session")
def rows():
    from sg_opd.data import load_data

    return load_data(str(ROOT / "examples" / "arithmetic" / "data"), "train").select(range(64))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where blocks run: an empty folder that shows the examples; settings are small unless a block gives them."""
    from trl import DistillationConfig, GRPOConfig

    from sg_opd import SGOPDConfig

    for config in (SGOPDConfig, GRPOConfig, DistillationConfig):

        def init(self, *args, original=config.__init__, **kwargs):
            steps = min(kwargs.get("max_steps", 1), 2)  # of a run in full the first two
            original(self, *args, **{**SMALL, **kwargs, "max_steps": steps})

        monkeypatch.setattr(config, "__init__", functools.wraps(config.__init__)(init))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(names: tuple[str, ...], rows) -> dict:
    from sg_opd import SGOPDConfig, SGOPDTrainer

    values = {"dataset": rows, "held_out": rows.select(range(4))}
    if {"trainer", "trained"} & {*names}:
        models = {"model": "examples/arithmetic/student", "teacher_model": "examples/arithmetic/teacher"}
        values["trainer"] = SGOPDTrainer(**models, args=SGOPDConfig(output_dir="out"), train_dataset=rows)
    if "trained" in names:  # a trainer that has a log
        values["trainer"].train()
        return {"trainer": values["trainer"]}
    return {name: values[name] for name in names}


@pytest.mark.parametrize("page", ids(PAGES | DOCSTRINGS, "python"))
def test_python_runs(page, folder, rows):
    namespace = {"__name__": "__main__", **given(GIVEN.get(page, ()), rows)}
    for block in (PAGES | DOCSTRINGS)[page]:
        if block.language != "python":
            continue
        code = functools.reduce(lambda text, pair: text.replace(*pair), STAND_INS.items(), block.code)
        compiled = compile("\n" * (block.line - 1) + code, page, "exec")
        if not block.marks:
            exec(compiled, namespace)


def test_every_stand_in_stands_for_something():
    code = "".join(block.code for some in (PAGES | DOCSTRINGS).values() for block in some if block.language == "python")
    assert all(text in code for text in STAND_INS)
    assert GIVEN.keys() <= (PAGES | DOCSTRINGS).keys()


SHIM = """#!/bin/sh
{{ printf '%s\\0' '{program}' "$#" "$@"; /usr/bin/env -0; printf '\\0'; }} >>'{record}'
"""


class Call(NamedTuple):
    """A program as a shell called it: its name, what stands after it, and the variables set for it."""

    program: str
    arguments: list[str]
    variables: dict[str, str]


def calls(block: Block, folder: Path) -> list[Call]:
    """What bash calls when it runs a block, all of whose programs only note it."""
    record = folder / "calls"
    for program in CHECKS:
        shim = folder / "bin" / program
        shim.parent.mkdir(parents=True, exist_ok=True)
        shim.write_text(SHIM.format(program=program, record=record))
        shim.chmod(0o755)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(folder / "bin")
    environment = {"PATH": str(folder / "bin")}
    run = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", block.code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = []
    for noted in record.read_text().split("\0\0")[:-1]:
        program, count, *rest = noted.split("\0")
        variables = dict(entry.split("=", 1) for entry in rest[int(count) :])
        own = {key: value for key, value in variables.items() if key not in ("PATH", "PWD", "OLDPWD", "SHLVL", "_")}
        found.append(Call(program, rest[: int(count)], own))
    return found


def check_recipe(arguments: list[str]) -> None:
    from train import TrainArguments
    from trl import ModelConfig, TrlParser

    from sg_opd import SGOPDConfig

    parser = TrlParser((TrainArguments, SGOPDConfig, ModelConfig), allow_abbrev=False)
    parser.parse_args_and_config([*arguments, "--bf16", "false", "--use_cpu", "true"])


def check_accelerate(call: Call) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert call.arguments[0] == "launch"
    launch = launch_command_parser().parse_args(call.arguments[1:])
    if launch.config_file:
        load_config_from_file(launch.config_file)
    assert launch.training_script == "examples/train.py"
    check_recipe(launch.training_script_args)


def check_python(call: Call) -> None:
    import evaluate
    from trl import TrlParser

    script, *arguments = call.arguments
    if script == "-m":
        module, *arguments = arguments
        importlib.import_module(module).command_line().parse_args(arguments)
        return
    assert (ROOT / script).is_file(), script
    if script == "examples/train.py":
        check_recipe(arguments)
    elif script == "examples/evaluate.py" and arguments[0] != "compare":
        TrlParser((evaluate.EvaluationArguments,), allow_abbrev=False).parse_args_and_config(arguments)
    else:  # its options are those that its source adds to a parser
        source = (ROOT / script).read_text()
        for option in [argument for argument in arguments if argument.startswith("-")]:
            assert f'add_argument("{option}"' in source, f"{script} has no {option}"


def check_bash(call: Call) -> None:
    script, *arguments = call.arguments
    source = (ROOT / script).read_text()
    header = "\n".join(line for line in source.splitlines() if line.startswith("#"))
    for variable in call.variables:
        assert re.search(rf"\b{variable}\b", header), f"{script} documents no {variable}"
    recipe = call.variables.get("RECIPE") or re.search(r"^RECIPE=\$\{RECIPE:-(.*)\}$", source, re.M)[1]
    check_recipe(["--config", recipe, *arguments])


def check_jupyter(call: Call) -> None:
    command, *options, notebook = call.arguments
    assert (command, (ROOT / notebook).suffix) == ("nbconvert", ".ipynb")
    assert (ROOT / notebook).is_file(), notebook
    assert options == ["--to", "html", "--execute", "--output-dir", "runs"]  # as was tried


def check_make(call: Call) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(call.arguments) <= set(targets)


def check_pip(call: Call) -> None:
    import tomllib

    assert call.arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for what in call.arguments[1:]:
        named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
        assert named, f"pip install {what}: only this package is installed in the documents"
        assert set((named[1] or "").split(",")) - {""} <= extras.keys()


def check_nothing(call: Call) -> None:
    """A program that is not installed here; its block must say what it needs."""
    raise LookupError(f"{call.program} cannot be checked here: say what the block needs")


CHECKS = {
    "accelerate": check_accelerate,
    "bash": check_bash,
    "jupyter": check_jupyter,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "trl": check_nothing,
    "vllm": check_nothing,
}


@pytest.mark.parametrize("page", ids(PAGES, "bash"))
def test_commands_are_what_their_programs_take(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for number, block in enumerate(block for block in PAGES[page] if block.language == "bash"):
        folder = tmp_path / str(number)
        folder.mkdir()
        for call in calls(block, folder):
            check = CHECKS[call.program]
            if check is check_nothing and block.needs:
                continue
            try:
                check(call)
            except (Exception, SystemExit) as error:
                said = " ".join([call.program, *call.arguments])
                raise AssertionError(f"{page}:{block.line}: {said}: {error}") from error
