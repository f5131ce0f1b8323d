"""k-means per parent class, written once over a FeatureShard: in memory, in one process, or on a cluster.

Legend: C parent classes, K sub-categories (clusters) of each, D feature dimensions, A classes still moving.
Source: Chang et al. 2020, section 3.2 (k-means of pooled features inside each parent class; the authors' code calls
scikit-learn with k-means++ and ten restarts). We differ in where the work is done: restarts run on a sample in a
projected space (seeding.py), then exact Lloyd passes run over all rows of all classes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa

from subcat_core.kmeans_result import KMeansResult
from subcat_core.kmeans_settings import KMeansSettings
from subcat_core.seeding import seed_centroids

OnPass = Callable[[int, float, int], None]
TableSink = Callable[[str, pa.Table], None]


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
class KMeansState:
    """All that is needed to go on after a pass, besides the rows; its size does not depend on their number.

    centroids: (C, K, D) float32 of the next pass; assigned: (C, K, D) float32, those that the rows were given last.
    wanted: (C,) int64 clusters of each class; moving: (A,) int64 classes of the next pass. counts, inertia, history: as
    in KMeansResult.
    """

    centroids: np.ndarray
    assigned: np.ndarray
    wanted: np.ndarray
    moving: np.ndarray
    counts: np.ndarray
    inertia: np.ndarray
    history: np.ndarray


class Checkpoint(Protocol):
    """Keeps the state of the last pass, so that a lost driver or actor costs one pass."""

    def load(self) -> KMeansState | None:
        """What was saved last by a run of the same rows and settings; None where there is nothing."""
        ...

    def save(self, state: KMeansState) -> None: ...


def kmeans(
    shard: FeatureShard,
    settings: KMeansSettings,
    *,
    rng_seed: int = 0,
    on_pass: OnPass | None = None,
    num_clusters: np.ndarray | None = None,
    checkpoint: Checkpoint | None = None,
) -> KMeansResult:
    """Cluster the rows of every class of `shard`.

    rng_seed (>= 0) chooses the sample and the k-means++ draws; every class has its own generator. num_clusters: (C,)
    clusters of each class, at most K (`KMeansSettings.clusters_of`); None: K. on_pass(pass_index, total inertia, rows
    that changed) is called after each exact pass. The rows' clusters stay in the shard (`write_labels`) and always
    belong to the centroids of the result. With a checkpoint it goes on where another call stopped, to the same bits.
    """
    state = checkpoint.load() if checkpoint is not None else None
    if state is None:
        state = _start(shard, settings, rng_seed, num_clusters)
    elif len(state.history):  # rows forgot their clusters: give them those of the last pass again
        present = np.flatnonzero(shard.counts)
        shard.assign(state.assigned[present], present)
    while state.moving.size and len(state.history) < settings.max_passes:
        num_changed = _one_pass(shard, settings, state)
        if on_pass is not None:
            on_pass(len(state.history) - 1, float(state.history[-1]), num_changed)
        if checkpoint is not None:
            checkpoint.save(state)
    possible = np.minimum(shard.counts, _clusters_at_most(shard.counts, settings, num_clusters))
    return KMeansResult(
        state.assigned,
        state.counts,
        state.inertia,
        _balance(state.counts, possible),
        state.history,
        converged=not state.moving.size,
    )


def _clusters_at_most(rows: np.ndarray, settings: KMeansSettings, num_clusters: np.ndarray | None) -> np.ndarray:
    """(C,) int64: what settings allow for classes of `rows` (C,) rows."""
    allowed = np.full(len(rows), settings.num_clusters) if num_clusters is None else num_clusters
    return np.minimum(allowed, np.maximum(1, rows // settings.min_rows_per_cluster))


def _start(
    shard: FeatureShard, settings: KMeansSettings, rng_seed: int, num_clusters: np.ndarray | None
) -> KMeansState:
    rows = shard.counts
    wanted = np.minimum(rows, _clusters_at_most(rows, settings, num_clusters))
    centroids = seed_centroids(shard, settings, rng_seed, wanted)
    if settings.spherical:
        centroids = _of_length_one(centroids)
    counts = np.zeros((len(rows), settings.num_clusters), np.int64)
    unassigned = np.full_like(centroids, np.nan)
    return KMeansState(
        centroids, unassigned, wanted, np.flatnonzero(rows), counts, np.zeros(len(rows)), np.empty(0, np.float64)
    )


def _one_pass(shard: FeatureShard, settings: KMeansSettings, state: KMeansState) -> int:
    """Assign the rows of the moving classes, then move their centroids; returns how many rows changed."""
    first_pass, moving = not len(state.history), state.moving
    found = shard.assign(state.centroids[moving], moving)
    state.assigned[moving] = state.centroids[moving]
    before = state.inertia[moving]
    state.counts[moving], state.inertia[moving] = found.counts, found.inertia
    state.history = np.append(state.history, state.inertia.sum())
    settled = before - found.inertia <= settings.tolerance * before if settings.tolerance else found.num_changed == 0
    goes_on = [
        _update_class(shard, settings, state, int(c), found, i, settled=bool(settled[i]) and not first_pass)
        for i, c in enumerate(moving)
    ]
    state.moving = moving[np.array(goes_on, bool)]
    return int(found.num_changed.sum())


def _update_class(
    shard: FeatureShard,
    settings: KMeansSettings,
    state: KMeansState,
    class_index: int,
    found: Assignment,
    position: int,
    *,
    settled: bool,
) -> bool:
    """Move the centroids of one class to the means of their rows, in place; returns whether it needs another pass.

    Empty clusters go to the end and start again at the rows that lie farthest from their centroids. When every row lies
    on its centroid there is nothing left to split: `wanted` sinks to the clusters that have rows.
    """
    counts = found.counts[position]
    filled = np.flatnonzero(counts)
    if settled and len(filled) >= state.wanted[class_index]:
        return False
    means = (found.sums[position, filled] / counts[filled, None]).astype(np.float32)
    if settings.spherical:
        means = _of_length_one(means)
    missing = int(state.wanted[class_index]) - len(filled)
    if missing > 0:
        far = shard.farthest(class_index, missing)
        off_centre = far.distances > 0
        if not off_centre.any():
            state.wanted[class_index] = len(filled)
        means = np.concatenate([means, far.features[off_centre]])
    state.centroids[class_index] = np.nan
    state.centroids[class_index, : len(means)] = means
    return True


def _of_length_one(centroids: np.ndarray) -> np.ndarray:
    """centroids (..., D), each divided by its norm; zeros stay."""
    norms = np.linalg.norm(centroids, axis=-1, keepdims=True)
    return (centroids / np.where(norms > 0, norms, 1)).astype(np.float32)


def _balance(counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(C,) normalised entropy of cluster sizes: 1 when all are equal, 0 when one cluster took everything.

    rows: (C,) rows, or clusters possible, of each class.
    """
    balance = np.ones(len(counts))
    for class_index, sizes in enumerate(counts):
        possible = min(int(rows[class_index]), len(sizes))
        if possible > 1:
            share = sizes[sizes > 0] / sizes.sum()
            balance[class_index] = abs(float((share * np.log(share)).sum())) / np.log(possible)
    return balance
