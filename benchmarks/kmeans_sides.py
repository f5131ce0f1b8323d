"""What the k-means benchmark measures: our side, its peers, and the data they count.

The authors' side is their algorithm, not their code.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np
from sklearn.cluster import KMeans

from subcat_core.block_shard import BlockShard
from subcat_core.feature_blocks import FeatureBlock, ImageRows
from subcat_core.kmeans import kmeans
from subcat_core.kmeans_settings import KMeansSettings

NUM_IMAGES = 10_582
# fmt: off
IMAGES_PER_CLASS = (
    590, 504, 705, 468, 714, 393, 1150, 1005, 1228, 267, 613, 1188, 445, 492, 4155, 522, 300, 649, 503, 567,
)
# fmt: on
NUM_CLASSES, NUM_CLUSTERS = len(IMAGES_PER_CLASS), 10
ROWS_PER_BLOCK = 64
PASS_STEPS = 10
BEST_PEER = "scikit-learn, 10 starts"

Clusters = list[np.ndarray]


def power_law_features(num_rows: int, dimension: int, rng: np.random.Generator) -> np.ndarray:
    """(n, D) float32: Gaussian with standard deviation 1/sqrt(i) along a random orthogonal basis."""
    basis, _ = np.linalg.qr(rng.standard_normal((dimension, dimension)).astype(np.float32))
    scales = (np.arange(1, dimension + 1) ** -0.5).astype(np.float32)
    return (rng.standard_normal((num_rows, dimension)).astype(np.float32) * scales) @ basis


def draw_labels(rng: np.random.Generator) -> list[list[int]]:
    """A list of class_index an image, with VOC's number of images in every class."""
    labels: list[list[int]] = [[] for _ in range(NUM_IMAGES)]
    for class_index, count in enumerate(IMAGES_PER_CLASS):
        for row in rng.choice(NUM_IMAGES, count, replace=False):
            labels[row].append(class_index)
    return labels


def read_labels(table: Path, image_ids: Path) -> list[list[int]]:
    """The tags of the images listed in `image_ids`, one a line."""
    wanted = image_ids.read_text().split()
    with table.open(newline="") as file:
        rows = {row[0]: [i for i, value in enumerate(row[1:]) if value == "1"] for row in csv.reader(file)}
    return [rows[image_id] for image_id in wanted]


def our_blocks(
    features: np.ndarray, labels: Sequence[Sequence[int]], num_classes: int = NUM_CLASSES
) -> dict[int, FeatureBlock]:
    blocks = {}
    for block_id, start in enumerate(range(0, len(features), ROWS_PER_BLOCK)):
        stop = min(start + ROWS_PER_BLOCK, len(features))
        rows = ImageRows(
            [f"{row:06d}" for row in range(start, stop)],
            np.array([len(labels[row]) for row in range(start, stop)], np.int64),
            np.array([label for row in range(start, stop) for label in labels[row]], np.int64),
            features[start:stop],
        )
        blocks[block_id] = FeatureBlock(f"part-{block_id:05d}", rows, num_classes)
    return blocks


class Sides:
    """What is measured: each returns the total inertia of all classes."""

    def __init__(self, features: np.ndarray, labels: Sequence[Sequence[int]]) -> None:
        self.features, self.labels = features, labels
        self.members = [np.array([row for row, own in enumerate(labels) if c in own]) for c in range(NUM_CLASSES)]

    def named(self, quick: bool) -> dict[str, Callable[[], float]]:
        few: dict[str, Callable[[], float]] = {
            "ours": self.ours,
            "scikit-learn, 1 start": functools.partial(self.scikit_learn, 1),
        }
        if quick:
            return few
        return few | {
            BEST_PEER: functools.partial(self.scikit_learn, 10),
            "faiss, 10 starts": self.faiss_restarts,
            "stage: ours": self.our_stage,
            "stage: the authors'": self.authors_stage,
        }

    def ours(self) -> float:
        shard = BlockShard(our_blocks(self.features, self.labels), NUM_CLASSES)
        return float(kmeans(shard, KMeansSettings(num_clusters=NUM_CLUSTERS)).inertia.sum())

    def our_stage(self) -> float:
        """Clusters and the tables of sub-categories."""
        shard = BlockShard(our_blocks(self.features, self.labels), NUM_CLASSES)
        result = kmeans(shard, KMeansSettings(num_clusters=NUM_CLUSTERS))
        tables = []
        shard.write_labels(lambda _name, table: tables.append(table))
        assert sum(len(table) for table in tables) == len(self.features)
        return float(result.inertia.sum())

    def scikit_learn(self, num_starts: int) -> float:
        fits = (self._fit(rows, num_starts) for rows in self.members)
        return float(sum(fit.inertia_ for fit in fits))

    def _fit(self, rows: np.ndarray, num_starts: int) -> KMeans:
        return KMeans(NUM_CLUSTERS, n_init=num_starts, random_state=0).fit(self.features[rows])

    def authors_stage(self) -> float:
        """Ten starts a class, then their merging of the classes' labels (method only; the sources are not copied)."""
        fits = [self._fit(rows, 10) for rows in self.members]
        merge_labels(self.members, [fit.labels_ for fit in fits])
        return float(sum(fit.inertia_ for fit in fits))

    def faiss_restarts(self) -> float:
        """k-means++, ten starts, 25 steps each, all rows (faiss would take 256 a cluster)."""
        total = 0.0
        for members in self.members:
            rows = self.features[members]
            run = faiss.Kmeans(
                rows.shape[1],
                NUM_CLUSTERS,
                niter=25,
                nredo=10,
                seed=1,
                max_points_per_centroid=len(rows),
                init_method=getattr(faiss, "ClusteringInitMethod_KMEANS_PLUS_PLUS", 0),
            )
            run.train(rows)
            total += float(run.index.search(rows, 1)[0].sum(dtype=np.float64))
        return total


