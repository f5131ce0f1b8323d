"""The oracle: a FeatureShard in plain NumPy and float64, short and slow; every faster shard is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from subcat_core.feature_blocks import image_hashes
from subcat_core.kmeans import Assignment, FarRows, Sample, TableSink
from subcat_core.lloyd import project
from subcat_core.schemas import SUBCATEGORIES

_TILE_ROWS = 64


class NumpyShard:
    """All rows in memory, as one block; for tests, and for data that fits one process."""

    def __init__(
        self,
        image_ids: Sequence[str],
        labels: Sequence[Sequence[int]],
        features: np.ndarray,
        num_classes: int,
        name: str = "part-00000",
    ) -> None:
        """image_ids: n unique strings; labels: n lists of class_index; features: (n, D)."""
        order = sorted(range(len(image_ids)), key=lambda i: image_ids[i])
        self._image_ids = [image_ids[i] for i in order]
        self._labels = [list(labels[i]) for i in order]
        self._features = np.asarray(features, np.float32)[order].astype(np.float64)
        self._rows = [np.array([i for i, own in enumerate(self._labels) if c in own], int) for c in range(num_classes)]
        self._clusters = [np.full(len(rows), -1) for rows in self._rows]
        self._distances = [np.zeros(len(rows)) for rows in self._rows]
        self._name = name

    @property
    def counts(self) -> np.ndarray:
        return np.array([len(rows) for rows in self._rows], np.int64)

    @property
    def dimension(self) -> int:
        return int(self._features.shape[1])

    def sample(self, class_index: int, max_hash: int, rng_seed: int, axes: np.ndarray | None = None) -> Sample:
        rows = self._rows[class_index]
        hashes = image_hashes([self._image_ids[i] for i in rows], rng_seed)
        order = [i for i in np.argsort(hashes, kind="stable") if int(hashes[i]) <= max_hash]
        features = self._features[rows[order]].astype(np.float32)
        if axes is not None:
            points = np.empty((len(order), len(axes)), np.float32)
            project(features, np.arange(len(order)), axes, points)
            features = points
        return Sample(hashes[order], features)

    def assign(self, centroids: np.ndarray, classes: np.ndarray) -> Assignment:
        found = Assignment.zeros(*centroids.shape)
        for i, c in enumerate(classes):
            alive = centroids[i][~np.isnan(centroids[i][:, 0])].astype(np.float64)
            rows = self._features[self._rows[c]]
            tiles = [rows[start : start + _TILE_ROWS] for start in range(0, len(rows), _TILE_ROWS)]
            squares = np.concatenate([((tile[:, None] - alive) ** 2).sum(axis=2) for tile in tiles])
            clusters = squares.argmin(axis=1)
            for k in range(len(alive)):
                found.sums[i, k] = rows[clusters == k].sum(axis=0)
                found.counts[i, k] = (clusters == k).sum()
            found.inertia[i] = squares.min(axis=1).sum()
            found.num_changed[i] = (clusters != self._clusters[c]).sum()
            self._clusters[c], self._distances[c] = clusters, np.sqrt(squares.min(axis=1))
        return found

    def farthest(self, class_index: int, num_rows: int) -> FarRows:
        distances, rows = self._distances[class_index], self._rows[class_index]
        order = np.argsort(-distances, kind="stable")[:num_rows]
        image_ids = [self._image_ids[i] for i in rows[order]]
        return FarRows(distances[order].astype(np.float32), image_ids, self._features[rows[order]].astype(np.float32))

    def write_labels(self, sink: TableSink) -> None:
        cluster_of = {(int(r), c): i for c, rows in enumerate(self._rows) for i, r in enumerate(rows)}
        pairs = [[(c, cluster_of[r, c]) for c in own] for r, own in enumerate(self._labels)]
        columns = {
            "image_id": self._image_ids,
            "labels": self._labels,
            "cluster_ids": [[int(self._clusters[c][i]) for c, i in own] for own in pairs],
            "distances": [[float(self._distances[c][i]) for c, i in own] for own in pairs],
        }
        sink(self._name, pa.table(columns, schema=SUBCATEGORIES))
