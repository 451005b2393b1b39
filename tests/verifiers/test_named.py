"""A verifier by its name: where the module is looked for, and what is said of a name that names none."""

import sys

import pytest

from sg_opd.verifiers import load_verifier

MINE = """
LIMIT = 3

class Judge:
    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)

judge = Judge()

def right(completions, **kwargs):
    return [float("right" in text) for text in completions]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").mkdir()
    for name, text in {
        "mine_": MINE, "package/inner": MINE, "broken": "import no_such_package", "wrong": "1 / 0", "colorsys": MINE,
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize("module", ["mine_", "package.inner"])
def test_a_module_of_the_working_directory(here, module):
    assert load_verifier(f"{module}:right")(["right", "no"]) == [1.0, 0.0]
    assert load_verifier(f"{module}:judge")(["x"]) == [1.0]


def test_a_file_here_stands_in_for_no_module_of_pythons(here):
    sys.modules.pop("colorsys", None)
    assert load_verifier("colorsys:rgb_to_hls")(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("mine_", ValueError, "`verifier` must be 'module:function', as in 'my_verifiers:chosen_letter', got 'mine_'"),
        ("mine_.right", ValueError, "`verifier` must be 'module:function'"),
        ("mine_.py:right", ModuleNotFoundError, "`verifier`: there is no module 'mine_.py' for 'mine_.py:right'"),
        ("./mine_:right", ValueError, "`verifier` must be 'module:function'"),
        (":right", ValueError, "`verifier` must be 'module:function'"),
        ("mine_:", ValueError, "`verifier` must be 'module:function'"),
        ("nothing_here:right", ModuleNotFoundError, "`verifier`: there is no module 'nothing_here'"),
        ("package.outer:right", ModuleNotFoundError, "`verifier`: there is no module 'package.outer'"),
        ("mine_:left", AttributeError, "mine_.py) has no 'left'"),
        ("mine_:LIMIT", TypeError, "mine_.py) cannot be called; it is of type int"),
        ("mine_:Judge", TypeError, "mine_.py) is a class; name an object made of it"),
    ],
)
def test_what_names_no_verifier(here, name, error, said):
    with pytest.raises(error) as raised:
        load_verifier(name)
    assert "`verifier`" in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize(("name", "error"), [("broken", ModuleNotFoundError), ("wrong", ZeroDivisionError)])
def test_the_modules_own_errors_stay_its_own(here, name, error):
    with pytest.raises(error) as raised:
        load_verifier(f"{name}:right")
    assert "`verifier`" not in str(raised.value)
    assert raised.value.__notes__ == [f"It came from importing '{name}', for `verifier` '{name}:right'."]
