"""The rows of one feature shard file as k-means wants them: checked, in one order, indexed by class.

Legend: C parent classes, K clusters, D feature dimensions, A classes in a pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from subcat_core import lloyd
from subcat_core.kmeans import Assignment, FarRows
from subcat_core.schemas import SUBCATEGORIES

Nearest = Callable[[np.ndarray, np.ndarray], np.ndarray]
_TILE_ROWS = 256  # rows gathered at once: they stay in the second-level cache for search and sums


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Features of n images as they come from a table, or of n pairs of image and class (features.pool = "region").

    image_ids: n strings; rows of one image have no label in common. label_counts: (n,) int64. label_values: class_index
    of every label, row after row.
    features: (n, D) float16 or float32.
    """

    image_ids: list[str]
    label_counts: np.ndarray
    label_values: np.ndarray
    features: np.ndarray

    def row_keys(self) -> list[str]:
        """n strings that tell the rows of a file apart: image_id with the row's first label."""
        labels = np.append(self.label_values, -1)  # a row without labels may stand at the end
        first = np.cumsum(self.label_counts) - self.label_counts
        firsts = np.where(self.label_counts > 0, labels[first], -1).tolist()
        return [f"{image_id}/{label}" for image_id, label in zip(self.image_ids, firsts, strict=True)]

    def taken(self, order: np.ndarray) -> ImageRows:
        """The images at positions `order`, in that order."""
        ends = np.cumsum(self.label_counts)
        values = [self.label_values[ends[i] - self.label_counts[i] : ends[i]] for i in order]
        return ImageRows(
            [self.image_ids[i] for i in order],
            self.label_counts[order],
            np.concatenate([*values, np.empty(0, np.int64)]).astype(np.int64),
            self.features[order],
        )


class FeatureBlock:
    """The rows of one feature shard file: images by rising image_id; (image, class) pairs index them by class."""

    def __init__(self, name: str, rows: ImageRows, num_classes: int, stored_dtype: str = "float32") -> None:
        """Raises ValueError naming file and image for NaN, infinity, bad labels or an image that occurs twice."""
        order = np.array(sorted(range(len(rows.image_ids)), key=rows.image_ids.__getitem__), np.int64)
        rows = rows.taken(order)
        self.name = name
        self.image_ids = rows.image_ids
        self.label_counts = rows.label_counts
        self.features = _checked_features(name, rows, stored_dtype)
        _check_labels(name, rows, num_classes)
        image_of_pair = np.repeat(np.arange(len(rows.image_ids)), rows.label_counts)
        self.by_class = np.argsort(rows.label_values, kind="stable")
        self.pair_rows = image_of_pair[self.by_class]
        self.label_values = rows.label_values
        pairs_per_class = np.bincount(rows.label_values, minlength=num_classes)
        self.class_offsets = np.concatenate([[0], np.cumsum(pairs_per_class)]).astype(np.int64)
        self.clusters = np.full(len(self.pair_rows), -1, np.int32)
        self.distances = np.zeros(len(self.pair_rows), np.float32)
        self._hashes: dict[int, np.ndarray] = {}

    @property
    def dimension(self) -> int:
        return int(self.features.shape[1])

    @property
    def counts(self) -> np.ndarray:
        """(C,) int64 rows of each class."""
        return np.diff(self.class_offsets)

    def pairs(self, class_index: int) -> slice:
        """Where the pairs of a class lie in pair_rows, clusters and distances."""
        return slice(int(self.class_offsets[class_index]), int(self.class_offsets[class_index + 1]))

    def hashes(self, class_index: int, rng_seed: int) -> np.ndarray:
        """(rows of the class,) uint64: the hash of (rng_seed, image_id), which decides what is in a sample."""
        if rng_seed not in self._hashes:
            self._hashes = {rng_seed: image_hashes(self.image_ids, rng_seed)}
        return self._hashes[rng_seed][self.pair_rows[self.pairs(class_index)]]

    def assign(self, centroids: np.ndarray, classes: np.ndarray, nearest: Nearest) -> Assignment:
        """As FeatureShard.assign, for the rows of this block: always tile after tile of one class."""
        found = Assignment.zeros(len(classes), centroids.shape[1], self.dimension)
        tile = np.empty((_TILE_ROWS, self.dimension), self.features.dtype)
        for i, class_index in enumerate(classes):
            alive = np.ascontiguousarray(centroids[i, ~np.isnan(centroids[i, :, 0])])
            pairs = self.pairs(int(class_index))
            for start in range(pairs.start, pairs.stop, _TILE_ROWS):
                part = slice(start, min(start + _TILE_ROWS, pairs.stop))
                rows = tile[: part.stop - part.start]
                np.take(self.features, self.pair_rows[part], axis=0, out=rows, mode="clip")
                rows = rows.astype(np.float32, copy=False)
                inertia, num_changed = lloyd.accumulate(
                    rows,
                    nearest(rows, alive),
                    alive,
                    self.clusters[part],
                    self.distances[part],
                    found.sums[i],
                    found.counts[i],
                )
                found.inertia[i] += inertia
                found.num_changed[i] += num_changed
        return found

    def farthest(self, class_index: int, num_rows: int) -> FarRows:
        pairs = self.pairs(class_index)
        order = np.argsort(-self.distances[pairs], kind="stable")[:num_rows] + pairs.start
        rows = self.pair_rows[order]
        image_ids = [self.image_ids[i] for i in rows]
        return FarRows(self.distances[order], image_ids, self.features[rows].astype(np.float32))

    def table(self) -> pa.Table:
        """The sub-categories of the images of this block, of schema SUBCATEGORIES."""
        clusters, distances = np.empty_like(self.clusters), np.empty_like(self.distances)
        clusters[self.by_class], distances[self.by_class] = self.clusters, self.distances
        offsets = pa.array(np.concatenate([[0], np.cumsum(self.label_counts)]).astype(np.int32))
        columns = [
            pa.array(self.image_ids, pa.string()),
            pa.ListArray.from_arrays(offsets, pa.array(self.label_values.astype(np.int32))),
            pa.ListArray.from_arrays(offsets, pa.array(clusters)),
            pa.ListArray.from_arrays(offsets, pa.array(distances)),
        ]
        return pa.Table.from_arrays(columns, schema=SUBCATEGORIES)


