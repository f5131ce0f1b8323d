"""k-means over feature shard files, inside Ray actors that Ray Data feeds; on a GPU faiss finds the nearest centroids.

Each actor owns neighbouring files and caches their rows (N * D * 2 or 4 bytes over all actors: the one thing here that
grows with the data). Rows go from storage to the actors and never through the driver; a pass returns sums and counts.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster.faiss_search import gpu_search
from cluster.feature_actors import with_actors
from cluster.kmeans_progress import StoredProgress, progress_key
from cluster.memory import free_bytes
from cluster.runtime import peak_rss_bytes
from cluster.shard_dispatch import (
    FEATURE_COLUMNS,
    Description,
    DispatchedShard,
    Holders,
    Reservation,
    ShardFile,
    ShardPlan,
    check_memory,
    feature_dimension,
    image_rows,
)
from cluster.spill_file import SpillFile, slot_bytes
from cluster.storage import Storage, StorageError
from cluster.streams import StreamSettings
from subcat_core.block_shard import BlockShard, check_dimensions
from subcat_core.feature_blocks import FeatureBlock, ImageRows
from subcat_core.kmeans import Assignment, OnPass, kmeans
from subcat_core.kmeans_result import KMeansResult
from subcat_core.kmeans_settings import KMeansSettings
from subcat_core.seeding import component_axes

logger = logging.getLogger("subcat")

_FOOTER_THREADS = 16
_MAX_DEATHS = 2  # of actors, without a whole pass between
_MAX_NAMED_ROWS = 5


class FaissShard:
    """The FeatureShard of some files: `add` rows in any order and any pieces, `finish`, then ask."""

    def __init__(self, files: Sequence[ShardFile], plan: ShardPlan) -> None:
        self._files = {file.name: file for file in files}
        self._plan = plan
        self._pieces: dict[str, list[ImageRows]] = {}
        self._blocks: dict[int, FeatureBlock] = {}
        self._cached_bytes = 0
        self._spill_file: SpillFile | None = None
        self._error: ValueError | StorageError | None = None
        self._shard: BlockShard | None = None

    def reserve(self) -> Reservation:
        """What the cache will take of which node's memory."""
        cache_bytes = sum(map(self._bytes_of, self._files.values()))
        if self._plan.settings.cache_bytes is not None:
            cache_bytes = min(cache_bytes, self._plan.settings.cache_bytes)
        node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "this machine"
        return Reservation(node_id, len(self._files), cache_bytes, free_bytes())

    def _bytes_of(self, file: ShardFile) -> int:
        return file.num_rows * file.dimension * (4 if self._plan.settings.stored_dtype == "float32" else 2)

    def add(self, name: str, rows: ImageRows) -> int:
        """Take rows of a file, copied. Rows that come twice (a retried reading) count once. Errors wait for finish."""
        file = self._files[name]
        if file.block_id not in self._blocks and self._error is None:
            copied = dataclasses.replace(rows, features=np.array(rows.features))
            self._pieces.setdefault(name, []).append(copied)
            if sum(len(piece.image_ids) for piece in self._pieces[name]) >= file.num_rows:
                self._try_to_seal(file)
        return len(rows.image_ids)

    def finish(self) -> None:
        """Check that every file is whole; raises the first ValueError, naming the shard file and the image.

        StorageError where the disk had no room for rows beyond `cache_bytes`.
        """
        for file in self._files.values():
            if file.block_id not in self._blocks and self._error is None:
                self._try_to_seal(file)
                self._error = self._error or self._why_not_whole(file)
        if self._error is not None:
            raise self._error
        plan = self._plan
        nearest = gpu_search() if plan.use_gpu and plan.settings.search == "faiss" else None
        self._shard = BlockShard(self._blocks, plan.num_classes, nearest, plan.num_threads)

    def _try_to_seal(self, file: ShardFile) -> None:
        """Make the block of a file once all its rows are there."""
        rows = _joined(self._pieces.get(file.name, []), file.dimension)
        first = np.unique(np.array(rows.row_keys(), np.str_), return_index=True)[1]
        if len(first) != file.num_rows:
            return
        if len(first) < len(rows.image_ids):
            rows = rows.taken(np.sort(first))
        settings = self._plan.settings
        try:
            block = FeatureBlock(
                file.name, rows, self._plan.num_classes, settings.stored_dtype, spherical=settings.spherical
            )
            if settings.cache_bytes is None or self._cached_bytes + block.features.nbytes <= settings.cache_bytes:
                self._cached_bytes += block.features.nbytes
            else:
                block.spill(self._slot(file))
            self._blocks[file.block_id] = block
        except (ValueError, StorageError) as error:
            self._error = error
        self._pieces.pop(file.name, None)

    def _slot(self, file: ShardFile) -> Callable[[np.ndarray], np.ndarray]:
        if self._spill_file is None:
            self._spill_file = SpillFile(sum(slot_bytes(self._bytes_of(file)) for file in self._files.values()))
        return self._spill_file.slot(self._bytes_of(file))

    def _why_not_whole(self, file: ShardFile) -> ValueError | StorageError | None:
        if file.block_id in self._blocks:
            return None
        ids = [key for piece in self._pieces.get(file.name, []) for key in piece.row_keys()]
        if len(ids) >= file.num_rows and len(ids) > len(set(ids)):
            seen: set[str] = set()
            twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            return ValueError(
                f"{file.name}: image_id {twice.rpartition('/')[0]!r} occurs twice, expected one row for an image and "
                "class; extract this shard again"
            )
        return ValueError(
            f"{file.name}: {len(ids)} rows arrived, expected {file.num_rows}; the file changed while it was read, "
            "or rows were lost on the way: run the stage again"
        )

    def describe(self) -> Description:
        return Description(self.shard.name, self.shard.dimension, self.shard.counts, self.shard.max_norm)

    @property
    def shard(self) -> BlockShard:
        assert self._shard is not None, "finish() comes before questions"
        return self._shard

    def bad_rows(self) -> list[tuple[str, str]]:
        """(shard file, image_id) of the rows that were left out, as not finite."""
        return [(block.name, image_id) for _, block in sorted(self._blocks.items()) for image_id in block.bad_image_ids]

    def merged(self, first: Assignment, second: Assignment) -> Assignment:
        """The sum of two holders' answers: so that a tree of actors adds them up."""
        return first.merged(second)

    def ask(self, method: str, *args: Any) -> Any:
        """Any question of a FeatureShard, and of this class, by name: the one door that an actor opens."""
        own: dict[str, Any] = {"describe": self.describe, "reserve": self.reserve, "finish": self.finish}
        own |= {"peak_rss": peak_rss_bytes, "bad_rows": self.bad_rows}
        return own[method]() if method in own else getattr(self.shard, method)(*args)


