"""k-means per parent class, written once over a FeatureShard: in memory, in one process, or on a cluster.

Legend: C parent classes, K sub-categories (clusters) of each, D feature dimensions, A classes still moving.
Source: Chang et al. 2020, section 3.2 (k-means of pooled features inside each parent class; the authors' code calls
scikit-learn with k-means++ and ten restarts). We differ in where the work is done: restarts run on a sample in a
projected space (seeding.py), then exact Lloyd passes run over all rows of all classes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from pydantic import Field

from subcat_core.seeding import seed_centroids
from subcat_core.settings import Settings

OnPass = Callable[[int, float, int], None]
TableSink = Callable[[str, pa.Table], None]


class KMeansSettings(Settings):
    """How each parent class is split into sub-categories."""

    num_clusters: int = Field(default=10, ge=1, le=1024)
    """K: sub-categories of each parent class; a class with fewer rows gets fewer."""
    num_restarts: int = Field(default=10, ge=1)
    """k-means++ starts in the projected space; the one of lowest inertia goes on."""
    max_passes: int = Field(default=50, ge=1)
    """Exact passes over all rows, at most; they stop earlier when no row changes its cluster."""
    sample_rows_per_class: int = Field(default=16384, ge=256)
    """Rows of a class that the restarts see; also bounds the driver's memory (times D times 4 bytes)."""
    projection_dims: int = Field(default=64, ge=1)
    """Principal components the restarts work in."""
    stored_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """How rows are cached while clustering; the others halve the memory, sums stay float64."""
    search: Literal["faiss", "numba"] = "faiss"
    """What finds the nearest centroid of a row on a GPU: faiss, or (numba) the compiled loop of lloyd.py, on the CPU.
    Without a GPU it is always the loop, which takes half the time of faiss there."""


@dataclasses.dataclass
class Sample:
    """Rows of one class. hashes: (n,) uint64, ascending; features: (n, D) float32, or (n, d) on some axes."""

    hashes: np.ndarray
    features: np.ndarray


@dataclasses.dataclass
class Assignment:
    """What one pass over the rows returns; its size does not depend on the number of rows.

    sums: (A, K, D) float64; counts: (A, K) int64; inertia: (A,) float64, squared distances to the own centroid;
    num_changed: (A,) int64, rows whose cluster is another than in the pass before.
    """

    sums: np.ndarray
    counts: np.ndarray
    inertia: np.ndarray
    num_changed: np.ndarray

    @classmethod
    def zeros(cls, num_classes: int, num_clusters: int, dimension: int) -> Assignment:
        return cls(
            np.zeros((num_classes, num_clusters, dimension)),
            np.zeros((num_classes, num_clusters), np.int64),
            np.zeros(num_classes),
            np.zeros(num_classes, np.int64),
        )

    def merged(self, other: Assignment) -> Assignment:
        """The sum of both, in new arrays; the same bits whichever comes first."""
        return Assignment(
            self.sums + other.sums,
            self.counts + other.counts,
            self.inertia + other.inertia,
            self.num_changed + other.num_changed,
        )

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + self.counts.nbytes + self.inertia.nbytes + self.num_changed.nbytes


@dataclasses.dataclass
class FarRows:
    """Rows of one class by falling distance to their own centroid, ties by rising image_id.

    distances: (n,) float32; image_ids: n strings; features: (n, D) float32.
    """

    distances: np.ndarray
    image_ids: list[str]
    features: np.ndarray

    @classmethod
    def merged(cls, parts: list[FarRows], num_rows: int) -> FarRows:
        distances = np.concatenate([part.distances for part in parts])
        image_ids = [image_id for part in parts for image_id in part.image_ids]
        order = sorted(range(len(image_ids)), key=lambda i: (-distances[i], image_ids[i]))[:num_rows]
        features = np.concatenate([part.features for part in parts])
        return cls(distances[order], [image_ids[i] for i in order], features[order])


class FeatureShard(Protocol):
    """Rows held somewhere; k-means asks these questions only."""

    @property
    def counts(self) -> np.ndarray:
        """(C,) int64: rows of each class; an image of two classes is a row of both."""
        ...

    @property
    def dimension(self) -> int:
        """D."""
        ...

    def sample(self, class_index: int, max_hash: int, rng_seed: int, axes: np.ndarray | None = None) -> Sample:
        """The rows of a class whose hash of (rng_seed, image_id) is at most max_hash (0..2**64-1).

        axes: (d, D) float32; with them, the rows times the axes are handed out, and not the rows.
        """
        ...

    def assign(self, centroids: np.ndarray, classes: np.ndarray) -> Assignment:
        """Give each row of `classes` (A,) its nearest centroid, ties to the lower cluster id, and remember it.

        centroids: (A, K, D) float32; clusters that do not exist are NaN and come last.
        """
        ...

    def farthest(self, class_index: int, num_rows: int) -> FarRows:
        """The rows that lay farthest from their centroid in the last `assign` of the class."""
        ...

    def write_labels(self, sink: TableSink) -> None:
        """Hand out what `assign` remembered, once: sink(name of the feature shard file, table of SUBCATEGORIES)."""
        ...


