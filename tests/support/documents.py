"""The Markdown documents of the repository, read with markdown-it as CommonMark: fenced blocks and headings."""

import ast
import inspect
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
TARGET = {"link_open": "href", "image": "src"}
COMMENT = re.compile(r"<!--\s*(needs|covered by):\s*(.*?)\s*-->\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of code, `marks` what a comment right above it says."""

    language: str
    code: str
    line: int
    marks: dict[str, str]

    @property
    def needs(self) -> set[str]:
        return set(re.split(r",\s*", self.marks["needs"])) if "needs" in self.marks else set()


def documents() -> list[Path]:
    patterns = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def path_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    found, tokens = [], MarkdownIt().parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence":
            continue
        comment = before is not None and before.type == "html_block" and COMMENT.fullmatch(before.content)
        language = (token.info.split() or [""])[0]
        found.append(Block(language, token.content, token.map[0] + 2, dict([comment.groups()] if comment else [])))
    return found


def anchors(text: str) -> set[str]:
    """What `#...` may name in a document, as GitHub makes it of headings."""
    tokens, seen, slugs = MarkdownIt().parse(text), Counter(), set()
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open":
            title = "".join(part.content for part in inline.children)
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            slugs.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return slugs


def links(text: str) -> list[str]:
    """Targets of links and images, tables' included; not those in code."""
    parts = [part for token in MarkdownIt().enable("table").parse(text) for part in token.children or []]
    return [part.attrs[TARGET[part.type]] for part in parts if part.type in TARGET]


def docstring_blocks() -> dict[str, list[Block]]:
    """By qualified name, the fenced blocks of the docstrings of everything public in the package."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
                qualified = f"{prefix}.{child.name}"
                if some := blocks(inspect.cleandoc(ast.get_docstring(child) or "")):
                    found[qualified] = some
                visit(child, qualified)

    for path in sorted((ROOT / "src" / "sg_opd").rglob("*.py")):
        visit(ast.parse(path.read_text()), ".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    return found
