"""The gate made visible: one rollout with its tokens by case and strength, as HTML and in a terminal.

Whatever a model or a dataset wrote is shown, never run: the page sets it as text, and characters that would act on a
terminal or on the order of the text (controls, bidirectional marks, lone surrogates) have visible names in their place.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from io import StringIO
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ..method.gate import CONFLICT, CONSENSUS, NEUTRAL, GateDecision, GateSettings, decide, gate_metrics, gate_totals
from ..method.loss import SignGatedLoss

LEVELS = (0.1, 0.5, 1.0, 2.0)  # nats of abs(delta) from which a colour is one step stronger
CASES = {
    CONSENSUS: ("consensus", "the teacher moves the token the way the verdict wants"),
    CONFLICT: ("conflict", "the teacher moves the token against the verdict"),
    NEUTRAL: ("neutral", "no side: the verifier abstained, or abs(delta) is within the dead zone"),
}
VERDICTS = {1.0: "correct", 0.0: "incorrect", None: "abstained"}
SOURCES = ("student", "teacher")
# backgrounds by strength, all of them light: a terminal's own colours are not known
TERMINAL = {
    CONSENSUS: [f"#101418 on {tint} underline" for tint in ("#e8f1f8", "#cfe2f1", "#afd0e8", "#8abadd", "#65a5d2")],
    CONFLICT: [f"bold italic #101418 on {tint}" for tint in ("#fcefe4", "#f9dcc4", "#f5c49c", "#f0aa70", "#ea9045")],
}


@dataclass(frozen=True, repr=False)
class RolloutView:
    """One rollout as the gate saw it; made by `inspect_rollout`. All tuples have one entry a token.

    A notebook shows it as HTML, a `rich` console as coloured text.
    """

    tokens: tuple[str, ...]
    """Texts; empty where a token is only a part of a character, which a later one completes."""
    token_ids: tuple[int, ...] | None
    student_logps: tuple[float, ...]
    """log pi_S in nats, before the first update on the rollout; float32, as all log-probabilities here."""
    teacher_logps: tuple[float, ...]
    """log pi_T in nats."""
    reference_logps: tuple[float, ...] | None
    """log pi_R in nats; `None` is the current policy."""
    trained: tuple[bool, ...] | None
    """Which tokens are trained on, as those of a tool's answer are not; `None` is all. With the full estimator a run
    keeps log-probabilities of 0 for the others."""
    verdict: float | None
    """1.0 correct, 0.0 incorrect, `None` abstained."""
    settings: GateSettings
    """Of the gate that decided."""
    prompt: str | None = None
    gold: str | None = None
    source: str = "student"
    """Who wrote it: "student" or "teacher"."""
    step: int | None = None
    """The optimizer step it was trained in."""

    @cached_property
    def decision(self) -> GateDecision:
        """Of `sg_opd.method.gate.decide`, each field (1, T)."""
        label = math.nan if self.verdict is None else self.verdict
        student, teacher = torch.tensor([self.student_logps]), torch.tensor([self.teacher_logps])
        reference = None if self.reference_logps is None else torch.tensor([self.reference_logps])
        return decide(student, teacher, torch.tensor([label]), self.mask, self.settings, reference)

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
        pairs = zip(self.decision.case[0].tolist(), self.mask[0].tolist(), strict=True)
        return [case if trained else None for case, trained in pairs]

    @cached_property
    def levels(self) -> list[int]:
        """Each token's strength, 0 to 4, by `LEVELS`."""
        return [sum(abs(delta) >= level for level in LEVELS) for delta in self.decision.delta[0].tolist()]

    def html(self) -> str:
        """A page of its own: no request goes out of it."""
        return render_page([self])

    def save(self, path: str | Path) -> None:
        """Write the page."""
        Path(path).write_text(self.html(), encoding="utf-8")

    def print(self) -> None:
        """Print it to the terminal."""
        from rich.console import Console

        Console().print(self)

    def plain(self, width: int = 100) -> str:
        """Text without colours, where conflict tokens stand in brackets."""
        from rich.console import Console

        console = Console(file=StringIO(), color_system=None, width=width, force_jupyter=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def to_json(self) -> str:
        """One line of a `gate_samples.jsonl`; `from_json` reads it back."""
        fields = {name: _as_json(value) if name.endswith("logps") else value for name, value in asdict(self).items()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str | bytes) -> RolloutView:
        """What `to_json` wrote."""
        fields = json.loads(line)
        for name in ("tokens", "token_ids", "trained"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        for name in ("student_logps", "teacher_logps", "reference_logps"):
            fields[name] = None if fields[name] is None else tuple(map(float, fields[name]))
        fields["settings"] = GateSettings(**fields["settings"])
        fields["step"] = None if fields["step"] is None else int(fields["step"])
        return cls(**fields)

    def __repr__(self) -> str:
        return f"<RolloutView: {self.headline()}>"

    def _repr_html_(self) -> str:
        # a frame of its own keeps the notebook's styles out and the page's scripts in
        height = min(720, 420 + len(self.tokens) // 3)
        return (
            f'<iframe sandbox="allow-scripts" title="Gate view" style="width:100%;height:{height}px;border:0" '
            f'srcdoc="{html.escape(self.html())}"></iframe>'
        )

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        marked = console.color_system is None
        yield Text(self.headline(), style="bold")
        if self.prompt is not None:
            yield Text(visible(self.prompt, newline="\n"), style="dim")
        yield Text()
        body = Text()
        for case, level, token in zip(self.cases, self.levels, self.tokens, strict=True):
            shown = visible(token) or "⋯"
            if marked and case == CONFLICT:
                text = shown.rstrip("\n")
                shown = f"⟦{text}⟧{shown[len(text) :]}"
            body.append(shown, style="dim" if case is None else TERMINAL[case][level] if case else "")
        yield body
        yield Text()
        for case, (name, meaning) in CASES.items():
            line = Text(f"{self.summary[f'gate/{name}']:6.1%} ")
            line.append(f"⟦{name}⟧" if marked and case == CONFLICT else name, TERMINAL.get(case, [""] * 5)[3])
            yield line.append(f"  {meaning}")

    def headline(self) -> str:
        """Step, source, verdict, gold and the mean factor in one line."""
        gold = () if self.gold is None else (f"gold {visible(self.gold)}",)
        step = () if self.step is None else (f"step {self.step}",)
        size = f"{len(self.tokens)} tokens, mean factor {self.summary['gate/factor']:.2f}"
        return " · ".join((*step, f"{self.source}'s rollout", VERDICTS[self.verdict], *gold, size))

    def page_data(self) -> dict[str, Any]:
        """What the page's script shows, as JSON values."""
        numbers = {name: getattr(self.decision, name)[0].tolist() for name in ("delta", "factor", "advantage")}
        if self.settings.estimator == "full":  # which scales the position's divergence by the factor alone
            del numbers["advantage"]
        numbers |= {"student": self.student_logps, "teacher": self.teacher_logps}
        if self.reference_logps is not None:
            numbers["reference"] = self.reference_logps
        return {
            "verdict": VERDICTS[self.verdict],
            "source": self.source,
            "prompt": None if self.prompt is None else visible(self.prompt, newline="\n"),
            "gold": None if self.gold is None else visible(self.gold),
            "settings": asdict(self.settings),
            "summary": {name: _rounded(value) for name, value in self.summary.items()},
            "tokens": [visible(token) for token in self.tokens],
            "ids": self.token_ids,
            "cases": "".join({CONSENSUS: "+", CONFLICT: "-", NEUTRAL: "0", None: "."}[case] for case in self.cases),
            "levels": "".join(map(str, self.levels)),
            **{name: [_rounded(value) for value in values] for name, values in numbers.items()},
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
        gold: the expected answer, to be shown.
        source: "student" or "teacher".
        step: the optimizer step, to be shown.

    Raises:
        ValueError: an argument that does not fit the tokens, or is out of its range, by name.

    Example:

    ```python
    from sg_opd import inspect_rollout

    view = inspect_rollout(["2 + 2", " =", " 5"], [-0.1, -0.2, -0.9], [-0.3, -0.1, -4.0], verdict=0.0, gold="4")
    view.save("rollout.html")  # in a notebook, `view` alone shows it; in a terminal, `view.print()`
    ```
    """
    listed: list[Any] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    ids = None if all(isinstance(token, str) for token in listed) else tuple(int(token) for token in listed)
    if ids is not None and tokenizer is None:
        raise ValueError("`tokens` are ids: give the `tokenizer` that turns them into text, or give their texts.")
    given = {"student_logps": student_logps, "teacher_logps": teacher_logps, "reference_logps": reference_logps}
    _check(verdict, source, len(listed), {**given, "trained": trained})
    return RolloutView(
        tokens=tuple(listed if ids is None else token_texts(tokenizer, ids)),
        token_ids=ids,
        **{name: None if values is None else _float32(values) for name, values in given.items()},  # type: ignore[arg-type]
        trained=None if trained is None else tuple(torch.as_tensor(trained).bool().tolist()),
        verdict=None if verdict is None else float(verdict),
        settings=GateSettings() if gate is None else gate.settings,
        prompt=prompt if prompt is None or isinstance(prompt, str) else _conversation(prompt),
        gold=None if gold is None else str(gold),
        source=source,
        step=None if step is None else int(step),
    )


def _check(verdict: Any, source: Any, length: int, by_token: dict[str, Any]) -> None:
    """Refuse, by name, what is out of its range or has not one entry a token."""
    if verdict not in VERDICTS:
        raise ValueError(f"`verdict` must be 1.0 (correct), 0.0 (incorrect) or None (abstained), got {verdict!r}.")
    if source not in SOURCES:
        raise ValueError(f"`source` must be 'student' or 'teacher', got {source!r}.")
    for name, values in by_token.items():
        if values is not None and (getattr(values, "ndim", 1) != 1 or len(values) != length):
            raise ValueError(f"`{name}` must have one entry for each of the {length} `tokens`.")


def load_gate_samples(path: str | Path) -> list[RolloutView]:
    """The rollouts that a run with `log_gate_samples` kept, in order.

    Args:
        path: its `gate_samples.jsonl`, or the folder that holds it.
    """
    path = Path(path)
    return list(read_gate_samples(path / "gate_samples.jsonl" if path.is_dir() else path))


def read_gate_samples(path: Path) -> Iterator[RolloutView]:
    """Those of `load_gate_samples` one by one; a last line without an end, which a kill cut off, is none."""
    with path.open("rb") as lines:
        yield from (RolloutView.from_json(line) for line in lines if line.endswith(b"\n"))


def render_page(views: Iterable[RolloutView], title: str = "Gate view") -> str:
    """One self-contained HTML page of rollouts, with a selector where they are of several steps."""
    return page_of_blocks((page_block(list(some)) for _, some in groupby(views, lambda view: view.step)), title)


def page_block(views: Sequence[RolloutView]) -> str:
    """The part of a page that holds the rollouts of one step."""
    data = json.dumps([view.page_data() for view in views], separators=(",", ":"))
    for character in "<>&":  # nothing in it can end the script element, or begin a comment
        data = data.replace(character, f"\\u{ord(character):04x}")
    step = "" if views[0].step is None else html.escape(str(views[0].step))
    return f'<script type="application/json" class="rollouts" data-step="{step}">{data}</script>'


def page_of_blocks(blocks: Iterable[str], title: str = "Gate view") -> str:
    """A page of `page_block`s. Its policy lets it run its own script and nothing else, and ask nobody for anything."""
    parts = {kind: (files(__package__) / f"gate_view.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    hashes = {
        f"{kind}_hash": base64.b64encode(hashlib.sha256(parts[kind].encode()).digest()).decode()
        for kind in ("css", "js")
    }
    blocks = "\n".join(blocks)
    return Template(parts.pop("html")).substitute(parts, blocks=blocks, title=html.escape(visible(title)), **hashes)


def _conversation(messages: Sequence[dict[str, Any]]) -> str:
    """Each message's content, or the calls of tools that it has instead."""
    said = ((message["role"], message.get("content") or message.get("tool_calls", "")) for message in messages)
    return "\n\n".join(f"{role}: {content}" for role, content in said)


def _float32(values: Sequence[float] | Tensor) -> tuple[float, ...]:
    """As the shortest numbers that are the same in float32, which JSON keeps."""
    return tuple(float(str(value)) for value in torch.as_tensor(values).detach().float().cpu().numpy())


def _as_json(values: Sequence[float] | None) -> list[float | str] | None:
    return None if values is None else [value if math.isfinite(value) else str(value) for value in values]


def _rounded(value: float) -> float | str:
    return round(value, 4) if math.isfinite(value) else str(value)


JOINERS = "\u200c\u200d"  # invisible, but they shape emoji and Persian, and reorder nothing
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token: what it adds to the text before it, in time linear in the number of tokens.

    A token that ends within a character has no text; the one that completes it has the character.
    """
    texts: list[str] = []
    start = read = 0  # a token is decoded together with the ones before it, as some decoders drop a first space

    def decoded(begin: int, end: int) -> str:
        return tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    known = ""
    for end in range(1, len(ids) + 1):
        text = decoded(start, end)
        last = end == len(ids) or end - read == LONGEST_CHARACTER
        if text.endswith("\ufffd") and not last:
            texts.append("")
            continue
        # bytes that are no text may be read anew, so what is known need not be the beginning of it
        pairs = enumerate(zip(known, text, strict=False))
        texts.append(text[next((i for i, (a, b) in pairs if a != b), min(len(known), len(text))) :])
        start, read = read, end
        known = decoded(start, read)
    return texts


def visible(text: str, newline: str = "↵\n") -> str:
    """`text` with a visible name for each character that acts instead of being seen.

    Its code point, such as ⟨U+202E⟩: control characters, bidirectional and other format characters, separators of
    lines, and lone surrogates.
    """

    def shown(match: re.Match[str]) -> str:
        character = match[0]
        if character in "\n\t":
            return newline if character == "\n" else "⇥\t"
        acts = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
        return f"⟨U+{ord(character):04X}⟩" if acts else character

    return re.sub(r"[^ -~]", shown, text)
