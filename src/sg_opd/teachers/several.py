"""A run's teachers, one or several: where each is had from, and which rows of a batch are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .http import check_url
from .protocol import TeacherError

INITIAL = "initial"  # as `teacher_model`: the student before training; a folder of that name is "./initial"
KEYS = ("model_name_or_path", "server_url", "revision", "init_kwargs")  # of a teacher in `teacher_models`
ALONE = ("teacher_model_name_or_path", "teacher_server_url", "teacher_model_revision", "teacher_model_init_kwargs")
SEQUENCES = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")


@contextmanager
def named(name: str | None) -> Iterator[None]:
    """What a check or a teacher raises within begins with the teacher's name, unless that is `None`: the only one."""
    try:
        yield
    except (ValueError, TypeError, OSError, TeacherError) as error:
        if name is not None and error.args and isinstance(error.args[0], str):
            error.args = (f"Teacher {name!r}: {error.args[0]}", *error.args[1:])
        raise


@dataclass(frozen=True)
class Source:
    """Where a teacher is had from; `name` is `None` for the only one."""

    model: Any  #: a path, a hub id, a model, a `Teacher`, "initial", or the id that servers serve it under, or `None`
    server_url: Sequence[str] | None = None
    revision: str | None = None
    init_kwargs: Any = None
    name: str | None = None

    @property
    def is_initial(self) -> bool:
        """Whether it is the student before training."""
        return self.server_url is None and isinstance(self.model, str) and self.model == INITIAL

    @property
    def role(self) -> str:
        """As messages call it."""
        return "teacher" if self.name is None else f"teacher {self.name!r}"


def sources_of(given: Any, args: Any) -> list[Source]:
    """The teachers of a run: those `given` to the trainer, else those of its configuration.

    Raises:
        ValueError: a mapping of teachers that is empty, or has a teacher in another form.
    """
    several = args.teacher_models if given is None else given
    if isinstance(several, Mapping):
        if not several:
            raise ValueError("`teacher_models` is empty: it maps the names of teachers to where each is had from.")
        return [_source(name, value) for name, value in several.items()]
    model = args.teacher_model_name_or_path if given is None else given
    return [Source(model, args.teacher_server_url, args.teacher_model_revision, args.teacher_model_init_kwargs)]


def _source(name: Any, value: Any) -> Source:
    if not isinstance(name, str) or not name:
        raise ValueError(f"`teacher_models` must map names to teachers, but {name!r} is no name.")
    if not isinstance(value, Mapping):
        return Source(value, name=name)
    if unknown := [key for key in value if key not in KEYS]:
        raise ValueError(
            f"`teacher_models[{name!r}]` has {', '.join(map(repr, unknown))}; a teacher is a path, or a mapping with "
            f"some of {', '.join(map(repr, KEYS))}."
        )
    urls = value.get("server_url")
    urls = [urls] if isinstance(urls, str) else urls
    return Source(value.get("model_name_or_path"), urls, value.get("revision"), value.get("init_kwargs"), name)


def check_sources(args: Any) -> None:
    """Refuse a configuration's teachers that cannot be had, or not with the rest of its settings.

    Raises:
        ValueError: a setting, by name.
    """
    if args.teacher_models:
        for field in ALONE:
            if getattr(args, field) is not None:
                raise ValueError(
                    f"`{field}` is of a single teacher, but `teacher_models` has several: state it there, in the "
                    "mapping of the teacher it is of."
                )
    for source in sources_of(None, args):
        if source.server_url is not None:
            with named(source.name):
                _check_served(source, args)


def _check_served(source: Source, args: Any) -> None:
    setting = "teacher_server_url" if source.name is None else "server_url"
    for url in source.server_url or [""]:
        check_url(url, setting)
    if args.temperature != 1.0:
        raise ValueError(
            f"`temperature={args.temperature!r}` and `{setting}` do not go together: a server scores at "
            "temperature 1, and student and teacher must be compared at the same one. Set temperature=1.0."
        )
    if args.estimator == "full":
        raise ValueError(
            "estimator='full' needs the teacher's whole distributions, which no server returns: use "
            f"estimator='top_k' or 'sampled' with `{setting}`, or a teacher in this process."
        )
    if args.teacher_offload and source.name is None:
        raise ValueError(
            f"`teacher_offload=True` is for a teacher in this process, but `{setting}` has it elsewhere: "
            "leave it at False."
        )
    for value, name in ((source.revision, "revision"), (source.init_kwargs, "init_kwargs")):
        if value:
            name = name if source.name else f"teacher_model_{name}"
            raise ValueError(f"`{name}` is for loading a teacher, but `{setting}` has it loaded already.")


