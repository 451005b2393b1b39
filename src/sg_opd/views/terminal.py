"""A rollout with the gate's decision on each token, as `rich` prints it to a terminal or as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from ..method.rules import CONFLICT, CONSENSUS, NEUTRAL
from .gate_view import CASES, MARK_FROM, RolloutView
from .texts import visible

# styles by strength; the backgrounds are light, as a terminal's own colours are not known
STYLES = {
    CONSENSUS: [f"#101418 on {tint} underline" for tint in ("#e8f1f8", "#cfe2f1", "#afd0e8", "#8abadd", "#65a5d2")],
    CONFLICT: [f"bold italic #101418 on {tint}" for tint in ("#fcefe4", "#f9dcc4", "#f5c49c", "#f0aa70", "#ea9045")],
    NEUTRAL: [""] * 5,
    None: ["dim"] * 5,
}
SIGNS = "①②③"  # of the largest deltas, before their tokens and in the list of them


@dataclass(frozen=True)
class TerminalView:
    """A rollout to be printed, with consensus and conflict tokens marked from `mark_from` nats of abs(delta) on."""

    view: RolloutView
    mark_from: float = MARK_FROM

    def __post_init__(self) -> None:
        if not (isinstance(self.mark_from, int | float) and self.mark_from >= 0):
            raise ValueError(f"`mark_from` must be a number of nats, >= 0 (0 marks all); got {self.mark_from!r}.")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        view, bare = self.view, console.color_system is None
        yield Text(view.headline(), style="bold")
        if view.largest:
            yield Text(self.largest())
        if view.prompt is not None:
            yield Text(visible(view.prompt, newline="\n"), style="dim")
        yield Text()
        yield Text.assemble(*self.tokens(bare))
        yield Text()
        for case, (name, meaning) in CASES.items():
            share = view.summary[f"gate/{name}"]
            yield Text.assemble(f"{share:6.1%} ", styled(name, case, 3, bare), f"  {meaning}")
        if faint := view.faint(self.mark_from):
            which = f"of these {len(view.tokens)} tokens differ by less than {self.mark_from:g} nats"
            yield Text(f"{faint} {which}, and are not marked")

    def tokens(self, bare: bool) -> Iterator[tuple[str, str]]:
        """Each token's text with its style, and signs before the largest; `bare` where there are no colours."""
        view = self.view
        signs = dict(zip(view.largest, SIGNS, strict=False))
        deltas = view.decision.delta[0].tolist()
        for place, (token, case, level) in enumerate(zip(view.tokens, view.cases, view.levels, strict=True)):
            if place in signs:
                yield signs[place], "bold"
            marked = case is None or abs(deltas[place]) >= self.mark_from
            yield styled(visible(token) or "⋯", case if marked else NEUTRAL, level, bare)

    def largest(self) -> str:
        """The tokens with the largest abs(delta) in one line, each with its delta in nats, its case and its number."""
        view, delta = self.view, self.view.decision.delta[0].tolist()
        shown = (
            f"{sign} “{visible(view.tokens[place], newline='↵') or '⋯'}” {delta[place]:+.3g} "
            f"{CASES[view.cases[place] or NEUTRAL][0]}, token {place + 1}"
            for sign, place in zip(SIGNS, view.largest, strict=False)
        )
        return "largest delta: " + " · ".join(shown)


def styled(text: str, case: int | None, level: int, bare: bool) -> tuple[str, str]:
    """The text with the style of its case; without colours a conflict stands in brackets."""
    if case == CONFLICT and bare:
        stripped = text.rstrip("\n")
        text = f"⟦{stripped}⟧{text[len(stripped) :]}"
    return text, STYLES[case][level]
