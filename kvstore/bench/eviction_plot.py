"""The figure of `bench eviction`: hits over capacity, a panel a trace, as SVG without any library."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 220, 45, 30, 60
COLOURS = {"opt": "#999999", "lru": "#1f77b4", "s3fifo": "#2ca02c", "arc": "#ff7f0e", "default": "#d62728"}


def plot(results: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG document of all results named TRACE/SHARE%/POLICY. Pure."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, result in results.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[1].endswith("%") and result["unit"] == "%":
            panel = curves.setdefault(parts[0], {})
            panel.setdefault(parts[2], []).append((float(parts[1][:-1]), float(result["value"])))
    shares = sorted({share for panel in curves.values() for curve in panel.values() for share, _ in curve})
    width = LEFT + len(curves) * (WIDTH + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{TOP + HEIGHT + 70}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (trace, panel) in enumerate(curves.items()):
        lines += _panel(trace, panel, shares, LEFT + number * (WIDTH + GAP))
    names = list(dict.fromkeys(name for panel in curves.values() for name in panel))
    for number, name in enumerate(names):
        x = LEFT + 90 * number
        colour = COLOURS.get(name, "#000000")
        lines.append(
            f'<line x1="{x}" y1="{TOP + HEIGHT + 52}" x2="{x + 20}" y2="{TOP + HEIGHT + 52}" stroke="{colour}"/>'
        )
        lines.append(f'<text x="{x + 25}" y="{TOP + HEIGHT + 56}">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _panel(trace: str, panel: Mapping[str, list[tuple[float, float]]], shares: list[float], left: float) -> list[str]:
    first, last = shares[0], shares[-1]
    span = log(last / first) if last > first else 1.0
    lines = [f'<text x="{left}" y="{TOP - 10}" font-weight="bold">{trace}</text>']
    for percent in range(0, 101, 20):
        y = TOP + HEIGHT * (1 - percent / 100)
        lines.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    for share in shares:
        x = left + WIDTH * log(share / first) / span
        lines.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{share:g}%</text>')
    middle, below = left + WIDTH / 2, TOP + HEIGHT + 34
    lines.append(f'<text x="{middle}" y="{below}" text-anchor="middle">capacity, of the distinct blocks</text>')
    for name, curve in panel.items():
        points = " ".join(
            f"{left + WIDTH * log(share / first) / span:.1f},{TOP + HEIGHT * (1 - value / 100):.1f}"
            for share, value in sorted(curve)
        )
        colour = COLOURS.get(name, "#000000")
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return lines
