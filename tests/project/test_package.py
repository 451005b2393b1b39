"""The house: layers, public names, a light import, TRL's hooks, and that docs, configs and code agree."""

import ast
import inspect
import re
import subprocess
import sys

import pytest
import rooms
from documents import ROOT, documents, path_name
from rooms import arrows, own_imports
from train import TrainArguments
from trl import GRPOTrainer, ModelConfig, TrlParser

import sg_opd
from sg_opd import SGOPDConfig, SGOPDTrainer
from sg_opd.presets import PRESETS, SOURCES
from sg_opd.training.metrics import BY_TEACHER, METRICS

SOURCE = ROOT / "src" / "sg_opd"
# the rooms and modules that each may import from; `docs/rooms.py` draws the arrows there are
ARROWS = {
    "method": set(),
    "verifiers": set(),
    "checkpoints": set(),
    "teachers": {"method"},
    "paths": set(),
    "data": {"paths", "verifiers"},
    "presets": set(),
    "confidential": set(),
    "evaluation": {"data", "teachers", "verifiers"},
    "config": {"confidential", "method", "presets", "teachers"},
    "training": {"checkpoints", "config", "data", "method", "paths", "teachers", "verifiers"},
    "views": {"checkpoints", "evaluation", "method", "training", "verifiers"},
    "trainer": {"checkpoints", "config", "data", "method", "teachers", "training", "verifiers", "views"},
}


def test_rooms_import_one_way():
    found = arrows()
    assert found.keys() == ARROWS.keys()
    for room, others in found.items():
        assert others <= ARROWS[room], f"{room} imports {others - ARROWS[room]}"
    for room, others in ARROWS.items():  # an order of the rooms exists in which each imports from earlier ones alone
        assert all(list(ARROWS).index(other) < list(ARROWS).index(room) for other in others), room


def test_of_training_the_views_read_the_metrics_alone():
    """Else a plot would pay for TRL."""
    imports = [name for path in (SOURCE / "views").glob("*.py") for name in own_imports(path)]
    assert {name for name in imports if name.startswith("training")} == {"training.metrics"}


def test_the_picture_of_the_rooms_is_drawn_from_the_imports():
    assert (ROOT / "docs" / "rooms.svg").read_text() == rooms.picture(), "run `python docs/rooms.py`"


def test_public_names():
    classes = ["SGOPDConfig", "SGOPDTrainer", "SignGatedLoss", "TeacherPhaseSampler", "MathVerifier"]
    assert sorted(sg_opd.__all__) == sorted([*classes, "inspect_rollout", "load_gate_samples", "score_rollout"])
    assert all(getattr(sg_opd, name).__name__ == name for name in sg_opd.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        sg_opd.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sg_opd", {"torch", "trl", "transformers", "sympy"}),
        ("from sg_opd import MathVerifier; MathVerifier()", {"torch", "trl", "transformers", "sympy"}),
        ("from sg_opd import SignGatedLoss, TeacherPhaseSampler", {"trl", "transformers", "peft"}),
        ("from sg_opd.views.plot import plot_runs", {"matplotlib", "plotly", "trl", "transformers"}),
        ("from sg_opd import inspect_rollout, load_gate_samples", {"trl", "transformers", "peft", "rich"}),
    ],
)
def test_imports_are_lazy(code, absent):
    check = f"{code}; import sys; print(sorted({absent!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# the parent's private hooks as this package overrides or calls them; a new TRL minor must not change them unnoticed
