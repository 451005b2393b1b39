"""Draws the rooms of the package and the imports between them: `python docs/rooms.py` writes docs/rooms.svg.

A room is a folder or a module of src/sg_opd. An arrow goes from a room to one that it imports from; one that a longer
way implies is left out.
"""

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path
from textwrap import wrap

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parent / "src" / "sg_opd"
WIDTH, BOX, PITCH, LINE = 1070, (168, 78), 176, 128  # of the picture, a room, from room to room and from row to row
LETTERS = 34  # in a line within a room
# where a room stands in its row, so that few arrows cross and no two stand in one place
COLUMNS = {
    **{"trainer": 3.4, "views": 3.9, "training": 3.0, "config": 1.0, "evaluation": 4.5, "teachers": 4.0, "data": 3.0},
    **{"presets": 0.0, "confidential": 1.0, "checkpoints": 2.0, "paths": 3.0, "method": 4.0, "verifiers": 5.0},
}


def own_imports(path: Path) -> Iterator[str]:
    """The modules of the package that a module imports, from the package's root, such as `method.gate`."""
    folders = path.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folders[: len(folders) + 1 - node.level]
            yield from (
                ".".join([*above, name]) for name in ([node.module] if node.module else [a.name for a in node.names])
            )


def arrows() -> dict[str, set[str]]:
    """By room, the rooms that it imports from."""
    found: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, set()).update(name.split(".")[0] for name in own_imports(path))
    return {room: others - {room} for room, others in found.items()}


def reached(room: str, graph: dict[str, set[str]]) -> set[str]:
    """All rooms that a room imports from, be it by way of others."""
    return set().union(*({other} | reached(other, graph) for other in graph[room])) if graph[room] else set()


def height(room: str, graph: dict[str, set[str]]) -> int:
    """The longest way down from a room."""
    return max((1 + height(other, graph) for other in graph[room]), default=0)


def places(graph: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """The middle of each room; who imports stands above what it imports."""
    rows = {room: height(room, graph) for room in graph}
    left = BOX[0] / 2 + 10 - min(COLUMNS.values()) * PITCH
    return {
        room: (left + COLUMNS.get(room, 1.5) * PITCH, BOX[1] / 2 + 10 + (max(rows.values()) - row) * LINE)
        for room, row in rows.items()
    }


def modules(room: str) -> list[str]:
    """What is in it, in lines."""
    names = sorted(path.stem for path in (SOURCE / room).glob("*.py") if path.name != "__init__.py")
    return wrap("\N{NO-BREAK SPACE}· ".join(names), LETTERS)


def picture() -> str:
    """The drawing, as SVG."""
    graph = arrows()
    middle = places(graph)
    parts = []
    for room, others in graph.items():
        for other in sorted(others - set().union(*(reached(o, graph) for o in others))):
            (x, y), (u, v) = middle[room], middle[other]
            start, end = (x, y + BOX[1] / 2), (u, v - BOX[1] / 2 - 6)
            bend = (end[1] - start[1]) / 2
            curve = (
                f"M{start[0]:g} {start[1]:g}C{x:g} {start[1] + bend:g} {u:g} {end[1] - bend:g} {end[0]:g} {end[1]:g}"
            )
            parts.append(f'<path d="{curve}" fill="none" stroke="#5b6770" stroke-width="1.4" marker-end="url(#tip)"/>')
    for room, (x, y) in middle.items():
        box = f'x="{x - BOX[0] / 2:g}" y="{y - BOX[1] / 2:g}" width="{BOX[0]}" height="{BOX[1]}" rx="6"'
        parts.append(f'<rect {box} fill="#eef3f7" stroke="#33424e"/>')
        name = room if (SOURCE / room).is_dir() else f"{room}.py"
        lines = modules(room)
        top = y + 5 - 7 * len(lines)
        parts.append(f'<text x="{x:g}" y="{top:g}" font-weight="600">{escape(name)}</text>')
        for number, line in enumerate(lines):
            at = f'x="{x:g}" y="{top + 17 + 14 * number:g}"'
            parts.append(f'<text {at} font-size="11" fill="#5b6770">{line}</text>')
    bottom = max(y for _, y in middle.values()) + BOX[1] / 2 + 10
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    tip += '<path d="M0 0 8 4 0 8z" fill="#5b6770"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:g}" role="img" '
    head += 'aria-label="The rooms of the package and what each imports from" font-family="sans-serif" '
    head += 'font-size="15" text-anchor="middle">'
    return "\n".join(
        [head, f"<defs>{tip}</defs>", '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"]
    )


if __name__ == "__main__":
    (FOLDER / "rooms.svg").write_text(picture())
