"""High-dimensional Gaussian filtering on the permutohedral lattice, compiled at first use by numba.

Adams, Baek, Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice": pixels are embedded in the
hyperplane sum(x) = 0 of d + 1 dimensions, each spreads its value over the d + 1 vertices of the simplex around it
(splat), vertices blur with their neighbours along each axis, and each pixel gathers its vertices back (slice). A hash
table holds the vertices, so empty space costs nothing. Scale and order of the axes follow Kraehenbuehl & Koltun 2011,
whose code pydensecrf wraps, so that results agree. Kernels release the GIL and keep no state: threads may share them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from subcat_core.compiled import compiled

_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.float32(0.5)
_BLOCK = 64
MAX_KEY = 2**62


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Where N pixels lie in a lattice of M vertices.

    vertices: (N, d + 1) uint32, the vertices of each pixel's simplex. weights: (N, d + 1) float32 barycentric
    coordinates, >= 0 up to rounding, summing to 1. neighbours: (d + 1, M, 2) uint32, the vertices before and after
    each vertex along each axis; M where there is none.
    """

    vertices: np.ndarray
    weights: np.ndarray
    neighbours: np.ndarray

    @property
    def num_vertices(self) -> int:
        """M."""
        return self.neighbours.shape[1]

    @property
    def num_dimensions(self) -> int:
        """d."""
        return self.vertices.shape[1] - 1

    @property
    def num_bytes(self) -> int:
        """Memory of the three arrays."""
        return self.vertices.nbytes + self.weights.nbytes + self.neighbours.nbytes

    @property
    def gain(self) -> float:
        """What `filter_values` multiplies its sums by: 1 / (1 + 2^-d), as in the reference code."""
        return 1.0 / (1.0 + 2.0**-self.num_dimensions)


def build_lattice(features: np.ndarray) -> Lattice:
    """The lattice of N pixels.

    features: (d, N) float32, finite, N >= 1, in units of the standard deviation of the Gaussian: a feature that
    differs by 1 is weighed by exp(-1/2). ValueError where the features span more lattice cells than a key can number.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features: got {features.shape}, expected (d, N) with d and N of at least 1")
    features = np.ascontiguousarray(features, np.float32)
    low, high = features.min(axis=1), features.max(axis=1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("features hold nan or infinite values; check the image and the standard deviations")
    scale = scale_factors(len(features))
    origin, strides = _number_keys(low * scale, high * scale)
    vertices, weights, keys, table = _embed(features, tuple(scale), origin, strides)
    neighbours = _link(keys, table, strides)
    return Lattice(vertices, weights, neighbours)


def filter_values(lattice: Lattice, values: np.ndarray) -> np.ndarray:
    """Gaussian filter, not normalised: approximately sum_j exp(-|f_i - f_j|^2 / 2) values_j, up to a constant factor.

    values: (N, V) float32 or convertible. Returns (N, V) float32. The exact normalisation follows by filtering ones.
    """
    if values.ndim != 2 or len(values) != len(lattice.vertices):
        raise ValueError(f"values: got {values.shape}, expected ({len(lattice.vertices)}, V)")
    values = np.ascontiguousarray(values, np.float32)
    return _filter(values, lattice.vertices, lattice.weights, lattice.neighbours, np.float32(lattice.gain))


def scale_factors(num_dimensions: int) -> np.ndarray:
    """(d,) float32: the diagonal of the embedding times the standard deviation of the blur (Adams et al. 2010)."""
    deviation = math.sqrt(2.0 / 3.0) * (num_dimensions + 1)
    return np.array([deviation / math.sqrt((i + 2) * (i + 1)) for i in range(num_dimensions)], np.float32)


def _number_keys(low: np.ndarray, high: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Origin and strides, d integers each, that turn the first d coordinates of a vertex into one integer.

    A vertex lies within d + 1 of its pixels in each coordinate, a neighbour within another d + 1.
    """
    num_dimensions = len(low)
    margin = 3 * (num_dimensions + 1)
    origin, sizes = [], []
    for i in range(num_dimensions):
        # Coordinate i of the embedding is sum_{k >= i} y_k - i * y_{i-1} for scaled features y.
        lowest = float(low[i:].sum()) - (i * float(high[i - 1]) if i else 0.0)
        highest = float(high[i:].sum()) - (i * float(low[i - 1]) if i else 0.0)
        origin.append(math.floor(lowest) - margin)
        sizes.append(math.ceil(highest) + margin - origin[i] + 1)
    if math.prod(sizes) >= MAX_KEY:
        raise ValueError(
            f"features span {' x '.join(str(size) for size in sizes)} lattice cells, more than the lattice can number; "
            "raise the standard deviations (sigma) or shrink the image"
        )
    return tuple(origin), tuple(math.prod(sizes[:i]) for i in range(num_dimensions))


