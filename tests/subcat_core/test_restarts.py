"""k-means++, Lloyd's steps and single moves in few dimensions, and the best of the restarts."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.restarts import best_start, lloyd_steps, move_single_rows, plus_plus


def test_plus_plus_stops_when_every_point_is_chosen(rng: np.random.Generator) -> None:
    points = np.float32([[0, 0], [1, 1], [0, 0], [1, 1], [5, 5]])
    chosen = plus_plus(points, 5, rng)
    assert sorted(map(tuple, chosen.tolist())) == [(0.0, 0.0), (1.0, 1.0), (5.0, 5.0)]


def test_steps_refill_an_empty_cluster() -> None:
    points = np.float32([[0], [0], [1], [10]])
    centroids, clusters = np.float32([[0], [500], [10]]), np.full(4, -1, np.int32)
    assert lloyd_steps(points, centroids, clusters, 100) == 0.0
    assert sorted(centroids[:, 0].tolist()) == [0.0, 1.0, 10.0]
    assert clusters[0] == clusters[1] != clusters[2]


def test_steps_end_at_means_of_the_nearest_points(rng: np.random.Generator) -> None:
    points = rng.standard_normal((301, 9)).astype(np.float32)
    centroids, clusters = points[:6].copy(), np.full(301, -1, np.int32)
    inertia = lloyd_steps(points, centroids, clusters, 100)
    squares = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=2)
    np.testing.assert_array_equal(clusters, squares.argmin(axis=1))
    assert inertia == pytest.approx(squares.min(axis=1).sum(), rel=1e-5)
    means = np.stack([points[clusters == k].mean(axis=0) for k in range(6)])
    np.testing.assert_allclose(centroids, means, atol=1e-5)


def test_the_best_start_finds_far_clouds(rng: np.random.Generator) -> None:
    centres = rng.standard_normal((5, 40)).astype(np.float32) * 30 + 100
    rows = np.repeat(centres, 40, axis=0) + rng.standard_normal((200, 40)).astype(np.float32)
    found = best_start(rows, 5, 10, rng)
    assert sorted(np.linalg.norm(centres[:, None] - found, axis=2).argmin(axis=1)) == [0, 1, 2, 3, 4]


def test_single_moves_by_hand() -> None:
    """1.0 lies 1.0 from its own mean and 1.2 from the other, so Lloyd leaves it; the move takes inertia 1.5 to 0.96."""
    rows = np.float32([[-0.5], [-0.5], [1.0], [2.2], [2.2]])
    clusters, counts, means = np.int32([0, 0, 0, 1, 1]), np.array([3, 2]), np.array([[0.0], [2.2]])
    assert move_single_rows(rows, means, clusters, counts) == 1
    assert clusters.tolist() == [0, 0, 1, 1, 1]
    assert counts.tolist() == [2, 3]
    assert means[:, 0].tolist() == pytest.approx([-0.5, 1.8])
    assert float(np.square(rows - means[clusters]).sum()) == pytest.approx(0.96)


def test_single_moves_never_raise_the_inertia(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((120, 6)).astype(np.float32)
    clusters = rng.integers(0, 4, 120).astype(np.int32)
    means = np.stack([rows[clusters == k].mean(axis=0, dtype=np.float64) for k in range(4)])
    counts = np.bincount(clusters, minlength=4)
    inertias = [float(np.square(rows - means[clusters]).sum())]
    while move_single_rows(rows, means, clusters, counts):
        inertias.append(float(np.square(rows - means[clusters]).sum()))
        exact = np.stack([rows[clusters == k].mean(axis=0, dtype=np.float64) for k in range(4)])
        np.testing.assert_allclose(means, exact, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(counts, np.bincount(clusters, minlength=4))
    assert len(inertias) > 2
    assert (np.diff(inertias) < 0).all()
