"""Matched clusters: by hand, against all permutations, and counts that add up over shards."""

from __future__ import annotations

import itertools

import numpy as np

from subcat_core.cluster_matching import count_pairs, match_clusters


def test_counts_by_hand_add_up_over_shards() -> None:
    labels, newer, older = np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1, 0, 1]), np.array([1, 1, 0, 0, 1])
    counts = count_pairs(labels, newer, older, 2, 2)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[[0, 2], [0, 0]], [[1, 0], [1, 1]]]
    parts = [count_pairs(labels[part], newer[part], older[part], 2, 2) for part in (slice(0, 3), slice(3, 5))]
    assert sum(parts).tolist() == counts.tolist()
    assert count_pairs(labels[:0], newer[:0], older[:0], 2, 2).sum() == 0


def test_match_by_hand() -> None:
    # class 0: 5 + 4 beats 6 + 1, so cluster 0 does not get its largest partner; class 1 has no images at all
    counts = np.array([[[5, 6], [1, 4]], [[0, 0], [0, 0]], [[0, 9], [3, 8]]])
    matched = match_clusters(counts)
    assert matched[0].tolist() == [0, 1]
    assert sorted(matched[1].tolist()) == [0, 1]
    assert matched[2].tolist() == [1, 0]


def test_match_is_the_best_of_all_permutations(rng: np.random.Generator) -> None:
    counts = rng.integers(0, 20, (6, 5, 5))
    for own, matched in zip(counts, match_clusters(counts), strict=True):
        best = max(sum(own[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
        assert sorted(matched.tolist()) == list(range(5))
        assert own[np.arange(5), matched].sum() == best


def test_renamed_clusters_are_found_again(rng: np.random.Generator) -> None:
    labels, older = rng.integers(0, 3, 400), rng.integers(0, 4, 400)
    names = np.stack([rng.permutation(4) for _ in range(3)])  # what each older cluster is called now
    newer = names[labels, older]
    newer[:30] = rng.integers(0, 4, 30)  # and some images moved
    matched = match_clusters(count_pairs(labels, newer, older, 3, 4))
    assert np.take_along_axis(matched, names, axis=1).tolist() == [[0, 1, 2, 3]] * 3
