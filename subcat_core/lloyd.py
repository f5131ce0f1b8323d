"""The compiled loops of k-means: the nearest centroid of each row, the sums of the rows of each cluster, single moves.

Every row is worked on by itself, so its result has the same bits whatever rows stand beside it and however many threads
run: BLAS and faiss's matrix products do not promise that. Legend: n rows, K clusters, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Reassociation lets the compiler use vector registers; NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def nearest(rows: np.ndarray, centroids: np.ndarray, found: np.ndarray) -> None:
    """found (n,) int32 := the nearest of centroids (K, D) float32 for rows (n, D) float32; ties go to the lower id.

    Distances are sums of squared differences, so equal centroids give equal distances, and no digits cancel.
    """
    num_clusters, dimension = centroids.shape
    last = num_clusters - 1
    for i in range(rows.shape[0]):
        best, closest = 0, np.float32(np.inf)
        for k in range(0, num_clusters, 5):  # five at a time: the row is read from a register five times
            k1, k2, k3, k4 = min(k + 1, last), min(k + 2, last), min(k + 3, last), min(k + 4, last)
            s0 = s1 = s2 = s3 = s4 = np.float32(0)
            for d in range(dimension):
                value = rows[i, d]
                d0, d1, d2 = value - centroids[k, d], value - centroids[k1, d], value - centroids[k2, d]
                d3, d4 = value - centroids[k3, d], value - centroids[k4, d]
                s0 += d0 * d0
                s1 += d1 * d1
                s2 += d2 * d2
                s3 += d3 * d3
                s4 += d4 * d4
            if s0 < closest:
                closest, best = s0, k
            if s1 < closest:
                closest, best = s1, k1
            if s2 < closest:
                closest, best = s2, k2
            if s3 < closest:
                closest, best = s3, k3
            if s4 < closest:
                closest, best = s4, k4
        found[i] = best


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def accumulate(
    rows: np.ndarray,
    found: np.ndarray,
    centroids: np.ndarray,
    clusters: np.ndarray,
    distances: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
) -> tuple[float, int]:
    """Add rows (n, D) to sums (K, D) float64 and counts (K,) int64 of the clusters found (n,); rows in order.

    Writes clusters (n,) int32 := found and distances (n,) float32, Euclidean to the own centroid. Returns
    (inertia, rows whose cluster changed).
    """
    inertia, num_changed = 0.0, 0
    for i in range(rows.shape[0]):
        k = found[i]
        square = 0.0
        for d in range(rows.shape[1]):
            sums[k, d] += rows[i, d]
            difference = np.float64(rows[i, d] - centroids[k, d])
            square += difference * difference
        counts[k] += 1
        inertia += square
        distances[i] = np.sqrt(square)
        if clusters[i] != k:
            clusters[i] = k
            num_changed += 1
    return inertia, num_changed


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def move_single_rows(rows: np.ndarray, centroids: np.ndarray, clusters: np.ndarray, counts: np.ndarray) -> int:
    """One sweep of Hartigan's rule: move a row where the inertia falls once both means have moved; returns the moves.

    rows (n, D) float32, clusters (n,) int32; centroids (K, D) float64 are the means of counts (K,) rows: all three are
    updated in place. A state without such a move is also a fixed point of Lloyd's steps, and usually a better one
    (Hartigan 1975; Telgarsky and Vattani 2010).
    """
    num_clusters, dimension = centroids.shape
    num_moves = 0
    for i in range(rows.shape[0]):
        own = clusters[i]
        if counts[own] < 2:
            continue
        best, lowest, gain = own, np.inf, 0.0
        for k in range(num_clusters):
            square = 0.0
            for d in range(dimension):
                difference = rows[i, d] - centroids[k, d]
                square += difference * difference
            if k == own:
                gain = square * counts[k] / (counts[k] - 1)
            elif square * counts[k] / (counts[k] + 1) < lowest:
                best, lowest = k, square * counts[k] / (counts[k] + 1)
        if lowest < gain * (1 - 1e-9):
            for d in range(dimension):
                value = np.float64(rows[i, d])
                centroids[own, d] += (centroids[own, d] - value) / (counts[own] - 1)
                centroids[best, d] += (value - centroids[best, d]) / (counts[best] + 1)
            counts[own] -= 1
            counts[best] += 1
            clusters[i] = best
            num_moves += 1
    return num_moves
