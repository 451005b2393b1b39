"""Wheels for a GPU machine without the network: what a usual CUDA image lacks, and the package's own wheel.

    python benchmarks/gpu_bundle.py --output runs/wheels
    # there: python3 -m pip install --no-index --no-deps --target SITE runs/wheels/*.whl; export PYTHONPATH=SITE

Names, versions and hashes are those of benchmarks/gpu_wheels.txt; pip refuses a file with another hash.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "benchmarks" / "gpu_wheels.txt"
TARGET = ("--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")
LIMIT = 15 * 2**20  # bytes: what is carried to a lent machine is limited


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def bundle(folder: Path, wheels: Path = WHEELS) -> list[Path]:
    """Fill `folder` with the pinned wheels and the package's own; what was in it goes.

    Raises:
        SystemExit: a wheel that cannot be had, or with another hash than the pinned one, or too much in all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        checked = "--require-hashes", "--requirement", str(wheels), "--dest", str(folder)
        pip("download", "--quiet", "--no-deps", "--only-binary=:all:", *TARGET, *checked)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"The wheels of {wheels} could not be had: pip says why above.") from error
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    found = sorted(folder.iterdir())
    size = sum(path.stat().st_size for path in found)
    if size > LIMIT:
        raise SystemExit(f"{folder} has {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the wheels, made anew")
    for path in bundle(parser.parse_args().output):
        print(f"{path.stat().st_size:9,} {path.name}")


if __name__ == "__main__":
    main()
