"""The manifest, the table of images that every stage starts from: how it is written in shards, opened and read."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from cluster.storage import MissingFileError, Storage
from subcat_core import schemas
from subcat_core.classes import ClassTable

FOLDER = "manifest"
CLASSES = "classes.json"
SHARDS = "shards.json"
MARKER = "marker.json"
_READ_THREADS = 8
_READ_AHEAD = 16


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One shard, of one split. num_masks: rows with ground truth."""

    name: str
    split: str
    num_rows: int
    num_masks: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A prepared data set: the class table, its shards in order of their names, and where they are.

    fingerprint: of settings, list files and the rows themselves; stages that read the manifest are made from it.
    """

    classes: ClassTable
    shards: list[ShardEntry]
    fingerprint: str
    folder: Storage

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order of their first shards."""
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def shard_names(self, split: str | None = None, with_masks: bool = False) -> list[str]:
        """Names ("part-00000") of a split's shards, or of all; with_masks: only those with some ground truth."""
        return [
            shard.name
            for shard in self.shards
            if (split is None or shard.split == split) and (shard.num_masks or not with_masks)
        ]

    def num_rows(self, split: str | None = None) -> int:
        """Images of a split, or of all."""
        return sum(shard.num_rows for shard in self.shards if split is None or shard.split == split)

    def num_rows_in(self, names: Iterable[str]) -> int:
        """Images in some shards."""
        chosen = set(names)
        return sum(shard.num_rows for shard in self.shards if shard.name in chosen)

    def num_masks(self, split: str | None = None) -> int:
        """Images with ground truth of a split, or of all."""
        return sum(shard.num_masks for shard in self.shards if split is None or shard.split == split)

    def rows(self, split: str | None, columns: list[str] | None = None, limit: int | None = None) -> pa.Table:
        """Rows of a split (None: all) in manifest order, as schemas.MANIFEST or its `columns`; at most `limit`.

        A split that is not there gives no rows. Raises StorageError where a shard cannot be read.
        """
        schema = schemas.MANIFEST
        if columns is not None:
            schema = pa.schema([schemas.MANIFEST.field(name) for name in columns])
        names, num_rows = [], 0
        for shard in self.shards:
            if (split is None or shard.split == split) and (limit is None or num_rows < limit):
                names.append(shard.name)
                num_rows += shard.num_rows
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            tables = pool.map(lambda name: self.folder.read_table(f"{name}.parquet", schema=schema), names)
            table = pa.concat_tables([schema.empty_table(), *tables])
        return table if limit is None else table.slice(0, limit)

    def joined(
        self, split: str, columns: list[str], join: Callable[[str, pa.Table], pa.Table] | None = None
    ) -> Iterator[pa.Table]:
        """The rows of `rows`, a shard at a time and read a few shards ahead: for manifests of any size.

        join(name, rows): adds columns to the rows of shard `name`, or drops rows; called in threads. A split that is
        not there gives one table without rows (and without joined columns).
        """
        schema = pa.schema([schemas.MANIFEST.field(name) for name in columns])

        def read(name: str) -> pa.Table:
            rows = self.folder.read_table(f"{name}.parquet", schema=schema)
            return rows if join is None else join(name, rows)

        names = self.shard_names(split)
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            ahead = collections.deque(pool.submit(read, name) for name in names[:_READ_AHEAD])
            for name in names[_READ_AHEAD:]:
                yield ahead.popleft().result()
                ahead.append(pool.submit(read, name))
            while ahead:
                yield ahead.popleft().result()
        if not names:
            yield schema.empty_table()


def open_manifest(storage: Storage, stage: str = "prepare") -> Manifest:
    """The manifest of a run's output (or the manifest folder itself). stage: which stage wrote it.

    Raises ValueError when the stage has not been completed there.
    """
    for folder in (storage.child(FOLDER), storage):
        try:
            marker = folder.read_json(MARKER)
            if marker["inputs"]["stage"] != stage:
                continue
        except (MissingFileError, KeyError):
            continue
        return Manifest(
            classes=ClassTable.from_json(folder.read_bytes(CLASSES)),
            shards=[ShardEntry(**entry) for entry in folder.read_json(SHARDS)],
            fingerprint=marker["stats"]["fingerprint"],
            folder=folder,
        )
    raise ValueError(
        f"{storage.uri()}: no manifest here (expected {FOLDER}/{MARKER}, written last by `subcat prepare`); "
        "run `subcat prepare CONFIG` first, or give the output folder of a run"
    )


def write_shards(
    folder: Storage, rows: Iterable[dict[str, Any]], rows_per_shard: int, schema: pa.Schema = schemas.MANIFEST
) -> list[ShardEntry]:
    """Cut rows into part-*.parquet of one split each, in order; holds at most rows_per_shard rows a split.

    rows: dicts of the schema's columns; those left out are null. Returns the entries for shards.json.
    """
    entries: list[ShardEntry] = []
    for split, part in _parts(rows, rows_per_shard):
        name = f"part-{len(entries):05d}"
        folder.write_table(f"{name}.parquet", pa.Table.from_pylist(part, schema))
        entries.append(ShardEntry(name, split, len(part), sum(row.get("mask_uri") is not None for row in part)))
    return entries


def write_index(folder: Storage, classes: ClassTable, shards: Iterable[ShardEntry]) -> None:
    """Write classes.json and shards.json beside the shards."""
    folder.write_bytes(CLASSES, classes.to_json().encode())
    folder.write_json(SHARDS, [dataclasses.asdict(shard) for shard in shards])


def _parts(rows: Iterable[dict[str, Any]], rows_per_shard: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(split, rows) of each shard: full ones as they come, the rests at the end in order of their splits."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        part = waiting.setdefault(row["split"], [])
        part.append(row)
        if len(part) == rows_per_shard:
            yield row["split"], part
            waiting[row["split"]] = []
    for split, part in waiting.items():
        if part:
            yield split, part
