"""Where a number comes from: the commit of this checkout, and none where the package was copied elsewhere."""

import subprocess
import sys

from documents import ROOT

from sg_opd.evaluation import results as provenance


def git(folder, *arguments):
    run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_a_checkout_gives_its_commit():
    told = provenance.provenance()
    assert told["commit"] == git(ROOT, "rev-parse", "HEAD")
    assert told["dirty"] == bool(git(ROOT, "status", "--porcelain", "-uno"))
    assert told["python"] == sys.version.split()[0]
    assert {"torch", "transformers", "trl", "math-verify"} <= told["versions"].keys()


def test_a_copy_within_another_checkout_has_no_commit(tmp_path, monkeypatch):
    """As site-packages of an environment within somebody's repository; then committed there, with a change."""
    path = tmp_path / "provenance.py"
    path.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(path))
    assert provenance.checkout() == {"commit": None}
    git(tmp_path, "init", "-q")
    assert provenance.checkout() == {"commit": None}
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    assert provenance.checkout() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    path.write_text("x = 2\n")
    assert provenance.checkout()["dirty"] is True
