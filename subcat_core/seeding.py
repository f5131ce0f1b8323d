"""Where k-means starts: k-means++ with restarts on a sample of each class, in the space of its principal components.

Legend: n sample rows of one class, D feature dimensions, d projected dimensions, K clusters.
Source: Arthur and Vassilvitskii 2007 (k-means++, greedy variant as in scikit-learn); Makarychev et al. 2019 (a
projection to few dimensions keeps the cost of every clustering); Halko et al. 2011 (randomised range finder).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from subcat_core.lloyd import accumulate, move_single_rows, nearest

if TYPE_CHECKING:
    from subcat_core.kmeans import FeatureShard, KMeansSettings

_MAX_LLOYD_STEPS = 100
_MAX_SWEEPS = 30
_EXACT_ROWS = 192  # below this an exact decomposition costs less than the randomised one
_OVERSAMPLING = 16
_HASH_RANGE = 2**64


def seed_centroids(shard: FeatureShard, settings: KMeansSettings, rng_seed: int) -> np.ndarray:
    """(C, K, D) float32 to start the exact passes from; NaN, always last, where a class has fewer distinct rows.

    One class at a time, so that the driver holds one sample. A class's answer depends on its rows, the settings and its
    own generator, never on other classes or on where the rows lie.
    """
    counts = shard.counts
    centroids = np.full((len(counts), settings.num_clusters, shard.dimension), np.nan, np.float32)
    for class_index in np.flatnonzero(counts).tolist():
        max_hash = sample_threshold(int(counts[class_index]), settings.sample_rows_per_class)
        rows = shard.sample(class_index, max_hash, rng_seed).features[: settings.sample_rows_per_class]
        rng = np.random.default_rng([rng_seed, class_index])
        start = seed_class(rows, settings.num_clusters, settings.num_restarts, settings.projection_dims, rng)
        centroids[class_index, : len(start)] = start
    return centroids


def sample_threshold(num_rows: int, max_rows: int) -> int:
    """The hash below which about max_rows of num_rows uniform hashes lie: at least that many but once in 1e9 draws."""
    if num_rows <= max_rows:
        return _HASH_RANGE - 1
    return min(_HASH_RANGE - 1, int((max_rows + 6 * math.sqrt(max_rows)) / num_rows * _HASH_RANGE))


def seed_class(
    rows: np.ndarray, num_clusters: int, num_restarts: int, projection_dims: int, rng: np.random.Generator
) -> np.ndarray:
    """(at most K, D) float32 centroids of rows (n, D) float32: the best of the restarts, carried back to D dimensions.

    A carried-back centroid lies in the plane of the projection, so the first exact pass gives each row the cluster it
    has in the projected space, and moves the centroids to exact means.
    """
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = rows - mean
    basis = principal_axes(centred, projection_dims, rng)
    points = np.ascontiguousarray(centred @ basis)
    best, lowest = points[:1], math.inf
    for _ in range(num_restarts):
        centroids, inertia = lloyd(points, plus_plus(points, min(num_clusters, len(points)), rng))
        if inertia < lowest:
            best, lowest = centroids, inertia
    return best @ basis.T + mean


def principal_axes(centred: np.ndarray, num_axes: int, rng: np.random.Generator) -> np.ndarray:
    """(D, d) float32 orthonormal: the leading principal axes of centred rows (n, D), d = min(num_axes, n, D).

    Exact where the rows are few; otherwise a randomised range finder with two power iterations.
    """
    num_rows, dimension = centred.shape
    num_axes = min(num_axes, num_rows, dimension)
    if min(num_rows, dimension) <= max(_EXACT_ROWS, num_axes + _OVERSAMPLING):
        return np.linalg.svd(centred, full_matrices=False)[2][:num_axes].T.copy()
    axes = rng.standard_normal((dimension, num_axes + _OVERSAMPLING), np.float32)
    for _ in range(2):
        axes = np.linalg.qr(centred.T @ (centred @ axes))[0]
    projected = centred @ axes
    values, vectors = np.linalg.eigh((projected.T @ projected).astype(np.float64))
    leading = vectors[:, np.argsort(-values, kind="stable")[:num_axes]].astype(np.float32)
    return np.ascontiguousarray(axes @ leading)


def plus_plus(points: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """(at most K, d) float32: rows of points drawn by squared distance, the best of 2 + log K draws each time.

    Stops early when every point lies on a chosen one.
    """
    num_trials = 2 + int(math.log(num_clusters))
    chosen = [int(rng.integers(len(points)))]
    squares = _square_distances(points, points[chosen])[0]
    while len(chosen) < num_clusters:
        cumulative = np.cumsum(squares)
        if not cumulative[-1] > 0:
            break
        draws = np.searchsorted(cumulative, rng.random(num_trials) * cumulative[-1], side="right")
        draws = np.minimum(draws, len(points) - 1)
        trials = np.minimum(_square_distances(points, points[draws]), squares)
        winner = int(trials.sum(axis=1).argmin())
        chosen.append(int(draws[winner]))
        squares = trials[winner]
    return points[chosen]


def _square_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(number of centres, n) float64."""
    return np.stack([np.square(points - centre).sum(axis=1, dtype=np.float64) for centre in centres])


def lloyd(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, float]:
    """Lloyd steps, then single moves, until no point changes: (centroids (K, d) float32, inertia).

    An empty cluster takes the farthest point.
    """
    num_points, num_clusters = len(points), len(centroids)
    clusters = np.full(num_points, -1, np.int32)
    found, distances = np.empty(num_points, np.int32), np.empty(num_points, np.float32)
    for _ in range(_MAX_LLOYD_STEPS):
        sums, counts = np.zeros(centroids.shape), np.zeros(num_clusters, np.int64)
        nearest(points, centroids, found)
        _, num_changed = accumulate(points, found, centroids, clusters, distances, sums, counts)
        if not num_changed:
            break
        empty = np.flatnonzero(counts == 0)
        centroids = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        centroids[empty] = points[np.argsort(-distances, kind="stable")[: len(empty)]]
    means = centroids.astype(np.float64)
    for _ in range(_MAX_SWEEPS):
        if not move_single_rows(points, means, clusters, counts):
            break
    centroids = means.astype(np.float32)
    return centroids, float(np.square(points - centroids[clusters]).sum(dtype=np.float64))
