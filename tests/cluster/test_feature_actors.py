"""k-means on a real Ray cluster: the same bits as in this process, from a disk and from S3, and clear errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from cluster import feature_actors, feature_shards
from cluster.feature_actors import _cpus_per_actor
from cluster.feature_shards import FaissShard, cluster_features
from cluster.placement import NodeSize
from cluster.shard_dispatch import ShardFile
from cluster.storage import Storage, StorageError
from cluster.streams import StreamSettings
from subcat_core.kmeans import Assignment
from tests.cluster.test_feature_shards import LOCAL, SETTINGS, fingerprint, mixed, write_features
from tests.subcat_core.shards import image_ids


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
def test_rows_that_are_not_finite_are_left_out_named_and_limited(tmp_path: Path, rng: np.random.Generator) -> None:
    storage, stream = Storage(str(tmp_path)), StreamSettings(num_actors=2)
    labels, features = mixed(60, 8, rng)
    features[47, 3] = np.nan
    names = write_features(storage, labels, features, 20)
    result = cluster_features(storage, names, storage.child("out"), num_classes=3, settings=SETTINGS, stream=stream)
    assert result.bad_rows == [("part-00002", "image-00047")]
    ids = storage.read_table("out/part-00002.parquet")["image_id"].to_pylist()
    assert ids == [image_id for image_id in image_ids(60)[40:] if image_id != "image-00047"]
    strict = stream.model_copy(update={"max_bad_frac": 0.0})
    with pytest.raises(ValueError, match=r"^1 of 60 features hold NaN .*part-00002: image_id 'image-00047'"):
        cluster_features(storage, names, storage.child("none"), num_classes=3, settings=SETTINGS, stream=strict)
    assert storage.list_names("none") == []


class Dying(FaissShard):
    """Ends its own process in the middle of its third pass, the first time: the file says that it happened."""

    death: Path

    def ask(self, method: str, *args: Any) -> Any:
        if method == "assign" and self._files.keys() == {"part-00000", "part-00001"}:
            passes = self.death.with_suffix(".passes")
            passes.write_text(passes.read_text() + "x" if passes.exists() else "x")
            if len(passes.read_text()) == 3 and not self.death.exists():
                self.death.write_text("")
                half = self._blocks[0].assign

                def die(*_: Any) -> None:
                    half(*_)
                    os.kill(os.getpid(), signal.SIGKILL)

                self._blocks[1].assign = die  # type: ignore[method-assign]
        return super().ask(method, *args)


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_killed_in_the_middle_of_a_pass_changes_no_bit(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "features"))
    names = write_features(storage, *mixed(1500, 8, rng), 375)
    local = storage.child("local")
    expected = cluster_features(storage, names, local, num_classes=3, settings=SETTINGS, stream=LOCAL)
    assert expected.num_passes > 4
    death = tmp_path / "death"
    monkeypatch.setattr(feature_shards, "FaissShard", type("Dying", (Dying,), {"death": death}))
    seen: list[int] = []
    output, stream = storage.child("out"), StreamSettings(num_actors=2)
    result = cluster_features(
        storage,
        names,
        output,
        num_classes=3,
        settings=SETTINGS,
        stream=stream,
        on_pass=lambda pass_index, *_: seen.append(pass_index),
    )
    assert death.exists()
    assert seen == list(range(expected.num_passes))  # it went on after the last whole pass
    assert fingerprint(result, output, names) == fingerprint(expected, local, names)
    assert "kmeans-progress.npz" not in output.list_names()


@pytest.mark.usefixtures("ray_cluster")
def test_actors_that_keep_dying_are_told(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    names = write_features(storage, *mixed(80, 8, rng), 20)
    real_total = feature_actors._ActorPool.total

    def total(pool: feature_actors._ActorPool, method: str, *args: object) -> Assignment:
        ray.kill(pool.actors[-1])
        return real_total(pool, method, *args)

    monkeypatch.setattr(feature_actors._ActorPool, "total", total)
    with pytest.raises(RuntimeError, match=r"died 2 times .* memory ran out"):
        cluster_features(
            storage, names, storage.child("out"), num_classes=3, settings=SETTINGS, stream=StreamSettings(num_actors=2)
        )


@pytest.mark.usefixtures("ray_cluster")
def test_deaths_count_since_the_last_whole_pass(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    names = write_features(storage, *mixed(1500, 8, rng), 375)
    expected = cluster_features(storage, names, storage.child("local"), num_classes=3, settings=SETTINGS, stream=LOCAL)
    deaths = [
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.NodeDiedError("the node is gone"),
        ray.exceptions.RayActorError(),
    ]
    seen: list[int] = []

    def on_pass(pass_index: int, *_: object) -> None:
        seen.append(pass_index)

    real_total = feature_actors._ActorPool.total

    def total(pool: feature_actors._ActorPool, method: str, *args: object) -> Assignment:
        if deaths and len(seen) == 4 - len(deaths):  # once in each of the passes 1, 2 and 3
            raise deaths.pop()
        return real_total(pool, method, *args)

    monkeypatch.setattr(feature_actors._ActorPool, "total", total)
    output, stream = storage.child("out"), StreamSettings(num_actors=1)
    result = cluster_features(storage, names, output, num_classes=3, settings=SETTINGS, stream=stream, on_pass=on_pass)
    assert not deaths
    assert seen == list(range(expected.num_passes))
    assert fingerprint(result, output, names) == fingerprint(expected, storage.child("local"), names)


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


def test_actors_leave_a_cpu_to_the_tasks_that_feed_them() -> None:
    node = [NodeSize(8.0, 0.0)]
    assert _cpus_per_actor(2, StreamSettings(num_actors=2, cpus_per_actor=1.0), node) == 1.0
    for num_actors in (1, 8, 24):
        share = _cpus_per_actor(num_actors, StreamSettings(num_actors=num_actors, cpus_per_actor=8.0), node)
        assert 0 < share * num_actors <= 7


def test_actors_take_no_more_than_a_node_has() -> None:
    wide = StreamSettings(num_actors=2, cpus_per_actor=8.0)
    assert _cpus_per_actor(2, wide, [NodeSize(4.0, 0.0)] * 3) == 4.0
    assert _cpus_per_actor(2, wide, [NodeSize(4.0, 0.0)] * 2) == 3.0
    assert _cpus_per_actor(2, wide, [NodeSize(0.0, 0.0)]) == 8.0  # the first machine is still to come


@pytest.mark.usefixtures("ray_cluster")
def test_gpus_that_no_node_has_are_an_error_and_not_a_wait(tmp_path: Path, rng: np.random.Generator) -> None:
    features = Storage(str(tmp_path))
    names = write_features(features, *mixed(50, 8, rng), 41)
    with pytest.raises(
        ValueError,
        match=r"cluster_features: 1 actor asks for 1 CPU and 0\.5 GPUs, and Ray Data's tasks 1 CPU; each must",
    ):
        cluster_features(
            features,
            names,
            features.child("out"),
            num_classes=3,
            settings=SETTINGS,
            stream=StreamSettings(num_actors=1, gpus_per_actor=0.5),
        )
