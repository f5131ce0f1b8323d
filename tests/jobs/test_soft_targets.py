"""Soft targets of feature shards: by hand, of rows of several classes, beside the clusters that k-means gave."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.feature_shards import cluster_features
from cluster.storage import Storage
from cluster.streams import StreamSettings
from jobs.soft_targets import CENTROIDS, SoftTargetWorker, centroid_table, read_centroids
from jobs.train_classifier import ClassifierSettings, ClassifierTrainee, _without_effect
from subcat_core import schemas
from subcat_core.kmeans_settings import KMeansSettings


def feature_table(ids: list[str], labels: list[list[int] | None], values: np.ndarray) -> pa.Table:
    schema = schemas.features(values.shape[1], "float32")
    return pa.table({"image_id": ids, "labels": labels, "feature": values.tolist()}, schema=schema)


def write_subcategories(folder: Storage, centroids: np.ndarray, counts: list[list[int]], inertia: list[float]) -> None:
    folder.write_table(CENTROIDS, centroid_table(centroids))
    folder.write_json("result.json", {"num_clusters": centroids.shape[1], "counts": counts, "inertia": inertia})


def test_centroids_come_back_as_they_were(tmp_path: Path, rng: np.random.Generator) -> None:
    centroids = rng.standard_normal((3, 4, 5)).astype(np.float32)
    centroids[1, 2:] = np.nan
    centroids[2] = np.nan
    folder = Storage(str(tmp_path))
    folder.write_table(CENTROIDS, centroid_table(centroids))
    np.testing.assert_array_equal(read_centroids(folder, 3, 4), centroids)


def test_a_folder_without_centroids_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"centroids.parquet: no such file, and .* = soft needs it; delete"):
        read_centroids(Storage(str(tmp_path)), 2, 2)


def test_a_shard_by_hand(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    centroids = np.array([[[0.0], [2.0]], [[5.0], [np.nan]]], np.float32)
    write_subcategories(folder, centroids, [[2, 2], [1, 0]], [4.0, 0.0])  # class 0: mean square 1
    worker = SoftTargetWorker(subcategories=folder, num_classes=2, temperature=3.0)
    table = feature_table(["b", "a", "c"], [[0, 1], None, [0]], np.array([[1.0], [7.0], [2.0]]))
    output = worker({"features": table})
    assert output.num_rows == 3
    assert output.table is not None
    assert output.table.schema == schemas.SOFT_TARGETS
    near = 1 / (1 + math.exp(-4 / 3))
    rows = output.table.to_pylist()
    assert [row["image_id"] for row in rows] == ["b", "a", "c"]
    assert [row["labels"] for row in rows] == [[0, 1], [], [0]]
    assert rows[0]["soft_targets"] == [[0.5, 0.5], [1.0, 0.0]]
    assert rows[1]["soft_targets"] == []
    np.testing.assert_allclose(rows[2]["soft_targets"], [[1 - near, near]], rtol=1e-6)


def test_the_largest_share_is_the_cluster_of_k_means(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = Storage(str(tmp_path))
    labels: list[list[int] | None] = [[[0], [1], [0, 1]][i % 3] for i in range(60)]
    table = feature_table([f"i{i:02d}" for i in range(60)], labels, rng.standard_normal((60, 3)))
    folder.child("features").write_table("part-00000.parquet", table)
    result = cluster_features(
        folder.child("features"),
        ["part-00000"],
        folder.child("clusters"),
        num_classes=2,
        settings=KMeansSettings(num_clusters=4),
        stream=StreamSettings(num_actors=0),
    )
    write_subcategories(folder, result.centroids, result.counts.tolist(), result.inertia.tolist())
    output = SoftTargetWorker(subcategories=folder, num_classes=2, temperature=1.0)({"features": table})
    assert output.table is not None
    hard = folder.child("clusters").read_table("part-00000.parquet").to_pylist()
    soft = output.table.to_pylist()
    assert [row["image_id"] for row in hard] == [row["image_id"] for row in soft]
    assert [row["cluster_ids"] for row in hard] == [np.argmax(row["soft_targets"], axis=1).tolist() for row in soft]
    spread = np.concatenate([row["soft_targets"] for row in soft])
    np.testing.assert_allclose(spread.sum(axis=1), 1, rtol=1e-6)
    assert spread.max() < 1


def test_rows_with_soft_targets_train_on_them() -> None:
    trainee = ClassifierTrainee(ClassifierSettings(), 2, 2)
    image = np.zeros((3, 4, 4), np.uint8)
    soft = trainee._sample(image, {"labels": [1], "soft_targets": [[0.25, 0.75]]})
    hard = trainee._sample(image, {"labels": [1], "cluster_ids": [1]})
    assert soft["sub"].tolist() == [0, 0, 0.25, 0.75]
    assert hard["sub"].tolist() == [0, 0, 0, 1]


def test_settings_without_effect_are_in_no_fingerprint() -> None:
    soft = ClassifierSettings(subcategory_targets="soft", soft_temperature=2.0)
    assert "subcategory_targets" in _without_effect(ClassifierSettings(soft_temperature=2.0), 1)
    assert "soft_temperature" in _without_effect(soft, 0)
    assert "subcategory_targets" not in _without_effect(soft, 1)
