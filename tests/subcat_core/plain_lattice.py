"""The permutohedral lattice in plain Python and float64: slow, by dictionaries, to hold the compiled one against."""

from __future__ import annotations

import numpy as np


def simplex(feature: np.ndarray) -> list[tuple[tuple[int, ...], float]]:
    """The d + 1 (vertex, weight) around a point, all d + 1 coordinates written out."""
    d = len(feature)
    scaled = [feature[i] * np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
    x = np.array([sum(scaled[i:]) - (i * scaled[i - 1] if i else 0) for i in range(d + 1)])
    base = np.rint(x / (d + 1)).astype(int) * (d + 1)
    excess = base.sum() // (d + 1)
    order = np.argsort(-(x - base), kind="stable")
    if excess > 0:
        base[order[len(order) - excess :]] -= d + 1
    elif excess < 0:
        base[order[:-excess]] += d + 1
    delta = x - base
    order = np.argsort(-delta, kind="stable")
    ranked = delta[order]
    corners = []
    for remainder in range(d + 1):
        vertex = base + remainder
        vertex[order[d + 1 - remainder :]] -= d + 1
        if remainder == 0:
            weight = 1 - (ranked[0] - ranked[d]) / (d + 1)
        else:
            weight = (ranked[d - remainder] - ranked[d - remainder + 1]) / (d + 1)
        corners.append((tuple(int(value) for value in vertex), float(weight)))
    return corners


def plain_filter(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """features (d, N), values (N, V) -> (N, V): splat, blur along axis 0 to d, slice."""
    d = len(features)
    corners = [simplex(feature) for feature in features.T.astype(np.float64)]
    held: dict[tuple[int, ...], np.ndarray] = {}
    for pixel, pairs in enumerate(corners):
        for vertex, weight in pairs:
            held[vertex] = held.get(vertex, 0) + weight * values[pixel].astype(np.float64)
    nothing = np.zeros(values.shape[1])
    for axis in range(d + 1):
        step = np.full(d + 1, -1)
        step[axis] = d
        blurred = {}
        for vertex, value in held.items():
            before = held.get(tuple(int(v) for v in np.add(vertex, step)), nothing)
            after = held.get(tuple(int(v) for v in np.subtract(vertex, step)), nothing)
            blurred[vertex] = value + 0.5 * (before + after)
        held = blurred
    gain = 1 / (1 + 2.0**-d)
    return np.array([sum(gain * weight * held[vertex] for vertex, weight in pairs) for pairs in corners])


def gaussian(features: np.ndarray) -> np.ndarray:
    """(N, N): exp(-|f_i - f_j|^2 / 2), what the lattice approximates."""
    points = features.T.astype(np.float64)
    return np.exp(-((points[:, None] - points[None]) ** 2).sum(axis=2) / 2)
