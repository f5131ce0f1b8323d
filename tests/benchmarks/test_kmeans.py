"""The peers of the k-means benchmark: the published merging gives our targets, and labels come in the list's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import Comparison, Sample
from benchmarks.kmeans import not_kept, pass_times, shown
from benchmarks.kmeans_sides import (
    BEST_PEER,
    NUM_CLASSES,
    NUM_CLUSTERS,
    PASS_STEPS,
    draw_labels,
    many_rows,
    merge_labels,
    pass_sides,
    read_labels,
)
from subcat_core.subcategories import subcategory_targets


def test_merging_gives_the_targets_of_our_tables(rng: np.random.Generator) -> None:
    labels = [sorted(rng.choice(NUM_CLASSES, rng.integers(1, 4), replace=False).tolist()) for _ in range(40)]
    members = [np.array([row for row, own in enumerate(labels) if c in own], int) for c in range(NUM_CLASSES)]
    clusters = [rng.integers(0, NUM_CLUSTERS, len(rows)) for rows in members]
    names, targets = merge_labels(members, clusters)
    assert sorted(names) == [f"{row:06d}" for row in range(40)]
    for name, found in zip(names, targets, strict=True):
        own = labels[int(name)]
        ids = [int(clusters[c][members[c].tolist().index(int(name))]) for c in own]
        np.testing.assert_array_equal(found, subcategory_targets(own, ids, NUM_CLASSES, NUM_CLUSTERS))


def test_centres_of_a_few_rows() -> None:
    assert many_rows(400) == {"ours": [0.5, 10.5], "faiss": [0.5, 10.5]}


def test_labels_come_in_the_order_of_the_list(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "labels.csv").write_text("image_id,cat,dog\na,1,0\nb,1,1\nc,0,1\n")
    (tmp_path / "list.txt").write_text("c\nb\n")
    assert read_labels(tmp_path / "labels.csv", tmp_path / "list.txt") == [[1], [0, 1]]
    assert sum(map(len, draw_labels(rng))) == 16_458


def _seconds(**cpu_s: float) -> Comparison:
    """A turn of each side; keys: o ours, 1 and 10 starts of scikit-learn, f faiss, s and a the stages."""
    names = {
        "o": "ours",
        "one": "scikit-learn, 1 start",
        "ten": BEST_PEER,
        "f": "faiss, 10 starts",
        "s": "stage: ours",
        "a": "stage: the authors'",
    }
    return Comparison({name: [Sample(cpu_s[key], 2 * cpu_s[key])] for key, name in names.items()})


KEPT = {"o": 1.0, "one": 2.5, "ten": 20.0, "f": 6.0, "s": 1.0, "a": 15.0}
PASSES = {"ours": 1.0, "faiss": 1.5, "scikit-learn": 1.2}
INERTIA = {"ours": 1.0, BEST_PEER: 1.0}
CENTRES = {"ours": [0.5, 10.5 + 9e-6], "faiss": [0.6, 13.3]}


@pytest.mark.parametrize(
    ("cpu_s", "passes", "inertia", "centres", "message"),
    [
        ({"a": 14.9}, {}, 1.0, CENTRES, "stage: the authors' / stage: ours: 14.90 times, at least 15"),
        ({"one": 2.4}, {}, 1.0, CENTRES, "scikit-learn, 1 start / ours: 2.40 times, at least 2.5"),
        ({"f": 5.9}, {}, 1.0, CENTRES, "faiss, 10 starts / ours: 5.90 times, at least 6"),
        ({}, {"faiss": 1.4}, 1.0, CENTRES, "a pass of faiss / ours: 1.40 times, at least 1.5"),
        ({}, {"scikit-learn": 1.1}, 1.0, CENTRES, "a pass of scikit-learn / ours: 1.10 times, at least 1.2"),
        ({}, {}, 1.01, CENTRES, "inertia 1.01, above 1 of scikit-learn, 10 starts"),
        ({}, {}, 1.0, {"ours": [0.5, 10.50002]}, "centres [0.5, 10.50002], not (0.5, 10.5)"),
    ],
)
def test_each_limit_is_judged(
    cpu_s: dict[str, float], passes: dict[str, float], inertia: float, centres: dict[str, list[float]], message: str
) -> None:
    assert not_kept(_seconds(**KEPT), INERTIA, PASSES, CENTRES) == []
    assert not_kept(_seconds(**KEPT), INERTIA, PASSES, {}) == []
    found = not_kept(_seconds(**{**KEPT, **cpu_s}), {**INERTIA, "ours": inertia}, {**PASSES, **passes}, centres)
    assert found == [message]


def test_a_pass_is_the_difference_of_many_and_one() -> None:
    many = f"{1 + PASS_STEPS}"
    seconds = {"ours, 1": 3.0, f"ours, {many}": 13.0}
    for peer in ("faiss", "scikit-learn"):
        seconds |= {f"{peer}, 1": 1.0, f"{peer}, {many}": 11.0}
    passes = Comparison({name: [Sample(s, 10 * s)] for name, s in seconds.items()})
    steps = {name: 1.0 if name.endswith(" 1") else 6.0 for name in seconds}
    found = {"ours": 2.0, "faiss": 2.0, "scikit-learn": 2.0, "ours, the first pass": 3.0}
    assert pass_times(passes, steps, "cpu_s") == found
    text = shown(
        _seconds(**KEPT),
        dict.fromkeys(_seconds(**KEPT).samples, 2.0),
        dict.fromkeys(_seconds(**KEPT).samples, 5.0),
        found,
        found,
    )
    assert "| stage: the authors' | 15 | 30 | 15 | 1.0000 | 5 |" in text
    assert "| ours, the first pass | 3000 | 3000 | 1.5 |" in text


def test_sides_of_a_pass_start_anew(rng: np.random.Generator) -> None:
    sides = pass_sides(rng.random((640, 4), np.float32), 3)
    name = f"ours, {1 + PASS_STEPS}"
    assert sides["ours, 1"]() == 1
    assert sides[name]() == sides[name]() > 1
