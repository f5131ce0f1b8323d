"""A FeatureShard over blocks of rows (one block a feature shard file), and the sum over blocks that has one answer.

Legend: C parent classes, K clusters, D feature dimensions, A classes in a pass, B blocks of the whole data set.
Partial sums are made per block and merged along a fixed dyadic tree over block ids, so the result has the same bits for
any number of holders of blocks, any number of threads, and any order in which blocks are ready.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from subcat_core.feature_blocks import FeatureBlock, Nearest, nearest_numba
from subcat_core.kmeans import Assignment, FarRows, Sample, TableSink

Partials = dict[tuple[int, int], Assignment]


class DyadicSum:
    """Adds Assignments of blocks 0..B-1 in pairs of neighbours, pairs of pairs, and so on, whatever order they come in.

    Node (level, index) covers blocks index * 2**level up to the next node; a node without a right neighbour stands for
    itself one level up. At most log2(B) nodes wait at a time when blocks come in order.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self.waiting: Partials = {}

    def add(self, level: int, index: int, partial: Assignment) -> None:
        while (1 << level) < self._num_blocks:
            sibling = index ^ 1
            if index % 2 == 1 or (sibling << level) < self._num_blocks:
                other = self.waiting.pop((level, sibling), None)
                if other is None:
                    break
                partial = partial.merged(other)
            level, index = level + 1, index // 2
        self.waiting[level, index] = partial

    def total(self) -> Assignment:
        """The sum of what was added: of all blocks, the same bits always."""
        nodes = sorted(self.waiting.items(), key=lambda item: item[0][1] << item[0][0])
        total = nodes[0][1]
        for _, partial in nodes[1:]:
            total = total.merged(partial)
        return total


class BlockShard:
    """A FeatureShard of some blocks of a data set of num_blocks; blocks: block id -> block."""

    def __init__(
        self,
        blocks: Mapping[int, FeatureBlock],
        num_blocks: int,
        num_classes: int,
        nearest: Nearest = nearest_numba,
        num_threads: int = 1,
    ) -> None:
        self._blocks = dict(sorted(blocks.items()))
        self._num_blocks = num_blocks
        self._num_classes = num_classes
        self._nearest = nearest
        self._num_threads = num_threads
        dimensions = {block.dimension: block.name for block in self._blocks.values()}
        check_dimensions(dimensions)
        self._dimension = next(iter(dimensions), 0)

    @property
    def counts(self) -> np.ndarray:
        return sum((block.counts for block in self._blocks.values()), np.zeros(self._num_classes, np.int64))

    @property
    def dimension(self) -> int:
        return self._dimension

    @property
    def name(self) -> str:
        """A shard file of it, for messages."""
        return next((block.name for block in self._blocks.values()), "no shard")

    def sample(self, class_index: int, max_hash: int, rng_seed: int) -> Sample:
        hashes, features = [np.empty(0, np.uint64)], [np.empty((0, self._dimension), np.float32)]
        for block in self._blocks.values():
            keys = block.hashes(class_index, rng_seed)
            chosen = np.flatnonzero(keys <= np.uint64(max_hash))
            hashes.append(keys[chosen])
            features.append(block.features[block.pair_rows[block.pairs(class_index)][chosen]].astype(np.float32))
        return merge_samples([Sample(np.concatenate(hashes), np.concatenate(features))])

    def assign(self, centroids: np.ndarray, classes: np.ndarray) -> Assignment:
        tree = self._tree(centroids, classes)
        return tree.total() if tree.waiting else Assignment.zeros(*centroids.shape)

    def assign_partials(self, centroids: np.ndarray, classes: np.ndarray) -> Partials:
        """As assign, but the nodes of the tree over all blocks that these blocks complete: few, for neighbours."""
        return self._tree(centroids, classes).waiting

    def _tree(self, centroids: np.ndarray, classes: np.ndarray) -> DyadicSum:
        tree = DyadicSum(self._num_blocks)
        for block_id, partial in zip(self._blocks, self._assigned(centroids, classes), strict=True):
            tree.add(0, block_id, partial)
        return tree

    def _assigned(self, centroids: np.ndarray, classes: np.ndarray) -> Iterator[Assignment]:
        blocks = list(self._blocks.values())
        if self._num_threads <= 1:
            for block in blocks:
                yield block.assign(centroids, classes, self._nearest)
            return
        # A few blocks at a time: all partial sums at once would take B * A * K * D * 8 bytes.
        with ThreadPoolExecutor(self._num_threads) as pool:
            for start in range(0, len(blocks), self._num_threads):
                group = blocks[start : start + self._num_threads]
                yield from pool.map(lambda block: block.assign(centroids, classes, self._nearest), group)

    def farthest(self, class_index: int, num_rows: int) -> FarRows:
        nothing = FarRows(np.empty(0, np.float32), [], np.empty((0, self._dimension), np.float32))
        parts = [block.farthest(class_index, num_rows) for block in self._blocks.values()]
        return FarRows.merged([nothing, *parts], num_rows)

    def write_labels(self, sink: TableSink) -> None:
        for block in self._blocks.values():
            sink(block.name, block.table())


def merge_samples(samples: Sequence[Sample]) -> Sample:
    """One sample by rising hash, whatever the order of the parts."""
    hashes = np.concatenate([sample.hashes for sample in samples])
    features = np.concatenate([sample.features for sample in samples])
    order = np.argsort(hashes, kind="stable")
    return Sample(hashes[order], features[order])


def check_dimensions(names: Mapping[int, str]) -> None:
    """names: dimension -> a shard file of it; raises ValueError when there is more than one dimension."""
    if len(names) > 1:
        found = ", ".join(f"{name} has {dimension}" for dimension, name in sorted(names.items()))
        raise ValueError(f"feature dimensions differ: {found}; expected one; extract the features of one model again")
