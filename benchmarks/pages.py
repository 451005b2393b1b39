"""Pages with places for tables that a benchmark fills."""

from __future__ import annotations

import re
from collections.abc import Sequence


def filled(page: str, known: dict[str, str]) -> str:
    """A page with each `<!-- table: name -->` ... `<!-- end -->` filled anew, from tables as Markdown by name."""
    return re.sub(
        r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{known.get(match[2], 'Not run yet.')}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are set to the left, the others are numbers."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))
