"""Affinity, its labels and the random walk as their equations say them: loops over cells, float64, a dense matrix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from subcat_core.classes import IGNORE

Cell = tuple[int, int]


def all_pairs(height: int, width: int, radius: int, pad_border: bool) -> Iterator[tuple[Cell, Cell]]:
    """(source, partner) of every pair, found by distance and by the order in which cells are read."""
    cells = [(y, x) for y in range(height) for x in range(width)]
    for source in cells:
        partners = [cell for cell in cells if cell > source and np.hypot(*np.subtract(cell, source)) < radius]
        whole = source[0] + radius <= height and radius - 1 <= source[1] <= width - radius
        if pad_border or whole:
            yield from ((source, partner) for partner in partners)


def plain_kind(first: int, second: int) -> str:
    """What the labels of a pair say."""
    if IGNORE in (first, second):
        return "unknown"
    if first != second:
        return "negative"
    return "background" if first == 0 else "foreground"


def dense_walk(maps: np.ndarray, affinity: dict[tuple[Cell, Cell], float], beta: float, log_steps: int) -> np.ndarray:
    """The released code: A with ones on its diagonal, A^beta over the sums of its columns, squared log_steps times."""
    _, height, width = maps.shape
    matrix = np.eye(height * width)
    for (source, partner), value in affinity.items():
        first, second = source[0] * width + source[1], partner[0] * width + partner[1]
        matrix[first, second] = matrix[second, first] = value
    power = matrix**beta
    step = power / power.sum(axis=0, keepdims=True)
    for _ in range(log_steps):
        step = step @ step
    return (maps.reshape(len(maps), -1).astype(np.float64) @ step).reshape(maps.shape)
