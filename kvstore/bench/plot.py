"""Small line plots as SVG, for benches: panels side by side, one horizontal axis on a log scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, MARGIN = 340, 260, 52
COLOURS = ("#1f6fb4", "#d1642a", "#3d8f4f", "#8a4fa3")


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over one set of x values: name -> y values, None where there is none."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[float | None]]


def svg(title: str, xs: Sequence[float], x_name: str, panels: Sequence[Panel]) -> str:
    """The plot as a document. At least one x, all greater than 0."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT + 30}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="18" font-size="14">{escape(title)}</text>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({index * WIDTH},30)">')
        parts += _panel(panel, xs, x_name)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, xs: Sequence[float], x_name: str) -> list[str]:
    left, right, top, bottom = MARGIN, WIDTH - 12, 24, HEIGHT - 36
    highest = max((y for line in panel.lines.values() for y in line if y is not None), default=0.0)
    ceiling = _round_up(highest)
    low, high = math.log(min(xs)), math.log(max(xs))

    def x_at(x: float) -> float:
        return (left + right) / 2 if high == low else left + (math.log(x) - low) / (high - low) * (right - left)

    def y_at(y: float) -> float:
        return bottom - y / ceiling * (bottom - top)

    parts = [f'<text x="{left}" y="14">{escape(panel.title)} ({escape(panel.unit)})</text>']
    for step in range(5):
        value = ceiling * step / 4
        parts.append(f'<path d="M{left} {y_at(value):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4}" y="{y_at(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for x in xs:
        parts.append(f'<text x="{x_at(x):.1f}" y="{bottom + 14}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 30}" text-anchor="middle">{escape(x_name)}</text>')
    for number, (name, ys) in enumerate(panel.lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(x_at(x), y_at(y)) for x, y in zip(xs, ys, strict=True) if y is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{left + 8}" y="{top + 12 + 14 * number}" fill="{colour}">{escape(name)}</text>')
    return parts


def _round_up(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    base = 10.0 ** math.floor(math.log10(value))
    return next(base * step for step in (1, 2, 2.5, 5, 10) if base * step >= value)
