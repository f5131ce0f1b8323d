"""Anti-aliased shapes on a pixel canvas, by signed distances, with arithmetic that gives the same pixels everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Colour = tuple[float, float, float]
INK: Colour = (44, 38, 42)


@dataclasses.dataclass(frozen=True)
class Pen:
    """Draws into canvas (H, W, 3) float64 of 0..255, in coordinates of its own; marks what it covers.

    centre: (x, y) in px of the pen's origin. unit_px: pixels of one unit. turn: (cos, sin), clockwise. mirror: -1 flips
    left and right, else 1. covered: (H, W) bool.
    """

    canvas: np.ndarray
    covered: np.ndarray
    centre: tuple[float, float]
    unit_px: float
    turn: tuple[float, float]
    mirror: float

    @classmethod
    def on(
        cls,
        canvas: np.ndarray,
        centre: tuple[float, float] = (0.0, 0.0),
        unit_px: float = 1.0,
        turn_degrees: float = 0.0,
        mirrored: bool = False,
    ) -> Pen:
        """A pen whose origin is at centre, turned clockwise, then mirrored left to right."""
        # Rounded, so that the last digit of a processor's sine never decides over a pixel.
        angle = math.radians(turn_degrees)
        turn = (round(math.cos(angle), 6), round(math.sin(angle), 6))
        return cls(canvas, np.zeros(canvas.shape[:2], bool), centre, unit_px, turn, -1.0 if mirrored else 1.0)

    def moved(self, x: float, y: float) -> Pen:
        """The same pen with its origin at (x, y) of this one; marks the same pixels as covered."""
        return dataclasses.replace(self, centre=self._to_px(x, y))

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, outline: bool = False, light: float = 0.0
    ) -> None:
        """light: how much brighter the top is than the middle, and the bottom darker."""
        window = self._window((x, y), max(rx, ry))
        if window is not None:
            px, py = self._from_px(window)
            inside = np.sqrt(((px - x) / rx) ** 2 + ((py - y) / ry) ** 2) - 1.0
            self._paint(window, inside * min(rx, ry), colour, outline, light * (y - py) / ry)

    def polygon(self, corners: Sequence[tuple[float, float]], colour: Colour, outline: bool = False) -> None:
        """Convex, corners clockwise on the screen (y points down)."""
        middle = (sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners))
        window = self._window(middle, max(_length(x - middle[0], y - middle[1]) for x, y in corners))
        if window is None:
            return
        px, py = self._from_px(window)
        distance = np.full(px.shape, -np.inf)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            side = (px - x0) * (y1 - y0) - (py - y0) * (x1 - x0)
            distance = np.maximum(distance, side / _length(x1 - x0, y1 - y0))
        self._paint(window, distance, colour, outline)

    def stroke(
        self, start: tuple[float, float], end: tuple[float, float], radius: float, colour: Colour, outline: bool = False
    ) -> None:
        """A line with round ends."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        window = self._window((start[0] + dx / 2, start[1] + dy / 2), _length(dx, dy) / 2 + radius)
        if window is None:
            return
        x, y = self._from_px(window)
        along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
        x, y = x - start[0] - along * dx, y - start[1] - along * dy
        self._paint(window, np.sqrt(x * x + y * y) - radius, colour, outline)

    def _to_px(self, x: float, y: float) -> tuple[float, float]:
        (cos, sin), x = self.turn, x * self.mirror
        return self.centre[0] + self.unit_px * (x * cos - y * sin), self.centre[1] + self.unit_px * (x * sin + y * cos)

    def _from_px(self, window: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
        """The pen's coordinates of the pixel centres of a window."""
        rows, columns = np.ogrid[window]
        dx, dy = (columns + 0.5 - self.centre[0]) / self.unit_px, (rows + 0.5 - self.centre[1]) / self.unit_px
        cos, sin = self.turn
        return self.mirror * (dx * cos + dy * sin), dy * cos - dx * sin

    def _window(self, middle: tuple[float, float], reach: float) -> tuple[slice, slice] | None:
        """Rows and columns that a shape of that reach (units) can touch; None where they are outside the canvas."""
        x, y = self._to_px(*middle)
        reach_px = reach * self.unit_px + 2.0
        spans = []
        for value, size in ((y, self.canvas.shape[0]), (x, self.canvas.shape[1])):
            first, last = max(0, math.floor(value - reach_px)), min(size, math.ceil(value + reach_px))
            if first >= last:
                return None
            spans.append(slice(first, last))
        return spans[0], spans[1]

    def _paint(
        self,
        window: tuple[slice, slice],
        distance: np.ndarray,
        colour: Colour,
        outline: bool,
        light: np.ndarray | None = None,
    ) -> None:
        """distance: of the window's pixels, in units, negative inside. outline: a darker rim of a pixel outside."""
        distance_px = distance * self.unit_px
        if outline:
            self._blend(window, distance_px - 1.0, np.multiply(colour, 0.55))
        fill = np.broadcast_to(np.asarray(colour, np.float64), (*distance.shape, 3))
        if light is not None:
            fill = np.clip(fill * (1.0 + light[..., None]), 0.0, 255.0)
        self._blend(window, distance_px, fill)
        self.covered[window] |= distance_px - (1.0 if outline else 0.0) <= 0.0

    def _blend(self, window: tuple[slice, slice], distance_px: np.ndarray, fill: np.ndarray) -> None:
        alpha = np.clip(0.5 - distance_px, 0.0, 1.0)[..., None]
        self.canvas[window] += alpha * (fill - self.canvas[window])


def _length(x: float, y: float) -> float:
    return math.sqrt(x * x + y * y)


def value_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """(H, W) float64 in -1..1: random values on a coarse grid, in between by a smooth ramp."""
    grid = rng.uniform(-1.0, 1.0, (cells + 1, cells + 1))
    y, x = np.arange(height) * (cells / height), np.arange(width) * (cells / width)
    row, column = y.astype(int), x.astype(int)
    fy, fx = y - row, x - column
    fy, fx = (fy * fy * (3.0 - 2.0 * fy))[:, None], (fx * fx * (3.0 - 2.0 * fx))[None]
    top = grid[row][:, column] * (1.0 - fx) + grid[row][:, column + 1] * fx
    bottom = grid[row + 1][:, column] * (1.0 - fx) + grid[row + 1][:, column + 1] * fx
    return top * (1.0 - fy) + bottom * fy
