"""Which names are local paths, and that one which is not there is refused before the hub is asked."""

import socket

import pytest
from huggingface_hub import constants

from sg_opd.data import load_data
from sg_opd.paths import check_path


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
