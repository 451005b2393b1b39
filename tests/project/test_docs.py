"""The documentation builds in strict mode and says of recipes, TRL's fields and links what is so."""

import ast
import html
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
import ran
import yaml
from documents import ROOT, anchors, documents, links, path_name
from memory import estimate, read
from pages import filled

import sg_opd

DOCS = ROOT / "docs"
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The pages as `make docs` builds them: warnings are errors, names without a target too."""
    target = tmp_path_factory.mktemp("site")
    command = re.search(r"-m sphinx (.*) docs build/docs$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert {"-W", "-n"} <= set(command)
    run = subprocess.run([sys.executable, "-m", "sphinx", *command, DOCS, target], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_every_page_is_built_and_reached_from_the_first(site):
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert all((site / page).is_file() for page in pages)
    reached, todo = set(), [site / "index.html"]
    while todo:
        page = todo.pop()
        if page not in reached:
            reached.add(page)
            targets = re.findall(r'href="([^":#]+\.html)', page.read_text())
            todo += [found for found in ((page.parent / target).resolve() for target in targets) if found.is_file()]
    assert pages <= {page.relative_to(site) for page in reached}


def test_docstrings_are_read_as_what_they_are(site):
    page, text = (site / "api.html").read_text(), text_of(site / "api.html")
    for public in sg_opd.__all__:
        assert f'id="sg_opd.{public}"' in page
    assert "```" not in text
    assert not re.search(r"\[[`~]", text)
    assert '<span class="pre">~trl' not in page
    assert r"\boxed{}" in text
    assert 'class="highlight-python' in page
    assert ":type: log" not in text


def test_nothing_is_fetched_to_read_a_page(site):
    """Formulas are drawn by the browser, from MathML."""
    assert (site / "method.html").read_text().count("<math ") > 20
    for page in site.rglob("*.html"):
        sources = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', page.read_text())
        assert not [source for pair in sources for source in pair if source.startswith(("http", "//"))], page


@pytest.mark.parametrize("path", documents(), ids=path_name)
def test_links_name_what_is_there(path):
    """Relative links, and what stands after a #: a heading, as GitHub names it; the site has the same names."""
    for target in links(path.read_text()):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text()), target


def test_anchors_are_those_of_github():
    text = "# A `b_c`, d & e\n\n## 2 x\n\n## 2 x\n\n```\n# no\n```\n"
    assert anchors(text) == {"a-b_c-d--e", "2-x", "2-x-1"}


