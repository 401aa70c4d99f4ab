"""An SVG picture and its colours."""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, FAINT = "#1f2328", "#59636e"
Colour = tuple[str, str]  # of a box and its border
BLUE: Colour = ("#dbeafe", "#1d4ed8")
ORANGE: Colour = ("#ffedd5", "#c2410c")
GREEN: Colour = ("#dcfce7", "#15803d")
PURPLE: Colour = ("#f3e8ff", "#7e22ce")
GREY: Colour = ("#eef0f2", "#59636e")
WHITE: Colour = ("#ffffff", "#59636e")
ARROWS = [INK, FAINT, *(border for _, border in (BLUE, ORANGE, GREEN, PURPLE))]
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Figure:
    """An SVG picture. Coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        heads = "".join(
            f'<marker id="head{i}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>'
            for i, colour in enumerate(ARROWS)
        )
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="{FONT}"><title>{escape(title)}</title><defs>{heads}</defs>',
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: Colour = WHITE,
        *lines: str,
        size: int = 14,
        dashed: bool = False,
    ) -> None:
        """Draw a rectangle with centred text. If there are several lines, the first is bold."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{min(4, height / 4)}" fill="{colour[0]}" '
            f'stroke="{colour[1]}"{dash}/>'
        )
        top = y + height / 2 - (len(lines) - 1) * (size + 4) / 2
        for i, line in enumerate(lines):
            self.text(
                x + width / 2,
                top + i * (size + 4) + size * 0.36,
                line,
                size=size,
                anchor="middle",
                bold=i == 0 and len(lines) > 1,
            )

    def text(
        self, x: float, y: float, line: str, size: int = 14, anchor: str = "start", colour: str = INK, bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(line)}</text>'
        )

    def note(self, x: float, y: float, *lines: str, anchor: str = "start") -> None:
        """Draw lines of smaller text."""
        for i, line in enumerate(lines):
            self.text(x, y + 17 * i, line, size=13, anchor=anchor, colour=FAINT)

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """Draw an arrow through all points, with its head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        head = f"url(#head{ARROWS.index(colour)})"
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="{head}"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str = FAINT, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{colour}"{dash}/>')

    def frame(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Draw a thick border without a fill."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{colour}" stroke-width="2.4"/>'
        )

    def save(self, name: str, folder: Path) -> None:
        (folder / f"{name}.svg").write_text("\n".join([*self.parts, "</svg>", ""]))
