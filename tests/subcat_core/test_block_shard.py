"""The tree of partial sums: one answer for every grouping and order; samples and dimensions of several blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from subcat_core.block_shard import BlockShard, DyadicSum
from subcat_core.feature_blocks import FeatureBlock
from subcat_core.kmeans import Assignment
from tests.subcat_core.shards import block_shard, image_ids, rows_of


def parts(num_blocks: int, rng: np.random.Generator) -> list[Assignment]:
    """Numbers of very different size, whose sum depends on the order of the additions."""
    made = []
    for _ in range(num_blocks):
        sums = rng.standard_normal((1, 2, 3)) * 10.0 ** rng.integers(-8, 9, (1, 2, 3))
        made.append(Assignment(sums, np.ones((1, 2), np.int64), sums[0, 0, :1].copy(), np.ones(1, np.int64)))
    return made


def total(leaves: list[Assignment], holders: list[list[int]]) -> bytes:
    root = DyadicSum(len(leaves))
    for holder in holders:
        tree = DyadicSum(len(leaves))
        for block_id in holder:
            tree.add(0, block_id, leaves[block_id])
        assert len(tree.waiting) <= 2 * math.log2(len(leaves) + 1) + 1
        for (level, index), partial in tree.waiting.items():
            root.add(level, index, partial)
    assert len(root.waiting) == 1
    return root.total().sums.tobytes() + root.total().inertia.tobytes()


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 8, 11, 13])
def test_every_grouping_and_order_gives_the_same_bits(num_blocks: int, rng: np.random.Generator) -> None:
    leaves = parts(num_blocks, rng)
    answers = {total(leaves, [list(range(num_blocks))])}
    for num_holders in range(1, num_blocks + 1):
        ids = [part.tolist() for part in np.array_split(np.arange(num_blocks), num_holders)]
        answers.add(total(leaves, ids))
        answers.add(total(leaves, [part[::-1] for part in ids[::-1]]))
        answers.add(total(leaves, [rng.permutation(num_blocks).tolist()]))
    assert len(answers) == 1


def test_the_tree_by_hand() -> None:
    """((1e16 + 1) + (-1e16 + 1)) + 1: the ones beside 1e16 are lost, the last is not; left to right would give 2."""
    tree = DyadicSum(5)
    for block_id, value in enumerate([1e16, 1.0, -1e16, 1.0, 1.0]):
        tree.add(
            0, block_id, Assignment(np.full((1, 1, 1), value), np.ones((1, 1), int), np.zeros(1), np.zeros(1, int))
        )
    assert tree.total().sums.item() == ((1e16 + 1) + (-1e16 + 1)) + 1 != sum([1e16, 1.0, -1e16, 1.0, 1.0])
    assert tree.total().counts.item() == 5


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
        BlockShard(blocks, 2, 1)
