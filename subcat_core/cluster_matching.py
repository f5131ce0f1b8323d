"""Which cluster of one round is which of the round before: the one-to-one match that most images agree with."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def count_pairs(
    labels: np.ndarray, newer: np.ndarray, older: np.ndarray, num_classes: int, num_clusters: int
) -> np.ndarray:
    """(C, K, K) int64: images of a class in cluster i of the newer and cluster j of the older clustering.

    labels, newer, older: (n,) integers, for each pair of image and class its class_index and its two cluster ids. Such
    tables of several shards add up.
    """
    keys = (labels.astype(np.int64) * num_clusters + newer) * num_clusters + older
    counts = np.bincount(keys, minlength=num_classes * num_clusters**2)
    return counts.astype(np.int64).reshape(num_classes, num_clusters, num_clusters)


def match_clusters(counts: np.ndarray) -> np.ndarray:
    """(C, K) int64: for each newer cluster the older one it is matched with, a permutation of 0..K-1 in each class.

    counts: (C, K, K) of `count_pairs`. The match of most images in common (Kuhn 1955, by scipy); clusters without
    images in common take what is left.
    """
    return np.stack([linear_sum_assignment(own, maximize=True)[1] for own in counts]).astype(np.int64)
