"""The layout of sub-category targets, and back."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.subcategories import from_index, subcategory_targets, targets_to_clusters, to_index


def test_layout_by_hand() -> None:
    target = subcategory_targets([0, 2], [1, 0], num_classes=3, num_clusters=2)
    assert target.dtype == np.float32
    assert target.tolist() == [0, 1, 0, 0, 1, 0]


def test_an_image_without_tags_has_no_target() -> None:
    assert subcategory_targets([], [], 3, 2).tolist() == [0] * 6


def test_indices_go_there_and_back() -> None:
    for class_index in range(4):
        for cluster_id in range(7):
            assert from_index(to_index(class_index, cluster_id, 7), 7) == (class_index, cluster_id)
    assert to_index(3, 6, 7) == 27


def test_targets_go_there_and_back(rng: np.random.Generator) -> None:
    for _ in range(50):
        labels = np.sort(rng.choice(20, rng.integers(0, 6), replace=False))
        clusters = rng.integers(0, 10, len(labels))
        found = targets_to_clusters(subcategory_targets(labels, clusters, 20, 10), 10)
        np.testing.assert_array_equal(found[0], labels)
        np.testing.assert_array_equal(found[1], clusters)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_index(0, 2, 2), r"cluster_id is 2, expected 0..1"),
        (lambda: to_index(0, -1, 2), r"cluster_id is -1, expected 0..1"),
        (lambda: to_index(-1, 0, 2), r"class_index is -1"),
        (lambda: from_index(-3, 2), r"index is -3"),
        (lambda: subcategory_targets([0, 1], [0], 3, 2), r"got 2 labels and 1 cluster_ids"),
        (lambda: subcategory_targets([3], [0], 3, 2), r"label is 3, expected 0..2"),
    ],
)
def test_errors_say_what_was_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
