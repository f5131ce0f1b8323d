"""One block: what it refuses, how it orders rows, and the table it writes."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.block_shard import BlockShard
from subcat_core.feature_blocks import FeatureBlock, image_hashes
from subcat_core.schemas import SUBCATEGORIES
from tests.subcat_core.shards import rows_of


def test_table_keeps_the_order_of_labels_and_sorts_images() -> None:
    rows = rows_of(["b", "a", "c"], [[2, 0], [0], []], np.array([[4.0], [0.0], [9.0]], np.float32))
    block = FeatureBlock("part-00000", rows, 3)
    centroids = np.array([[[0.0], [3.0]], [[7.0], [np.nan]]], np.float32)
    BlockShard({0: block}, 3).assign(centroids, np.array([0, 2]))
    table = block.table()
    assert table.schema == SUBCATEGORIES
    assert table.to_pylist() == [
        {"image_id": "a", "labels": [0], "cluster_ids": [0], "distances": [0.0]},
        {"image_id": "b", "labels": [2, 0], "cluster_ids": [0, 1], "distances": [3.0, 1.0]},
        {"image_id": "c", "labels": [], "cluster_ids": [], "distances": []},
    ]


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even() -> None:
    values = np.array([[1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -3.0e38]], np.float32)
    block = FeatureBlock("p", rows_of(["a"], [[0]], values[:, :4]), 1, "bfloat16")
    assert block.rows(np.array([0])).tolist() == [[1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_images_with_features_that_are_not_finite_are_left_out(value: float) -> None:
    rows = rows_of(["c", "b", "a"], [[0], [0, 1], [1]], np.array([[3.0, value], [1.0, 2.0], [5.0, 6.0]], np.float32))
    block = FeatureBlock("part-00003", rows, 2)
    assert block.bad_image_ids == ["c"]
    assert block.image_ids == ["a", "b"]
    assert block.counts.tolist() == [1, 2]
    assert block.features.tolist() == [[5.0, 6.0], [1.0, 2.0]]


def test_rows_that_are_too_long_are_an_error() -> None:
    rows = rows_of(["a"], [[0]], np.array([[1e30]], np.float32))
    with pytest.raises(ValueError, match=r"^part-00003: a feature is longer than 1\.8e19"):
        FeatureBlock("part-00003", rows, 1)


def test_spherical_rows_have_length_one() -> None:
    rows = rows_of(["a", "b"], [[0], [0]], np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    block = FeatureBlock("p", rows, 1, spherical=True)
    np.testing.assert_allclose(block.features, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(block.norms, [1.0, 0.0], rtol=1e-6)


def test_values_beyond_float16_are_told_apart() -> None:
    rows = rows_of(["a"], [[0]], np.array([[1e6]], np.float32))
    with pytest.raises(ValueError, match=r"part-1: image_id 'a' has a value beyond float16 .* cache rows as float32"):
        FeatureBlock("part-1", rows, 1, "float16")


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (["a", "b"], [[0], [0, 5]], r"p: image_id 'b' has label 5, expected a class_index 0..2"),
        (["a", "b"], [[-1], [0]], r"p: image_id 'a' has label -1, expected a class_index 0..2"),
        (["a", "b"], [[0], [2, 2]], r"p: image_id 'b' has label 2 twice"),
        (
            ["a", "a"],
            [[1], [2, 1]],
            r"p: image_id 'a' occurs twice with label 1, expected one row for an image and class",
        ),
    ],
)
def test_bad_rows_are_named(ids: list[str], labels: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureBlock("p", rows_of(ids, labels, np.zeros((2, 2), np.float32)), 3)


def test_rows_of_one_image_are_those_of_its_classes() -> None:
    rows = rows_of(["b", "a", "b", "c"], [[2], [0], [0], []], np.array([[4.0], [0.0], [1.0], [9.0]], np.float32))
    assert rows.row_keys() == ["b/2", "a/0", "b/0", "c/-1"]
    block = FeatureBlock("part-00000", rows, 3)
    assert block.counts.tolist() == [2, 0, 1]
    found = BlockShard({0: block}, 3).assign(np.array([[[0.0]], [[4.0]]], np.float32), np.array([0, 2]))
    assert found.sums.ravel().tolist() == [1.0, 4.0]
    assert [(row["image_id"], row["labels"]) for row in block.table().to_pylist()] == [
        ("a", [0]),
        ("b", [2]),
        ("b", [0]),
        ("c", []),
    ]


@pytest.mark.parametrize("stored_dtype", ["float16", "bfloat16"])
def test_rows_of_two_bytes_are_read_as_float32(stored_dtype: str) -> None:
    rows = rows_of(["a", "b"], [[0], [0]], np.array([[1.5], [2.5]], np.float32))
    block = FeatureBlock("p", rows, 1, stored_dtype)
    assert block.features.itemsize == 2
    found = BlockShard({0: block}, 1).assign(np.array([[[2.0]]], np.float32), np.array([0]))
    assert found.sums.item() == 4.0
    assert found.inertia.item() == 0.5


def test_hashes_are_fixed_for_ever() -> None:
    """A sample must be the same on every machine and in every version: the values are part of the contract."""
    assert image_hashes(["a", "2007_000032"], 0).tolist() == HASHES
    assert image_hashes(["a"], 1).tolist() != HASHES[:1]
    assert image_hashes([], 0).shape == (0,)


HASHES = [1476484591048093314, 5743157310503891407]
