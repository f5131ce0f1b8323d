"""k-means over every shard of this package: hand-computed cases, the oracle, scikit-learn, and degenerate data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.cluster import KMeans

import subcat_core.kmeans as kmeans_module
from subcat_core.block_shard import BlockShard
from subcat_core.feature_blocks import FeatureBlock
from subcat_core.kmeans import Assignment, FarRows, kmeans
from subcat_core.kmeans_settings import KMeansSettings
from subcat_core.numpy_shard import NumpyShard
from tests.subcat_core.shards import block_shard, image_ids, labels_of, power_law, rows_of, separated

FOUR = np.array([[0.0], [1.0], [10.0], [12.0]])


def oracle(labels: list[list[int]], features: np.ndarray, num_classes: int) -> NumpyShard:
    return NumpyShard(image_ids(len(features)), labels, features, num_classes)


@pytest.fixture(params=["numpy", "blocks", "threads"])
def make_shard(request: pytest.FixtureRequest):
    if request.param == "numpy":
        return oracle
    num_threads = 1 if request.param == "blocks" else 3
    return lambda labels, features, num_classes: block_shard(labels, features, num_classes, 3, num_threads=num_threads)


def test_four_points_by_hand(make_shard) -> None:
    shard = make_shard([[0]] * 4, FOUR, 1)
    result = kmeans(shard, KMeansSettings(num_clusters=2))
    low = int(result.centroids[0, :, 0].argmin())
    assert result.centroids[0, [low, 1 - low], 0].tolist() == [0.5, 11.0]
    assert result.counts.tolist() == [[2, 2]]
    assert result.inertia.tolist() == [0.25 + 0.25 + 1.0 + 1.0]
    assert result.balance.tolist() == [1.0]
    assert result.converged
    clusters = labels_of(shard)
    assert [clusters[i, 0] for i in image_ids(4)] == [low, low, 1 - low, 1 - low]


def test_one_pass_by_hand(make_shard) -> None:
    shard = make_shard([[0], [0, 1], [1], [0]], FOUR, 2)
    centroids = np.array([[[0.0], [10.0]], [[1.0], [np.nan]]], np.float32)
    found = shard.assign(centroids, np.array([0, 1]))
    assert found.sums.tolist() == [[[1.0], [12.0]], [[11.0], [0.0]]]
    assert found.counts.tolist() == [[2, 1], [2, 0]]
    assert found.inertia.tolist() == [1.0 + 4.0, 81.0]
    assert found.num_changed.tolist() == [3, 2]
    again = shard.assign(centroids[:1], np.array([0]))
    assert again.num_changed.tolist() == [0]


def test_an_image_of_two_classes_is_a_row_of_both(make_shard) -> None:
    shard = make_shard([[0, 1], [1], [0], [0]], FOUR, 3)
    assert shard.counts.tolist() == [3, 2, 0]
    kmeans(shard, KMeansSettings(num_clusters=2))
    assert set(labels_of(shard)) == {(image_ids(4)[i], c) for i, c in [(0, 0), (0, 1), (1, 1), (2, 0), (3, 0)]}


def test_ties_go_to_the_lower_cluster_id(make_shard) -> None:
    shard = make_shard([[0]] * 3, np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), 1)
    found = shard.assign(np.array([[[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 2.0]]], np.float32), np.array([0]))
    assert found.counts.tolist() == [[2, 1, 0, 0]]
    clusters = labels_of(shard)
    assert [clusters[i, 0] for i in image_ids(3)] == [0, 1, 0]


def test_farthest_rows_ties_by_image_id(make_shard) -> None:
    shard = make_shard([[0]] * 5, np.array([[3.0], [-5.0], [0.0], [5.0], [1.0]]), 1)
    shard.assign(np.zeros((1, 1, 1), np.float32), np.array([0]))
    far = shard.farthest(0, 3)
    assert far.image_ids == [image_ids(5)[i] for i in (1, 3, 0)]
    assert far.distances.tolist() == [5.0, 5.0, 3.0]
    assert far.features.tolist() == [[-5.0], [5.0], [3.0]]


def test_merged_far_rows_do_not_depend_on_the_order_of_parts() -> None:
    parts = [FarRows(np.float32([2, 1]), ["b", "d"], np.float32([[1], [2]]))]
    parts.append(FarRows(np.float32([2, 1]), ["a", "c"], np.float32([[3], [4]])))
    for order in (parts, parts[::-1]):
        assert FarRows.merged(order, 3).image_ids == ["a", "b", "c"]


def test_an_empty_cluster_takes_the_farthest_row(make_shard, monkeypatch: pytest.MonkeyPatch) -> None:
    start = np.array([[[0.0], [1000.0], [12.0]]], np.float32)
    monkeypatch.setattr(kmeans_module, "seed_centroids", lambda *_: start.copy())
    features = np.array([[0.0], [0.0], [4.0], [12.0], [12.0]])
    result = kmeans(make_shard([[0]] * 5, features, 1), KMeansSettings(num_clusters=3))
    assert sorted(result.centroids[0, :, 0].tolist()) == [0.0, 4.0, 12.0]
    assert result.inertia.tolist() == [0.0]
    assert result.converged


@pytest.mark.parametrize("num_distinct", [1, 3])
def test_duplicates_end_with_fewer_clusters(make_shard, num_distinct: int) -> None:
    features = (np.arange(20)[:, None] % num_distinct) * np.float32([0.1, 3.3, 1e-3]) + np.float32(0.7)
    result = kmeans(make_shard([[0]] * 20, features, 1), KMeansSettings(num_clusters=10))
    assert result.num_clusters.tolist() == [num_distinct]
    assert np.isnan(result.centroids[0, num_distinct:]).all()
    assert result.inertia.tolist() == [0.0]
    assert result.num_passes < 10
    assert result.converged


def test_classes_of_few_rows(make_shard) -> None:
    labels = [[1], [2], [2], [2], [4]]
    features = np.array([[1.0, 0], [0, 1], [0, 5], [0, 9], [7, 7]])
    result = kmeans(make_shard(labels, features, 5), KMeansSettings(num_clusters=4))
    assert result.num_clusters.tolist() == [0, 1, 3, 0, 1]
    assert result.inertia.tolist() == [0.0] * 5
    assert result.balance == pytest.approx([1.0] * 5)
    assert np.isnan(result.centroids[[0, 3]]).all()
    assert result.centroids[4, 0].tolist() == [7.0, 7.0]


def test_no_rows_at_all(make_shard) -> None:
    result = kmeans(make_shard([[], []], np.ones((2, 3)), 2), KMeansSettings(num_clusters=2))
    assert result.num_passes == 0
    assert result.counts.sum() == 0


def test_oracle_and_blocks_agree_on_separated_data(rng: np.random.Generator) -> None:
    labels, features = separated(400, rng)
    first, second = oracle(labels, features, 3), block_shard(labels, features, 3, 37)
    settings = KMeansSettings(num_clusters=4)
    a, b = kmeans(first, settings), kmeans(second, settings)
    assert labels_of(first) == labels_of(second)
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_allclose(a.centroids, b.centroids, rtol=1e-6)
    np.testing.assert_allclose(a.inertia, b.inertia, rtol=1e-6)


def test_one_pass_of_blocks_agrees_with_the_oracle_on_general_data(rng: np.random.Generator) -> None:
    features = power_law(700, 96, rng) + 3
    labels = [[i % 2] for i in range(700)]
    centroids = features[:14].reshape(2, 7, 96).copy()
    a = oracle(labels, features, 2).assign(centroids, np.arange(2))
    b = block_shard(labels, features, 2, 64).assign(centroids, np.arange(2))
    np.testing.assert_allclose(a.inertia, b.inertia, rtol=1e-6)
    np.testing.assert_allclose(a.sums, b.sums, rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(a.counts, b.counts)


def test_inertia_never_rises_and_labels_belong_to_the_centroids(rng: np.random.Generator) -> None:
    features = power_law(900, 24, rng)
    shard = block_shard([[0]] * 900, features, 1)
    seen: list[tuple[int, float, int]] = []
    settings = KMeansSettings(num_clusters=6, sample_rows_per_class=256)
    result = kmeans(shard, settings, on_pass=lambda *values: seen.append(values))
    assert [values[0] for values in seen] == list(range(result.num_passes))
    assert [values[1] for values in seen] == result.history.tolist()
    assert (np.diff(result.history) <= 0).all()
    assert seen[-1][2] == 0
    clusters = labels_of(shard)
    chosen = result.centroids[0, [clusters[i, 0] for i in image_ids(900)]]
    assert float(np.square(features - chosen).sum(dtype=np.float64)) == pytest.approx(result.inertia[0], rel=1e-6)
    means = [features[[clusters[i, 0] == k for i in image_ids(900)]].mean(axis=0) for k in range(6)]
    np.testing.assert_allclose(result.centroids[0], means, rtol=1e-4, atol=1e-5)


def test_max_passes_stops_and_says_so(rng: np.random.Generator) -> None:
    shard = block_shard([[0]] * 900, power_law(900, 24, rng), 1)
    result = kmeans(shard, KMeansSettings(num_clusters=6, sample_rows_per_class=256, max_passes=2))
    assert result.num_passes == 2
    assert not result.converged


@pytest.mark.parametrize(("num_rows", "dimension"), [(2000, 256), (267, 512)])
def test_inertia_is_that_of_ten_restarts_of_scikit_learn(
    num_rows: int, dimension: int, rng: np.random.Generator
) -> None:
    features = power_law(num_rows, dimension, rng)
    result = kmeans(block_shard([[0]] * num_rows, features, 1), KMeansSettings())
    peer = KMeans(10, n_init=10, random_state=0).fit(features)
    assert result.inertia[0] <= peer.inertia_ * 1.001


def test_what_a_pass_returns_does_not_grow_with_the_rows(rng: np.random.Generator) -> None:
    centroids = np.zeros((1, 5, 8), np.float32)
    sizes = []
    for num_rows in (50, 400):
        shard = block_shard([[0]] * num_rows, rng.standard_normal((num_rows, 8)), 1)
        sizes.append(shard.assign(centroids, np.array([0])).nbytes)
    assert sizes[0] == sizes[1] == (5 * 8 + 5 + 1 + 1) * 8


def test_classes_get_the_clusters_they_were_given(rng: np.random.Generator) -> None:
    features = rng.standard_normal((90, 5)).astype(np.float32)
    labels = [[0]] * 30 + [[1]] * 30 + [[2]] * 9 + [[3]] * 21
    settings = KMeansSettings(num_clusters=6, min_rows_per_cluster=10, clusters_by_class={"b": 2})
    wanted = settings.clusters_of(["a", "b", "c", "d"])
    assert wanted.tolist() == [6, 2, 6, 6]
    result = kmeans(block_shard(labels, features, 4), settings, num_clusters=wanted)
    assert result.num_clusters.tolist() == [3, 2, 1, 2]
    assert np.isnan(result.centroids[2, 1:]).all()
    assert result.balance[2] == 1.0
    with pytest.raises(ValueError, match=r"kmeans\.clusters_by_class\.b: no such class; expected one of cat, dog"):
        settings.clusters_of(["cat", "dog"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clusters_by_class": {"cat": 11}}, r"clusters_by_class\.cat = 11: expected 1 to num_clusters \(10\)"),
        ({"whiten": True}, r"whiten = true: needs pca_dims"),
        ({"spherical": True, "pca_dims": 4}, r"spherical = true with pca_dims"),
    ],
)
def test_settings_that_do_not_fit(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KMeansSettings(**values)


def test_a_fingerprint_knows_only_what_decides() -> None:
    before = {"num_clusters", "num_restarts", "max_passes", "sample_rows_per_class", "projection_dims"}
    before |= {"stored_dtype", "search"}
    assert set(KMeansSettings(cache_bytes=5).decides()) == before
    used = KMeansSettings(spherical=True, tolerance=0.1, clusters_by_class={"cat": 2}).decides()
    assert set(used) == before | {"spherical", "tolerance", "clusters_by_class"}


def test_tolerance_stops_early_and_labels_belong_to_the_centroids(rng: np.random.Generator) -> None:
    features = power_law(900, 24, rng)
    settings = KMeansSettings(num_clusters=6, sample_rows_per_class=256)
    exact = kmeans(block_shard([[0]] * 900, features, 1), settings)
    shard = block_shard([[0]] * 900, features, 1)
    result = kmeans(shard, settings.model_copy(update={"tolerance": 1e-3}))
    assert 1 < result.num_passes < exact.num_passes
    assert result.converged
    assert result.history.tolist() == exact.history[: result.num_passes].tolist()
    last, one_before = result.history[-1], result.history[-2]
    assert one_before - last <= 1e-3 * one_before
    clusters = labels_of(shard)
    chosen = result.centroids[0, [clusters[i, 0] for i in image_ids(900)]]
    assert float(np.square(features - chosen).sum(dtype=np.float64)) == pytest.approx(result.inertia[0], rel=1e-6)


def test_spherical_clusters_go_by_angle() -> None:
    """Two directions, each with a short and a long row: plain k-means parts them by length."""
    features = np.float32([[1, 0], [100, 1], [0, 1], [1, 100]])
    rows = rows_of(image_ids(4), [[0]] * 4, features)
    shard = BlockShard({0: FeatureBlock("p", rows, 1, spherical=True)}, 1)
    result = kmeans(shard, KMeansSettings(num_clusters=2, spherical=True))
    clusters = [labels_of(shard)[i, 0] for i in image_ids(4)]
    assert clusters[0] == clusters[1] != clusters[2] == clusters[3]
    np.testing.assert_allclose(np.linalg.norm(result.centroids[0], axis=1), 1, rtol=1e-6)


def test_rng_seed_decides(rng: np.random.Generator) -> None:
    features = power_law(500, 16, rng)
    settings = KMeansSettings(num_clusters=8, num_restarts=1)
    first, again, other = (
        kmeans(block_shard([[0]] * 500, features, 1), settings, rng_seed=seed).centroids.tobytes() for seed in (3, 3, 4)
    )
    assert first == again != other


def test_balance_is_normalised_entropy() -> None:
    counts = np.array([[3, 1], [4, 0], [1, 0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert kmeans_module._balance(counts, np.array([4, 4, 1])) == pytest.approx([entropy, 0.0, 1.0])


def test_summary_is_json_able(rng: np.random.Generator) -> None:
    import json

    result = kmeans(block_shard([[0]] * 50, rng.standard_normal((50, 4)), 2), KMeansSettings(num_clusters=3))
    assert json.loads(json.dumps(result.summary()))["cluster_sizes"] == result.counts.tolist()


def test_merging_assignments_adds() -> None:
    one = Assignment(np.full((1, 2, 1), 2.0), np.array([[1, 2]]), np.array([3.0]), np.array([4]))
    both = one.merged(one)
    assert (both.sums == 4).all()
    assert both.counts.tolist() == [[2, 4]]
    assert both.inertia.tolist() == [6.0]
    assert both.num_changed.tolist() == [8]
