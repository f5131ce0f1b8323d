"""The compiled loops of a pass against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.lloyd import Grid, Targets, assign_rows, project, settle, square_distance


class State:
    """Rows, and what a pass keeps of them."""

    def __init__(self, features: np.ndarray, num_clusters: int, rows: np.ndarray | None = None) -> None:
        self.features = features
        self.norms = np.linalg.norm(features, axis=1).astype(np.float32)
        self.rows = np.arange(len(features)) if rows is None else rows
        self.clusters = np.full(len(self.rows), -1, np.int32)
        self.distances = np.zeros(len(self.rows), np.float32)
        self.sums = np.zeros((num_clusters, features.shape[1]))
        self.counts = np.zeros(num_clusters, np.int64)
        self.grid = Grid(float(self.norms.max(initial=0)), len(self.rows))

    def assign(self, centroids: np.ndarray) -> tuple[float, int]:
        aim = Targets.of(centroids)
        return assign_rows(
            self.features,
            self.norms,
            self.rows,
            aim.centroids,
            aim.shifted,
            aim.offsets,
            aim.bound,
            aim.slack,
            self.clusters,
            self.distances,
            self.sums,
            self.counts,
            self.grid.magic,
            self.grid.magic_of_squares(aim.centroids),
        )


@pytest.mark.parametrize("num_clusters", [1, 4, 5, 6, 11])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_pass_agrees_with_numpy(num_clusters: int, offset: float, rng: np.random.Generator) -> None:
    features = (rng.standard_normal((203, 37)) + offset).astype(np.float32)
    centroids = features[:num_clusters] + np.float32(0.01)
    state = State(features, num_clusters)
    inertia, num_changed = state.assign(centroids)
    squares = np.square(features[:, None].astype(np.float64) - centroids).sum(axis=2)
    np.testing.assert_array_equal(state.clusters, squares.argmin(axis=1))
    assert num_changed == 203
    assert inertia == pytest.approx(squares.min(axis=1).sum(), rel=1e-6)
    np.testing.assert_allclose(state.distances, np.sqrt(squares.min(axis=1)), rtol=1e-6)
    np.testing.assert_array_equal(state.counts, np.bincount(state.clusters, minlength=num_clusters))
    for k in range(num_clusters):
        np.testing.assert_allclose(
            state.sums[k], features[state.clusters == k].sum(axis=0, dtype=np.float64), atol=1e-9 * (1 + offset)
        )


def test_labels_are_those_of_float64_where_float32_cannot_tell(rng: np.random.Generator) -> None:
    """Rows on the plane between two centroids, but for their rounding: scores in float32 are noise."""
    centroids = rng.standard_normal((2, 512)).astype(np.float32)
    direction = (centroids[1] - centroids[0]).astype(np.float64)
    direction /= np.linalg.norm(direction)
    rows = 50 * rng.standard_normal((400, 512))
    rows -= np.outer((rows - centroids.mean(axis=0, dtype=np.float64)) @ direction, direction)
    rows = rows.astype(np.float32)
    state = State(rows, 2)
    state.assign(centroids)
    squares = np.square(rows[:, None].astype(np.float64) - centroids).sum(axis=2)
    plain = (rows @ centroids.T - np.square(centroids).sum(axis=1) / 2).argmax(axis=1)
    np.testing.assert_array_equal(state.clusters, squares.argmin(axis=1))
    assert (plain != state.clusters).any()


def test_a_row_has_the_same_bits_in_any_company(rng: np.random.Generator) -> None:
    features = rng.standard_normal((66, 129)).astype(np.float32)
    centroids = features[:3] + np.float32(0.01)
    together = State(features, 3)
    together.assign(centroids)
    for i in range(66):
        alone = State(features, 3, np.array([i]))
        alone.assign(centroids)
        assert alone.distances[0].tobytes() == together.distances[i].tobytes()


def test_ties_go_to_the_lower_id() -> None:
    state = State(np.zeros((1, 2), np.float32), 7)
    state.assign(np.float32([[3, 0], [0, 2], [2, 0], [0, -2], [-2, 0], [0, 2], [0, 2]]))
    assert state.clusters.tolist() == [1]


def test_a_row_that_moves_leaves_nothing_behind(rng: np.random.Generator) -> None:
    features = rng.standard_normal((50, 6)).astype(np.float32)
    state = State(features, 3)
    state.assign(features[:3])
    first = state.sums.copy()
    _, num_changed = state.assign(features[10:13])
    assert 0 < num_changed < 50
    state.assign(features[:3])
    assert state.sums.tobytes() == first.tobytes()
    fixed = np.zeros(50, np.int32)
    aim = np.zeros((3, 6), np.float32)
    settle(features, state.rows, fixed, aim, state.clusters, state.distances, state.sums, state.counts, 1.0, 1.0)
    assert state.counts.tolist() == [50, 0, 0]
    assert state.sums[1:].any() == False  # noqa: E712 (numpy bool)


def test_more_rows_than_float32_can_count() -> None:
    """17 million rows around 0.5 and 10.5 in two clusters: float32 sums and counts stop at 2**24 = 16.8 million."""
    features = np.float32([[0.0], [1.0], [10.0], [11.0]])
    rows = np.tile(np.arange(4), 8_500_000)
    state = State(features, 2, rows)
    state.assign(np.float32([[1.0], [10.0]]))
    assert state.counts.tolist() == [17_000_000, 17_000_000]
    np.testing.assert_allclose(state.sums[:, 0] / state.counts, [0.5, 10.5], rtol=1e-9)


def test_the_grid_keeps_means_right(rng: np.random.Generator) -> None:
    """Small values beside a large one, as many rows as the grid was made for."""
    features = rng.standard_normal((1000, 3)).astype(np.float32) * np.float32([1000, 1, 0.001])
    state = State(features, 1)
    state.assign(np.zeros((1, 3), np.float32))
    exact = features.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(state.sums[0] / 1000, exact, atol=1000 * 2.0**-40)
    assert Grid(0.0, 5).magic == 1.0


def test_distances_and_products(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 1000)).astype(np.float32)
    assert square_distance(x, y) == pytest.approx(np.square(x.astype(np.float64) - y).sum(), rel=1e-6)
    features, axes = rng.standard_normal((9, 33)).astype(np.float32), rng.standard_normal((7, 33)).astype(np.float32)
    rows, points = np.array([8, 0, 3, 3, 1]), np.empty((5, 7), np.float32)
    project(features, rows, axes, points)
    np.testing.assert_allclose(points, features[rows] @ axes.T, rtol=1e-4, atol=1e-5)
