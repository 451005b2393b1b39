"""One rollout with the gate's decision on each token, shown in a notebook, a browser and a terminal.

Text of a model or a dataset is shown, never run: the page sets it as text, and what acts unseen has a name (`visible`).
"""

from __future__ import annotations

import heapq
import json
import math
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from html import escape
from importlib.resources import files
from io import StringIO
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ..method.gate import (
    GateDecision,
    GateSettings,
    decide,
    gate_metrics,
    gate_totals,
    is_divergence,
    verdict_sign,
)
from ..method.loss import SignGatedLoss
from ..method.rules import CONFLICT, CONSENSUS, NEUTRAL
from .texts import token_texts, visible

SAMPLES_FILE = "gate_samples.jsonl"
LEVELS = (0.1, 0.5, 1.0, 2.0)  # nats of abs(delta) from which a colour is one step stronger
MARK_FROM = LEVELS[0]  # nats of abs(delta) from which a token is marked
LARGEST = 3  # tokens that are listed by their abs(delta)
VERDICTS = {1.0: "correct", 0.0: "incorrect", None: "abstained"}
CASES = {
    CONSENSUS: ("consensus", "the teacher moves the token the way the outcome wants"),
    CONFLICT: ("conflict", "the teacher moves the token against the outcome"),
    NEUTRAL: ("neutral", "no side: the outcome has sign 0, or abs(delta) is within the dead zone"),
}
MARKS = {CONSENSUS: "+", CONFLICT: "-", NEUTRAL: "0", None: "."}  # of the cases, for the page's script