def _checked_features(name: str, rows: ImageRows, stored_dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(rows.features, dtype=stored_dtype)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        overflow = np.isfinite(rows.features[bad[0]]).all()
        found = "a value beyond float16" if overflow else "NaN or infinity"
        remedy = "cache rows as float32" if overflow else "extract the features of this shard again"
        raise ValueError(
            f"{name}: image_id {rows.image_ids[bad[0]]!r} has {found} in its feature ({len(bad)} such rows), "
            f"expected finite numbers; {remedy}"
        )
    return features


def _check_labels(name: str, rows: ImageRows, num_classes: int) -> None:
    row_of_label = np.repeat(np.arange(len(rows.image_ids)), rows.label_counts)
    outside = np.flatnonzero((rows.label_values < 0) | (rows.label_values >= num_classes))
    if len(outside):
        raise ValueError(
            f"{name}: image_id {rows.image_ids[row_of_label[outside[0]]]!r} has label {rows.label_values[outside[0]]}, "
            f"expected a class_index 0..{num_classes - 1}; use the class table these features were made with"
        )
    same = [first == second for first, second in zip(rows.image_ids, rows.image_ids[1:], strict=False)]
    image_of_row = np.arange(len(rows.image_ids)) - np.cumsum([False, *same])[: len(rows.image_ids)]
    keys = image_of_row[row_of_label] * num_classes + rows.label_values
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(twice):
        first, second = row_of_label[order[twice[0] : twice[0] + 2]]
        what = f"image_id {rows.image_ids[first]!r} {{}} label {rows.label_values[order[twice[0]]]}"
        if first == second:
            raise ValueError(f"{name}: {what.format('has')} twice, expected it once; dedupe")
        raise ValueError(
            f"{name}: {what.format('occurs twice with')}, expected one row for an image and class; "
            "extract this shard again"
        )


def image_hashes(image_ids: Sequence[str], rng_seed: int) -> np.ndarray:
    """(n,) uint64, uniform, the same on every machine: BLAKE2b keyed by rng_seed."""
    key = str(rng_seed).encode()
    digests = b"".join(hashlib.blake2b(image_id.encode(), digest_size=8, key=key).digest() for image_id in image_ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def nearest_numba(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n,) int32 nearest of centroids (K, D) float32 for rows (n, D) float32, by the compiled loop."""
    found = np.empty(len(rows), np.int32)
    lloyd.nearest(rows, centroids, found)
    return found
