"""Scores are merged by split from what shards return, and match the plain count."""

import numpy as np

from cluster.streams import ShardSummary
from jobs.manifest import Manifest, ShardEntry
from jobs.scoring import SplitConfusions, SplitSweeps, confusion_scores
from subcat_core.classes import IGNORE, ClassTable
from subcat_core.metrics import ConfusionMatrix, ThresholdSweep

CLASSES = ClassTable(("cat", "dog"))


def _manifest(storage: object) -> Manifest:
    shards = [
        ShardEntry("part-00000", "train", 2, 2),
        ShardEntry("part-00001", "train", 1, 1),
        ShardEntry("part-00002", "val", 1, 1),
    ]
    return Manifest(classes=CLASSES, shards=shards, fingerprint="x", folder=storage)  # type: ignore[arg-type]


def _summary(name: str, **stats: object) -> ShardSummary:
    return ShardSummary(name=name, num_rows=1, bad=[], stats=dict(stats), seconds=1.0, peak_rss_bytes=1, num_inputs=1)


def test_confusions_merge_by_split_and_shards_without_truth_are_left_out() -> None:
    one, two = ConfusionMatrix(2), ConfusionMatrix(2)
    one.update(np.array([[0, 1], [2, 2]], np.uint8), np.array([[0, 1], [1, IGNORE]], np.uint8))
    two.update(np.array([[1]], np.uint8), np.array([[1]], np.uint8))
    confusions = SplitConfusions(_manifest(None))
    for summary in (
        _summary("part-00000", confusion=one.to_json(), num_scored=2),
        _summary("part-00001", confusion=two.to_json(), num_scored=1),
        _summary("part-00002", confusion=two.to_json(), num_scored=0),
    ):
        confusions.add(summary)
    merged = confusions.by_split
    assert set(merged) == {"train"}
    confusion, num_images = merged["train"]
    assert num_images == 3
    # truth 0: 1 right; truth 1: 2 right, 1 taken for class 2
    assert confusion.counts.tolist() == [[1, 0, 0], [0, 2, 1], [0, 0, 0]]
    scores = confusion_scores(confusion, num_images)
    assert scores["iou"] == [1.0, round(2 / 3, 6), None]
    assert scores["miou"] == round((1 + 2 / 3) / 2, 6)
    assert scores["pixel_accuracy"] == 0.75


def test_sweep_scores_hold_the_papers_threshold_and_the_best() -> None:
    thresholds = [0.0, 0.15, 0.5]
    sweep = ThresholdSweep(2, thresholds)
    cam = np.array([[[0.9, 0.3]]], np.float32)  # one class, two pixels: object and background
    sweep.update(cam, [0], np.array([[1, 0]], np.uint8))
    sweeps = SplitSweeps(_manifest(None))
    for name in ("part-00000", "part-00001", "part-00002"):
        sweeps.add(_summary(name, sweep=sweep.to_json(), num_scored=1))
    assert sweeps.scores()["train"]["num_images"] == 2
    val = sweeps.scores()["val"]
    assert val["all_background"]["miou"] == 0.25  # background 1/2, cat 0/1
    assert val["fixed"]["threshold"] == 0.15
    assert val["fixed"]["miou"] == 0.25  # background 0/1, cat 1/2
    assert val["best"] == {
        "threshold": 0.5,
        "num_images": 1,
        "miou": 1.0,
        "iou": [1.0, 1.0, None],
        "pixel_accuracy": 1.0,
    }
