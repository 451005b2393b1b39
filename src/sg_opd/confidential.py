"""Keeps addresses of servers and tokens out of whatever a configuration is written to or shown in."""

from __future__ import annotations

import copy
from typing import Any, Self

# what is left out wherever a configuration is written down or shown: addresses of servers and tokens
CONFIDENTIAL = ("teacher_server_url", "vllm_server_base_url", "hub_token", "push_to_hub_token")
# and keys of a field that is a dict, such as `model_init_kwargs` or `teacher_models`, or of a dict in it
CONFIDENTIAL_KEYS = ("server_url", "token", "hf_token", "access_token", "use_auth_token", "api_key", "password")


class Confidential:
    """Mixed into training arguments: their text and their dict, and pickles of `without_secrets`, have no secrets.

    No subclass of them: the dataclass made from both would take its defaults for TRL's.
    """

    _public = False  # whether a pickle of it leaves secrets out; no field

    def to_dict(self) -> dict[str, Any]:
        """All fields; `<NAME>` stands for a secret."""
        return _masked(super().to_dict(), CONFIDENTIAL)  # type: ignore[misc]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({shown})"

    __str__ = __repr__

    def without_secrets(self) -> Self:
        """A copy to be written down: the same in use, but pickled it has `None` or `<NAME>` for a secret."""
        public = copy.copy(self)
        public._public = True
        return public

    def __getstate__(self) -> dict[str, Any]:
        values = {name: value for name, value in self.__dict__.items() if name != "_public"}
        if not self._public:
            return values
        return _masked(values, ()) | dict.fromkeys(values.keys() & set(CONFIDENTIAL))


def _masked(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """With `<NAME>` for what is set of these names, and of `CONFIDENTIAL_KEYS` in dicts within."""

    def shown(name: str, value: Any) -> Any:
        if name in names and value is not None:
            return f"<{name.upper()}>"
        return _masked(value, CONFIDENTIAL_KEYS) if isinstance(value, dict) else value

    return {name: shown(name, value) for name, value in values.items()}
