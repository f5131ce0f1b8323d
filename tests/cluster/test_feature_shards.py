"""The ladder: the oracle, faiss in this process, and 1, 2 and 4 actors; and what bad shard files lead to."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from cluster.faiss_search import FaissSearch
from cluster.feature_shards import FaissShard, LocalHolders, cluster_features, list_files, split_files
from cluster.shard_dispatch import DispatchedShard, ShardFile, ShardPlan, check_memory, image_rows
from cluster.storage import MissingFileError, Storage, StorageError
from cluster.streams import StreamSettings
from subcat_core import schemas
from subcat_core.kmeans import kmeans
from subcat_core.kmeans_result import KMeansResult
from subcat_core.kmeans_settings import KMeansSettings
from subcat_core.numpy_shard import NumpyShard
from subcat_core.seeding import component_axes
from tests.subcat_core.shards import block_shard, image_ids, labels_of, power_law, rows_of, separated

SETTINGS = KMeansSettings(num_clusters=4, sample_rows_per_class=256)
LOCAL = StreamSettings(num_actors=0)


def write_features(
    storage: Storage, labels: Sequence[Sequence[int]], features: np.ndarray, rows_per_file: int, dtype: str = "float32"
) -> list[str]:
    ids, names = image_ids(len(features)), []
    for number, start in enumerate(range(0, len(features), rows_per_file)):
        part = slice(start, start + rows_per_file)
        values = pa.array(features[part].astype(dtype).ravel())
        columns = [ids[part][::-1], list(labels[part])[::-1]]  # files need not be sorted
        stored = pa.FixedSizeListArray.from_arrays(values, features.shape[1]).take(
            pa.array(range(len(columns[0])))[::-1]
        )
        table = pa.table(
            [pa.array(columns[0]), pa.array(columns[1], schemas.LABELS), stored],
            names=["image_id", "labels", "feature"],
        )
        names.append(f"part-{number:05d}")
        storage.write_table(f"{names[-1]}.parquet", table.cast(schemas.features(features.shape[1], dtype)))
    return names


def fingerprint(result: KMeansResult, output: Storage, names: Sequence[str]) -> str:
    """A hash over every bit of the result and the tables."""
    digest = hashlib.sha256()
    for array in (result.centroids, result.counts, result.inertia, result.balance, result.history):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name in names:
        digest.update(output.read_bytes(f"{name}.parquet"))
    return digest.hexdigest()


def mixed(num_rows: int, dimension: int, rng: np.random.Generator) -> tuple[list[list[int]], np.ndarray]:
    labels = [sorted(rng.choice(3, rng.integers(0, 3), replace=False).tolist()) for _ in range(num_rows)]
    return labels, power_law(num_rows, dimension, rng)


def holders(
    storage: Storage,
    names: Sequence[str],
    num_holders: int,
    num_classes: int,
    holder_class: type[FaissShard] = FaissShard,
) -> DispatchedShard:
    """A dispatcher over FaissShards of this process."""
    files = list_files(storage, names)
    made = [holder_class(part, ShardPlan(num_classes, SETTINGS)) for part in split_files(files, num_holders)]
    for holder, part in zip(made, split_files(files, num_holders), strict=True):
        for file in part:
            holder.add(file.name, image_rows(file.name, storage.read_table(f"{file.name}.parquet")))
        holder.finish()
    return DispatchedShard(LocalHolders(made))


def test_faiss_agrees_with_the_oracle_on_separated_data(tmp_path: Path, rng: np.random.Generator) -> None:
    labels, features = separated(400, rng)
    oracle = NumpyShard(image_ids(400), labels, features, 3)
    expected = kmeans(oracle, SETTINGS)
    storage, output = Storage(str(tmp_path / "features")), Storage(str(tmp_path / "subcategories"))
    names = write_features(storage, labels, features, 37)
    found = cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=LOCAL)
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_allclose(found.inertia, expected.inertia, rtol=1e-6)
    tables = [output.read_table(f"{name}.parquet", schema=schemas.SUBCATEGORIES) for name in names]
    rows = [row for table in tables for row in table.to_pylist()]
    clusters = {(r["image_id"], c): k for r in rows for c, k in zip(r["labels"], r["cluster_ids"], strict=True)}
    assert clusters == labels_of(oracle)
    assert found.peak_rss_bytes > 0


def test_one_pass_agrees_with_the_oracle_on_general_data(tmp_path: Path, rng: np.random.Generator) -> None:
    labels, features = mixed(600, 96, rng)
    storage = Storage(str(tmp_path))
    names = write_features(storage, labels, features, 64)
    centroids = features[:12].reshape(3, 4, 96) + np.float32(0.01)
    expected = NumpyShard(image_ids(600), labels, features, 3).assign(centroids, np.arange(3))
    found = holders(storage, names, 3, 3).assign(centroids, np.arange(3))
    np.testing.assert_allclose(found.inertia, expected.inertia, rtol=1e-6)
    np.testing.assert_array_equal(found.counts, expected.counts)


def test_any_number_of_holders_and_any_order_give_the_same_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    labels, features = mixed(1500, 24, rng)  # more than the sample: several passes
    storage = Storage(str(tmp_path / "features"))
    names = write_features(storage, labels, features, 83)
    output = Storage(str(tmp_path / "in-process"))
    expected = cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=LOCAL)
    assert expected.num_passes > 3
    for num_holders in (1, 2, 3, 4, 9):
        order = rng.permutation(names).tolist()
        result = kmeans(holders(storage, order, num_holders, 3), SETTINGS)
        assert result.centroids.tobytes() == expected.centroids.tobytes()
        assert result.inertia.tobytes() == expected.inertia.tobytes()


def test_bytes_that_holders_answer_do_not_grow_with_the_rows(tmp_path: Path, rng: np.random.Generator) -> None:
    """Of every question that k-means puts, as it would be pickled on its way from an actor: `ask` is its one door."""
    found = []
    for num_rows in (1500, 6000):  # both more than the sample of a class
        sizes: dict[str, int] = {}

        class Measured(FaissShard):
            def ask(self, method: str, *args: Any, sizes: dict[str, int] = sizes) -> Any:
                answer = super().ask(method, *args)
                sizes[method] = max(sizes.get(method, 0), len(pickle.dumps(answer)))
                return answer

        storage = Storage(str(tmp_path / str(num_rows)))
        names = write_features(storage, *mixed(num_rows, 24, rng), num_rows // 8)
        shard = holders(storage, names, 2, 3, Measured)
        assert kmeans(shard, SETTINGS).num_passes > 3
        assert len(shard.farthest(0, 5).distances) == 5
        shard.write_labels(lambda name, table: None)
        found.append(sizes)
    few, many = found
    assert few.keys() == many.keys() >= {"describe", "sample", "assign", "farthest", "write_labels"}
    assert few["assign"] == many["assign"] < 2 * 3 * (4 * (24 + 1) + 2) * 8
    for method, size in many.items():
        assert size < 1.5 * few[method], method  # a sample has about as many rows as it should


def test_the_compiled_loop_finds_what_faiss_finds(rng: np.random.Generator) -> None:
    rows = power_law(500, 80, rng)
    centroids = np.concatenate([rows[:6], rows[2:4]])  # two of them twice: ties
    shard = block_shard([[0]] * 500, rows, 1)
    shard.assign(centroids[None], np.array([0]))
    expected = faiss.knn(rows, centroids, 1)[1][:, 0].tolist()
    assert [labels_of(shard)[image_id, 0] for image_id in image_ids(500)] == expected


def test_both_searches_cluster_alike(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = Storage(str(tmp_path / "features"))
    names = write_features(storage, *separated(200, rng), 50)
    prints = set()
    for search in ("faiss", "numba"):
        output = Storage(str(tmp_path / search))
        settings = SETTINGS.model_copy(update={"search": search})
        result = cluster_features(storage, names, output, num_classes=3, settings=settings, stream=LOCAL)
        prints.add(fingerprint(result, output, names))
    assert len(prints) == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_stored_as_float16(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    labels, features = separated(200, rng)
    storage = Storage(str(tmp_path / "features"))
    names = write_features(storage, labels, features, 50, dtype)
    settings = SETTINGS.model_copy(update={"stored_dtype": "float16"})
    result = cluster_features(storage, names, storage.child("out"), num_classes=3, settings=settings, stream=LOCAL)
    exact = kmeans(NumpyShard(image_ids(200), labels, features.astype(np.float16), 3), settings)
    np.testing.assert_array_equal(result.counts, exact.counts)
    np.testing.assert_allclose(result.inertia, exact.inertia, rtol=1e-6)


@pytest.mark.parametrize("stored_dtype", ["float32", "bfloat16"])
def test_rows_beyond_the_budget_lie_in_a_file_and_nothing_else_changes(
    tmp_path: Path, rng: np.random.Generator, stored_dtype: str
) -> None:
    storage = Storage(str(tmp_path / "features"))
    names = write_features(storage, *mixed(120, 8, rng), 30)
    prints = set()
    for cache_bytes in (None, 1000, 1):
        settings = SETTINGS.model_copy(update={"stored_dtype": stored_dtype, "cache_bytes": cache_bytes})
        output = Storage(str(tmp_path / str(cache_bytes)))
        result = cluster_features(storage, names, output, num_classes=3, settings=settings, stream=LOCAL)
        prints.add(fingerprint(result, output, names))
    assert len(prints) == 1
    files = list_files(storage, names)
    holder = FaissShard(files, ShardPlan(3, SETTINGS.model_copy(update={"cache_bytes": 1000})))
    assert holder.reserve().cache_bytes == 1000
    for file in files:
        holder.add(file.name, image_rows(file.name, storage.read_table(f"{file.name}.parquet")))
    assert on_disk(holder) == [False, True, True, True]
    axes = np.eye(8, dtype=np.float32)[:3]
    expected = [block.features[:, :3].copy() for _, block in sorted(holder._blocks.items())]
    num_descriptors = len(list(Path("/proc/self/fd").iterdir()))
    holder.finish()
    holder.ask("turn", axes)
    assert on_disk(holder) == [False, True, True, True]
    assert len(list(Path("/proc/self/fd").iterdir())) == num_descriptors
    for (_, block), features in zip(sorted(holder._blocks.items()), expected, strict=True):
        np.testing.assert_allclose(block.features, features, rtol=1e-6)


def on_disk(holder: FaissShard) -> list[bool]:
    """Whether the rows of each block are a part of a mapped file."""

    def owner(array: np.ndarray) -> object:
        while isinstance(array, np.ndarray) and array.base is not None:
            array = array.base
        return array

    return [not isinstance(owner(block.features), np.ndarray) for _, block in sorted(holder._blocks.items())]


def test_a_disk_that_is_full_names_tmpdir_and_the_setting(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "features"))
    names = write_features(storage, *mixed(120, 8, rng), 30)
    settings = SETTINGS.model_copy(update={"cache_bytes": 1})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError) as caught:
        cluster_features(storage, names, storage.child("out"), num_classes=3, settings=settings, stream=LOCAL)
    assert str(caught.value) == (
        f"{tempfile.gettempdir()}: cannot write 960 bytes of features that k-means keeps on disk, at byte 0: No space "
        "left on device; set TMPDIR to a folder with 3840 bytes free, raise kmeans.cache_bytes, or use more nodes"
    )


def test_a_lost_driver_goes_on_after_its_last_pass(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = Storage(str(tmp_path / "features"))
    names = write_features(storage, *mixed(1500, 24, rng), 400)

    def cluster(output: Storage, stop_after: int | None = None, rng_seed: int = 0) -> tuple[KMeansResult, list[int]]:
        seen: list[int] = []

        def on_pass(pass_index: int, *_: float) -> None:
            seen.append(pass_index)
            if pass_index == stop_after:
                raise KeyboardInterrupt

        arguments = {"settings": SETTINGS, "stream": LOCAL, "on_pass": on_pass, "rng_seed": rng_seed}
        return cluster_features(storage, names, output, num_classes=3, **arguments), seen  # type: ignore[arg-type]

    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))
    expected, passes = cluster(whole)
    with pytest.raises(KeyboardInterrupt):
        cluster(broken, stop_after=2)
    assert broken.exists("kmeans-progress.npz")
    result, resumed = cluster(broken)
    assert resumed == passes[2:]  # pass 2 had not been saved
    assert fingerprint(result, broken, names) == fingerprint(expected, whole, names)
    with pytest.raises(KeyboardInterrupt):
        cluster(broken, stop_after=2)
    assert cluster(broken, rng_seed=1)[1][0] == 0  # the state of other settings is not taken up
    with pytest.raises(KeyboardInterrupt):
        cluster(broken, stop_after=2)
    broken.write_bytes("kmeans-progress.npz", broken.read_bytes("kmeans-progress.npz")[:-100])
    assert cluster(broken)[1] == passes


def test_components_are_clustered_the_same_by_any_number_of_holders(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = Storage(str(tmp_path / "features"))
    labels, features = mixed(400, 24, rng)
    features[:, 0] += rng.standard_normal(400).astype(np.float32) * 30  # one direction drowns the others
    names = write_features(storage, labels, features, 60)
    found = {}
    for whiten in (False, True):
        settings = KMeansSettings(num_clusters=4, pca_dims=6, whiten=whiten)
        output = storage.child(f"out-{whiten}")
        result = cluster_features(storage, names, output, num_classes=3, settings=settings, stream=LOCAL)
        assert result.centroids.shape == (3, 4, 6)
        files = list_files(storage, names)
        shard = holders(storage, names, 3, 3)
        shard.turn(component_axes(shard, 6, whiten, 0))
        assert kmeans(shard, settings).centroids.tobytes() == result.centroids.tobytes()
        spread = np.nanstd(result.centroids, axis=(0, 1))
        found[whiten] = spread.max() / np.sort(spread)[-2]
        assert len(files) == 7
    assert found[False] > 3 * found[True]


def test_writing_twice_writes_the_same(tmp_path: Path, rng: np.random.Generator) -> None:
    storage, output = Storage(str(tmp_path / "features")), Storage(str(tmp_path / "subcategories"))
    names = write_features(storage, *mixed(120, 8, rng), 50)
    prints = {
        fingerprint(
            cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=LOCAL), output, names
        )
        for _ in range(2)
    }
    assert len(prints) == 1


def test_a_file_in_pieces_and_pieces_twice_is_one_block() -> None:
    rows = rows_of(image_ids(9), [[0]] * 9, np.arange(9, dtype=np.float32)[:, None])
    holder = FaissShard([ShardFile(0, "part-00000", 9, 1)], ShardPlan(1, SETTINGS))
    for piece in ([7, 8], [0, 1, 2], [7, 8], [3, 4, 5, 6], [0, 1, 2]):
        holder.add("part-00000", rows.taken(np.array(piece)))
    holder.finish()
    assert holder.shard.counts.tolist() == [9]
    found = holder.shard.assign(np.zeros((1, 1, 1), np.float32), np.array([0]))
    assert found.sums.item() == 36.0


def test_lost_rows_are_an_error() -> None:
    rows = rows_of(image_ids(9), [[0]] * 9, np.zeros((9, 1), np.float32))
    holder = FaissShard([ShardFile(0, "part-00004", 9, 1)], ShardPlan(1, SETTINGS))
    holder.add("part-00004", rows.taken(np.arange(8)))
    with pytest.raises(ValueError, match=r"part-00004: 8 rows arrived, expected 9; .* run the stage again"):
        holder.finish()


def test_an_image_twice_in_a_file_is_an_error() -> None:
    rows = rows_of(["a", "b", "a"], [[0]] * 3, np.zeros((3, 1), np.float32))
    holder = FaissShard([ShardFile(0, "part-00004", 3, 1)], ShardPlan(1, SETTINGS))
    holder.add("part-00004", rows)
    with pytest.raises(ValueError, match=r"part-00004: image_id 'a' occurs twice"):
        holder.finish()


def test_an_image_with_a_row_for_each_class_is_whole_when_all_came() -> None:
    rows = rows_of(["a", "b", "a"], [[11], [2], [2]], np.array([[1.0], [2.0], [3.0]], np.float32))
    holder = FaissShard([ShardFile(0, "part-00004", 3, 1)], ShardPlan(12, SETTINGS))
    for piece in ([0, 1], [0, 1], [2]):
        holder.add("part-00004", rows.taken(np.array(piece)))
    holder.finish()
    assert holder.shard.counts[[2, 11]].tolist() == [2, 1]


def test_a_cache_that_does_not_fit_is_refused() -> None:
    holder = FaissShard([ShardFile(0, "part-00000", 10**12, 4096)], ShardPlan(1, SETTINGS))
    assert holder.reserve().cache_bytes == 10**12 * 4096 * 4
    with pytest.raises(ValueError, match=r"k-means needs 16384\d*\.\d GB on one node .*stored_dtype = 'float16'"):
        check_memory([holder.reserve()])


def test_a_gpu_is_asked_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    asking, most = [], []

    def knn_gpu(resources: object, rows: np.ndarray, centroids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        asking.append(1)
        most.append(len(asking))
        time.sleep(0.01)
        asking.pop()
        return faiss.knn(rows, centroids, k)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu, raising=False)
    rows = rng.random((40, 8), np.float32)
    search = FaissSearch()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: search(rows, rows[:5]), range(8)))
    assert most == [1] * 8
    for ids in found:
        np.testing.assert_array_equal(ids, faiss.knn(rows, rows[:5], 1)[1][:, 0])


def test_an_empty_file_is_an_empty_block(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = Storage(str(tmp_path))
    names = write_features(storage, *mixed(60, 8, rng), 30)
    storage.write_table("part-00002.parquet", schemas.features(8, "float32").empty_table())
    names.append("part-00002")
    output = storage.child("out")
    cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=LOCAL)
    assert [len(output.read_table(f"{name}.parquet")) for name in names] == [30, 30, 0]


def test_dimensions_of_two_models_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = Storage(str(tmp_path))
    write_features(storage, *mixed(20, 8, rng), 10)
    storage.write_table("part-00001.parquet", schemas.features(9, "float32").empty_table())
    with pytest.raises(ValueError, match=r"part-00000 has 8, part-00001 has 9; expected one"):
        list_files(storage, ["part-00000", "part-00001"])


def test_other_columns_are_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_table("part-00000.parquet", pa.table({"image_id": ["a"], "labels": [[0]], "feature": [[1.0]]}))
    with pytest.raises(ValueError, match=r"part-00000: feature is list<.*expected a list of fixed size"):
        list_files(storage, ["part-00000"])
    storage.write_table("part-00000.parquet", pa.table({"image_id": ["a"]}))
    with pytest.raises(ValueError, match=r"part-00000: no column labels, feature"):
        list_files(storage, ["part-00000"])


def test_null_features_are_named() -> None:
    table = pa.table({"image_id": ["a", "b"], "labels": [[0], [0]], "feature": [[1.0], None]})
    table = table.set_column(2, "feature", table["feature"].cast(pa.list_(pa.float32(), 1)))
    with pytest.raises(ValueError, match=r"part-7: feature of row 1 \(image_id 'b'\) is null"):
        image_rows("part-7", table)


def test_null_labels_are_no_labels() -> None:
    feature = pa.array([[1.0], [2.0], [3.0]], pa.list_(pa.float32(), 1))
    labels = pa.array([[0, 1], None, [2]], schemas.LABELS)
    rows = image_rows("p", pa.table({"image_id": ["a", "b", "c"], "labels": labels, "feature": feature}).slice(1))
    assert rows.label_counts.tolist() == [0, 1]
    assert rows.label_values.tolist() == [2]
    assert rows.features.tolist() == [[2.0], [3.0]]


def test_truncated_and_missing_files_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = Storage(str(tmp_path))
    names = write_features(storage, *mixed(20, 8, rng), 10)
    path = tmp_path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StorageError, match=r"part-00001.parquet: truncated, not Parquet"):
        list_files(storage, names)
    with pytest.raises(MissingFileError, match=r"part-00009.parquet: cannot read: no such file"):
        list_files(storage, ["part-00000", "part-00009"])
    with pytest.raises(ValueError, match="got 0 feature shards"):
        list_files(storage, [])


@pytest.mark.parametrize("rows", [[5, 5, 5, 5], [100, 1, 1, 1], [1, 1, 1, 100], [0, 0, 0, 0], [3]])
def test_files_are_split_into_neighbours_and_none_is_left_out(rows: list[int]) -> None:
    files = [ShardFile(i, f"part-{i:05d}", num_rows, 4) for i, num_rows in enumerate(rows)]
    for num_parts in (1, 2, 3, 4, 7):
        parts = split_files(files, num_parts)
        assert [file for part in parts for file in part] == files
        assert len(parts) == min(num_parts, len(files))
        assert all(parts)
    assert [len(part) for part in split_files(files[:4], 2)] == [2, 2] or rows != [5, 5, 5, 5]