@dataclass(frozen=True, repr=False)
class RolloutView:
    """One rollout as the gate saw it; made by `inspect_rollout`. All tuples have one entry a token.

    ```python
    from sg_opd import inspect_rollout
    view = inspect_rollout(["2 + 2", " =", " 5"], [-0.1, -0.2, -0.9], [-0.3, -0.1, -4.0], verdict=0.0, gold="4")
    view.save("rollout.html")  # in a notebook, `view` alone shows it; in a terminal, `view.print()`
    ```
    """

    tokens: tuple[str, ...]  #: texts; empty where a token is only a part of a character, which a later one completes
    token_ids: tuple[int, ...] | None
    student_logps: tuple[float, ...]  #: log pi_S in nats, before the first update on the rollout; all logps are float32
    teacher_logps: tuple[float, ...]  #: log pi_T in nats
    reference_logps: tuple[float, ...] | None  #: log pi_R in nats; `None` is the current policy
    #: Which tokens are trained on; `None` is all. A run may keep 0 as the others' logps.
    trained: tuple[bool, ...] | None
    verdict: float | None  #: 1.0 correct, 0.0 incorrect, `None` abstained
    settings: GateSettings  #: of the gate that decided
    prompt: str | None = None
    gold: str | None = None  #: the reference answer
    source: str = "student"  #: who wrote it: "student" or "teacher"
    step: int | None = None  #: the optimizer step it was trained in
    sign: float | None = None  #: of the outcome, +1, -1 or 0; `None` is the verdict's
    group_advantage: float = 0.0  #: GRPO's, which `advantage_weight` scales

    @cached_property
    def decision(self) -> GateDecision:
        """Of `sg_opd.method.gate.decide`, each field (1, T)."""
        label = math.nan if self.verdict is None else self.verdict
        sign = verdict_sign(torch.tensor([label])) if self.sign is None else torch.tensor([self.sign])
        student, teacher = (torch.tensor([logps]) for logps in (self.student_logps, self.teacher_logps))
        reference = None if self.reference_logps is None else torch.tensor([self.reference_logps])
        return decide(student, teacher, sign, self.mask, self.settings, reference, torch.tensor([self.group_advantage]))

    @cached_property
    def mask(self) -> Tensor:
        """(1, T), the trained tokens."""
        return torch.tensor([[True] * len(self.tokens) if self.trained is None else self.trained], dtype=torch.bool)

    @cached_property
    def summary(self) -> dict[str, float]:
        """Over the trained tokens: `gate/` shares in [0, 1], the mean factor, and quantiles of delta."""
        metrics = gate_metrics(gate_totals(self.decision, self.mask), self.decision.delta[self.mask])
        return {name: value.item() for name, value in metrics.items()}

    @cached_property
    def cases(self) -> list[int | None]:
        """Each token's case; `None` where it is not trained."""
        case, mask = self.decision.case[0].tolist(), self.mask[0].tolist()
        return [one if trained else None for one, trained in zip(case, mask, strict=True)]

    @cached_property
    def levels(self) -> list[int]:
        """Each token's strength, 0 to 4, by `LEVELS`."""
        return [sum(abs(delta) >= level for level in LEVELS) for delta in self.decision.delta[0].tolist()]

    @cached_property
    def largest(self) -> list[int]:
        """The places of the trained tokens with the largest abs(delta) above 0, at most `LARGEST`, largest first."""
        sizes = self.decision.delta[0].abs().tolist()
        differing = (place for place, case in enumerate(self.cases) if case is not None and sizes[place] > 0)
        return heapq.nlargest(LARGEST, differing, key=sizes.__getitem__)

    def faint(self, mark_from: float = MARK_FROM) -> int:
        """How many consensus and conflict tokens have an abs(delta) below `mark_from` nats."""
        of_case = zip(self.cases, self.decision.delta[0].tolist(), strict=True)
        return sum(case in (CONSENSUS, CONFLICT) and abs(delta) < mark_from for case, delta in of_case)

    def html(self) -> str:
        """A page of its own, which sends no request."""
        return render_page([self])

    def save(self, path: str | Path) -> None:
        """Write the page."""
        Path(path).write_text(self.html(), encoding="utf-8")

    def print(self, mark_from: float = MARK_FROM, **options: Any) -> None:
        """Print it to the terminal, or as the options of `rich.console.Console` say.

        Args:
            mark_from: nats of abs(delta), >= 0, from which a consensus or conflict token is marked; 0 marks all.

        Raises:
            ValueError: `mark_from` out of its range.
        """
        from rich.console import Console

        from .terminal import TerminalView

        Console(**options).print(TerminalView(self, mark_from))

    def plain(self, width: int = 100, mark_from: float = MARK_FROM) -> str:
        """Text without colours, where marked conflict tokens stand in brackets; `mark_from` as for `print`."""
        file = StringIO()
        self.print(mark_from, file=file, color_system=None, width=width, force_jupyter=False)
        return file.getvalue()

    def to_json(self) -> str:
        """One line of a `gate_samples.jsonl`; `from_json` reads it back."""
        fields = {name: _json(value) if name.endswith("logps") else value for name, value in asdict(self).items()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str | bytes) -> RolloutView:
        """What `to_json` wrote."""
        fields = json.loads(line)
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = tuple(map(float, value) if name.endswith("logps") else value)
        fields["settings"] = GateSettings(**fields["settings"])
        fields["step"] = None if fields["step"] is None else int(fields["step"])
        return cls(**fields)

    def __repr__(self) -> str:
        return f"<RolloutView: {self.headline()}>"

    def _repr_html_(self) -> str:
        # a frame of its own keeps the notebook's styles out and the page's scripts in
        page, height = escape(self.html()), min(720, 420 + len(self.tokens) // 3)
        style = f"width:100%;height:{height}px;border:0"
        return f'<iframe sandbox="allow-scripts" title="Gate view" style="{style}" srcdoc="{page}"></iframe>'

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from .terminal import TerminalView

        yield TerminalView(self)

    def headline(self) -> str:
        """Step, source, verdict, reference answer and the mean factor in one line."""
        step = "" if self.step is None else f"step {self.step}"
        gold = "" if self.gold is None else f"reference answer {visible(self.gold)}"
        size = f"{len(self.tokens)} tokens, mean factor {self.summary['gate/factor']:.2f}"
        by_group = self.settings.signal == "group" and self.sign is not None
        outcome = VERDICTS[self.verdict] + (f", sign {self.sign:g} in its group" if by_group else "")
        return " · ".join(filter(None, (step, f"{self.source}'s rollout", outcome, gold, size)))

    def page_data(self) -> dict[str, Any]:
        """What the page's script shows, as JSON values."""
        numbers = {name: getattr(self.decision, name)[0].tolist() for name in ("delta", "factor", "advantage")}
        numbers |= {whose: getattr(self, f"{whose}_logps") for whose in ("student", "teacher", "reference")}
        if is_divergence(self.settings.estimator):  # which scales the position's divergence by the factor alone
            del numbers["advantage"]
        return {
            "verdict": VERDICTS[self.verdict],
            "sign": self.sign,
            "source": self.source,
            "prompt": None if self.prompt is None else visible(self.prompt, newline="\n"),
            "gold": None if self.gold is None else visible(self.gold),
            "settings": asdict(self.settings),
            "summary": {name: _json(value, 4) for name, value in self.summary.items()},
            "tokens": [visible(token) for token in self.tokens],
            "ids": self.token_ids,
            "cases": "".join(MARKS[case] for case in self.cases),
            "levels": "".join(map(str, self.levels)),
            "largest": self.largest,
            "faint": {"count": self.faint(), "below": MARK_FROM},
            **{name: _json(values, 4) for name, values in numbers.items()},
        }


def inspect_rollout(
    tokens: Sequence[str] | Sequence[int] | Tensor,
    student_logps: Sequence[float] | Tensor,
    teacher_logps: Sequence[float] | Tensor,
    verdict: float | None,
    gate: SignGatedLoss | None = None,
    *,
    tokenizer: Any = None,
    reference_logps: Sequence[float] | Tensor | None = None,
    trained: Sequence[bool] | Tensor | None = None,
    prompt: str | Sequence[dict[str, Any]] | None = None,
    gold: str | None = None,
    source: str = "student",
    step: int | None = None,
    sign: float | None = None,
    group_advantage: float = 0.0,
) -> RolloutView:
    """One rollout with the gate's decision on each token, to be looked at in a notebook, a browser or a terminal.

    Args:
        tokens: the completion's token ids, with a `tokenizer`, or their texts.
        student_logps: log pi_S of each token in nats, (T,).
        teacher_logps: log pi_T of each token in nats, (T,).
        verdict: 1.0 correct, 0.0 incorrect, `None` abstained.
        gate: whose settings decide, such as `trainer.sign_gated_loss`; default: `SignGatedLoss()`.
        tokenizer: turns ids into texts.
        reference_logps: log pi_R of each token, (T,); `None` is the current policy.
        trained: which tokens are trained on, (T,); `None` is all.
        prompt: text or messages, to be shown.
        gold: the reference answer, to be shown.
        source: "student" or "teacher".
        step: the optimizer step, to be shown.
        sign: of the outcome, +1, -1 or 0; `None` is the verdict's, which is the group's too where a group is mixed.
        group_advantage: GRPO's advantage of the rollout, for gates with `advantage_weight`.

    Raises:
        ValueError: an argument that does not fit the tokens, or is out of its range, by name.
    """
    listed: list[Any] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    ids = None if all(isinstance(token, str) for token in listed) else tuple(int(token) for token in listed)
    if ids is not None and tokenizer is None:
        raise ValueError("`tokens` are ids: give the `tokenizer` that turns them into text, or give their texts.")
    logps = {"student_logps": student_logps, "teacher_logps": teacher_logps, "reference_logps": reference_logps}
    _check(verdict, source, sign, len(listed), {**logps, "trained": trained})
    if not (prompt is None or isinstance(prompt, str)):  # each message's content, or the calls of tools instead
        prompt = "\n\n".join(f"{m['role']}: {m.get('content') or m.get('tool_calls', '')}" for m in prompt)
    return RolloutView(
        tokens=tuple(listed if ids is None else token_texts(tokenizer, ids)),
        token_ids=ids,
        **{name: None if values is None else _float32(values) for name, values in logps.items()},  # type: ignore[arg-type]
        trained=None if trained is None else tuple(torch.as_tensor(trained).bool().tolist()),
        verdict=None if verdict is None else float(verdict),
        settings=GateSettings() if gate is None else gate.settings,
        prompt=prompt,
        gold=None if gold is None else str(gold),
        source=source,
        step=None if step is None else int(step),
        sign=None if sign is None else float(sign),
        group_advantage=float(group_advantage),
    )


def _check(verdict: Any, source: Any, sign: Any, length: int, by_token: dict[str, Any]) -> None:
    """Refuse, by name, what is out of its range or has not one entry a token."""
    if verdict not in VERDICTS:
        raise ValueError(f"`verdict` must be 1.0 (correct), 0.0 (incorrect) or None (abstained), got {verdict!r}.")
    for name, value, allowed in (("source", source, ("student", "teacher")), ("sign", sign, (1, -1, 0, None))):
        if value not in allowed:
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))}, got {value!r}.")
    for name, values in by_token.items():
        if values is not None and (getattr(values, "ndim", 1) != 1 or len(values) != length):
            raise ValueError(f"`{name}` must have one entry for each of the {length} `tokens`.")


