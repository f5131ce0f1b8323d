"""Inline SVG for the report: the threshold curve, small lines, bars. Colours come from the page's style sheet."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 92, 14, 40
_NUM_SERIES_COLOURS = 6


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart; None in values leaves a gap. marked: index of the value that gets a dot."""

    label: str
    places: Sequence[float]
    values: Sequence[float | None]
    marked: int | None = None


def curve_chart(
    curves: Sequence[Curve],
    *,
    across: str,
    up: str,
    rule: float | None = None,
    ticks: Mapping[float, str] | None = None,
    low: float = 0.0,
    of: str = "round",
) -> str:
    """Lines over 0..1 with labels at their ends. across, up: titles of the axes. rule: place of a vertical line.

    ticks: place -> text along the bottom. low: value at the bottom, a multiple of 0.1. of: what each line is of.
    """
    known = [value for curve in curves for value in curve.values if value is not None]
    if not known:
        return ""
    top = max(min(1.0, math.ceil((max(known) + 0.02) * 10) / 10), low + 0.1)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(up)} by '
        f'{html.escape(across)}, one line a {of}">'
    ]
    span = (low, top)
    digits = 2 if top - low <= 0.2 else 1
    spacing = 0.1 if 0.2 < top - low <= 0.6 else 0.05 if top - low <= 0.2 else 0.2
    for level in (low + step * spacing for step in range(int((top - low) / spacing + 1e-9) + 1)):
        y = _y(level, span)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{level:.{digits}f}</text>')
    for place, text in (ticks or {step / 5: f"{step / 5:.1f}" for step in range(6)}).items():
        x, y = _x(place), _HEIGHT - _BOTTOM + 18
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{html.escape(text)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(across)}</text>')
    if rule is not None:
        x = _x(rule)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x + 4:.1f}" y="{_TOP + 9}">{rule:g}</text>')
    parts += [_line(curve, index, span) for index, curve in enumerate(curves)]
    parts += _legend(curves)
    return "".join([*parts, "</svg>"])


def sparkline(values: Sequence[float | None], label: str) -> str:
    """A small line of values against their order, from the lowest to the highest."""
    known = [(index, value) for index, value in enumerate(values) if value is not None and math.isfinite(value)]
    if len(known) < 2:
        return ""
    width, height, edge = 140, 32, 3
    low, high = min(value for _, value in known), max(value for _, value in known)
    span = (high - low) or 1.0
    across, up = (width - 2 * edge) / (len(values) - 1), (height - 2 * edge) / span
    points = [f"{edge + index * across:.1f},{height - edge - (value - low) * up:.1f}" for index, value in known]
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
        f'<polyline class="s0" points="{" ".join(points)}"/></svg>'
    )


def stacked_bar(counts: Sequence[int], label: str) -> str:
    """Shares of a whole as one bar, a segment a count."""
    total = sum(counts)
    if not total:
        return ""
    width, height, x = 220.0, 14, 0.0
    parts = [f'<svg class="stack" viewBox="0 0 {width:g} {height}" role="img" aria-label="{html.escape(label)}">']
    for index, count in enumerate(counts):
        part = width * count / total
        title = f"<title>sub-category {index}: {count}</title>"
        parts.append(
            f'<rect class="k{index % 2}" x="{x:.2f}" y="0" width="{part:.2f}" height="{height}">{title}</rect>'
        )
        x += part
    return "".join([*parts, "</svg>"])


def _x(place: float) -> float:
    return _LEFT + place * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, span: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - (value - span[0]) / (span[1] - span[0]) * (_HEIGHT - _TOP - _BOTTOM)


def _line(curve: Curve, index: int, span: tuple[float, float]) -> str:
    points = [
        f"{_x(place):.1f},{_y(value, span):.1f}"
        for place, value in zip(curve.places, curve.values, strict=True)
        if value is not None
    ]
    colour = f"s{index % _NUM_SERIES_COLOURS}"
    text = f'<polyline class="{colour}" points="{" ".join(points)}"/>'
    if curve.marked is not None and (value := curve.values[curve.marked]) is not None:
        place = curve.places[curve.marked]
        title = f"<title>{html.escape(curve.label)}: {value:.3f} at {place:.2f}</title>"
        text += f'<circle class="{colour}" cx="{_x(place):.1f}" cy="{_y(value, span):.1f}" r="4.5">{title}</circle>'
    return text


def _legend(curves: Sequence[Curve]) -> list[str]:
    """Names at the right, in order: lines of later rounds often lie on each other, so end labels would too."""
    parts = []
    for index, curve in enumerate(curves):
        y = _TOP + 10 + index * 18
        left = _WIDTH - _RIGHT + 12
        colour = f"s{index % _NUM_SERIES_COLOURS}"
        parts.append(f'<line class="{colour}" x1="{left}" x2="{left + 16}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<text class="tick" x="{left + 22}" y="{y}">{html.escape(curve.label)}</text>')
    return parts