HOOKS = {
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_get_train_sampler": ["self", "dataset"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_maybe_log_save_evaluate": [
        "self",
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ],
    "_finalize_training": ["self", "trial", "num_train_samples", "start_time"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_tokenize_prompts": ["self", "prompts"],
    "_log_completion_extra": ["self", "column", "values"],
    "_log_metric": ["self", "name", "value"],
    "log": ["self", "logs", "start_time"],
}


@pytest.mark.parametrize("name", HOOKS)
def test_trl_hooks(name):
    hook = inspect.unwrap(getattr(GRPOTrainer, name))
    assert list(inspect.signature(hook).parameters) == HOOKS[name]


MOST_OVERRIDDEN = 10  # it only goes down: ask TRL for a public place instead, docs/upstream.md


def test_trls_private_methods_that_are_overridden():
    """Counted over the trainer's own classes; each has its signature held here and its reason in docs/upstream.md."""
    own = SGOPDTrainer.__mro__[: SGOPDTrainer.__mro__.index(GRPOTrainer)]
    private = re.compile(r"_[a-z]\w*")
    found = {name for cls in own for name, value in vars(cls).items() if callable(value) and private.fullmatch(name)}
    overridden = {name for name in found if hasattr(GRPOTrainer, name)}
    assert len(overridden) <= MOST_OVERRIDDEN, f"{len(overridden)} are overridden: {', '.join(sorted(overridden))}"
    assert overridden <= HOOKS.keys() | {"_get_per_token_logps_and_entropies"}  # whose signature is below
    page = (ROOT / "docs" / "upstream.md").read_text()
    assert set(re.findall(r"^\| `(_\w+)` \|", page, re.M)) == overridden
    assert f"{MOST_OVERRIDDEN} private methods" in page
    assert len(re.findall(r"^### \d", page, re.M)) == 5


def test_trl_forward_hook():
    from sg_opd.trainer import MULTIMODAL_KEYS

    hook = inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)
    parameters = list(inspect.signature(hook).parameters)
    assert parameters[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert set(MULTIMODAL_KEYS) == set(parameters[8:])


def test_trl_kernel_hooks():
    """What `method/divergence.py` takes from the kernels, so that a token's logit is rounded as in theirs."""
    from trl.kernels import chunked_divergence, chunked_logprob

    hooks = {
        chunked_divergence._compute_dtype: ["hidden"],
        chunked_divergence._project: ["tile", "hidden_chunk", "weight", "bias", "start", "end", "dtype"],
        chunked_logprob._torch_transform: ["z", "logit_scale", "softcap", "inv_t", "HAS_SOFTCAP"],
    }
    for hook, parameters in hooks.items():
        assert list(inspect.signature(hook).parameters) == parameters


def test_the_trainer_takes_grpos_arguments():
    ours, theirs = (list(inspect.signature(c.__init__).parameters) for c in (SGOPDTrainer, GRPOTrainer))
    assert ours[:5] == ["self", "model", "teacher_model", "verifier", "args"]
    assert "kwargs" in ours
    assert set(ours) - {"teacher_model", "verifier", "kwargs"} <= set(theirs)


CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_parses(path):
    lines = path.read_text().splitlines()
    assert re.match(r"# (accelerate launch|python) .*examples/train\.py --config examples/configs/", lines[0])
    assert f"examples/configs/{path.name}" in lines[0]
    parser = TrlParser((TrainArguments, SGOPDConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config(["--config", str(path), "--bf16", "false", "--use_cpu", "true"])
    assert script.dataset_name
    assert model.model_name_or_path
    assert args.teacher_model_name_or_path or args.teacher_models
    if model.model_name_or_path.startswith("Qwen/Qwen3-"):  # which think first, and would be cut
        assert args.chat_template_kwargs == {"enable_thinking": False}


def test_there_are_configs():
    assert len(CONFIGS) >= 3


ACCELERATE = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
# what each name promises: distributed type, and within it the stage, the device of offloading, or the version
TOPOLOGIES = {
    "single_gpu": ("NO", {}),
    "ddp": ("MULTI_GPU", {}),
    "zero2": ("DEEPSPEED", {"zero_stage": 2, "offload_optimizer_device": "none", "offload_param_device": "none"}),
    "zero3": ("DEEPSPEED", {"zero_stage": 3, "offload_optimizer_device": "none", "offload_param_device": "none"}),
    "zero3_offload": ("DEEPSPEED", {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}),
    "fsdp2": ("FSDP", {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_cpu_ram_efficient_loading": False}),
}


def test_every_topology_has_its_config():
    assert {path.stem for path in ACCELERATE} == set(TOPOLOGIES)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_configs_are_what_their_names_say(path):
    """Loaded by accelerate, which refuses unknown keys; those within a section are compared with its launcher's flags,
    where accelerate itself would hand an unknown one on in silence."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    kind, promised = TOPOLOGIES[path.stem]
    section = {"DEEPSPEED": config.deepspeed_config, "FSDP": config.fsdp_config}.get(kind, {})
    assert config.distributed_type.value == kind
    assert promised.items() <= section.items()
    assert section.keys() <= vars(launch_command_parser().parse_args(["script.py"])).keys()
    assert config.deepspeed_config == (section if kind == "DEEPSPEED" else {})
    assert config.fsdp_config == (section if kind == "FSDP" else {})
    assert config.mixed_precision == "bf16"
    assert config.use_cpu is False
    assert (config.num_processes > 1) == (kind != "NO")


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_configs_name_their_command(path):
    command = path.read_text().splitlines()[0]
    found = re.fullmatch(
        r"# accelerate launch --config_file (\S+) examples/train\.py --config (examples/configs/\w+\.yaml)", command
    )
    assert found, command
    assert found[1] == f"examples/accelerate/{path.name}"
    assert (ROOT / found[2]).exists()


def test_every_topology_is_documented_with_its_command():
    section = (ROOT / "docs" / "scale-out.md").read_text()
    for path in ACCELERATE:
        assert f"accelerate launch --config_file examples/accelerate/{path.name} " in section
    for path in (ROOT / "examples" / "launch").glob("*.sh"):
        assert f"bash examples/launch/{path.name}" in section
    assert "trl vllm-serve --model" in section


def test_an_unknown_key_of_accelerate_is_refused(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    path = tmp_path / "ddp.yaml"
    path.write_text((ROOT / "examples" / "accelerate" / "ddp.yaml").read_text() + "number_of_processes: 8\n")
    with pytest.raises(ValueError, match="number_of_processes"):
        load_config_from_file(str(path))


@pytest.mark.parametrize("path", documents(), ids=path_name)
def test_named_paths_exist(path):
    """Paths in code, from the repository's root; tests/project/test_docs.py follows the links."""
    text = path.read_text()
    for named in re.findall(r"\b((?:examples|notebooks|benchmarks|docs|tests|src)/[\w./-]+\.\w+)", text):
        made_by_a_run = named.startswith("benchmarks/results/")
        assert made_by_a_run or (ROOT / named).exists(), named


def test_no_figure_is_left_to_fill_in():
    for path in documents():
        assert not re.search(r"\b(DEMO|TEACHER|STUDENT)_[A-Z]+\b|TODO|FIXME", path.read_text()), path


README = (ROOT / "README.md").read_text()


def test_readme_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.M))
    assert {"demo", "test"} <= named <= targets
    for path in re.findall(r"\b((?:examples|notebooks|benchmarks|docs|tests)/[\w./-]+\.\w+)", README):
        assert (ROOT / path).exists(), path


def test_readme_python_compiles_and_uses_public_names():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "sg_opd":
                assert {alias.name for alias in node.names} <= set(sg_opd.__all__)


def test_documented_metrics_are_the_codes():
    documented = dict(
        re.findall(r"^\| `([a-z]+/[a-z0-9_]+)` \| (.*?) \|$", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    )
    assert documented == METRICS


def test_documented_metrics_by_teacher_are_the_codes():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert dict(re.findall(r"^\| `teachers/<name>/(\w+)` \| (.*?) \|$", page, re.M)) == BY_TEACHER


def test_documented_presets_are_the_codes():
    def factor(rule: str, p: dict) -> str:
        return f"{p['gate_extrapolation']:g} / {p['gate_interpolation']:g}" if rule == "sign" else rule

    def row(p: dict) -> tuple[str, str, str]:
        return factor(p["gate_rule"], p), p["gate_signal"], p["reference_policy"]

    method = (ROOT / "docs" / "method.md").read_text()
    form = r"^\| `([a-z0-9-]+)` \| ([\w. /]+) \| (verdict|group) \| (\w+) \| .*? \| (.*?) \|$"
    rows = re.findall(form, method, re.M)
    assert {name: tuple(values) for name, *values, _ in rows} == {name: row(p) for name, p in PRESETS.items()}
    assert {name: source for name, *_, source in rows} == SOURCES


def test_documented_fields_are_the_codes():
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "configuration.md").read_text(), re.M))
    assert documented == set(SGOPDConfig.__annotations__)


def test_one_version():
    """Of the package, the citation and the changelog's first heading."""
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    changed = re.search(r"^## (\S+) \((?:unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sg_opd.__version__ == cited == changed[1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone: what git has committed is not known")
def test_nothing_of_one_machine_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".ipynb", "") and path.is_file():
            assert "/work/" + "main" not in path.read_text(errors="ignore"), name


