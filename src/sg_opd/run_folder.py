"""The folder of one evaluation: settings, samples batch by batch, then the result; a stopped run goes on there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .results import EvaluationResult, Sample, checked, read_json, write_json


class RunFolder:
    """`settings.json`, `samples.jsonl` and `result.json` of one evaluation.

    Args:
        folder: made where it is not there.
        settings: all that decides the samples.

    Raises:
        ValueError: the folder holds an evaluation with other settings, or samples without settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.samples = self.folder / "samples.jsonl"
        self.result = self.folder / "result.json"
        known = self.folder / "settings.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if known.exists():
            check_same(read_json(known), settings, self.folder)
        elif self.samples.exists() or self.result.exists():
            raise ValueError(f"{self.folder} has results but no settings.json: choose another `output_dir`.")
        else:
            write_json(known, settings)

    def finished(self) -> EvaluationResult | None:
        """The result, where there is one."""
        return EvaluationResult.from_json(self.result) if self.result.exists() else None

    def resume(self, batch_size: int, places: Sequence[tuple[str, int]]) -> list[Sample]:
        """The samples of whole batches; what follows them in the file is cut off, to be done again.

        Args:
            batch_size: samples a batch.
            places: question id and sample id of every sample of the run, in order.

        Raises:
            ValueError: a line that is no sample, or not the one of its place, by its number.
        """
        if not self.samples.exists():
            return []
        lines = self.samples.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if len(lines) != len(places):
            del lines[len(lines) - len(lines) % batch_size :]
        samples = [read_sample(line, f"{self.samples}, line {number}") for number, line in enumerate(lines, 1)]
        for number, sample in enumerate(samples, 1):
            if number > len(places) or (sample.question_id, sample.sample_id) != places[number - 1]:
                raise ValueError(f"{self.samples}, line {number}: not the sample of this place.")
        with self.samples.open("r+b") as stream:
            stream.truncate(sum(map(len, lines)))
        return samples

    def append(self, samples: Sequence[Sample]) -> None:
        """Write a batch of samples, one line each."""
        # a lone surrogate in a completion is kept, as json.loads reads it
        with self.samples.open("a", encoding="utf-8", errors="surrogatepass") as stream:
            stream.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)


def read_sample(line: bytes, place: str) -> Sample:
    """A line of `samples.jsonl`; `place` names it in the error."""
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}).") from None
    return Sample(**checked(place, content, Sample))


def check_same(known: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Raise a `ValueError` where a folder's settings are others than a run's."""
    known, missing = dict(known), object()
    for name in sorted(known.keys() | settings.keys()):
        before, now = known.get(name, missing), settings.get(name, missing)
        if before != now:
            shown = ["unset" if value is missing else repr(value) for value in (before, now)]
            raise ValueError(
                f"{folder} holds an evaluation with another `{name}`: {shown[0]} there, {shown[1]} now. Choose another "
                "`output_dir`, or go on with the settings in its settings.json."
            )
