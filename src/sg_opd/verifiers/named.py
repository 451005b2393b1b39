"""A verifier by its name, as recipes and command lines give it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path


def load_verifier(name: str) -> Callable:
    """The verifier that `module:function` names: any TRL reward function that answers 1, 0 or `None`.

    The module is looked for where Python looks, then in the working directory.

    Args:
        name: as in `my_project.verdicts:chosen_letter`; an object that can be called does too.

    Raises:
        ValueError: `name` has another form.
        ModuleNotFoundError: there is no such module.
        AttributeError: the module has nothing of that name.
        TypeError: what it has cannot be called, or is a class.
        Exception: the module's own, with a note that names it.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ValueError(f"`verifier` must be 'module:function', as in 'my_verifiers:chosen_letter', got {name!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file here must not stand in for a module that is imported later
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise ModuleNotFoundError(
                f"`verifier`: there is no module {missing!r} for {name!r} (looked where Python looks, and in {here}).",
                name=missing,
            ) from None
        error.add_note(f"It came from importing {module_name!r}, for `verifier` {name!r}.")
        raise
    where = f"the module {module_name!r} ({getattr(module, '__file__', None) or 'built in'})"
    if not hasattr(module, attribute):
        raise AttributeError(f"`verifier`: {where} has no {attribute!r}.")
    found = getattr(module, attribute)
    if isinstance(found, type):
        raise TypeError(f"`verifier`: {attribute!r} of {where} is a class; name an object made of it.")
    if not callable(found):
        raise TypeError(f"`verifier`: {attribute!r} of {where} cannot be called; it is of type {type(found).__name__}.")
    return found