@dataclasses.dataclass
class LocalHolders:
    """Holders of this process."""

    holders: Sequence[FaissShard]

    def call(self, method: str, *args: Any) -> list[Any]:
        return [holder.ask(method, *args) for holder in self.holders]

    def total(self, method: str, *args: Any) -> Assignment:
        return functools.reduce(Assignment.merged, self.call(method, *args))


def _joined(pieces: Sequence[ImageRows], dimension: int) -> ImageRows:
    return ImageRows(
        [image_id for piece in pieces for image_id in piece.image_ids],
        np.concatenate([np.empty(0, np.int64), *(piece.label_counts for piece in pieces)]),
        np.concatenate([np.empty(0, np.int64), *(piece.label_values for piece in pieces)]),
        np.concatenate([piece.features for piece in pieces]) if pieces else np.empty((0, dimension), np.float32),
    )


@dataclasses.dataclass(frozen=True)
class TableWriter:
    """Writes the table of one block beside the feature shard of the same name; small when pickled."""

    output: Storage

    def __call__(self, name: str, table: pa.Table) -> None:
        self.output.write_table(f"{name}.parquet", table)


def cluster_features(
    features: Storage,
    shard_names: Sequence[str],
    output: Storage,
    *,
    num_classes: int,
    settings: KMeansSettings,
    stream: StreamSettings,
    rng_seed: int = 0,
    on_pass: OnPass | None = None,
    num_clusters: np.ndarray | None = None,
) -> KMeansResult:
    """Cluster the features of the named shards inside each parent class, and write their sub-category tables.

    features: folder of part-XXXXX.parquet of schemas.features. output: folder of tables of the same names, schema
    SUBCATEGORIES, rows by rising image_id. The result, and every table, has the same bits for any num_actors (0 works
    in this process, without Ray) and any order of shard_names; a GPU, or another kind of CPU, may differ in last bits.
    Calling it again writes the same again; where an actor or the driver was lost, it goes on after the last whole pass.
    Rows that are not finite are left out, logged, and named in the result (at most stream.max_bad_frac of all rows);
    ValueError names the shard file for other bad rows, StorageError bad files. num_clusters: see kmeans.
    """
    files = list_files(features, shard_names)
    plan = ShardPlan(num_classes, settings, use_gpu=stream.gpus_per_actor > 0)
    num_passes = 0

    def count_pass(pass_index: int, inertia: float, num_changed: int) -> None:
        nonlocal num_passes
        num_passes += 1
        if on_pass is not None:
            on_pass(pass_index, inertia, num_changed)

    def work(holders: Holders) -> KMeansResult:
        bad_rows = [row for rows in holders.call("bad_rows") for row in rows]
        _check_bad_rows(bad_rows, sum(file.num_rows for file in files), stream.max_bad_frac)
        shard = DispatchedShard(holders)
        if settings.pca_dims is not None:
            shard.turn(component_axes(shard, settings.pca_dims, settings.whiten, rng_seed))
        key = progress_key(shard, settings, rng_seed, num_clusters)
        progress = StoredProgress(output, key)
        result = kmeans(
            shard, settings, rng_seed=rng_seed, on_pass=count_pass, num_clusters=num_clusters, checkpoint=progress
        )
        shard.write_labels(TableWriter(output))
        progress.delete()
        return dataclasses.replace(result, bad_rows=bad_rows)

    if stream.num_actors > 0:
        parts = split_files(files, stream.num_actors)
        return with_actors(
            FaissShard, features, parts, plan, stream, work, max_deaths=_MAX_DEATHS, num_passes=lambda: num_passes
        )
    holder = FaissShard(files, plan)
    check_memory([holder.reserve()])
    for file in files:
        table = features.read_table(f"{file.name}.parquet", columns=FEATURE_COLUMNS)
        holder.add(file.name, image_rows(file.name, table))
    holder.finish()
    result = work(LocalHolders([holder]))
    return dataclasses.replace(result, peak_rss_bytes=peak_rss_bytes())


