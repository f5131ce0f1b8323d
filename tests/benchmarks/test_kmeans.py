"""The peers of the k-means benchmark: the published merging gives our targets, and labels come in the list's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.kmeans import NUM_CLASSES, NUM_CLUSTERS, draw_labels, many_rows, merge_labels, read_labels
from subcat_core.subcategories import subcategory_targets


def test_merging_gives_the_targets_of_our_tables(rng: np.random.Generator) -> None:
    labels = [sorted(rng.choice(NUM_CLASSES, rng.integers(1, 4), replace=False).tolist()) for _ in range(40)]
    members = [np.array([row for row, own in enumerate(labels) if c in own], int) for c in range(NUM_CLASSES)]
    clusters = [rng.integers(0, NUM_CLUSTERS, len(rows)) for rows in members]
    names, targets = merge_labels(members, clusters)
    assert sorted(names) == [f"{row:06d}" for row in range(40)]
    for name, found in zip(names, targets, strict=True):
        own = labels[int(name)]
        ids = [int(clusters[c][members[c].tolist().index(int(name))]) for c in own]
        np.testing.assert_array_equal(found, subcategory_targets(own, ids, NUM_CLASSES, NUM_CLUSTERS))


def test_centres_of_a_few_rows() -> None:
    assert many_rows(400) == {"ours": [0.5, 10.5], "faiss": [0.5, 10.5]}


def test_labels_come_in_the_order_of_the_list(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "labels.csv").write_text("image_id,cat,dog\na,1,0\nb,1,1\nc,0,1\n")
    (tmp_path / "list.txt").write_text("c\nb\n")
    assert read_labels(tmp_path / "labels.csv", tmp_path / "list.txt") == [[1], [0, 1]]
    assert sum(map(len, draw_labels(rng))) == 16_458
