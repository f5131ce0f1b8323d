"""The mean-field steps of the dense CRF over two kernels, compiled: what crf.py runs once the lattices are built.

One pass over the pixels does the whole of a step (gather both messages, softmax, spread again), so the marginals of a
step never leave the processor's cache. Labels lie in groups of four lanes, which the compiler turns into vectors;
lanes without a label hold a logit so low that their marginal is 0.
"""

from __future__ import annotations

import numpy as np

from subcat_core.compiled import compiled

_LANES = 4
_BLOCK = 128
_NEVER = np.float32(-1e4)
_HALF = np.float32(0.5)
_LOWEST = np.float32(-87.0)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_E2, _E3, _E4 = np.float32(0.5), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_E5, _E6, _E7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_ONE = np.float32(1.0)
_EXPONENT_BIAS = np.int32(127)
_MANTISSA_BITS = np.int32(23)


@compiled
def exp_negative(x: np.float32) -> np.float32:
    """exp for x <= 0 to 2 units in the last place (Cephes' polynomial): plain arithmetic, so that loops vectorise."""
    x = max(x, _LOWEST)
    power = np.floor(x * _LOG2_E + _HALF)
    r = (x - power * _LN2_HIGH) - power * _LN2_LOW
    series = ((((_E7 * r + _E6) * r + _E5) * r + _E4) * r + _E3) * r + _E2
    series = series * r * r + r + _ONE
    return series * np.int32((np.int32(power) + _EXPONENT_BIAS) << _MANTISSA_BITS).view(np.float32)


@compiled
def softmax_rows(rows: np.ndarray, num_rows: int) -> None:
    """Softmax of each row of (B, G, 4) in place."""
    num_values = rows.shape[1] * rows.shape[2]
    flat = rows.reshape(len(rows), num_values)
    for row in range(num_rows):
        largest = flat[row, 0]
        for v in range(1, num_values):
            largest = max(largest, flat[row, v])
        for v in range(num_values):
            flat[row, v] -= largest
    every = rows.reshape(rows.size)
    for k in range(num_rows * num_values):
        every[k] = exp_negative(every[k])
    for row in range(num_rows):
        total = flat[row, 0]
        for v in range(1, num_values):
            total += flat[row, v]
        total = _ONE / total
        for v in range(num_values):
            flat[row, v] *= total


@compiled
def _gather(
    rows: np.ndarray,
    start: int,
    stop: int,
    vertices: np.ndarray,
    weights: np.ndarray,
    held: np.ndarray,
    factor: np.float32,
) -> None:
    """rows += factor * slice of the lattice values `held` (M + 1, G, 4) at pixels start..stop."""
    num_corners = vertices.shape[1]
    for pixel in range(start, stop):
        for g in range(np.uint64(held.shape[1])):
            a0 = a1 = a2 = a3 = np.float32(0)
            for corner in range(num_corners):
                vertex, weight = vertices[pixel, corner], weights[pixel, corner]
                a0 += weight * held[vertex, g, 0]
                a1 += weight * held[vertex, g, 1]
                a2 += weight * held[vertex, g, 2]
                a3 += weight * held[vertex, g, 3]
            rows[pixel - start, g, 0] += factor * a0
            rows[pixel - start, g, 1] += factor * a1
            rows[pixel - start, g, 2] += factor * a2
            rows[pixel - start, g, 3] += factor * a3


