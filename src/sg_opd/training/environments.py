"""TRL's environments: who judges their rollouts, and their own reward as a verifier."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.logging import get_logger

from ..verifiers.verdicts import MathVerifier

logger = get_logger(__name__)  # of the main process only

Factory = Callable[[], Any]


class EnvironmentVerifier:
    """The verdicts of environments: what `get_reward` of each returns, 1, 0 or `None`. In reward-function form.

    Args:
        name: TRL's name for the reward, that of the environments' class.
        loop: returns the event loop on which an asynchronous `get_reward` runs, TRL's own.
    """

    needs_environments = True  #: so it judges within training alone

    def __init__(self, name: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.__name__ = name
        self._loop = loop

    def __call__(self, environments: Sequence[Any] | None = None, **kwargs: Any) -> list[float | None]:
        """One verdict an environment; other columns and TRL's extras are not read."""
        if environments is None:
            raise ValueError(f"{self.__name__} judges what was done in it, and nothing was: pass a `verifier`.")
        rewards = [environment.get_reward() for environment in environments]

        async def awaited() -> list[Any]:
            return [await reward if inspect.isawaitable(reward) else reward for reward in rewards]

        if any(map(inspect.isawaitable, rewards)):
            rewards = asyncio.run_coroutine_threadsafe(awaited(), self._loop()).result()
        graded = next((reward for reward in rewards if reward not in (0, 1, None)), None)
        if graded is not None:
            raise ValueError(
                f"`get_reward` of {self.__name__} returned {graded!r}; a verdict is 1 (correct), 0 (incorrect) or None "
                "(abstained). Pass a `verifier` that turns it into one: it gets each rollout's environment in "
                "`environments`."
            )
        return rewards


def probed(factories: Factory | Mapping[str, Factory] | None) -> tuple[Any, dict[str | None, type]]:
    """An `environment_factory`, or a dict of them, and the class of each one's environments by its name.

    To know the class one environment is made; the factory that is returned hands it out first.
    """

    def probe(factory: Factory) -> tuple[Factory, type]:
        made = [factory()]
        return lambda: made.pop() if made else factory(), type(made[0])

    if factories is None:
        return None, {}
    if not isinstance(factories, Mapping):
        factory, kind = probe(factories)
        return factory, {None: kind}
    each = {name: probe(factory) for name, factory in factories.items()}
    return {name: factory for name, (factory, _) in each.items()}, {name: kind for name, (_, kind) in each.items()}


def verifier_of(
    given: Callable | None,
    environments: Mapping[str | None, type],
    dataset: Any,
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> Callable:
    """The verifier of a run: the one given, else the environments' own reward, else a `MathVerifier`.

    Args:
        given: the trainer's `verifier`, which wins.
        environments: classes by name, as `probed` returns them.
        dataset: the trainer's `train_dataset`.
        loop: as `EnvironmentVerifier` takes it.

    Raises:
        ValueError: environments that none of these can judge.
    """
    kinds = list(dict.fromkeys(environments.values()))
    judges = [kind.__name__ for kind in kinds if inspect.isfunction(getattr(kind, "get_reward", None))]
    silent = [kind.__name__ for kind in kinds if kind.__name__ not in judges]
    if given is not None:
        if judges:
            logger.warning(
                "`get_reward` of %s is not asked, since a `verifier` is given, and a verdict is one: that verifier may "
                "call it, on the `environments` it gets.",
                ", ".join(judges),
            )
        return given
    if judges and not silent:
        return EnvironmentVerifier("_".join(judges), loop)
    if judges or (silent and not has_column(dataset, "solution")):
        raise ValueError(
            f"Pass a `verifier`, which gets each rollout's environment in `environments`, or give "
            f"{', '.join(silent)} a `get_reward` that returns 1, 0 or None: "
            + (f"only {', '.join(judges)} has one." if judges else "there is no column 'solution' for MathVerifier.")
        )
    return MathVerifier()


def has_column(dataset: Any, column: str) -> bool:
    """Whether a dataset has a column; of a stream without declared columns, whether its first row has."""
    return dataset is not None and column in (getattr(dataset, "column_names", None) or next(iter(dataset), {}))