def _check_bad_rows(bad_rows: Sequence[tuple[str, str]], num_rows: int, max_bad_frac: float) -> None:
    if not bad_rows:
        return
    named = ", ".join(f"{name}: image_id {image_id!r}" for name, image_id in bad_rows[:_MAX_NAMED_ROWS])
    found = f"{len(bad_rows)} of {num_rows} features hold NaN or infinity ({named})"
    if len(bad_rows) > max_bad_frac * num_rows:
        raise ValueError(f"{found}, expected at most stream.max_bad_frac = {max_bad_frac}; extract those shards again")
    logger.warning("%s; they are left out", found)


def list_files(features: Storage, shard_names: Sequence[str]) -> list[ShardFile]:
    """The files by rising name, with what their footers say; raises before any row is read."""
    names = sorted(shard_names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"got {len(names)} feature shards, expected one or more, each once; extract features first")
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda name: _footer(features, name), names))
    check_dimensions({dimension: name for name, (_, dimension) in zip(names, footers, strict=True)})
    return [ShardFile(i, name, *footer) for i, (name, footer) in enumerate(zip(names, footers, strict=True))]


def _footer(features: Storage, name: str) -> tuple[int, int]:
    """(number of rows, D) of a file."""
    num_rows, schema = features.read_footer(f"{name}.parquet")
    return num_rows, feature_dimension(name, schema)


def split_files(files: Sequence[ShardFile], num_parts: int) -> list[list[ShardFile]]:
    """At most num_parts runs of neighbouring files, of about as many rows each, none empty."""
    num_parts = min(num_parts, len(files))
    ends = np.cumsum([file.num_rows for file in files])
    cuts = [0]
    for part in range(1, num_parts):
        cut = int(np.searchsorted(ends, ends[-1] * part / num_parts)) + 1
        cuts.append(min(max(cut, cuts[-1] + 1), len(files) - num_parts + part))
    return [list(files[start:stop]) for start, stop in zip(cuts, [*cuts[1:], len(files)], strict=True)]