@dataclasses.dataclass
class KMeansResult:
    """Centroids and what the last pass found with them.

    centroids: (C, K, D) float32, NaN where a cluster does not exist (always the last ones of a class).
    counts: (C, K) int64. inertia: (C,) float64. balance: (C,) float64 in 0..1, entropy of the cluster sizes over
    log(number of clusters possible), 1 for a class of fewer than two rows. history: (num_passes,) float64, total
    inertia of each pass. converged: no row would change in another pass. peak_rss_bytes: of the largest process that
    took part, 0 where nobody measured it.
    """

    centroids: np.ndarray
    counts: np.ndarray
    inertia: np.ndarray
    balance: np.ndarray
    history: np.ndarray
    converged: bool
    peak_rss_bytes: int = 0

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


def kmeans(
    shard: FeatureShard, settings: KMeansSettings, *, rng_seed: int = 0, on_pass: OnPass | None = None
) -> KMeansResult:
    """Cluster the rows of every class of `shard`.

    rng_seed (>= 0) chooses the sample and the k-means++ draws; every class has its own generator.
    on_pass(pass_index, total inertia, rows that changed) is called after each exact pass. The rows' clusters stay in
    the shard (`write_labels`) and always belong to the centroids of the result.
    """
    rows = shard.counts
    shape = (len(rows), settings.num_clusters)
    centroids = seed_centroids(shard, settings, rng_seed)
    counts, inertia = np.zeros(shape, np.int64), np.zeros(len(rows))
    wanted = np.minimum(rows, settings.num_clusters)
    moving = np.flatnonzero(rows)
    history: list[float] = []
    while moving.size:
        found = shard.assign(centroids[moving], moving)
        counts[moving], inertia[moving] = found.counts, found.inertia
        history.append(float(inertia.sum()))
        if on_pass is not None:
            on_pass(len(history) - 1, history[-1], int(found.num_changed.sum()))
        if len(history) == settings.max_passes:
            # Rows were assigned to these centroids; moving them once more would leave labels of other centroids behind.
            moving = np.array([c for i, c in enumerate(moving) if found.num_changed[i] or len(history) == 1], np.int64)
            break
        goes_on = [
            _update_class(shard, centroids, wanted, int(c), found, i, first_pass=len(history) == 1)
            for i, c in enumerate(moving)
        ]
        moving = moving[np.array(goes_on, bool)]
    return KMeansResult(
        centroids, counts, inertia, _balance(counts, rows), np.array(history), converged=not moving.size
    )


def _update_class(
    shard: FeatureShard,
    centroids: np.ndarray,
    wanted: np.ndarray,
    class_index: int,
    found: Assignment,
    position: int,
    *,
    first_pass: bool,
) -> bool:
    """Move the centroids of one class to the means of their rows, in place; returns whether it needs another pass.

    Empty clusters go to the end and start again at the rows that lie farthest from their centroids. When every row lies
    on its centroid there is nothing left to split: `wanted` sinks to the clusters that have rows.
    """
    counts = found.counts[position]
    filled = np.flatnonzero(counts)
    if not first_pass and not found.num_changed[position] and len(filled) >= wanted[class_index]:
        return False
    means = (found.sums[position, filled] / counts[filled, None]).astype(np.float32)
    missing = int(wanted[class_index]) - len(filled)
    if missing > 0:
        far = shard.farthest(class_index, missing)
        off_centre = far.distances > 0
        if not off_centre.any():
            wanted[class_index] = len(filled)
        means = np.concatenate([means, far.features[off_centre]])
    centroids[class_index] = np.nan
    centroids[class_index, : len(means)] = means
    return True


def _balance(counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(C,) normalised entropy of cluster sizes: 1 when all are equal, 0 when one cluster took everything."""
    balance = np.ones(len(counts))
    for class_index, sizes in enumerate(counts):
        possible = min(int(rows[class_index]), len(sizes))
        if possible > 1:
            share = sizes[sizes > 0] / sizes.sum()
            balance[class_index] = abs(float((share * np.log(share)).sum())) / np.log(possible)
    return balance
