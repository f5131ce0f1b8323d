"""The layout of sub-category targets."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.subcategories import subcategory_targets, to_index


def test_layout_by_hand() -> None:
    target = subcategory_targets([0, 2], [1, 0], num_classes=3, num_clusters=2)
    assert target.dtype == np.float32
    assert target.tolist() == [0, 1, 0, 0, 1, 0]


def test_an_image_without_tags_has_no_target() -> None:
    assert subcategory_targets([], [], 3, 2).tolist() == [0] * 6


def test_each_class_owns_a_block_of_indices() -> None:
    indices = [to_index(class_index, cluster_id, 7) for class_index in range(4) for cluster_id in range(7)]
    assert indices == list(range(28))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_index(0, 2, 2), r"cluster_id is 2, expected 0..1"),
        (lambda: to_index(0, -1, 2), r"cluster_id is -1, expected 0..1"),
        (lambda: to_index(-1, 0, 2), r"class_index is -1"),
        (lambda: subcategory_targets([0, 1], [0], 3, 2), r"got 2 labels and 1 cluster_ids"),
        (lambda: subcategory_targets([3], [0], 3, 2), r"label is 3, expected 0..2"),
    ],
)
def test_errors_say_what_was_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
