"""A sub-category head that goes on from the round before, its outputs in the order of this round's clusters.

Reads:   classifier of round r - 1 (model.pt); sub-categories of rounds r - 1 and r - 2, a shard of each at a time
Writes:  nothing: the head is where the classifier of round r starts (train_classifier)
Runs on: the driver
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
import torch

from cluster.artifacts import Artifact
from cluster.storage import Storage
from jobs.joins import one_row_an_image, with_column
from subcat_core.cluster_matching import count_pairs, match_clusters


@dataclasses.dataclass(frozen=True)
class PreviousRound:
    """The classifier of the round before, and the sub-categories that it was trained on (of the round before that)."""

    classifier: Artifact
    subcategories: Artifact


def previous_head(
    previous: PreviousRound, subcategories: Storage, shard_names: Sequence[str], num_classes: int
) -> np.ndarray | None:
    """(C*K, D) float32: the head of the round before, its rows renamed to the clusters they are matched with now.

    subcategories: the folder of the clusters that are trained on now. None where the two have different K.
    """
    num_clusters = subcategories.read_json("result.json")["num_clusters"]
    older = previous.subcategories.folder
    if older.read_json("result.json")["num_clusters"] != num_clusters:
        return None
    counts = np.zeros((num_classes, num_clusters, num_clusters), np.int64)
    for name in shard_names:
        counts += _count_shard(subcategories, older, name, num_classes, num_clusters)
    with previous.classifier.folder.fetch("model.pt") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    head = state["sub_head.weight"].float().numpy()
    first = np.arange(num_classes)[:, None] * num_clusters
    return head[(first + match_clusters(counts)).ravel()]


def _count_shard(newer: Storage, older: Storage, name: str, num_classes: int, num_clusters: int) -> np.ndarray:
    """`count_pairs` of the images that both tables of a shard hold."""
    columns = ["image_id", "labels", "cluster_ids"]
    now, before = (
        one_row_an_image(folder.read_table(f"{name}.parquet", columns), ["cluster_ids"]) for folder in (newer, older)
    )
    before = before.rename_columns(["image_id", "labels_before", "cluster_ids_before"])
    both = with_column(with_column(now, before, "labels_before"), before, "cluster_ids_before")
    labels, labels_before, clusters, clusters_before = (
        pc.list_flatten(both[column]).to_numpy()
        for column in ("labels", "labels_before", "cluster_ids", "cluster_ids_before")
    )
    assert np.array_equal(labels, labels_before), "both rounds are of one manifest, labels ascending"
    return count_pairs(labels, clusters, clusters_before, num_classes, num_clusters)