@compiled
def _find(table: np.ndarray, key: Any) -> Any:
    """Slot of a key in an open-addressing table of (key, vertex + 1): where it is, or the free slot for it."""
    mask = np.uint64(len(table) - 1)
    slot = (np.uint64(key) * _HASH_FACTOR) >> np.uint64(20) & mask
    while table[slot, 1] != 0 and table[slot, 0] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled
def _grow(table: np.ndarray) -> np.ndarray:
    bigger = np.zeros((len(table) * 2, 2), np.int64)
    for slot in range(len(table)):
        if table[slot, 1] != 0:
            free = _find(bigger, table[slot, 0])
            bigger[free, 0] = table[slot, 0]
            bigger[free, 1] = table[slot, 1]
    return bigger


@compiled
def _embed(features: np.ndarray, scale: tuple, origin: tuple, strides: tuple) -> tuple:
    """(vertices, weights) of each pixel, keys (M,) int64 of the vertices, and their hash table."""
    num_axes = len(scale) + 1
    num_pixels = features.shape[1]
    vertices = np.empty((num_pixels, num_axes), np.uint32)
    weights = np.empty((num_pixels, num_axes), np.float32)
    table = np.zeros((1 << 12, 2), np.int64)
    keys = np.empty(1 << 12, np.int64)
    num_vertices = 0
    residual = np.empty((num_axes, _BLOCK), np.float32)
    cell, rank = np.empty_like(residual), np.empty_like(residual)
    for start in range(0, num_pixels, _BLOCK):
        stop = min(start + _BLOCK, num_pixels)
        _place(features[:, start:stop], scale, residual, cell, rank)
        needed = num_vertices + _BLOCK * num_axes
        while len(table) < 2 * needed:
            table = _grow(table)
        if len(keys) < needed:
            longer = np.empty(2 * needed, np.int64)
            longer[:num_vertices] = keys[:num_vertices]
            keys = longer
        num_vertices = _number(
            residual, cell, rank, origin, strides, table, keys, num_vertices, vertices[start:stop], weights[start:stop]
        )
    return vertices, weights, keys[:num_vertices].copy(), table


@compiled
def _place(features: np.ndarray, scale: tuple, residual: np.ndarray, cell: np.ndarray, rank: np.ndarray) -> None:
    """The simplex around each pixel of a block, feature by feature so that the loops vectorise.

    features: (d, n) float32. Fills the first n columns of (d + 1, block) arrays: the nearest vertex of remainder 0 as
    cell * (d + 1), the distance to it in units of d + 1, and the rank of that distance, largest first.
    """
    d, n = features.shape
    down, up = np.float32(1.0 / (d + 1)), np.float32(d + 1)
    total, excess = residual[0], np.zeros(n, np.float32)
    total[:] = 0
    for j in range(d, 0, -1):
        for b in range(n):
            scaled = features[j - 1, b] * scale[j - 1]
            residual[j, b] = total[b] - np.float32(j) * scaled
            total[b] += scaled
    for i in range(d + 1):
        for b in range(n):
            nearest = np.rint(residual[i, b] * down)
            residual[i, b] -= nearest * up
            cell[i, b] = nearest
            excess[b] += nearest
    for i in range(d + 1):
        rank[i, :n] = excess
    for i in range(d):
        for j in range(i + 1, d + 1):
            for b in range(n):
                behind = np.float32(residual[i, b] < residual[j, b])
                rank[i, b] += behind
                rank[j, b] += np.float32(1) - behind
    # Rounding by itself may leave the plane sum(x) = 0: the coordinates that were rounded worst bring it back.
    for i in range(d + 1):
        for b in range(n):
            shift = np.float32(rank[i, b] < 0) - np.float32(rank[i, b] > d)
            rank[i, b] += shift * up
            cell[i, b] += shift
            residual[i, b] = (residual[i, b] - shift * up) * down


