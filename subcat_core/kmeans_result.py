"""What k-means returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass
class KMeansResult:
    """Centroids and what the last pass found with them.

    centroids: (C, K, D) float32, NaN where a cluster does not exist (always the last ones of a class).
    counts: (C, K) int64. inertia: (C,) float64. balance: (C,) float64 in 0..1, entropy of the cluster sizes over
    log(number of clusters possible), 1 for a class of fewer than two rows. history: (num_passes,) float64, total
    inertia of each pass. converged: no row would change in another pass, or gains fell below settings.tolerance.
    bad_rows: (shard file, image_id) of rows that were left out, as not finite. peak_rss_bytes: of the largest process
    that took part, 0 where nobody measured it.
    """

    centroids: np.ndarray
    counts: np.ndarray
    inertia: np.ndarray
    balance: np.ndarray
    history: np.ndarray
    converged: bool
    peak_rss_bytes: int = 0
    bad_rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def num_passes(self) -> int:
        return len(self.history)

    @property
    def num_clusters(self) -> np.ndarray:
        """(C,) int64: clusters of each class that hold a row."""
        return (self.counts > 0).sum(axis=1)

    def summary(self) -> dict[str, Any]:
        """JSON-able numbers for markers, MLflow and the report; no centroids."""
        return {
            "inertia": float(self.inertia.sum()),
            "inertia_by_class": self.inertia.tolist(),
            "num_passes": self.num_passes,
            "converged": self.converged,
            "history": self.history.tolist(),
            "cluster_sizes": self.counts.tolist(),
            "balance_by_class": self.balance.tolist(),
            "balance": float(self.balance.mean()) if len(self.balance) else 1.0,
        }
