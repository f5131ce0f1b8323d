"""Nearest centroids on a GPU, by faiss."""

from __future__ import annotations

import logging
import threading

import faiss
import numpy as np

logger = logging.getLogger("subcat")


class FaissSearch:
    """Nearest centroids by faiss on a GPU."""

    def __init__(self) -> None:
        self._resources = faiss.StandardGpuResources()
        self._lock = threading.Lock()

    def __call__(self, rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        """(n,) int32: the nearest of centroids (K, D) for rows (n, D), float32."""
        with self._lock:  # faiss: one StandardGpuResources serves one thread at a time
            return faiss.knn_gpu(self._resources, rows, centroids, 1)[1][:, 0].astype(np.int32)


def gpu_search() -> FaissSearch | None:
    """faiss on the GPU of this process; None, and a warning, where faiss sees none."""
    if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
        return FaissSearch()
    logger.warning("faiss sees no GPU; k-means goes on on the CPU")
    return None