def test_documented_tasks_are_the_codes():
    from sg_opd.data import TASKS

    text = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (`\S+/.*?) \| (\w+) \| (.*?) \|$", text, re.M)
    assert {name: (dataset, split, columns) for name, dataset, split, columns in rows} == {
        name: (
            ", ".join(f"`{part}`" for part in (task.dataset, task.config) if part),
            task.split,
            ", ".join(f"`{part}`" for part in (task.question, task.answer, task.id) if part),
        )
        for name, task in TASKS.items()
    }


def test_documented_figures_and_fields_are_the_codes():
    from dataclasses import fields

    from sg_opd.evaluation.figures import QuestionResult, Sample

    text = (ROOT / "docs" / "evaluation.md").read_text()
    figures = re.findall(r"^\| `([\w@]+)` \| (?!`)", text[text.index("## Figures") : text.index("## Compare")], re.M)
    names = QuestionResult("q", 16, *[0] * 6).figures()
    assert figures == list(dict.fromkeys(re.sub(r"pass@\d+", "pass@k", name).replace("16", "n") for name in names))
    (line,) = re.findall(r"^\| `samples.jsonl` \| (.*) \|$", text, re.M)
    assert [name for name in re.findall(r"`(\w+)`", line) if name not in ("stop", "length")] == [
        field.name for field in fields(Sample)
    ]
