"""Which names are local paths, and that one which is not there is refused before the hub is asked."""

import socket

import pytest
from huggingface_hub import constants

from sg_opd.data import load_data
from sg_opd.paths import check_command_line, check_path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, a file of rows and a folder `Qwen`, and an empty cache of the hub; no network."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    (folder / "Qwen" / "mine").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    return folder


ASKED_OF_THE_HUB = ["gpt2", "org/name", "rows"]
PATHS = ["./org/name", "../name", "~/name", "name/", "org/name/", "org/deep/name", "Qwen/Qwen3-1.7B", "/nowhere/x"]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_a_path(here, kind):
    for value in (*ASKED_OF_THE_HUB, None, object(), "Qwen/mine", "./Qwen/mine", str(here / "Qwen" / "mine"), "Qwen/"):
        check_path("model", value, kind)
    for value in PATHS:
        with pytest.raises(FileNotFoundError) as caught:
            check_path("teacher_model", value, kind)
        assert str(caught.value).startswith("`teacher_model`: there is no f")
        assert f"{value!r} (looked in {here})" in str(caught.value)
        assert ("`~` is for shells" in str(caught.value)) == value.startswith("~")


def test_a_file_is_a_dataset_but_no_model(here):
    check_path("dataset_name", "./rows.jsonl", "dataset")
    with pytest.raises(FileNotFoundError, match=r"`model`: there is no folder './rows\.jsonl'"):
        check_path("model", "./rows.jsonl")


@pytest.mark.parametrize(("kind", "option"), [("model", ""), ("dataset", " --repo-type dataset")])
def test_a_name_on_the_hub_whose_organisation_is_a_folder_here(here, kind, option):
    """The message says what to do; once that is done the name passes, and one beside it still does not."""
    with pytest.raises(FileNotFoundError, match="because there is a folder 'Qwen'") as caught:
        check_path("model", "Qwen/Qwen3-1.7B", kind)
    assert f"`hf download Qwen/Qwen3-1.7B{option}`" in str(caught.value)
    (here.parent / "cache" / f"{kind}s--Qwen--Qwen3-1.7B").mkdir(parents=True)
    check_path("model", "Qwen/Qwen3-1.7B", kind)
    with pytest.raises(FileNotFoundError):
        check_path("model", "Qwen/Qwen3-1.8B", kind)


def test_load_data_asks_no_hub_for_a_path(here):
    for missing in ("./nope", "Qwen/nope"):
        with pytest.raises(FileNotFoundError, match="`name_or_path`: there is no file or folder"):
            load_data(missing)


def test_options_of_a_command_line_and_its_recipe(here):
    """As TRL's parser reads them: what stands on the command line wins, and either spelling is an option."""
    (here / "recipe.yaml").write_text("model_name_or_path: ./nope\nteacher_model_name_or_path: ./none\nseed: 1\n")
    kinds = {"model_name_or_path": "model", "teacher_model_name_or_path": "model", "dataset_name": "dataset"}

    def check(*arguments, **options):
        check_command_line([*arguments, "--learning_rate", "1"], kinds, **options)

    check()
    check("--model_name_or_path", "org/name", "--dataset_name=./rows.jsonl")
    for arguments in (["--dataset_name", "./nope"], ["--dataset-name", "./nope"], ["--dataset_name=./nope"]):
        with pytest.raises(FileNotFoundError, match="`dataset_name`: there is no file or folder"):
            check(*arguments)
    with pytest.raises(FileNotFoundError, match="`model_name_or_path`"):
        check("--config", "recipe.yaml")
    with pytest.raises(FileNotFoundError, match="`teacher_model_name_or_path`"):
        check("--config", "recipe.yaml", "--model_name_or_path", "org/name")
    served = {"teacher_model_name_or_path": "teacher_server_url"}
    given = [
        "--config",
        "recipe.yaml",
        "--model_name_or_path",
        "org/name",
        "--teacher_server_url",
        "http://a",
        "http://b",
    ]
    check(*given, unless=served)
    with pytest.raises(FileNotFoundError, match="`teacher_model_name_or_path`"):
        check(*given[:4], unless=served)
