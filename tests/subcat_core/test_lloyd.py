"""The compiled loops against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.lloyd import accumulate, move_single_rows, nearest


@pytest.mark.parametrize("num_clusters", [1, 4, 5, 6, 11])
def test_nearest_and_sums_agree_with_numpy(num_clusters: int, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((200, 37)).astype(np.float32)
    centroids = rows[:num_clusters].copy()
    found = np.empty(200, np.int32)
    nearest(rows, centroids, found)
    squares = np.square(rows[:, None].astype(np.float64) - centroids).sum(axis=2)
    np.testing.assert_array_equal(found, squares.argmin(axis=1))
    sums, counts = np.zeros((num_clusters, 37)), np.zeros(num_clusters, np.int64)
    clusters, distances = np.full(200, -1, np.int32), np.empty(200, np.float32)
    inertia, num_changed = accumulate(rows, found, centroids, clusters, distances, sums, counts)
    assert num_changed == 200
    assert inertia == pytest.approx(squares.min(axis=1).sum(), rel=1e-6)
    np.testing.assert_allclose(distances, np.sqrt(squares.min(axis=1)), rtol=1e-6)
    np.testing.assert_array_equal(counts, np.bincount(found, minlength=num_clusters))
    for k in range(num_clusters):
        np.testing.assert_allclose(sums[k], rows[found == k].sum(axis=0, dtype=np.float64), rtol=1e-12)


def test_a_row_has_the_same_bits_in_any_company(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((64, 129)).astype(np.float32)
    centroids = rows[:3] + np.float32(0.01)

    def distances_of(part: np.ndarray) -> np.ndarray:
        found, clusters = np.empty(len(part), np.int32), np.zeros(len(part), np.int32)
        distances = np.empty(len(part), np.float32)
        nearest(part, centroids, found)
        accumulate(part, found, centroids, clusters, distances, np.zeros((3, 129)), np.zeros(3, np.int64))
        return distances

    alone = np.concatenate([distances_of(rows[i : i + 1]) for i in range(64)])
    assert alone.tobytes() == distances_of(rows).tobytes()


def test_ties_go_to_the_lower_id() -> None:
    rows = np.zeros((1, 2), np.float32)
    found = np.empty(1, np.int32)
    nearest(rows, np.float32([[3, 0], [0, 2], [2, 0], [0, -2], [-2, 0], [0, 2], [0, 2]]), found)
    assert found.tolist() == [1]


def test_float64_sums_pass_the_limit_of_float32() -> None:
    """2**24 + 1 is no float32: a float32 sum would stay at 16,777,216 for ever."""
    rows = np.ones((3, 1), np.float32)
    sums, counts = np.array([[2.0**24]]), np.array([2**24])
    accumulate(rows, np.zeros(3, np.int32), rows[:1], np.zeros(3, np.int32), np.empty(3, np.float32), sums, counts)
    assert sums.item() == counts.item() == 2**24 + 3


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