@compiled
def _number(
    residual: np.ndarray,
    cell: np.ndarray,
    rank: np.ndarray,
    origin: tuple,
    strides: tuple,
    table: np.ndarray,
    keys: np.ndarray,
    num_vertices: int,
    vertices: np.ndarray,
    weights: np.ndarray,
) -> int:
    """Fill vertices and weights (n, d + 1) of a block from `_place`; returns how many vertices there are by then."""
    d = len(strides)
    holder = np.zeros(d + 1, np.int64)
    last_key, last_vertex = np.full(d + 1, -1, np.int64), np.zeros(d + 1, np.uint32)
    base, diagonal = np.int64(0), np.int64(0)
    for i in range(d):
        base -= origin[i] * strides[i]
        diagonal += strides[i]
    for b in range(len(vertices)):
        key = base
        for i in range(d + 1):
            holder[np.int64(rank[i, b])] = i
            if i < d:
                key += np.int64(cell[i, b]) * (d + 1) * strides[i]
        # Weights are differences of neighbouring residuals in sorted order (Adams et al. 2010, proposition 4.2).
        weights[b, 0] = np.float32(1) + (residual[holder[d], b] - residual[holder[0], b])
        for r in range(d + 1):
            if r > 0:
                # The next vertex: every coordinate + 1, the one whose turn it is - (d + 1).
                moved = holder[d + 1 - r]
                key += diagonal - ((d + 1) * strides[moved] if moved < d else 0)
                weights[b, r] = residual[holder[d - r], b] - residual[moved, b]
            if key != last_key[r]:
                slot = _find(table, key)
                if table[slot, 1] == 0:
                    keys[num_vertices] = key
                    num_vertices += 1
                    table[slot, 0] = key
                    table[slot, 1] = num_vertices
                last_key[r], last_vertex[r] = key, table[slot, 1] - 1
            vertices[b, r] = last_vertex[r]
    return num_vertices


@compiled
def _link(keys: np.ndarray, table: np.ndarray, strides: tuple) -> np.ndarray:
    """neighbours (d + 1, M, 2) of each vertex along each axis; M where the lattice has none."""
    d = len(strides)
    num_vertices = len(keys)
    neighbours = np.full((d + 1, num_vertices, 2), num_vertices, np.uint32)
    step = np.empty(d + 1, np.int64)
    for j in range(d + 1):
        step[j] = 0
        for i in range(d):
            step[j] -= strides[i]
        if j < d:
            step[j] += (d + 1) * strides[j]
    for j in range(d + 1):
        for vertex in range(num_vertices):
            slot = _find(table, keys[vertex] + step[j])
            if table[slot, 1] != 0:
                other = table[slot, 1] - 1
                neighbours[j, vertex, 0] = other
                neighbours[j, other, 1] = vertex
    return neighbours


@compiled
def _filter(
    values: np.ndarray, vertices: np.ndarray, weights: np.ndarray, neighbours: np.ndarray, gain: np.float32
) -> np.ndarray:
    """Splat, blur along axis 0, 1, ..., d, slice."""
    num_axes, num_vertices, num_values = len(neighbours), neighbours.shape[1], values.shape[1]
    held = np.zeros((num_vertices + 1, num_values), np.float32)
    blurred = np.zeros_like(held)
    for pixel in range(len(values)):
        for corner in range(num_axes):
            for v in range(num_values):
                held[vertices[pixel, corner], v] += weights[pixel, corner] * values[pixel, v]
    for axis in range(num_axes):
        for vertex in range(num_vertices):
            before, after = neighbours[axis, vertex, 0], neighbours[axis, vertex, 1]
            for v in range(num_values):
                blurred[vertex, v] = held[vertex, v] + _HALF * (held[before, v] + held[after, v])
        held, blurred = blurred, held
    filtered = np.zeros_like(values)
    for pixel in range(len(values)):
        for corner in range(num_axes):
            for v in range(num_values):
                filtered[pixel, v] += gain * weights[pixel, corner] * held[vertices[pixel, corner], v]
    return filtered