@compiled
def _spread(
    rows: np.ndarray, start: int, stop: int, vertices: np.ndarray, weights: np.ndarray, held: np.ndarray
) -> None:
    """Splat the rows of pixels start..stop onto the lattice values `held` (M + 1, G, 4)."""
    num_corners = vertices.shape[1]
    for pixel in range(start, stop):
        for g in range(np.uint64(held.shape[1])):
            q0, q1 = rows[pixel - start, g, 0], rows[pixel - start, g, 1]
            q2, q3 = rows[pixel - start, g, 2], rows[pixel - start, g, 3]
            for corner in range(num_corners):
                vertex, weight = vertices[pixel, corner], weights[pixel, corner]
                a0 = held[vertex, g, 0] + weight * q0
                a1 = held[vertex, g, 1] + weight * q1
                a2 = held[vertex, g, 2] + weight * q2
                a3 = held[vertex, g, 3] + weight * q3
                held[vertex, g, 0] = a0
                held[vertex, g, 1] = a1
                held[vertex, g, 2] = a2
                held[vertex, g, 3] = a3


@compiled
def _blur(held: np.ndarray, spare: np.ndarray, neighbours: np.ndarray) -> tuple:
    """Blur along each axis; returns (blurred, the other buffer). Both are (M + 1, G, 4) with a last row of zeros."""
    for axis in range(neighbours.shape[0]):
        for vertex in range(neighbours.shape[1]):
            before, after = neighbours[axis, vertex, 0], neighbours[axis, vertex, 1]
            for g in range(np.uint64(held.shape[1])):
                a0 = held[vertex, g, 0] + _HALF * (held[before, g, 0] + held[after, g, 0])
                a1 = held[vertex, g, 1] + _HALF * (held[before, g, 1] + held[after, g, 1])
                a2 = held[vertex, g, 2] + _HALF * (held[before, g, 2] + held[after, g, 2])
                a3 = held[vertex, g, 3] + _HALF * (held[before, g, 3] + held[after, g, 3])
                spare[vertex, g, 0] = a0
                spare[vertex, g, 1] = a1
                spare[vertex, g, 2] = a2
                spare[vertex, g, 3] = a3
        held, spare = spare, held
    return held, spare


@compiled
def mean_field(
    logit: np.ndarray,
    s_vertices: np.ndarray,
    s_weights: np.ndarray,
    s_neighbours: np.ndarray,
    s_factor: np.float32,
    b_vertices: np.ndarray,
    b_weights: np.ndarray,
    b_neighbours: np.ndarray,
    b_factor: np.float32,
    iterations: int,
) -> np.ndarray:
    """logit: (L, N) float32 -> marginals (L, N) float32. s_, b_: the smoothness and the appearance kernel."""
    num_labels, num_pixels = logit.shape
    groups = (num_labels + _LANES - 1) // _LANES
    rows = np.empty((_BLOCK, groups, _LANES), np.float32)
    flat = rows.reshape(_BLOCK, groups * _LANES)
    s_held = np.zeros((s_neighbours.shape[1] + 1, groups, _LANES), np.float32)
    b_held = np.zeros((b_neighbours.shape[1] + 1, groups, _LANES), np.float32)
    s_next, b_next = np.zeros_like(s_held), np.zeros_like(b_held)
    marginals = np.empty_like(logit)
    for iteration in range(iterations + 1):
        for start in range(0, num_pixels, _BLOCK):
            stop = min(start + _BLOCK, num_pixels)
            rows[:] = _NEVER
            for label in range(num_labels):
                for pixel in range(start, stop):
                    flat[pixel - start, label] = logit[label, pixel]
            if iteration > 0:
                _gather(rows, start, stop, s_vertices, s_weights, s_held, s_factor)
                _gather(rows, start, stop, b_vertices, b_weights, b_held, b_factor)
            softmax_rows(rows, stop - start)
            if iteration < iterations:
                _spread(rows, start, stop, s_vertices, s_weights, s_next)
                _spread(rows, start, stop, b_vertices, b_weights, b_next)
            else:
                for label in range(num_labels):
                    for pixel in range(start, stop):
                        marginals[label, pixel] = flat[pixel - start, label]
        if iteration < iterations:
            s_held, s_next = _blur(s_next, s_held, s_neighbours)
            b_held, b_next = _blur(b_next, b_held, b_neighbours)
            s_next[:] = 0
            b_next[:] = 0
    return marginals
