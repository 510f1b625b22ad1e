"""The picture of how a model passes through the folders of `camera_serve`.

    python -m bench.data_flow

Writes `docs/data-flow.svg`. What a folder takes and gives is what its `__init__.py` says.
"""

import ast
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from bench.reference import ROOT
from bench.stored import DOCS

PICTURE = DOCS / "data-flow.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 214, 104, 66, 62, 16
CHARACTERS = 31

PLACES = {
    "calibration": (0, 0),
    "ranking": (1, 0),
    "compression": (2, 0),
    "checkpoint": (2, 1),
    "vllm_plugin": (1, 1),
    "kernels": (0, 1),
    "hf": (3, 0),
    "evaluation": (3, 1),
    "models": (0, 2),
    "ragged": (1, 2),
    "converters": (2, 2),
    "benchmark": (3, 2),
}
"""Column and row of each folder; the data goes along the first row, then back along the second."""

FLOWS = (
    ("calibration", "ranking", "tokens"),
    ("ranking", "compression", "selection"),
    ("compression", "checkpoint", "tensors"),
    ("checkpoint", "vllm_plugin", "OUT"),
    ("vllm_plugin", "kernels", "layers"),
    ("checkpoint", "hf", ""),
    ("checkpoint", "evaluation", "OUT"),
    ("checkpoint", "converters", ""),
)
"""From, to, and what passes."""


@dataclass(frozen=True)
class Box:
    """Where a folder stands, in pixels of its left upper corner."""

    x: int
    y: int

    @classmethod
    def of(cls, folder: str) -> "Box":
        """The box of a folder in `PLACES`."""
        column, row = PLACES[folder]
        return cls(MARGIN + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y))


def draw() -> str:
    """The picture as SVG."""
    columns, rows = (1 + max(place[axis] for place in PLACES.values()) for axis in (0, 1))
    width = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP_X
    height = 2 * MARGIN + rows * HEIGHT + (rows - 1) * GAP_Y
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#456"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *(line for folder in PLACES for line in _box(folder)),
        *(line for flow in FLOWS for line in _arrow(*flow)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def sentence(folder: str) -> str:
    """What a folder takes and gives: the first sentence of its package."""
    home = ROOT if folder == "converters" else ROOT / "camera_serve"
    text = ast.get_docstring(ast.parse((home / folder / "__init__.py").read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("`", "")


def _box(folder: str) -> Iterator[str]:
    box = Box.of(folder)
    yield (
        f'<rect x="{box.x}" y="{box.y}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
        'fill="#eef3f8" stroke="#456"/>'
    )
    yield f'<text x="{box.x + 10}" y="{box.y + 20}" font-weight="bold">{folder}/</text>'
    for number, line in enumerate(textwrap.wrap(sentence(folder), CHARACTERS)):
        y = box.y + 39 + 15 * number
        yield f'<text x="{box.x + 10}" y="{y}" fill="#234">{escape(line)}</text>'


def _arrow(start: str, end: str, label: str) -> Iterator[str]:
    """A line between the facing sides of two boxes; beside it what passes."""
    (x1, y1), (x2, y2) = _sides(Box.of(start), Box.of(end))
    yield (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#456" stroke-width="1.5" '
        'marker-end="url(#tip)"/>'
    )
    if label:
        level = y1 == y2
        x, y = (x1 + x2) // 2 + (0 if level else 8), (y1 + y2) // 2 - (7 if level else -4)
        anchor = "middle" if level else "start"
        yield f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-style="italic">{label}</text>'


def _sides(start: Box, end: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    if start.y == end.y:
        middle = start.y + HEIGHT // 2
        right = end.x > start.x
        return (start.x + WIDTH * right, middle), (end.x + WIDTH * (not right), middle)
    if start.x == end.x:
        middle = start.x + WIDTH // 2
        below = end.y > start.y
        return (middle, start.y + HEIGHT * below), (middle, end.y + HEIGHT * (not below))
    right, below = end.x > start.x, end.y > start.y
    return (start.x + WIDTH * right, start.y + HEIGHT * below), (
        end.x + WIDTH * (not right),
        end.y + HEIGHT * (not below),
    )


def main(picture: Path = PICTURE) -> int:
    """Write the picture."""
    picture.write_text(draw())
    return 0


if __name__ == "__main__":
    sys.exit(main())
