"""Local paths that are not there, named before anything is loaded and before the hub is asked for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["model", "dataset"]


def check_path(name: str, value: Any, kind: Kind = "model") -> None:
    """Refuse a local path that is not there, for which the hub would be asked instead.

    A path is a text that is absolute, begins with `.` or `~`, ends with a separator, has several, or lies in a folder
    that is there, unless the hub's cache has it. Other texts are names on the hub; what is no text passes.

    Args:
        name: of the argument, for the message.
        value: the model, in a folder, or the dataset, in a file or a folder.
        kind: which of the two.

    Raises:
        FileNotFoundError: the path is not there.
    """
    if not isinstance(value, str) or (Path(value).is_dir() if kind == "model" else Path(value).exists()):
        return
    parent = Path(value).parent if "/" in value else None
    is_path = Path(value).is_absolute() or value.startswith((".", "~")) or value.endswith("/") or value.count("/") > 1
    if not is_path and (parent is None or not parent.is_dir() or in_cache(value, kind)):
        return
    what = "folder" if kind == "model" else "file or folder"
    message = f"`{name}`: there is no {what} {value!r} (looked in {Path.cwd()}). "
    if is_path:
        message += f"Correct the path, or give a {kind} of the hub as 'organisation/name'."
    else:
        option = "" if kind == "model" else " --repo-type dataset"
        message += (
            f"It is taken for a path, because there is a folder {str(parent)!r}. Correct it; if a {kind} of the hub is "
            f"meant, have it in the hub's cache first: `hf download {value}{option}`."
        )
    raise FileNotFoundError(message + " `~` is for shells: write it out." * value.startswith("~"))


def check_command_line(
    arguments: Sequence[str], kinds: Mapping[str, Kind], unless: Mapping[str, str] | None = None
) -> None:
    """`check_path` of some options, before the imports that it takes to read all of them.

    Args:
        arguments: the command line, without the program. Its `--config` names a recipe, over which it wins, as with
            TRL's parser.
        kinds: by option, what it is the path of.
        unless: by option, another one beside which it is no path.

    Raises:
        FileNotFoundError: a path is not there.
    """
    names = ("config", *kinds, *(unless or {}).values())
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, default=argparse.SUPPRESS)
    given = vars(parser.parse_known_args(arguments)[0])
    if Path(recipe := given.get("config", "")).is_file():
        given = {**(yaml.safe_load(Path(recipe).read_text()) or {}), **given}
    for name, kind in kinds.items():
        if not given.get((unless or {}).get(name, "")):
            check_path(name, given.get(name), kind)


def in_cache(name: str, kind: str) -> bool:
    """Whether the hub's cache on this machine has something of that name."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir()
