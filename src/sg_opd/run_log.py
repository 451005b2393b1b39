"""The log of a run: its metrics over the steps, from the `trainer_state.json` that TRL's trainers leave behind."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoints import SEAL, last_whole

STATE = "trainer_state.json"
logger = logging.getLogger(__name__)


class Series(NamedTuple):
    """A metric over the steps."""

    steps: tuple[int, ...]
    """Optimizer steps, ascending, each once."""
    values: tuple[float, ...]
    """As logged; NaN where the log has a NaN or nothing."""


@dataclass(frozen=True)
class RunLog:
    """The metrics of a run by name."""

    name: str
    """How the run is called in plots."""
    series: dict[str, Series]
    """By the metric's name in the log; only metrics with at least one number."""

    @classmethod
    def of(cls, log_history: Iterable[Mapping[str, Any]], name: str) -> RunLog:
        """From `trainer.state.log_history`; of a step that was logged twice, the later value counts.

        Args:
            log_history: entries with `step` and metrics.
            name: of the run.
        """
        found: dict[str, dict[int, float]] = {}
        for entry in log_history:
            for metric, value in entry.items():
                if metric in ("step", "epoch") or isinstance(value, (bool, str)):
                    continue
                if value is None or isinstance(value, (int, float)):  # None is how TRL logs a mean of nothing
                    found.setdefault(metric, {})[int(entry["step"])] = math.nan if value is None else float(value)
        return cls(
            name,
            {
                metric: Series(*zip(*sorted(points.items()), strict=True))
                for metric, points in found.items()
                if not all(map(math.isnan, points.values()))
            },
        )

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> RunLog:
        """From a run's output folder, or one of its checkpoints.

        The log of the highest step is taken: that of `trainer.save_state()`, or of the newest whole checkpoint.

        Args:
            folder: `output_dir` of a run of `SGOPDTrainer` or another trainer of TRL.
            name: of the run; default: the folder's.

        Raises:
            FileNotFoundError: no such folder, or none of its files holds a log.
            ValueError: a file that is no log.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} (looked in {Path.cwd()}).")
        logs = [read_state(path) for path in states(folder)]
        if not logs:
            raise FileNotFoundError(
                f"{folder} has no log: neither a {STATE} nor a whole checkpoint with one. Call `trainer.save_state()` "
                "after training, or train with save_strategy='steps'; then plot that folder."
            )
        newest = max(logs, key=lambda state: state["global_step"])
        return cls.of(newest["log_history"], folder.resolve().name if name is None else name)


def states(folder: Path) -> list[Path]:
    """The files that may hold the folder's log: its own, and its newest whole checkpoint's."""
    own = [folder / STATE] if (folder / STATE).is_file() else []
    checkpoint, passed_over = last_whole(folder)
    if checkpoint is None and not any((path / SEAL).exists() for path in passed_over):
        # another trainer's, which seals none: its log is written after the weights
        checkpoint = next((path for path in passed_over if (path / STATE).is_file()), None)
    elif not own:
        for path, reason in passed_over.items():
            logger.warning("%s is passed over: %s.", path, reason)
    return own if checkpoint is None else [*own, checkpoint / STATE]


def read_state(path: Path) -> dict[str, Any]:
    """A trainer's state as JSON; a file that is none is named in the error."""
    try:
        state = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no log of a trainer: {error}. Delete it, or copy it again from the run.") from None
    if not isinstance(state, dict) or not {"log_history", "global_step"} <= state.keys():
        raise ValueError(f"{path} is no log of a trainer: it has no `log_history` and `global_step`.")
    return state
