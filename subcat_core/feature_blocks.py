"""The rows of one feature shard file as k-means wants them: checked, in one order, indexed by class.

Legend: C parent classes, K clusters, D feature dimensions, A classes in a pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from subcat_core import lloyd
from subcat_core.kmeans import FarRows, Sample
from subcat_core.schemas import SUBCATEGORIES

Nearest = Callable[[np.ndarray, np.ndarray], np.ndarray]
_TILE_ROWS = 64  # rows widened at once: they stay in the cache for search and sums


@dataclasses.dataclass
class RunningSums:
    """Sums of one class that follow the clusters of its rows. sums: (K, D) float64; counts: (K,) int64, both of the
    caller; inertia and num_changed are those of the pass; magic, magic_of_squares: see lloyd.Grid.
    """

    sums: np.ndarray
    counts: np.ndarray
    magic: float
    magic_of_squares: float
    inertia: float = 0.0
    num_changed: int = 0


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

    def __init__(
        self, name: str, rows: ImageRows, num_classes: int, stored_dtype: str = "float32", spherical: bool = False
    ) -> None:
        """Images whose feature is not finite are left out: `bad_image_ids`. float32 features that come in the order of
        image_id are kept as they are, not copied. spherical: rows are brought to length 1.

        Raises ValueError naming file and image for bad labels or an image that occurs twice.
        """
        order = np.array(sorted(range(len(rows.image_ids)), key=rows.image_ids.__getitem__), np.int64)
        norms = _norms(rows.features)[order]
        finite = np.isfinite(norms)
        if not finite.all():
            finite |= np.isfinite(rows.features[order]).all(axis=1)
            if finite.all():
                raise ValueError(f"{name}: a feature is longer than 1.8e19, expected less; extract this shard again")
        self.bad_image_ids = [rows.image_ids[i] for i in order[~finite]]
        """Images left out: their feature holds NaN or infinity."""
        order = order[finite]
        if not np.array_equal(order, np.arange(len(rows.image_ids))):
            rows = rows.taken(order)
        self.name = name
        self.image_ids = rows.image_ids
        self.label_counts = rows.label_counts
        _check_labels(name, rows, num_classes)
        self._stored_dtype = stored_dtype
        self._move: Callable[[np.ndarray], np.ndarray] | None = None
        features, self.norms = rows.features, norms[finite]
        if spherical:
            self._keep(features / np.maximum(self.norms, np.finfo(np.float32).tiny)[:, None])
        elif features.dtype == stored_dtype:
            self.features = np.ascontiguousarray(features)
        else:
            self._keep(features)
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

    def turn(self, axes: np.ndarray) -> None:
        """Keep the rows times axes (d, D) float32 from here on, and not the rows; where the rows were moved to."""
        points = np.empty((len(self.image_ids), len(axes)), np.float32)
        for part, features, places in self._tiles(np.arange(len(points))):
            lloyd.project(features, places, axes, points[part])
        self._keep(points)
        if self._move is not None:
            self.features = self._move(self.features)

    def spill(self, move: Callable[[np.ndarray], np.ndarray]) -> None:
        """Move the rows to where they take no memory. move: writes an array there and returns it from there; a second
        array, not larger, takes the place of the first.
        """
        self._move = move
        self.features = move(self.features)

    def _keep(self, features: np.ndarray) -> None:
        """Cache features (n, D) as `stored_dtype`, with the norms of what is cached."""
        self.features = _stored(self.name, self.image_ids, features, self._stored_dtype)
        tiles = self._tiles(np.arange(len(features)), gathered=True)
        self.norms = np.concatenate([np.empty(0, np.float32), *(_norms(tile) for _, tile, _ in tiles)])

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

    def sample(self, class_index: int, max_hash: int, rng_seed: int, axes: np.ndarray | None) -> Sample:
        """As FeatureShard.sample, for the rows of this block, in their order."""
        keys = self.hashes(class_index, rng_seed)
        chosen = np.flatnonzero(keys <= np.uint64(max_hash))
        rows = self.pair_rows[self.pairs(class_index)][chosen]
        if axes is None:
            return Sample(keys[chosen], self.rows(rows))
        points = np.empty((len(rows), len(axes)), np.float32)
        for part, features, places in self._tiles(rows):
            lloyd.project(features, places, axes, points[part])
        return Sample(keys[chosen], points)

    def assign(self, class_index: int, targets: lloyd.Targets, sums: RunningSums, nearest: Nearest | None) -> None:
        """Give the rows of a class the nearest of its centroids, and bring `sums` to that. nearest: on a GPU."""
        pairs = self.pairs(class_index)
        for part, features, places in self._tiles(self.pair_rows[pairs], gathered=nearest is not None):
            own = slice(pairs.start + part.start, pairs.start + part.stop)
            state = (self.clusters[own], self.distances[own], sums.sums, sums.counts)
            grid = (sums.magic, sums.magic_of_squares)
            if nearest is not None:
                found = nearest(features, targets.centroids)
                inertia, num_changed = lloyd.settle(features, places, found, targets.centroids, *state, *grid)
            else:
                norms = self.norms if features is self.features else self.norms[self.pair_rows[own]]
                aim = (targets.centroids, targets.shifted, targets.offsets, targets.bound, targets.slack)
                inertia, num_changed = lloyd.assign_rows(features, norms, places, *aim, *state, *grid)
            sums.inertia += inertia
            sums.num_changed += num_changed

    def _tiles(self, rows: np.ndarray, gathered: bool = False) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(part of rows, features (m, D) float32, places (n,) of the part in them); all at once for float32."""
        if self.features.dtype == np.float32 and not gathered:
            yield slice(0, len(rows)), self.features, rows
            return
        for start in range(0, len(rows), _TILE_ROWS):
            part = slice(start, min(start + _TILE_ROWS, len(rows)))
            yield part, self.rows(rows[part]), np.arange(part.stop - start)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 of the images at `rows` (n,), copied."""
        taken = self.features[rows]
        if taken.dtype == np.uint16:  # bfloat16: the upper half of a float32
            return (taken.astype(np.uint32) << 16).view(np.float32)
        return taken.astype(np.float32, copy=False)

    def farthest(self, class_index: int, num_rows: int) -> FarRows:
        pairs = self.pairs(class_index)
        order = np.argsort(-self.distances[pairs], kind="stable")[:num_rows] + pairs.start
        rows = self.pair_rows[order]
        image_ids = [self.image_ids[i] for i in rows]
        return FarRows(self.distances[order], image_ids, self.rows(rows))

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


def _stored(name: str, image_ids: Sequence[str], features: np.ndarray, stored_dtype: str) -> np.ndarray:
    """(n, D) features as they are cached; bfloat16 as uint16, rounded to the nearest."""
    if stored_dtype == "bfloat16":
        bits = np.ascontiguousarray(features, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(features, dtype=stored_dtype)
    if stored_dtype == "float16" and features.dtype != np.float16:
        bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{name}: image_id {image_ids[bad[0]]!r} has a value beyond float16 in its feature ({len(bad)} such "
                "rows), expected at most 65504; cache rows as float32 or bfloat16"
            )
    return stored


def _norms(features: np.ndarray) -> np.ndarray:
    """(n,) float32 Euclidean norms of features (n, D); not finite where a value is not."""
    norms = np.empty(len(features), np.float32)
    for start in range(0, len(features), _TILE_ROWS):
        tile = features[start : start + _TILE_ROWS].astype(np.float32, copy=False)
        norms[start : start + _TILE_ROWS] = np.sqrt(np.einsum("nd,nd->n", tile, tile))
    return norms


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
