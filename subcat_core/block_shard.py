"""A FeatureShard over blocks of rows, one block a feature shard file.

Legend: C parent classes, K clusters, D feature dimensions, A classes in a pass.
Sums are exact on the grid of lloyd.py, so the result has the same bits for any number of holders of blocks, any number
of threads, and any order; and a pass only touches the sums for rows that change their cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from subcat_core.feature_blocks import FeatureBlock, Nearest, RunningSums
from subcat_core.kmeans import Assignment, FarRows, Sample, TableSink
from subcat_core.lloyd import Grid, Targets


class BlockShard:
    """A FeatureShard of some blocks of a data set; blocks: block id -> block. nearest: on a GPU; None: lloyd.py."""

    def __init__(
        self,
        blocks: Mapping[int, FeatureBlock],
        num_classes: int,
        nearest: Nearest | None = None,
        num_threads: int = 1,
    ) -> None:
        self._blocks = [block for _, block in sorted(blocks.items())]
        self._num_classes = num_classes
        self._nearest = nearest
        self._num_threads = num_threads
        check_dimensions({block.dimension: block.name for block in self._blocks})
        self._running: Assignment | None = None
        """Sums of all classes by the clusters that rows are in now; a pass brings them up to date for its classes."""
        self._grid = Grid(self.max_norm, int(self.counts.max(initial=0)))

    @property
    def max_norm(self) -> float:
        """Of the longest row."""
        return max((float(block.norms.max(initial=0)) for block in self._blocks), default=0.0)

    def use_grid(self, grid: Grid) -> None:
        """Add up on the grid of all holders' rows, where these blocks are a part of the data set."""
        self._grid = grid

    def turn(self, axes: np.ndarray) -> None:
        """Go on with the rows times axes (d, D) float32; before the first pass."""
        for block in self._blocks:
            block.turn(axes)
        self._grid = Grid(self.max_norm, int(self.counts.max(initial=0)))

    @property
    def counts(self) -> np.ndarray:
        return sum((block.counts for block in self._blocks), np.zeros(self._num_classes, np.int64))

    @property
    def dimension(self) -> int:
        return self._blocks[0].dimension if self._blocks else 0

    @property
    def name(self) -> str:
        """A shard file of it, for messages."""
        return next((block.name for block in self._blocks), "no shard")

    def sample(self, class_index: int, max_hash: int, rng_seed: int, axes: np.ndarray | None = None) -> Sample:
        width = self.dimension if axes is None else len(axes)
        nothing = Sample(np.empty(0, np.uint64), np.empty((0, width), np.float32))
        return merge_samples(
            [nothing, *(block.sample(class_index, max_hash, rng_seed, axes) for block in self._blocks)]
        )

    def assign(self, centroids: np.ndarray, classes: np.ndarray) -> Assignment:
        running = self._running_sums(centroids.shape[1])
        aims = [Targets.of(own[~np.isnan(own[:, 0])]) for own in centroids]
        groups = [self._blocks[i :: self._num_threads] for i in range(min(self._num_threads, len(self._blocks)))]
        if len(groups) <= 1:
            passes = [self._assign_blocks(group, classes, aims, running.sums, running.counts) for group in groups]
        else:  # each thread adds to its own sums: they are exact, so any order of adding them up will do
            with ThreadPoolExecutor(len(groups)) as pool:
                own = [(np.zeros_like(running.sums), np.zeros_like(running.counts)) for _ in groups]
                passes = list(
                    pool.map(lambda group, state: self._assign_blocks(group, classes, aims, *state), groups, own)
                )
            for sums, counts in own:
                running.sums += sums
                running.counts += counts
        inertia = sum((inertia for inertia, _ in passes), np.zeros(len(classes)))
        num_changed = sum((changed for _, changed in passes), np.zeros(len(classes), np.int64))
        return Assignment(running.sums[classes], running.counts[classes], inertia, num_changed)

    def _running_sums(self, num_clusters: int) -> Assignment:
        if self._running is None or self._running.counts.shape[1] != num_clusters:
            self._running = Assignment.zeros(self._num_classes, num_clusters, self.dimension)
            for block in self._blocks:
                block.clusters[:] = -1
        return self._running

    def _assign_blocks(
        self,
        blocks: Sequence[FeatureBlock],
        classes: np.ndarray,
        aims: Sequence[Targets],
        sums: np.ndarray,
        counts: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inertia (A,) float64, rows that changed (A,)): class by class, so that centroids stay in the cache."""
        inertia, num_changed = np.zeros(len(classes)), np.zeros(len(classes), np.int64)
        for i, (class_index, aim) in enumerate(zip(classes.tolist(), aims, strict=True)):
            square = self._grid.magic_of_squares(aim.centroids)
            own = RunningSums(sums[class_index], counts[class_index], self._grid.magic, square)
            for block in blocks:
                block.assign(class_index, aim, own, self._nearest)
            inertia[i], num_changed[i] = own.inertia, own.num_changed
        return inertia, num_changed

    def farthest(self, class_index: int, num_rows: int) -> FarRows:
        nothing = FarRows(np.empty(0, np.float32), [], np.empty((0, self.dimension), np.float32))
        parts = [block.farthest(class_index, num_rows) for block in self._blocks]
        return FarRows.merged([nothing, *parts], num_rows)

    def write_labels(self, sink: TableSink) -> None:
        for block in self._blocks:
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
