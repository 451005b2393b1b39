"""Checkpoints on disk: each sealed once it is whole, and the last whole one found again."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

SEAL = "complete.json"  # written last, so a checkpoint without it is a part of one
PATTERN = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path, settings: dict[str, Any]) -> None:
    """Mark a folder as whole: what is in it reaches the disk first, then the list of it appears at once.

    Args:
        folder: with every file of every rank in it.
        settings: of the run, to be compared with those of a run that goes on from here.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        flush(path)
        files[path.relative_to(folder).as_posix()] = path.stat().st_size
    unfinished = folder / f"{SEAL}.part"
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
    """What is in the folder is no whole checkpoint from now on."""
    (folder / SEAL).unlink(missing_ok=True)


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings that a sealed checkpoint was written with."""
    return json.loads((folder / SEAL).read_text())["settings"]


def flaw(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, in words; `None` where it is one."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / SEAL).is_file():
        return f"it has no {SEAL}, which is written last, so its writing did not end"
    for name, size in json.loads((folder / SEAL).read_text())["files"].items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes, not {size}"
    return None


def last_whole(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint of the highest step, if there is one, and of each later one why it is none."""
    found = {int(match[1]): path for path in output_dir.glob("checkpoint-*") if (match := PATTERN.fullmatch(path.name))}
    skipped: dict[Path, str] = {}
    for step in sorted(found, reverse=True):
        reason = flaw(found[step])
        if reason is None:
            return found[step], skipped
        skipped[found[step]] = reason
    return None, skipped


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that are not what they were, one text each: name, value then, value now."""
    return [
        f"`{name}` was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