def _float32(values: Sequence[float] | Tensor) -> tuple[float, ...]:
    """As the shortest numbers that are the same in float32, which JSON keeps."""
    return tuple(float(str(value)) for value in torch.as_tensor(values).detach().float().cpu().numpy())


def _json(value: Any, digits: int | None = None) -> Any:
    """A number or several, rounded where `digits` are given; JSON has no infinity and NaN, so these are texts."""
    if isinstance(value, float | int):
        return (value if digits is None else round(value, digits)) if math.isfinite(value) else str(value)
    return None if value is None else [_json(number, digits) for number in value]


def load_gate_samples(path: str | Path) -> list[RolloutView]:
    """The rollouts that a run with `log_gate_samples` kept, in order.

    Args:
        path: its `gate_samples.jsonl`, or the folder that holds it.
    """
    return list(read_gate_samples(Path(path)))


def read_gate_samples(path: Path) -> Iterator[RolloutView]:
    """Those of `load_gate_samples` one by one; a last line without an end, which a kill cut off, is left out."""
    with (path / SAMPLES_FILE if path.is_dir() else path).open("rb") as lines:
        yield from (RolloutView.from_json(line) for line in lines if line.endswith(b"\n"))


def render_page(views: Iterable[RolloutView], title: str = "Gate view") -> str:
    """One self-contained HTML page of rollouts, with a selector where they are of several steps."""
    return page_of_blocks((page_block(list(some)) for _, some in groupby(views, lambda view: view.step)), title)


def page_block(views: Sequence[RolloutView]) -> str:
    """The part of a page that holds the rollouts of one step."""
    data = json.dumps([view.page_data() for view in views], separators=(",", ":"))
    data = data.translate({ord(char): f"\\u{ord(char):04x}" for char in "<>&"})  # no end of the element, no comment
    step = "" if views[0].step is None else escape(str(views[0].step))
    return f'<script type="application/json" class="rollouts" data-step="{step}">{data}</script>'


def page_of_blocks(blocks: Iterable[str], title: str = "Gate view") -> str:
    """A page of `page_block`s. Its policy lets it run its own script and nothing else, and send no request."""
    parts = {kind: (files(__package__) / f"gate_view.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    hashes = {f"{kind}_hash": b64encode(sha256(parts[kind].encode()).digest()).decode() for kind in ("css", "js")}
    return Template(parts["html"]).substitute(parts, blocks="\n".join(blocks), title=escape(visible(title)), **hashes)