def test_every_recipe_has_its_page_and_no_other():
    pages = {path.stem for path in (DOCS / "recipes").glob("*.md")} - {"index"}
    assert pages == {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_recipes_page_says_what_the_recipe_says(path):
    recipe = yaml.safe_load(path.read_text())
    page, index = ((DOCS / "recipes" / f"{stem}.md").read_text() for stem in (path.stem, "index"))
    assert f"examples/configs/{path.name}" in page
    (row,) = [line for line in index.splitlines() if line.startswith(f"| [`{path.stem}`]")]
    for field in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name"):
        value = recipe.get(field, "")  # of several teachers there is no single one
        if "/" in value and not value.startswith("examples/"):
            assert value.split("/")[-1].lower() in row.lower(), field
    assert ("LoRA" in row) == bool(recipe.get("use_peft"))
    assert ("server" in row) == ("teacher_server_url" in recipe)
    (launch,) = re.findall(r"examples/accelerate/(\w+)\.yaml", path.read_text().splitlines()[0]) or [None]
    if launch:
        peak = estimate(read(path, ROOT / "examples" / "accelerate" / f"{launch}.yaml"))["peak"]
        assert f"| memory | {peak:.1f} GiB at its peak" in page


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_what_to_change_can_be_changed(path):
    """The options that a recipe's page names with their values, laid over the recipe; and variables of the scripts."""
    from train import TrainArguments
    from trl import ModelConfig, TrlParser

    parser = TrlParser((TrainArguments, sg_opd.SGOPDConfig, ModelConfig), allow_abbrev=False)
    page = (DOCS / "recipes" / f"{path.stem}.md").read_text()
    changes = [shlex.split(code) for code in re.findall(r"`(--\w+[^`]*)`", page)]
    assert changes
    for change in changes:
        if len(change) > 1:
            options = ["--config", str(path), "--bf16", "false", "--use_cpu", "true", *change]
            parser.parse_args_and_config(options)
        assert change[0] in parser._option_string_actions
    for variable in re.findall(r"`([A-Z_]{3,})[=`]", page):
        assert variable in (ROOT / "examples" / "launch" / "teacher_server.sh").read_text()


def test_the_readme_says_what_ran_where():
    page = (ROOT / "README.md").read_text()
    assert ran.missing_tests() == []
    assert filled(page, {"what ran where": ran.ran_table()}, whole=False) == page, "run `python benchmarks/ran.py`"


def test_a_case_that_did_not_agree_ran_nowhere(tmp_path):
    """LoRA has three cases on the GPU; one of them failed."""
    agrees = json.loads((ran.GPU / "judged.json").read_text())["agrees"] | {"lora/full": False}
    (tmp_path / "judged.json").write_text(json.dumps({"agrees": agrees}))
    (tmp_path / "agreement.json").write_text(json.dumps({"about": {"device": "NVIDIA B300 80GB"}}))
    made = ran.ran_table(tmp_path)
    on_gpu, on_cpu, *_ = made.splitlines()[2:]
    assert on_gpu.endswith("; a killed run resumed, bit for bit | in the tests | B300 |")
    assert "LoRA;" not in on_gpu
    assert on_cpu.startswith("| estimator `top_k`; LoRA; several teachers")
    assert on_cpu.endswith(" | in the tests | not yet |")


def test_the_readmes_example_is_the_recipe():
    """Its settings and models are those of the recipe for a GPU of 24 GB."""
    recipe = yaml.safe_load((ROOT / "examples" / "configs" / "qwen3_lora_24gb.yaml").read_text())
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    told = {
        node.func.id: {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    settings = told["SGOPDConfig"]
    assert len(settings) > 7
    del settings["output_dir"]
    assert settings.items() <= recipe.items()
    names = ("r", "lora_r"), ("lora_alpha", "lora_alpha"), ("target_modules", "lora_target_modules")
    assert told["LoraConfig"] == {name: recipe[field] for name, field in names}
    assert told["SGOPDTrainer"]["model"] == recipe["model_name_or_path"]
    assert told["SGOPDTrainer"]["teacher_model"] == recipe["teacher_model_name_or_path"]


def rollouts(recipe, processes):
    each = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    return each * processes, each * processes // recipe["num_generations"]


@pytest.mark.parametrize(
    ("recipe", "processes", "said"),
    [
        ("qwen3_lora_24gb", 1, "so {prompts} prompts per step"),
        ("qwen3_qlora_16gb", 1, "so {prompts} prompts per step"),
        ("qwen3_full_zero3_server", 6, "so {prompts} prompts per step"),
        ("qwen3_full_zero3_server", 8, "on eight, {prompts}."),
    ],
)
def test_batches_are_the_recipes(recipe, processes, said):
    settings = yaml.safe_load((ROOT / "examples" / "configs" / f"{recipe}.yaml").read_text())
    number, prompts = rollouts(settings, processes)
    page = " ".join((DOCS / "recipes" / f"{recipe}.md").read_text().split())
    assert said.format(rollouts=number, prompts=prompts) in page


def test_every_field_of_trls_trainers_has_its_row():
    """Of DistillationTrainer all fields of its own; of GRPOTrainer those that DistillationTrainer has not."""
    from transformers import TrainingArguments
    from trl import DistillationConfig, GRPOConfig
    from trl.experimental.server_distillation import ServerDistillationConfig

    page = (DOCS / "migrating.md").read_text()
    before, after = page.split("## From `GRPOTrainer`")
    distillation, server = before.split("experimental `ServerDistillationTrainer`")

    def own(config, *others):
        return {f.name for f in fields(config)} - {f.name for other in others for f in fields(other)}

    def named(text):
        return set(re.findall(r"`(\w+)`", text))

    known = own(DistillationConfig, TrainingArguments)
    assert known - named(distillation) == set()
    assert own(ServerDistillationConfig, DistillationConfig) - named(server) == set()
    # the two are TRL's deprecated names; the continuous batching of transformers and the rest are in no way altered
    unaltered = {"vllm_importance_sampling_cap", "use_transformers_paged", "use_transformers_continuous_batching"}
    unaltered |= {"transformers_continuous_batching_config", "log_multimodal", "log_completions_hub_repo"}
    assert own(GRPOConfig, TrainingArguments, DistillationConfig) - named(after) == unaltered
    ours = {f.name: f.default for f in fields(sg_opd.SGOPDConfig)}
    changed = {f.name for f in fields(GRPOConfig) if f.name not in ours or ours[f.name] != f.default}
    assert changed == {"enable_jit_checkpoint"}
