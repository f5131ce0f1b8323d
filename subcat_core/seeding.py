"""Where k-means starts: restarts on a sample of each class, in the space of principal axes that all classes share.

Legend: n sample rows of one class, D feature dimensions, d projected dimensions, K clusters, C classes.
Source: Makarychev et al. 2019 (a projection to few dimensions keeps the cost of every clustering); Halko et al. 2011
(randomised range finder); restarts.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from subcat_core.restarts import best_start

if TYPE_CHECKING:
    from subcat_core.kmeans import FeatureShard
    from subcat_core.kmeans_settings import KMeansSettings

_EXACT_ROWS = 192  # below this an exact decomposition costs less than the randomised one
_OVERSAMPLING = 16
_HASH_RANGE = 2**64
_AXIS_ROWS = 2560  # rows of all classes together that the axes are found from: bounds the driver's memory
_MIN_AXIS_ROWS = 32  # of each class, where it has them


def seed_centroids(
    shard: FeatureShard, settings: KMeansSettings, rng_seed: int, num_clusters: np.ndarray | None = None
) -> np.ndarray:
    """(C, K, D) float32 to start the exact passes from; NaN, always last, where a class has fewer distinct rows.

    num_clusters: (C,) at most K for each class; K for all where it is None. One class at a time: the driver holds the
    projected sample of one. A class's answer depends on the rows, the settings and its own generator, never on where
    the rows lie. Centroids are carried back into the plane of the axes, so the first exact pass gives each row of the
    sample the cluster that it has in the projected space, and moves the centroids to exact means.
    """
    counts = shard.counts
    wanted = np.full(len(counts), settings.num_clusters) if num_clusters is None else num_clusters
    centroids = np.full((len(counts), settings.num_clusters, shard.dimension), np.nan, np.float32)
    means, axes = shared_axes(shard, settings.projection_dims, rng_seed)
    for class_index in np.flatnonzero(counts).tolist():
        max_hash = sample_threshold(int(counts[class_index]), settings.sample_rows_per_class)
        sample = shard.sample(class_index, max_hash, rng_seed, axes)
        points = sample.features[: settings.sample_rows_per_class]
        rng = np.random.default_rng([rng_seed, class_index])
        start = best_start(points, int(wanted[class_index]), settings.num_restarts, rng)
        if axes is not None:
            start = means[class_index] + (start - means[class_index] @ axes.T) @ axes
        centroids[class_index, : len(start)] = start
    return centroids


def shared_axes(shard: FeatureShard, num_axes: int, rng_seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """((C, D) float32 means, (d, D) float32 axes) of a few rows of each class; no axes where D <= num_axes.

    The axes are those of the scatter inside the classes: what lies between classes tells no clusters of one apart.
    """
    if shard.dimension <= num_axes:
        return np.zeros((len(shard.counts), shard.dimension), np.float32), None
    centred, means = _centred_sample(shard, rng_seed)
    rng = np.random.default_rng([rng_seed, len(shard.counts)])
    return means, np.ascontiguousarray(principal_axes(centred, num_axes, rng).T)


def component_axes(shard: FeatureShard, num_axes: int, whiten: bool, rng_seed: int) -> np.ndarray:
    """(d, D) float32: the principal axes inside the classes, scaled to variance 1 with `whiten`; d <= num_axes.

    Found from the same sample as the axes of the start: no pass over the rows.
    """
    centred, _ = _centred_sample(shard, rng_seed)
    axes = principal_axes(centred, num_axes, np.random.default_rng([rng_seed, len(shard.counts)])).T
    if whiten:
        deviations = np.sqrt(np.square(centred @ axes.T).mean(axis=0, dtype=np.float64))
        axes = axes / np.maximum(deviations, deviations.max() * 1e-6)[:, None]
    return np.ascontiguousarray(axes, np.float32)


def _centred_sample(shard: FeatureShard, rng_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """((n, D) float32 a few rows of each class, less their class's mean; (C, D) float32 those means)."""
    counts = shard.counts
    means = np.zeros((len(counts), shard.dimension), np.float32)
    present = np.flatnonzero(counts).tolist()
    max_rows = max(_MIN_AXIS_ROWS, _AXIS_ROWS // max(1, len(present)))
    centred = [np.empty((0, shard.dimension), np.float32)]
    for class_index in present:
        rows = shard.sample(class_index, sample_threshold(int(counts[class_index]), max_rows), rng_seed)
        features = rows.features[:max_rows]
        means[class_index] = features.mean(axis=0, dtype=np.float64)
        centred.append(features - means[class_index])
    return np.concatenate(centred), means


def sample_threshold(num_rows: int, max_rows: int) -> int:
    """The hash below which about max_rows of num_rows uniform hashes lie: at least that many but once in 1e9 draws."""
    if num_rows <= max_rows:
        return _HASH_RANGE - 1
    return min(_HASH_RANGE - 1, int((max_rows + 6 * math.sqrt(max_rows)) / num_rows * _HASH_RANGE))


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
