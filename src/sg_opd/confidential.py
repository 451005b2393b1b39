"""What must not be written down: addresses of servers, the credentials in them, tokens."""

from __future__ import annotations

import copy
from typing import Any
from urllib.parse import urlsplit

# fields of a configuration; where one is set, what is saved or shown of it is its name
CONFIDENTIAL = ("teacher_server_url", "vllm_server_base_url", "hub_token", "push_to_hub_token")
# and keys of a field that is a dict, such as `model_init_kwargs`
CONFIDENTIAL_KEYS = ("token", "hf_token", "access_token", "use_auth_token", "api_key", "password")


class Confidential:
    """A mixin of a training configuration: checkpoints, trackers and its text hold no address and no token.

    Nor tokens in dicts, as `model_init_kwargs` may hold them. Copies are whole. What is pickled, as a checkpoint's
    `training_args.bin` is, has `None` in those fields.
    """

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return masked(values, CONFIDENTIAL)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({shown})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        values = {name: None if name in CONFIDENTIAL else value for name, value in self.__dict__.items()}
        return masked(values, ())

    def __copy__(self) -> Confidential:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Confidential:
        new = memo[id(self)] = copy.copy(self)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def masked(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """With `<NAME>` for what is set of these names, and of `CONFIDENTIAL_KEYS` in dicts within."""

    def shown(name: str, value: Any) -> Any:
        if name in names and value is not None:
            return f"<{name.upper()}>"
        return masked(value, CONFIDENTIAL_KEYS) if isinstance(value, dict) else value

    return {name: shown(name, value) for name, value in values.items()}


def check_url(url: Any, name: str) -> None:
    """Refuse what is no `http://host` or `https://host`, with or without a port and a path, or holds credentials.

    Args:
        url: the base URL of a server; never repeated with its credentials.
        name: of the setting, for the error.

    Raises:
        ValueError: see above.
    """
    text = url if isinstance(url, str) else ""
    if "@" in text or "?" in text or "#" in text:
        raise ValueError(
            f"`{name}` holds a user name, a password or a query, which would end in logs: give the bare URL, as "
            "http://host:8000, and the server's key in the environment variable VLLM_API_KEY."
        )
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ValueError(f"`{name}` must hold URLs as http://host:8000, got {url!r}.")
