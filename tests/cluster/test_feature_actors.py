"""k-means on a real Ray cluster: the same bits as in this process, from a disk and from S3, and clear errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from cluster import feature_actors
from cluster.feature_actors import _cpus_per_actor
from cluster.feature_shards import cluster_features
from cluster.shard_dispatch import ShardFile
from cluster.storage import Storage, StorageError
from cluster.streams import StreamSettings
from tests.cluster.test_feature_shards import LOCAL, SETTINGS, fingerprint, mixed, write_features


@pytest.mark.usefixtures("ray_cluster")
def test_one_two_and_four_actors_write_the_same_bits(storage_root: str, rng: np.random.Generator) -> None:
    features = Storage(storage_root).child("features")
    names = write_features(features, *mixed(500, 24, rng), 41)
    counts = (0, 1, 2, 4) if features.is_local else (0, 2)
    prints = set()
    for num_actors in counts:
        output = Storage(storage_root).child(f"out-{num_actors}")
        stream = StreamSettings(num_actors=num_actors)
        order = rng.permutation(names).tolist()
        result = cluster_features(features, order, output, num_classes=3, settings=SETTINGS, stream=stream, rng_seed=4)
        assert result.peak_rss_bytes > 0
        assert result.converged
        prints.add(fingerprint(result, output, names))
    assert len(prints) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_bad_row_in_an_actor_is_named_here(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = Storage(str(tmp_path))
    labels, features = mixed(60, 8, rng)
    features[47, 3] = np.nan
    names = write_features(storage, labels, features, 20)
    with pytest.raises(ValueError, match=r"^part-00002: image_id 'image-00047' has NaN or infinity"):
        cluster_features(
            storage, names, storage.child("out"), num_classes=3, settings=SETTINGS, stream=StreamSettings(num_actors=2)
        )
    assert storage.list_names("out") == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_deaths", [1, 2])
def test_a_dead_actor_starts_k_means_again_once(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, num_deaths: int
) -> None:
    storage = Storage(str(tmp_path))
    names = write_features(storage, *mixed(80, 8, rng), 20)
    local = storage.child("local")
    expected = cluster_features(storage, names, local, num_classes=3, settings=SETTINGS, stream=LOCAL)
    deaths: list[int] = []
    real_call = feature_actors._ActorPool.call

    def call(pool: feature_actors._ActorPool, method: str, *args: object) -> list[object]:
        if method == "assign_partials" and len(deaths) < num_deaths:
            deaths.append(1)
            ray.kill(pool.actors[-1])
        return real_call(pool, method, *args)

    monkeypatch.setattr(feature_actors._ActorPool, "call", call)
    output, stream = storage.child("out"), StreamSettings(num_actors=2)
    if num_deaths == 2:
        with pytest.raises(RuntimeError, match=r"died 2 times .* memory ran out"):
            cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=stream)
        return
    result = cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=stream)
    assert fingerprint(result, output, names) == fingerprint(expected, local, names)


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_dies_while_rows_are_fed_starts_k_means_again(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    names = write_features(storage, *mixed(80, 8, rng), 20)
    expected = cluster_features(storage, names, storage.child("local"), num_classes=3, settings=SETTINGS, stream=LOCAL)
    pools: list[object] = []
    real_feed = feature_actors._feed

    def feed(features: Storage, parts: Sequence[Sequence[ShardFile]], pool: feature_actors._ActorPool) -> None:
        if not pools:
            ray.kill(pool.actors[-1])
        pools.append(pool)
        real_feed(features, parts, pool)

    monkeypatch.setattr(feature_actors, "_feed", feed)
    output, stream = storage.child("out"), StreamSettings(num_actors=2)
    result = cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=stream)
    assert len(pools) == 2
    assert fingerprint(result, output, names) == fingerprint(expected, storage.child("local"), names)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        ("image_id", ValueError, r"^part-00001: image_id of row 3 \(image_id None\) is null, expected a value"),
        ("feature", StorageError, r"part-00001\.parquet: truncated, .* or of other types \(Expected all lists"),
    ],
)
def test_a_null_names_its_shard(
    tmp_path: Path, rng: np.random.Generator, column: str, error: type[Exception], message: str
) -> None:
    storage = Storage(str(tmp_path))
    names = write_features(storage, *mixed(40, 8, rng), 20)
    table = storage.read_table("part-00001.parquet")
    rows = table.to_pylist()
    rows[3][column] = None
    storage.write_table("part-00001.parquet", pa.Table.from_pylist(rows, table.schema))
    with pytest.raises(error, match=message):
        cluster_features(
            storage, names, storage.child("out"), num_classes=3, settings=SETTINGS, stream=StreamSettings(num_actors=2)
        )


@pytest.mark.usefixtures("ray_cluster")
def test_actors_leave_a_cpu_to_the_tasks_that_feed_them() -> None:
    total = ray.cluster_resources()["CPU"]
    assert _cpus_per_actor(2, StreamSettings(num_actors=2, cpus_per_actor=1.0)) == 1.0
    for num_actors in (1, int(total), 3 * int(total)):
        share = _cpus_per_actor(num_actors, StreamSettings(num_actors=num_actors, cpus_per_actor=total))
        assert 0 < share * num_actors <= total - 1
