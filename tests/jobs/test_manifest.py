"""Shards of one split each, read back in order, wherever they are stored."""

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact
from cluster.storage import Storage, StorageError
from jobs import manifest as manifest_module
from jobs.joins import with_column
from jobs.manifest import Manifest, ShardEntry, open_manifest, write_index, write_shards
from subcat_core import schemas
from subcat_core.classes import ClassTable

CLASSES = ClassTable(("cat", "dog"))


def _rows(splits: str) -> list[dict]:
    """One row a letter: t train, v val; every second one has a mask."""
    names = {"t": "train", "v": "val"}
    return [
        {
            "image_id": f"{index}",
            "uri": f"/data/{index}.png",
            "split": names[split],
            "labels": [index % 2],
            "mask_uri": f"/masks/{index}.png" if index % 2 else None,
        }
        for index, split in enumerate(splits)
    ]


def _write(storage: Storage, splits: str, rows_per_shard: int) -> list[ShardEntry]:
    artifact = Artifact(storage, "manifest", {"stage": "prepare"})
    artifact.begin()
    entries = write_shards(artifact.folder, iter(_rows(splits)), rows_per_shard)
    write_index(artifact.folder, CLASSES, entries)
    artifact.commit({"fingerprint": "abc"})
    return entries


def test_shards_hold_one_split_and_keep_the_order(storage_root: str) -> None:
    storage = Storage(storage_root)
    entries = _write(storage, "tvttvtt", 2)
    assert entries == [
        ShardEntry("part-00000", "train", 2, 0),  # 0, 2
        ShardEntry("part-00001", "val", 2, 1),  # 1, 4
        ShardEntry("part-00002", "train", 2, 2),  # 3, 5
        ShardEntry("part-00003", "train", 1, 0),  # 6
    ]
    manifest = open_manifest(storage)
    assert manifest.shards == entries
    assert manifest.classes == CLASSES
    assert manifest.fingerprint == "abc"
    assert manifest.splits == ["train", "val"]
    assert manifest.rows("train", columns=["image_id"])["image_id"].to_pylist() == ["0", "2", "3", "5", "6"]
    assert manifest.num_rows_in(iter(["part-00003", "part-00001"])) == 3  # names are gone through once
    assert manifest.rows("val").schema == schemas.MANIFEST
    assert manifest.rows(None).num_rows == manifest.num_rows() == 7
    assert manifest.rows("train", limit=3)["image_id"].to_pylist() == ["0", "2", "3"]
    assert manifest.shard_names("train", with_masks=True) == ["part-00002"]
    assert manifest.shard_names(with_masks=True) == ["part-00001", "part-00002"]
    assert (manifest.num_rows("val"), manifest.num_masks("train"), manifest.num_masks()) == (2, 2, 3)
    assert open_manifest(storage.child("manifest")) == manifest


def test_a_split_that_is_not_there_is_empty(tmp_path: object) -> None:
    storage = Storage(str(tmp_path))
    _write(storage, "tt", 8)
    manifest = open_manifest(storage)
    assert manifest.shard_names("val") == []
    assert manifest.rows("val", columns=["uri", "labels"]).schema == pa.schema(
        [schemas.MANIFEST.field("uri"), schemas.MANIFEST.field("labels")]
    )


def test_nothing_prepared_is_a_clear_error(storage_root: str) -> None:
    with pytest.raises(ValueError, match=r"no manifest here.*subcat prepare"):
        open_manifest(Storage(storage_root))
    storage = Storage(storage_root)
    artifact = Artifact(storage, "manifest", {"stage": "prepare"})
    artifact.begin()
    write_shards(artifact.folder, _rows("tt"), 2)
    with pytest.raises(ValueError, match="no manifest here"):
        open_manifest(storage)


def test_a_truncated_shard_is_named(tmp_path: object) -> None:
    storage = Storage(str(tmp_path))
    _write(storage, "ttt", 2)
    data = storage.read_bytes("manifest/part-00001.parquet")
    storage.write_bytes("manifest/part-00001.parquet", data[: len(data) // 2])
    manifest: Manifest = open_manifest(storage)
    with pytest.raises(StorageError, match=r"part-00001.parquet.*truncated"):
        manifest.rows("train")


def test_joined_shards_are_the_joined_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_READ_AHEAD", 2)
    folder = Storage(str(tmp_path))
    rows = [{"image_id": f"i{n}", "uri": f"/{n}.png", "split": "val" if n % 4 == 0 else "train"} for n in range(30)]
    shards = write_shards(folder, rows, 3)
    others = {}
    for shard in shards:  # without the second row of each shard
        ids = folder.read_table(f"{shard.name}.parquet")["image_id"].to_pylist()
        others[shard.name] = pa.table({"image_id": ids[::2], "value": [int(image_id[1:]) for image_id in ids[::2]]})
    manifest = Manifest(CLASSES, shards, "", folder)
    columns = ["image_id", "uri"]
    joined = pa.concat_tables(manifest.joined("train", columns, lambda name, r: with_column(r, others[name], "value")))
    whole = with_column(manifest.rows("train", columns), pa.concat_tables(others.values()), "value")
    assert joined.num_rows == 15
    assert joined.equals(whole)
    assert pa.concat_tables(manifest.joined("val", columns)).equals(manifest.rows("val", columns))
    assert [table.num_rows for table in manifest.joined("test", columns)] == [0]
