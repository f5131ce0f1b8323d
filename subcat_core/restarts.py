"""k-means of one class in few dimensions: k-means++ starts, Lloyd's steps, and single moves for the best of them.

Legend: n points, K clusters, d dimensions. One thread, a fixed order: the same points and draws give the same bits.
Source: Arthur and Vassilvitskii 2007 (k-means++, greedy variant as in scikit-learn); Hartigan 1975 (single moves).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from subcat_core.lloyd import _IN_ORDER, _four_dots, short_square_distance

_MAX_LLOYD_STEPS = 100
_MAX_SWEEPS = 30
_NUM_POLISHED = 3  # of the restarts: the single moves cost more than the steps before them


def best_start(points: np.ndarray, num_clusters: int, num_restarts: int, rng: np.random.Generator) -> np.ndarray:
    """(at most K, d) float32: the centroids of lowest inertia of points (n, d) float32; fewer where points coincide."""
    mean = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    points = np.ascontiguousarray(points - mean)
    found: list[tuple[float, int, np.ndarray, np.ndarray]] = []
    for restart in range(num_restarts):
        centroids = plus_plus(points, min(num_clusters, len(points)), rng)
        clusters = np.full(len(points), -1, np.int32)
        found.append((lloyd_steps(points, centroids, clusters, _MAX_LLOYD_STEPS), restart, centroids, clusters))
    found.sort(key=lambda start: start[:2])
    best, lowest = found[0][2], math.inf
    for _, _, centroids, clusters in found[:_NUM_POLISHED]:
        means = centroids.astype(np.float64)
        counts = np.bincount(clusters, minlength=len(means))
        for _ in range(_MAX_SWEEPS):
            if not move_single_rows(points, means, clusters, counts):
                break
        centroids = means.astype(np.float32)
        inertia = float(np.square(points - centroids[clusters]).sum(dtype=np.float64))
        if inertia < lowest:
            best, lowest = centroids, inertia
    return best + mean


def plus_plus(points: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """(at most K, d) float32: rows of points (n, d) drawn by squared distance, the best of 2 + log K draws each time.

    Stops early when every point lies on a chosen one.
    """
    draws = rng.random((num_clusters, 2 + int(math.log(num_clusters))))
    chosen = np.empty(num_clusters, np.int64)
    return points[chosen[: _plus_plus(points, draws, chosen)]]


@njit(nogil=True, cache=True)
def _plus_plus(points: np.ndarray, draws: np.ndarray, chosen: np.ndarray) -> int:
    num_points, (num_clusters, num_trials) = len(points), draws.shape
    chosen[0] = min(int(draws[0, 0] * num_points), num_points - 1)
    nearest = np.empty(num_points)
    for i in range(num_points):
        nearest[i] = short_square_distance(points[i], points[chosen[0]])
    kept, trial = np.empty(num_points), np.empty(num_points)
    for k in range(1, num_clusters):
        cumulative = np.cumsum(nearest)
        if not cumulative[-1] > 0:
            return k
        lowest = np.inf
        for t in range(num_trials):
            place = np.searchsorted(cumulative, draws[k, t] * cumulative[-1], side="right")
            candidate = min(place, num_points - 1)
            total = 0.0
            for i in range(num_points):
                trial[i] = min(nearest[i], short_square_distance(points[i], points[candidate]))
                total += trial[i]
            if total < lowest:
                lowest, chosen[k] = total, candidate
                kept, trial = trial, kept
        nearest[:] = kept
    return num_clusters


@njit(nogil=True, cache=True, fastmath=_IN_ORDER)
def lloyd_steps(points: np.ndarray, centroids: np.ndarray, clusters: np.ndarray, max_steps: int) -> float:
    """Lloyd's steps until no point changes; returns the inertia.

    points: (n, d) float32, centred; centroids: (K, d) float32 and clusters: (n,) int32, -1 at first, are updated. An
    empty cluster takes the farthest point.
    """
    num_points, (num_clusters, dimension) = len(points), centroids.shape
    sums, counts = np.zeros((num_clusters, dimension)), np.zeros(num_clusters, np.int64)
    dots, offsets = np.empty((4, num_clusters), np.float32), np.empty(num_clusters, np.float32)
    origin = np.zeros(dimension, np.float32)
    for _ in range(max_steps):
        for k in range(num_clusters):
            offsets[k] = short_square_distance(centroids[k], origin) / 2
        num_changed = 0
        for start in range(0, num_points, 4):
            stop = min(start + 4, num_points)
            p1, p2 = min(start + 1, stop - 1), min(start + 2, stop - 1)
            _four_dots(points[start], points[p1], points[p2], points[stop - 1], centroids, dots)
            for i in range(start, stop):
                best, highest, own = 0, np.float32(-np.inf), dots[i - start]
                for k in range(num_clusters):
                    if own[k] - offsets[k] > highest:
                        best, highest = k, own[k] - offsets[k]
                old = clusters[i]
                if best != old:
                    num_changed += 1
                    clusters[i] = best
                    counts[best] += 1
                    for d in range(dimension):
                        sums[best, d] += points[i, d]
                    if old >= 0:
                        counts[old] -= 1
                        for d in range(dimension):
                            sums[old, d] -= points[i, d]
        if num_changed == 0:
            break
        previous = centroids.copy()
        num_empty = 0
        for k in range(num_clusters):
            if counts[k]:
                for d in range(dimension):
                    centroids[k, d] = sums[k, d] / counts[k]
            else:
                num_empty += 1
        if num_empty:
            squares = np.empty(num_points)
            for i in range(num_points):
                squares[i] = -short_square_distance(points[i], previous[clusters[i]])
            order = np.argsort(squares, kind="mergesort")
            taken = 0
            for k in range(num_clusters):
                if not counts[k]:
                    centroids[k] = points[order[taken]]
                    taken += 1
    inertia = 0.0
    for i in range(num_points):
        inertia += short_square_distance(points[i], centroids[clusters[i]])
    return inertia


@njit(nogil=True, cache=True, fastmath=_IN_ORDER)
def move_single_rows(rows: np.ndarray, centroids: np.ndarray, clusters: np.ndarray, counts: np.ndarray) -> int:
    """One sweep of Hartigan's rule: move a row where the inertia falls once both means have moved; returns the moves.

    rows (n, d) float32, clusters (n,) int32; centroids (K, d) float64 are the means of counts (K,) rows: all three are
    updated in place. A state without such a move is also a fixed point of Lloyd's steps, and usually a better one
    (Hartigan 1975; Telgarsky and Vattani 2010).
    """
    num_clusters, dimension = centroids.shape
    near = centroids.astype(np.float32)
    num_moves = 0
    for i in range(len(rows)):
        own, x = clusters[i], rows[i]
        if counts[own] < 2:
            continue
        gain = short_square_distance(x, near[own]) * counts[own] / (counts[own] - 1)
        best, lowest = own, np.inf
        for k in range(num_clusters):
            if k != own:
                loss = short_square_distance(x, near[k]) * counts[k] / (counts[k] + 1)
                if loss < lowest:
                    best, lowest = k, loss
        if lowest < gain * (1 - 1e-6):  # float32 distances: a gain below their error could come back for ever
            for d in range(dimension):
                value = np.float64(x[d])
                centroids[own, d] += (centroids[own, d] - value) / (counts[own] - 1)
                centroids[best, d] += (value - centroids[best, d]) / (counts[best] + 1)
                near[own, d], near[best, d] = centroids[own, d], centroids[best, d]
            counts[own] -= 1
            counts[best] += 1
            clusters[i] = best
            num_moves += 1
    return num_moves
