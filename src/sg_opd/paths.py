"""Local paths that are not there, named before anything is loaded and before the hub is asked for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal


def check_path(name: str, value: Any, kind: Literal["model", "dataset"] = "model") -> None:
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


def in_cache(name: str, kind: str) -> bool:
    """Whether the hub's cache on this machine has something of that name."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir()