class Part(NamedTuple):
    """What one teacher is asked about a batch."""

    name: str | None
    teacher: Any
    #: of the batch, ascending; `None` is all of them
    rows: list[int] | None
    #: those rows; a sharded teacher without any gets one that is not its own, another one `None`
    batch: dict[str, Any] | None


class Teachers:
    """A run's teachers by name, and whose each row is.

    Args:
        by_name: the teachers, each a `Teacher`; a single one without a name is by `None`, and all rows are its.
        column: of the dataset, with a teacher's name in each row.
    """

    def __init__(self, by_name: Mapping[str | None, Any], column: str) -> None:
        self.by_name = dict(by_name)
        self.column = column
        self.names = [name for name in self.by_name if name is not None]

    @property
    def only(self) -> Any:
        """The single teacher; `None` where there are several."""
        return self.by_name.get(None)

    @property
    def name(self) -> str:
        """Where they are from, by which a resumed run is compared."""
        return self._named(lambda source: source)

    @property
    def card_name(self) -> str:
        """What a model card calls them: as `name`, but of a folder not where it lies."""
        return self._named(lambda source: Path(source).name if Path(source).is_dir() else source)

    def _named(self, told: Callable[[str], str]) -> str:
        each = ((name, told(teacher.name)) for name, teacher in self.by_name.items())
        return ", ".join(source if name is None else f"{name}: {source}" for name, source in each)

    def of_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
        """The name of each row's teacher; `None` where there is only one.

        Raises:
            ValueError: a row without a teacher's name, which only a stream can have once training began.
        """
        if self.only is not None:
            return None
        given: list[Any] = [row.get(self.column) for row in rows]
        check_names(given, self.names, self.column)
        return given

    def numbers(self, whose: Sequence[str] | None, device: torch.device) -> dict[str, Tensor]:
        """`teacher_number`, (B,): the place of each row's teacher in `names`; nothing where there is only one."""
        if whose is None:
            return {}
        return {"teacher_number": torch.tensor([self.names.index(name) for name in whose], device=device)}

    def parts(self, batch: dict[str, Any]) -> Iterator[Part]:
        """A batch's rows by teacher, all teachers in one order on every rank; only token ids and masks of several."""
        if self.only is not None:
            yield Part(None, self.only, None, batch)
            return
        numbers = batch["teacher_number"].tolist()
        for place, name in enumerate(self.names):
            teacher, rows = self.by_name[name], [row for row, number in enumerate(numbers) if number == place]
            asked = rows or ([0] if teacher.sharded else None)
            taken = None if asked is None else {key: batch[key][asked] for key in SEQUENCES if key in batch}
            yield Part(name, teacher, rows, taken)


def rows_of(name: str | None, whose: Sequence[str] | None, rows: Iterable[int]) -> list[int]:
    """Those of `rows` whose teacher is `name`, by `whose` of all rows; `None` there: all, of a single teacher."""
    return [row for row in rows if whose is None or whose[row] == name]


def check_names(given: Sequence[Any], names: Sequence[str], column: str) -> None:
    """Refuse rows whose teacher is none of `names`, which `given` has for each row, by number.

    Raises:
        ValueError: such a row.
    """
    if wrong := [row for row, name in enumerate(given) if name not in names]:
        shown = "; ".join(f"row {row}: {given[row]!r}" for row in wrong[:3])
        raise ValueError(
            f"{len(wrong)} of {len(given)} rows name no teacher in the column {column!r} (`teacher_column`), first "
            f"{shown}. The teachers are {', '.join(map(repr, names))}."
        )
