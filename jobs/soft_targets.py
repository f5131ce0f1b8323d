"""Soft sub-category targets: how near the features of each training image lie to every centroid of its classes.

Reads:   features, and sub-categories (result.json, centroids.parquet), of the round before
Writes:  rounds/RR/classifier/soft_targets: part-*.parquet of image_id, labels, soft_targets (K values a label)
Runs on: a fixed pool of Ray Data actors, a shard at a time; in process with stream.num_actors = 0. A part of
         train_classifier, with classifier.subcategory_targets = "soft"
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import MissingFileError, Storage
from cluster.streams import ShardOutput, map_shards
from jobs.context import StageContext, round_folder
from jobs.manifest import Manifest
from subcat_core import schemas
from subcat_core.subcategories import soft_shares

CENTROIDS = "centroids.parquet"


def centroid_table(centroids: np.ndarray) -> pa.Table:
    """(C, K, D) float32, NaN where a cluster does not exist -> schemas.centroids, a row for each that does."""
    classes, clusters = np.nonzero(~np.isnan(centroids[:, :, 0]))
    schema = schemas.centroids(centroids.shape[2])
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(centroids[classes, clusters].ravel()), type=schema.field("centroid").type
    )
    columns = [pa.array(classes, pa.int32()), pa.array(clusters, pa.int32()), values]
    return pa.Table.from_arrays(columns, schema=schema)


def read_centroids(folder: Storage, num_classes: int, num_clusters: int) -> np.ndarray:
    """(C, K, D) float32 of a sub-categories folder. ValueError where there are none: an earlier version wrote it."""
    try:
        table = folder.read_table(CENTROIDS)
    except MissingFileError as error:
        raise ValueError(
            f"{folder.uri(CENTROIDS)}: no such file, and classifier.subcategory_targets = soft needs it; delete "
            f"{folder.uri()} and cluster again"
        ) from error
    values = table["centroid"].combine_chunks()
    dimension = values.type.list_size
    centroids = np.full((num_classes, num_clusters, dimension), np.nan, np.float32)
    rows = np.asarray(values.flatten(), np.float32).reshape(-1, dimension)
    centroids[table["class_index"].to_numpy(), table["cluster_id"].to_numpy()] = rows
    return centroids


class SoftTargetWorker:
    """One actor: holds the centroids, turns a feature shard into a shard of soft targets."""

    def __init__(self, *, subcategories: Storage, num_classes: int, temperature: float) -> None:
        result = subcategories.read_json("result.json")
        self.centroids = read_centroids(subcategories, num_classes, result["num_clusters"])
        num_rows = np.maximum(1, np.sum(result["counts"], axis=1))
        self.scales = temperature * np.array(result["inertia"], np.float64) / num_rows

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        table = inputs["features"]
        lengths = pc.fill_null(pc.list_value_length(table["labels"]), 0).to_numpy()
        labels = pc.list_flatten(table["labels"]).to_numpy()
        rows = np.repeat(np.arange(table.num_rows), lengths)
        _, num_clusters, dimension = self.centroids.shape
        values = table["feature"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        features = values.reshape(table.num_rows, dimension)
        shares = np.zeros((len(labels), num_clusters), np.float32)
        for class_index in np.unique(labels):
            own = np.flatnonzero(labels == class_index)
            shares[own] = soft_shares(features[rows[own]], self.centroids[class_index], self.scales[class_index])
        ends = pa.array(np.arange(len(labels) + 1) * num_clusters, pa.int32())
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        columns = [
            table["image_id"].combine_chunks(),
            pa.ListArray.from_arrays(offsets, pa.array(labels, pa.int32())),
            pa.ListArray.from_arrays(offsets, pa.ListArray.from_arrays(ends, pa.array(shares.ravel()))),
        ]
        return ShardOutput(pa.Table.from_arrays(columns, schema=schemas.SOFT_TARGETS), num_rows=table.num_rows)


def write_soft_targets(
    context: StageContext,
    manifest: Manifest,
    round_index: int,
    subcategories: Storage,
    output: Storage,
    temperature: float,
) -> None:
    """Write the soft targets of a round's classifier to `output`; shards that are there are skipped.

    subcategories: the folder of the round before, whose features are read too.
    """
    kwargs: dict[str, Any] = {
        "subcategories": subcategories,
        "num_classes": manifest.classes.num_classes,
        "temperature": temperature,
    }
    with context.progress.stage(f"soft targets, round {round_index}", total=None, unit="features") as bar:
        map_shards(
            SoftTargetWorker,
            kwargs,
            inputs={"features": context.storage.child(round_folder(round_index - 1, "features"))},
            columns={"features": ["image_id", "labels", "feature"]},
            shards=manifest.shard_names("train"),
            output=output,
            settings=context.experiment.stream,
            bar=bar,
            stage="train_classifier",
        )
