"""Sub-category galleries: the images nearest to each centroid, from the first shards of a round, in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Storage, StorageError, read_uri
from jobs.manifest import Manifest
from subcat_core.images import ImageError, decode_image
from subcat_core.overlays import data_uri, square, to_jpeg

_TILE_PX = 88
_READ_THREADS = 8

# (distance, image_id, shard), so that sorting puts the nearest first and ties in a fixed order
Near = tuple[float, str, str]


@dataclasses.dataclass(frozen=True)
class ClusterTiles:
    """One sub-category: its number of images, and its nearest ones as (image_id, distance, data URI)."""

    class_index: int
    cluster_id: int
    num_images: int
    tiles: list[tuple[str, float, str]]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The sub-categories of one round. num_seen: rows that were searched for the nearest ones."""

    round_index: int
    clusters: list[ClusterTiles]
    num_seen: int


def make_galleries(
    storage: Storage,
    results: dict[int, dict[str, Any]],
    manifest: Manifest,
    *,
    num_nearest: int,
    max_rows: int,
    max_tiles: int,
) -> list[Gallery]:
    """A gallery a round that has sub-categories. results: result.json by round. manifest: what was clustered.

    At most max_tiles pictures on the whole page: then fewer a cluster, and then only the last rounds.
    """
    num_clusters = {index: sum(len(row) for row in result["counts"]) for index, result in results.items()}
    rounds = sorted(results)
    while len(rounds) > 1 and 2 * sum(num_clusters[index] for index in rounds) > max_tiles:
        rounds = rounds[1:]
    total = sum(num_clusters[index] for index in rounds)
    num_shown = max(1, min(num_nearest, max_tiles // max(total, 1)))
    names = manifest.shard_names("train")
    found = {index: nearest_rows(storage, index, names, num_shown, max_rows) for index in rounds}
    wanted = {(row[1], row[2]) for near, _ in found.values() for rows in near.values() for row in rows}
    pictures = _pictures(uris_of(manifest.folder, wanted))
    return [_gallery(index, results[index]["counts"], *found[index], pictures, max_tiles) for index in rounds]


def _gallery(
    round_index: int,
    counts: list[list[int]],
    near: dict[tuple[int, int], list[Near]],
    num_seen: int,
    pictures: dict[str, str],
    max_tiles: int,
) -> Gallery:
    clusters: list[ClusterTiles] = []
    for class_index, row in enumerate(counts):
        for cluster_id, num_images in enumerate(row):
            rows = near.get((class_index, cluster_id), []) if len(clusters) < max_tiles else []
            tiles = [(image_id, distance, pictures[image_id]) for distance, image_id, _ in rows if image_id in pictures]
            clusters.append(ClusterTiles(class_index, cluster_id, num_images, tiles))
    return Gallery(round_index, clusters, num_seen)


def _pictures(uris: dict[str, str]) -> dict[str, str]:
    """image_id -> data URI of its tile; those that cannot be read are left out."""
    ids = sorted(uris)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        tiles = pool.map(lambda image_id: _tile(uris[image_id]), ids)
        return {image_id: tile for image_id, tile in zip(ids, tiles, strict=True) if tile is not None}


def _tile(uri: str) -> str | None:
    try:
        return data_uri(to_jpeg(square(decode_image(read_uri(uri)), _TILE_PX), 78))
    except (ImageError, StorageError):
        return None


def nearest_rows(
    storage: Storage, round_index: int, shard_names: Iterable[str], num_nearest: int, max_rows: int
) -> tuple[dict[tuple[int, int], list[Near]], int]:
    """The rows nearest to each centroid: (class_index, cluster_id) -> [(distance, image_id, shard)], nearest first.

    Shards are read one at a time until max_rows rows were seen. Returns them with the number of rows seen.
    """
    nearest: dict[tuple[int, int], list[Near]] = {}
    num_seen = 0
    columns = ["image_id", "labels", "cluster_ids", "distances"]
    for name in shard_names:
        if num_seen >= max_rows:
            break
        try:
            table = storage.read_table(f"rounds/{round_index:02d}/subcategories/{name}.parquet", columns=columns)
        except FileNotFoundError:
            continue
        num_seen += table.num_rows
        for key, rows in _nearest_in_shard(table, name, num_nearest).items():
            nearest[key] = sorted([*nearest.get(key, []), *rows])[:num_nearest]
    return nearest, num_seen


def _nearest_in_shard(table: pa.Table, name: str, num_nearest: int) -> dict[tuple[int, int], list[Near]]:
    """As nearest_rows, for one table; arrays throughout, so that a large shard costs no Python objects a row."""
    lengths = pc.fill_null(pc.list_value_length(table["labels"]), 0).to_numpy()
    rows = np.repeat(np.arange(table.num_rows), lengths)
    labels, clusters, distances = (
        pc.list_flatten(table[column]).to_numpy(zero_copy_only=False)
        for column in ("labels", "cluster_ids", "distances")
    )
    order = np.lexsort((rows, distances, clusters, labels))
    found: dict[tuple[int, int], list[Near]] = {}
    if not len(order):
        return found
    keys = np.stack([labels[order], clusters[order]], axis=1)
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True):
        best = order[start : min(stop, start + num_nearest)]
        key = (int(keys[start][0]), int(keys[start][1]))
        found[key] = [(float(distances[i]), table["image_id"][int(rows[i])].as_py(), name) for i in best]
    return found


def uris_of(folder: Storage, wanted: Iterable[tuple[str, str]]) -> dict[str, str]:
    """image_id -> uri for (image_id, shard) pairs of a manifest's folder, reading each shard once."""
    by_shard: dict[str, set[str]] = {}
    for image_id, shard in wanted:
        by_shard.setdefault(shard, set()).add(image_id)
    found: dict[str, str] = {}
    for shard, ids in sorted(by_shard.items()):
        table = folder.read_table(f"{shard}.parquet", columns=["image_id", "uri"])
        kept = table.filter(pc.is_in(table["image_id"], pa.array(sorted(ids))))
        found.update(zip(kept["image_id"].to_pylist(), kept["uri"].to_pylist(), strict=True))
    return found
