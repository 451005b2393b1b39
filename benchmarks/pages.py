"""Pages with places for tables that a benchmark fills."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def filled(page: str, known: dict[str, str], whole: bool = True) -> str:
    """A page with each `<!-- table: name -->` ... `<!-- end -->` filled anew.

    Args:
        page: as Markdown.
        known: tables by name.
        whole: whether they are all that the page has; else the others, of another benchmark, stay as they are.
    """
    return re.sub(
        r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)",
        lambda m: f"{m[1]}{known.get(m[2], 'Not run yet.')}\n{m[4]}" if whole or m[2] in known else m[0],
        page,
        flags=re.DOTALL,
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are set to the left, the others are numbers."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def with_span(interval: Mapping[str, float], sign: str = "") -> str:
    """A mean with the interval around it; `sign` is "+" for differences."""
    return f"{interval['mean']:{sign}.1f} [{interval['low']:{sign}.1f}, {interval['high']:{sign}.1f}]"
