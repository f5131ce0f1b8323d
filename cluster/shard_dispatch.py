"""A FeatureShard made of many: asks every holder of blocks and puts their answers together.

It knows nothing of Ray: `call` asks all holders, which may be actors or objects of this process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from subcat_core.block_shard import check_dimensions, merge_samples
from subcat_core.feature_blocks import ImageRows
from subcat_core.kmeans import Assignment, FarRows, Sample, TableSink
from subcat_core.kmeans_result import KMeansResult
from subcat_core.kmeans_settings import KMeansSettings
from subcat_core.lloyd import Grid

FEATURE_COLUMNS = ["image_id", "labels", "feature"]
_FREE_MEMORY_FRAC = 0.8


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A feature shard file: its block id is its place among the sorted names of all files."""

    block_id: int
    name: str
    num_rows: int
    dimension: int


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """What every holder of rows must know."""

    num_classes: int
    settings: KMeansSettings
    num_threads: int = 1
    use_gpu: bool = False


class Reservation(NamedTuple):
    """What one holder's cache will take, and what its node has free before any of them is filled."""

    node_id: str
    num_files: int
    cache_bytes: int
    free_bytes: int


class Description(NamedTuple):
    """What a holder says of its rows: a shard file of them, D, rows of each class (C,), the norm of the longest."""

    name: str
    dimension: int
    counts: np.ndarray
    max_norm: float


def check_memory(reservations: Sequence[Reservation]) -> None:
    """ValueError where the caches of all holders on one node take more than _FREE_MEMORY_FRAC of what it has free."""
    for node_id in dict.fromkeys(reservation.node_id for reservation in reservations):
        here = [reservation for reservation in reservations if reservation.node_id == node_id]
        cache_bytes = sum(reservation.cache_bytes for reservation in here)
        free_bytes = min(reservation.free_bytes for reservation in here)
        if cache_bytes > free_bytes * _FREE_MEMORY_FRAC:
            raise ValueError(
                f"k-means needs {cache_bytes / 1e9:.1f} GB on one node ({node_id}) to cache "
                f"{sum(reservation.num_files for reservation in here)} feature shards, and {free_bytes / 1e9:.1f} GB "
                "are free there; use kmeans.cache_bytes or kmeans.stored_dtype = 'float16', or more nodes and actors"
            )


class Holders(Protocol):
    """What a dispatcher asks: all holders of rows, wherever they are."""

    def call(self, method: str, *args: Any) -> Sequence[Any]:
        """The answer of each holder, in the order of their blocks."""
        ...

    def total(self, method: str, *args: Any) -> Assignment:
        """The sum of the answers of all; only the sum comes here."""
        ...


class DispatchedShard:
    """The same questions as one BlockShard, put to several that hold neighbouring blocks of one data set."""

    def __init__(self, holders: Holders) -> None:
        """Raises ValueError, naming two shard files, when the holders' rows have different dimensions."""
        self._holders = holders
        self._describe()
        self.pass_bytes = 0
        """Bytes that came here in the last pass: independent of the number of rows, and of holders."""

    def _describe(self) -> None:
        holders = self._holders
        descriptions = holders.call("describe")
        check_dimensions({found.dimension: found.name for found in descriptions})
        self._dimension = descriptions[0].dimension if descriptions else 0
        self._counts = np.sum([found.counts for found in descriptions], axis=0)
        max_norm = max((found.max_norm for found in descriptions), default=0.0)
        holders.call("use_grid", Grid(max_norm, int(self._counts.max(initial=0))))

    def turn(self, axes: np.ndarray) -> None:
        """Go on with the rows times axes (d, D) float32; before the first pass."""
        self._holders.call("turn", axes)
        self._describe()

    @property
    def counts(self) -> np.ndarray:
        return self._counts

    @property
    def dimension(self) -> int:
        return self._dimension

    def sample(self, class_index: int, max_hash: int, rng_seed: int, axes: np.ndarray | None = None) -> Sample:
        return merge_samples(self._holders.call("sample", class_index, max_hash, rng_seed, axes))

    def assign(self, centroids: np.ndarray, classes: np.ndarray) -> Assignment:
        found = self._holders.total("assign", centroids, classes)
        self.pass_bytes = found.nbytes
        return found

    def farthest(self, class_index: int, num_rows: int) -> FarRows:
        return FarRows.merged(list(self._holders.call("farthest", class_index, num_rows)), num_rows)

    def write_labels(self, sink: TableSink) -> None:
        """The holders call `sink` where they are: labels never pass through here."""
        self._holders.call("write_labels", sink)


Work = Callable[[Holders], KMeansResult]


def feature_dimension(name: str, schema: pa.Schema) -> int:
    """D of a table of features; ValueError naming the file where its columns are not those of schemas.features."""
    missing = [column for column in FEATURE_COLUMNS if column not in schema.names]
    if missing:
        raise ValueError(f"{name}: no column {', '.join(missing)}, expected {FEATURE_COLUMNS}; extract features again")
    kind = schema.field("feature").type
    if not pa.types.is_fixed_size_list(kind):
        raise ValueError(f"{name}: feature is {kind}, expected a list of fixed size; extract features again")
    return int(kind.list_size)


def image_rows(name: str, table: pa.Table) -> ImageRows:
    """The images of a table of features; raises ValueError where image_id or feature is null."""
    dimension = feature_dimension(name, table.schema)
    for column in ("image_id", "feature"):
        if table[column].null_count:
            row = pc.index(pc.is_null(table[column]), True).as_py()
            raise ValueError(
                f"{name}: {column} of row {row} (image_id {table['image_id'][row].as_py()!r}) is null, "
                "expected a value; extract the features of this shard again"
            )
    labels = table["labels"].combine_chunks()
    values = table["feature"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return ImageRows(
        table["image_id"].to_pylist(),
        pc.fill_null(pc.list_value_length(labels), 0).to_numpy(zero_copy_only=False).astype(np.int64),
        labels.flatten().to_numpy(zero_copy_only=False).astype(np.int64),
        values.reshape(len(table), dimension),
    )
