"""Checkpoints on disk: each sealed once it is whole, and the last whole one found again."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEAL = "complete.json"  # written last, so a checkpoint without it is a part of one
UNFINISHED = f"{SEAL}.part"  # there from the first, so a folder with it is ours, and one without it perhaps not
FORMER = ".former"  # a whole checkpoint whose step is written anew, until that is whole too
PATTERN = re.compile(rf"checkpoint-(\d+)({re.escape(FORMER)})?")


def begin(folder: Path) -> None:
    """Mark a folder as one that is being written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()


def seal(folder: Path, settings: dict[str, Any]) -> None:
    """Mark a folder as whole: what is in it reaches the disk first, then the list of it appears at once.

    Args:
        folder: with every file of every rank in it.
        settings: of the run, to be compared with those of a run that goes on from here.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (SEAL, UNFINISHED)):
        flush(path)
        files[path.relative_to(folder).as_posix()] = path.stat().st_size
    unfinished = folder / UNFINISHED
    unfinished.write_text(json.dumps({"settings": settings, "files": files}, indent=1))
    flush(unfinished)
    os.replace(unfinished, folder / SEAL)
    flush(folder)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unseal(folder: Path) -> None:
    """What is in the folder is a part of a checkpoint from now on."""
    os.replace(folder / SEAL, folder / UNFINISHED)


def discard(folder: Path) -> None:
    """Delete a checkpoint; a kill while that is done leaves a part of one. As the parent, past files still in use."""
    if (folder / SEAL).is_file():
        unseal(folder)
    shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Make room for a new checkpoint of the same step: a whole one waits under another name, a part is deleted."""
    if flaw(folder) is None:
        discard(former(folder))
        os.replace(folder, former(folder))
    elif folder.is_dir():
        shutil.rmtree(folder)


def former(folder: Path) -> Path:
    """Where `set_aside` puts a whole checkpoint."""
    return folder.with_name(folder.name + FORMER)


def take_back(folder: Path) -> None:
    """Undo `set_aside`: the former checkpoint has its name again, in place of what was written of the new one."""
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(former(folder), folder)


def sealed(folder: Path) -> dict[str, Any] | None:
    """What the seal says, `settings` and `files`; `None` where it cannot be read."""
    try:
        content = json.loads((folder / SEAL).read_text())
    except ValueError:  # no JSON, or no text
        return None
    return content if isinstance(content, dict) and {"settings", "files"} <= content.keys() else None


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings that a whole checkpoint was written with."""
    return json.loads((folder / SEAL).read_text())["settings"]


def flaw(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, in words; `None` where it is one."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / SEAL).is_file():
        return f"it has no {SEAL}, which is written last, so its writing did not end"
    content = sealed(folder)
    if content is None:
        return f"its {SEAL} cannot be read, so it was cut off, or is no list of files"
    for name, size in content["files"].items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes, not {size}"
    return None


def checkpoints(output_dir: Path) -> Iterator[tuple[int, bool, Path]]:
    """Every folder that has a checkpoint's name: its step, whether it is no former one, where it is."""
    for path in output_dir.glob("checkpoint-*"):
        match = PATTERN.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), match[2] is None, path


def last_whole(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint of the highest step, if there is one, and of each later one why it is none."""
    skipped: dict[Path, str] = {}
    for _, _, path in sorted(checkpoints(output_dir), reverse=True):
        reason = flaw(path)
        if reason is None:
            return path, skipped
        skipped[path] = reason
    return None, skipped


def rotate(output_dir: Path, limit: int | None, best: str | None, last: Path) -> None:
    """Delete the whole checkpoints that were sealed first, and what is left of ours that were not written to an end.

    A part counts for none, or it would displace a whole one. Folders without a mark of ours are left alone, such as
    those of plain transformers.

    Args:
        output_dir: the run's folder, in which no checkpoint is being written.
        limit: how many may stay, as `save_total_limit`; `None` or 0: all.
        best: path of the best model's checkpoint, known by its name, so that the run's folder can be moved.
        last: the checkpoint just written; it stays, as does the best one.
    """
    if not limit or limit < 0:
        return
    found = [path for _, _, path in checkpoints(output_dir)]
    for path in found:
        if (path / UNFINISHED).is_file() and not (path / SEAL).is_file():
            discard(path)
    whole = sorted((path for path in found if flaw(path) is None), key=lambda path: (path / SEAL).stat().st_mtime_ns)
    spare = [path for path in whole if path.name not in (last.name, best and Path(best).name)]
    for path in spare[: max(0, len(whole) - limit)]:
        discard(path)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that are not what they were, one text each: name, value then, value now."""
    return [
        f"`{name}` was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
