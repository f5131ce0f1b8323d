"""Sums: one answer for every grouping and order; samples and dimensions of several blocks."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.block_shard import BlockShard
from subcat_core.feature_blocks import FeatureBlock
from subcat_core.kmeans import Assignment
from subcat_core.lloyd import Grid
from tests.subcat_core.shards import block_shard, image_ids, rows_of


@pytest.mark.parametrize("num_holders", [1, 2, 3, 5])
def test_every_grouping_and_order_gives_the_same_bits(num_holders: int, rng: np.random.Generator) -> None:
    """Numbers of very different size, whose float64 sums depend on the order unless they lie on a grid."""
    features = (rng.standard_normal((300, 5)) * 10.0 ** rng.integers(-6, 7, (300, 5))).astype(np.float32)
    ids, centroids = image_ids(300), features[:4][None]
    whole = block_shard([[0]] * 300, features, 1, 300)
    expected, grid = whole.assign(centroids, np.array([0])), Grid(whole.max_norm, 300)
    holders: list[dict[int, FeatureBlock]] = [{} for _ in range(num_holders)]
    for i, rows in enumerate(np.array_split(rng.permutation(300), 11)):
        named = rows_of([ids[row] for row in rows], [[0]] * len(rows), features[rows])
        holders[i % num_holders][i] = FeatureBlock(f"part-{i:05d}", named, 1)
    found = Assignment.zeros(*centroids.shape)
    for blocks in holders:
        shard = BlockShard(blocks, 1)
        shard.use_grid(grid)
        found = shard.assign(centroids, np.array([0])).merged(found)
    assert found.sums.tobytes() == expected.sums.tobytes()
    assert found.inertia.tobytes() == expected.inertia.tobytes()
    np.testing.assert_array_equal(found.counts, expected.counts)


def test_sums_follow_rows_that_change_to_the_bit(rng: np.random.Generator) -> None:
    features = rng.standard_normal((200, 7)).astype(np.float32)
    labels = [[i % 2] for i in range(200)]
    shard = block_shard(labels, features, 2, 30)
    for seed in range(4):  # also a pass of one class, which leaves the other as it was
        shard.assign(features[seed * 8 : seed * 8 + 8].reshape(2, 4, 7), np.array([0, 1]))
        shard.assign(features[seed + 50 : seed + 54][None], np.array([1]))
    last = np.stack([features[24:28], features[53:57]])
    found = shard.assign(last, np.array([0, 1]))
    fresh = block_shard(labels, features, 2, 30).assign(last, np.array([0, 1]))
    assert found.sums.tobytes() == fresh.sums.tobytes()
    np.testing.assert_array_equal(found.counts, fresh.counts)
    assert found.num_changed.tolist() == [0, 0]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_change_no_bit(num_threads: int, rng: np.random.Generator) -> None:
    features = rng.standard_normal((300, 12)).astype(np.float32)
    labels = [[i % 3] for i in range(300)]
    centroids = features[:15].reshape(3, 5, 12)
    plain = block_shard(labels, features, 3, 17).assign(centroids, np.arange(3))
    threaded = block_shard(labels, features, 3, 17, num_threads=num_threads).assign(centroids, np.arange(3))
    assert plain.sums.tobytes() == threaded.sums.tobytes()
    assert plain.inertia.tobytes() == threaded.inertia.tobytes()


def test_a_sample_does_not_depend_on_the_blocks(rng: np.random.Generator) -> None:
    features = rng.standard_normal((200, 4)).astype(np.float32)
    samples = [block_shard([[0]] * 200, features, 1, size).sample(0, 2**63, 7) for size in (9, 50, 200)]
    assert 60 < len(samples[0].hashes) < 140
    assert (np.diff(samples[0].hashes.astype(object)) > 0).all()
    assert len({sample.features.tobytes() for sample in samples}) == 1
    assert block_shard([[0]] * 200, features, 1).sample(0, 2**63, 8).features.shape != (0, 4)


def test_dimensions_must_agree() -> None:
    blocks = {
        i: FeatureBlock(f"part-{i:05d}", rows_of(image_ids(1), [[0]], np.zeros((1, 3 + i), np.float32)), 1)
        for i in range(2)
    }
    with pytest.raises(ValueError, match=r"part-00000 has 3, part-00001 has 4; expected one"):
        BlockShard(blocks, 1)