def merge_labels(members: Clusters, clusters: Clusters) -> tuple[list[str], np.ndarray]:
    """The published way from clusters to targets: one list of all pairs by class, then every name against every other.

    Returns (names of the images in the order they first appear, (n, C * K) float32 targets). O(M**2) in the M pairs.
    """
    names = [f"{row:06d}" for rows in members for row in rows]
    targets = np.zeros((len(names), NUM_CLASSES * NUM_CLUSTERS), np.float32)
    places = np.cumsum([0, *(len(rows) for rows in members)])
    for class_index, own in enumerate(clusters):
        pairs = np.arange(places[class_index], places[class_index + 1])
        targets[pairs, class_index * NUM_CLUSTERS + own] = 1
    repeats = [[j for j in range(i + 1, len(names)) if names[i] == names[j]] for i in range(len(names))]
    merged = set()
    for i, others in enumerate(repeats):
        for j in others:
            if i not in merged:
                targets[i] += targets[j]
            merged.add(j)
    kept = [i for i in range(len(names)) if i not in merged]
    return [names[i] for i in kept], targets[kept]


def pass_sides(features: np.ndarray, num_clusters: int) -> dict[str, Callable[[], float]]:
    """All rows as one class, one step and more from the same start; each returns the steps it made, to convergence.

    Each side goes once before it counts: memory that the side before gave back takes longer at its first touch, as
    long as ten passes of scikit-learn.
    """
    starts = features[:num_clusters].copy()
    blocks = our_blocks(features, [[0]] * len(features), 1)

    def ours(steps: int) -> int:
        shard = BlockShard(blocks, 1)  # forgets in which clusters the rows were: its first pass adds up all of them
        centroids = starts[None].copy()
        for step in range(steps):
            found = shard.assign(centroids, np.array([0]))
            if step and not found.num_changed[0]:
                return step + 1
            centroids[0] = found.sums[0] / np.maximum(found.counts[0], 1)[:, None]
        return steps

    def scikit_learn(steps: int) -> int:
        fit = KMeans(num_clusters, init=starts, n_init=1, max_iter=steps, tol=0, algorithm="lloyd")
        return int(fit.fit(features).n_iter_)

    def by_faiss(steps: int) -> int:
        run = faiss.Kmeans(features.shape[1], num_clusters, niter=steps, max_points_per_centroid=len(features))
        run.train(features, init_centroids=starts)
        return len(run.obj)

    made: dict[str, Callable[[], float]] = {}
    for name, side in (("ours", ours), ("faiss", by_faiss), ("scikit-learn", scikit_learn)):
        for label, steps in (("warm-up", 1), ("1", 1), (str(1 + PASS_STEPS), 1 + PASS_STEPS)):
            made[f"{name}, {label}"] = lambda side=side, steps=steps: side(steps)  # type: ignore[misc]
    return made


def many_rows(num_rows: int) -> dict[str, list[float]]:
    """Centres of two clusters whose true ones are 0.5 and 10.5, each of num_rows / 2 rows: more than float32 counts."""
    rows = np.tile(np.float32([0, 1, 10, 11]), num_rows // 4)[:, None]
    block = FeatureBlock.__new__(FeatureBlock)  # an image_id a row would take more memory than the rows
    block.name, block.features, block.norms = "part-00000", rows, rows[:, 0]
    block.pair_rows, block.class_offsets = np.arange(num_rows), np.array([0, num_rows])
    block.clusters, block.distances = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.float32)
    found = BlockShard({0: block}, 1).assign(np.float32([[[1], [10]]]), np.array([0]))
    run = faiss.Kmeans(1, 2, niter=1, max_points_per_centroid=num_rows)
    run.train(rows, init_centroids=np.float32([[1], [10]]))
    return {
        "ours": (found.sums[0, :, 0] / found.counts[0]).tolist(),
        "faiss": sorted(run.centroids[:, 0].tolist()),
    }
