"""The layout of sub-category targets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from subcat_core.subcategories import soft_shares, soft_subcategory_targets, subcategory_targets, to_index


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
        (lambda: soft_subcategory_targets([0, 1], [[1.0, 0.0]], 3, 2), r"got 2 labels and shares of lengths \[2\]"),
        (lambda: soft_subcategory_targets([0], [[1.0]], 3, 2), r"shares of lengths \[1\], expected 2 for each"),
        (lambda: soft_subcategory_targets([3], [[1.0, 0.0]], 3, 2), r"label is 3, expected 0..2"),
    ],
)
def test_errors_say_what_was_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_soft_shares_by_hand() -> None:
    centroids = np.array([[0.0, 0.0], [3.0, 0.0], [np.nan, np.nan]], np.float32)
    shares = soft_shares(np.array([[1.0, 0.0], [1.5, 9.0]], np.float32), centroids, scale=2.0)
    # squared distances 1 and 4: exp(-0.5) and exp(-2); then the same distance to both
    first = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-2.0))
    np.testing.assert_allclose(shares, [[first, 1 - first, 0], [0.5, 0.5, 0]], rtol=1e-6)


def test_soft_shares_agree_with_the_plain_loop(rng: np.random.Generator) -> None:
    features, centroids = rng.standard_normal((20, 6)) * 30, rng.standard_normal((4, 6)).astype(np.float32) * 30
    shares = soft_shares(features.astype(np.float16), centroids, scale=500.0)
    for row, found in zip(features.astype(np.float16).astype(float), shares, strict=True):
        power = [math.exp(-sum((x - c) ** 2 for x, c in zip(row, centre, strict=True)) / 500) for centre in centroids]
        np.testing.assert_allclose(found, np.array(power) / sum(power), rtol=1e-5, atol=1e-7)


def test_far_rows_and_no_spread_are_no_trouble() -> None:
    far = np.array([[1e4], [-1e4], [0.5]], np.float32)
    centroids = np.array([[0.0], [1.0]], np.float32)
    assert soft_shares(far, centroids, scale=0.01)[:2].tolist() == [[0, 1], [1, 0]]
    assert soft_shares(far, centroids, scale=0.0).tolist() == [[0, 1], [1, 0], [1, 0]]


def test_soft_targets_by_hand() -> None:
    target = soft_subcategory_targets([2, 0], [[0.25, 0.75], [1.0, 0.0]], num_classes=3, num_clusters=2)
    assert target.dtype == np.float32
    assert target.tolist() == [1, 0, 0, 0, 0.25, 0.75]
    assert soft_subcategory_targets([], [], 3, 2).tolist() == [0] * 6
