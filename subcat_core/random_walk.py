"""A random walk of maps along the affinity of neighbouring cells, step by step: no matrix of all pairs of cells.

Ahn & Kwak 2018 (PSA), section 3.3: T = D^-1 A^beta, maps * T^t with t = 2^log_steps. The released code puts A_ij^beta
over its sum over i (the columns of T sum to 1) and multiplies the maps as row vectors from the left: a cell's new value
is the weighted mean of its neighbours' old ones, the cell itself among them with weight 1, so no value passes the
largest old one. The authors square a matrix of (h * w)^2 numbers; here a step costs h * w * (2 P + 1) products a map.
In float64: where cells keep nearly all of their value, float32 weights sum to 1 only within 1e-7, and hundreds of steps
make 1e-4 of that.

Legend: n maps, h w cells, P offsets of pairs (see affinity_pairs.py), M = 2 P + 1 neighbours of a cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from subcat_core.affinity_pairs import Offset, pair_ends
from subcat_core.compiled import compiled
from subcat_core.settings import Settings


class RandomWalkSettings(Settings):
    """How far and how sharply maps spread; defaults are those of PSA's code."""

    beta: float = Field(default=8.0, gt=0, le=64, allow_inf_nan=False)
    """Power of the affinities: higher keeps the walk to what is very much alike."""
    log_steps: int = Field(default=8, ge=0, le=12)
    """The walk has 2^log_steps steps."""
    max_px: int | None = Field(default=1024, ge=8)
    """The long side of an image is brought down to this for the net; bounds time and memory for large pictures."""


@dataclasses.dataclass(frozen=True)
class Transition:
    """One step: cell (y, x) takes weights[m, y, x] times the value of cell (y, x) + shifts[m].

    shifts: (M, 2) int64. weights: (M, h, w) float64, >= 0, summing to 1 over m; 0 for neighbours outside the grid.
    """

    shifts: np.ndarray
    weights: np.ndarray


def transition(affinity: np.ndarray, offsets: Sequence[Offset], beta: float) -> Transition:
    """affinity: (P, h, w) float of 0..1 at the sources of pairs, 0 where there is no pair; both ways the same.

    Raises ValueError for another number of offsets, and for affinities that are not finite or outside 0..1.
    """
    if len(affinity) != len(offsets):
        raise ValueError(f"got affinities {affinity.shape} for {len(offsets)} offsets; expected ({len(offsets)}, h, w)")
    if affinity.size and not (affinity.min() >= 0 and affinity.max() <= 1):
        raise ValueError(
            f"affinities from {affinity.min()} to {affinity.max()}, expected finite values in 0..1; was the net "
            "trained without a finite loss?"
        )
    num_offsets, height, width = affinity.shape
    weights = np.zeros((2 * num_offsets + 1, height, width))
    weights[0] = 1
    weights[1 : num_offsets + 1] = affinity.astype(np.float64) ** beta
    for index, offset in enumerate(offsets):
        sources, partners = pair_ends(height, width, offset)
        weights[num_offsets + 1 + index][partners] = weights[1 + index][sources]
    weights /= weights.sum(axis=0)
    forward = np.array(offsets, np.int64).reshape(-1, 2)
    return Transition(np.concatenate([np.zeros((1, 2), np.int64), forward, -forward]), weights)


def random_walk(maps: np.ndarray, step: Transition, num_steps: int) -> np.ndarray:
    """maps: (n, h, w) float -> the same after num_steps steps, computed in float64.

    Raises ValueError where maps and step are not of one grid.
    """
    if maps.ndim != 3 or maps.shape[1:] != step.weights.shape[1:]:
        raise ValueError(f"got maps {maps.shape}, expected (n, {step.weights.shape[1]}, {step.weights.shape[2]})")
    margin = int(np.abs(step.shifts).max(initial=0))
    around = np.pad(maps.astype(np.float64), ((0, 0), (margin, margin), (margin, margin)))
    walked = _walk(around, np.zeros_like(around), step.weights, step.shifts, margin, num_steps)
    height, width = maps.shape[1:]
    return walked[:, margin : margin + height, margin : margin + width].astype(maps.dtype)


@compiled
def _walk(
    old: np.ndarray, new: np.ndarray, weights: np.ndarray, shifts: np.ndarray, margin: int, num_steps: int
) -> np.ndarray:
    """old, new: (n, h + 2 margin, w + 2 margin), with zeros around; the inner loop runs over neighbours in memory."""
    num_neighbours, height, width = weights.shape
    num_maps = old.shape[0]
    for _ in range(num_steps):
        for y in range(height):
            for index in range(num_maps):
                new[index, y + margin, margin : margin + width] = 0
            for neighbour in range(num_neighbours):
                row = y + margin + shifts[neighbour, 0]
                left = margin + shifts[neighbour, 1]
                weight = weights[neighbour, y]
                for index in range(num_maps):
                    source = old[index, row, left : left + width]
                    target = new[index, y + margin, margin : margin + width]
                    for x in range(width):
                        target[x] += weight[x] * source[x]
        old, new = new, old
    return old
