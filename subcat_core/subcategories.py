"""From cluster ids, or from distances to all centroids, to the training targets of the sub-category head.

Legend: C parent classes, K sub-categories in each. Sub-category index = class_index * K + cluster_id, so a class owns a
contiguous block of K outputs (Chang et al. 2020, section 3.2; layout of the authors' code).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def to_index(class_index: int, cluster_id: int, num_clusters: int) -> int:
    """(class_index, cluster_id 0..K-1) -> sub-category index 0..C*K-1."""
    if not 0 <= cluster_id < num_clusters:
        raise ValueError(
            f"cluster_id is {cluster_id}, expected 0..{num_clusters - 1}; re-cluster with this num_clusters"
        )
    if class_index < 0:
        raise ValueError(f"class_index is {class_index}, expected 0 or above; class ids 1..C are not class indices")
    return class_index * num_clusters + cluster_id


def subcategory_targets(
    labels: Sequence[int] | np.ndarray, cluster_ids: Sequence[int] | np.ndarray, num_classes: int, num_clusters: int
) -> np.ndarray:
    """(C*K,) float32: one 1 in the block of each parent class of the image, 0 elsewhere.

    labels: class_index of each parent class of one image. cluster_ids: its cluster in each of them, the same length.
    """
    if len(labels) != len(cluster_ids):
        raise ValueError(
            f"got {len(labels)} labels and {len(cluster_ids)} cluster_ids, expected one cluster_id for each label; "
            "cluster the features of this manifest again"
        )
    target = np.zeros(num_classes * num_clusters, np.float32)
    for class_index, cluster_id in zip(labels, cluster_ids, strict=True):
        if class_index >= num_classes:
            raise ValueError(
                f"label is {class_index}, expected 0..{num_classes - 1}; use the class table of the manifest"
            )
        target[to_index(int(class_index), int(cluster_id), num_clusters)] = 1.0
    return target


def soft_shares(features: np.ndarray, centroids: np.ndarray, scale: float) -> np.ndarray:
    """(n, K) float32 rows of sum 1: softmax over the clusters of -(squared distance) / scale (beyond the paper).

    features: (n, D) of one class. centroids: (K, D), NaN where a cluster does not exist, which gets 0. scale >= 0:
    temperature times the class's mean squared distance to the own centroid; 0 gives 1 to the nearest one (the lower id
    of equals). Computed in float64.
    """
    rows, alive = features.astype(np.float64), np.flatnonzero(~np.isnan(centroids[:, 0]))
    centres = centroids[alive].astype(np.float64)
    squares = np.square(rows).sum(axis=1)[:, None] - 2 * rows @ centres.T + np.square(centres).sum(axis=1)
    beyond = np.maximum(squares, 0) - np.maximum(squares, 0).min(axis=1, keepdims=True)
    if scale > 0:
        power = np.exp(-beyond / scale)
    else:
        power = np.eye(len(alive))[squares.argmin(axis=1)]
    shares = np.zeros((len(rows), len(centroids)), np.float32)
    shares[:, alive] = power / power.sum(axis=1, keepdims=True)
    return shares


def soft_subcategory_targets(
    labels: Sequence[int] | np.ndarray, shares: Sequence[Sequence[float]], num_classes: int, num_clusters: int
) -> np.ndarray:
    """(C*K,) float32: the shares of each parent class of the image in its block, 0 elsewhere.

    labels: class_index of each parent class of one image. shares: for each of them K values of 0..1.
    """
    lengths = [len(own) for own in shares]
    if lengths != [num_clusters] * len(labels):
        raise ValueError(
            f"got {len(labels)} labels and shares of lengths {lengths}, expected {num_clusters} for each label; "
            "cluster the features of this manifest again"
        )
    target = np.zeros((num_classes, num_clusters), np.float32)
    for class_index, own in zip(labels, shares, strict=True):
        if not 0 <= class_index < num_classes:
            raise ValueError(
                f"label is {class_index}, expected 0..{num_classes - 1}; use the class table of the manifest"
            )
        target[class_index] = own
    return target.ravel()
