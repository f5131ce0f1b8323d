"""Samples and shared axes of the start."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.kmeans_settings import KMeansSettings
from subcat_core.numpy_shard import NumpyShard
from subcat_core.seeding import principal_axes, sample_threshold, seed_centroids, shared_axes
from tests.subcat_core.shards import block_shard, image_ids, power_law


def test_a_class_that_fits_is_sampled_whole() -> None:
    assert sample_threshold(100, 100) == 2**64 - 1
    assert sample_threshold(1, 256) == 2**64 - 1


def test_the_threshold_leaves_a_little_more_than_asked() -> None:
    share = sample_threshold(1_000_000, 10_000) / 2**64
    assert share * 1_000_000 == pytest.approx(10_600)


@pytest.mark.parametrize(("num_rows", "dimension"), [(30, 400), (400, 30), (600, 300)])
def test_axes_are_orthonormal_and_hold_the_leading_variance(
    num_rows: int, dimension: int, rng: np.random.Generator
) -> None:
    rows = power_law(num_rows, dimension, rng)
    centred = rows - rows.mean(axis=0)
    axes = principal_axes(centred, 20, rng)
    np.testing.assert_allclose(axes.T @ axes, np.eye(20), atol=1e-5)
    exact = np.square(np.linalg.svd(centred, compute_uv=False)[:20]).sum()
    assert np.square(centred @ axes).sum() >= exact * (0.98 if min(num_rows, dimension) > 192 else 0.9999)


def test_few_rows_are_turned_without_loss(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((12, 500)).astype(np.float32)
    points = rows @ principal_axes(rows, 64, rng)
    before, after = (np.linalg.norm(x[:, None] - x, axis=2) for x in (rows, points))
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_classes_share_the_axes_of_their_inner_scatter(rng: np.random.Generator) -> None:
    """Classes lie far apart along the first axis, which tells nothing inside them; they spread along the second."""
    features = rng.standard_normal((400, 40)).astype(np.float32) * 0.01
    features[:200, 0] += 1000
    features[:, 1] += rng.standard_normal(400) * 5
    shard = block_shard([[i // 200] for i in range(400)], features, 2)
    means, axes = shared_axes(shard, 1, 0)
    assert abs(axes[0, 1]) > 0.99
    np.testing.assert_allclose(means[:, 0], [1000, 0], atol=0.1)
    assert shared_axes(shard, 40, 0)[1] is None


@pytest.mark.parametrize("projection_dims", [64, 8])
def test_seeds_do_not_depend_on_blocks(projection_dims: int, rng: np.random.Generator) -> None:
    features = power_law(600, 20, rng)
    settings = KMeansSettings(num_clusters=3, sample_rows_per_class=256, projection_dims=projection_dims)
    shards = [
        block_shard([[0]] * 600, features, 1, 50),
        block_shard([[0]] * 600, features, 1, 600),
        NumpyShard(image_ids(600), [[0]] * 600, features, 1),
    ]
    assert len({seed_centroids(shard, settings, 5)[0].tobytes() for shard in shards}) == 1
