"""From the confusion counts that shards return to the scores that stages store: by split, with the curve."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.streams import ShardSummary
from jobs.manifest import Manifest
from subcat_core.classes import BACKGROUND, ClassTable
from subcat_core.metrics import ConfusionMatrix, ThresholdSweep

PAPER_THRESHOLD = 0.15


def confusion_scores(confusion: ConfusionMatrix, num_images: int) -> dict[str, Any]:
    """num_images, miou, iou (C + 1; null where the class does not occur), pixel_accuracy."""
    return {
        "num_images": num_images,
        "miou": _number(confusion.miou()),
        "iou": [_number(value) for value in confusion.iou()],
        "pixel_accuracy": _number(confusion.pixel_accuracy()),
    }


class SplitConfusions:
    """The confusion matrix of every shard, added up by the shard's split as the summaries come; `add` is a fold.

    key: under which name the matrix stands in the stats.
    """

    def __init__(self, manifest: Manifest, key: str = "confusion") -> None:
        self._key = key
        self._split_of = {shard.name: shard.split for shard in manifest.shards}
        self._num_classes = manifest.classes.num_classes
        self.by_split: dict[str, tuple[ConfusionMatrix, int]] = {}
        """Matrix and number of scored images; splits without ground truth are left out."""

    def add(self, summary: ShardSummary) -> None:
        num_scored = summary.stats.get("num_scored", 0)
        if num_scored:
            split = self._split_of[summary.name]
            confusion, before = self.by_split.get(split, (ConfusionMatrix(self._num_classes), 0))
            confusion.merge(ConfusionMatrix.from_json(summary.stats[self._key]))
            self.by_split[split] = (confusion, before + num_scored)


class SplitSweeps:
    """The threshold sweep of every shard, added up by the shard's split as the summaries come; `add` is a fold.

    key: under which name the sweep stands in the stats.
    """

    def __init__(self, manifest: Manifest, key: str = "sweep") -> None:
        self._key = key
        self._classes = manifest.classes
        self._split_of = {shard.name: shard.split for shard in manifest.shards}
        self._merged: dict[str, tuple[ThresholdSweep, int]] = {}

    def add(self, summary: ShardSummary) -> None:
        num_scored = summary.stats.get("num_scored", 0)
        if num_scored:
            split, sweep = self._split_of[summary.name], ThresholdSweep.from_json(summary.stats[self._key])
            before = 0
            if split in self._merged:
                merged, before = self._merged[split]
                merged.merge(sweep)
                sweep = merged
            self._merged[split] = (sweep, before + num_scored)

    def scores(self) -> dict[str, Any]:
        """By split: the whole curve, the paper's threshold, the best one, and the baselines; without background, the
        maps' argmax in place of the curve.
        """
        return {
            split: _sweep_scores(sweep, num_images, self._classes)
            for split, (sweep, num_images) in sorted(self._merged.items())
        }


def _sweep_scores(sweep: ThresholdSweep, num_images: int, classes: ClassTable) -> dict[str, Any]:
    confusions = sweep.confusions()
    if not classes.has_background:
        return {**confusion_scores(confusions[0], num_images), **baseline_scores(confusions[0], num_images, classes)}
    curve = [confusion.miou() for confusion in confusions]
    best = max(range(len(curve)), key=lambda index: (curve[index], -index))
    fixed = min(range(len(curve)), key=lambda index: abs(sweep.thresholds[index] - PAPER_THRESHOLD))
    return {
        "num_images": num_images,
        "thresholds": list(sweep.thresholds),
        "miou": [_number(value) for value in curve],
        "fixed": {"threshold": sweep.thresholds[fixed], **confusion_scores(confusions[fixed], num_images)},
        "best": {"threshold": sweep.thresholds[best], **confusion_scores(confusions[best], num_images)},
        **baseline_scores(confusions[fixed], num_images, classes),
    }


def baseline_scores(confusion: ConfusionMatrix, num_images: int, classes: ClassTable) -> dict[str, Any]:
    """What a prediction that looks at nothing would have scored: {"all_background": ...}, or where there is no
    background one a class, {"all_gland": ...}.
    """
    ids = {"background": BACKGROUND} if classes.has_background else {n: i for i, n in enumerate(classes.names, 1)}
    return {f"all_{name}": confusion_scores(all_of_one(confusion, i), num_images) for name, i in ids.items()}


def label_free_scores(thresholds: list[float], by_image: dict[str, list[float]]) -> dict[str, Any]:
    """The label-free part of scores.json: the mean curve, its best threshold, and each image's score there."""
    ids = sorted(by_image)
    curves = np.array([by_image[image_id] for image_id in ids]).reshape(len(ids), len(thresholds))
    curve = curves.mean(axis=0) if ids else np.zeros(len(thresholds))
    best = int(curve.argmax())
    return {
        "num_images": len(ids),
        "thresholds": thresholds,
        "score": [round(float(value), 6) for value in curve],
        "best": {"threshold": thresholds[best], "score": round(float(curve[best]), 6)},
        "images": {image_id: round(float(value), 6) for image_id, value in zip(ids, curves[:, best], strict=True)},
    }


def all_background(confusion: ConfusionMatrix) -> ConfusionMatrix:
    """The matrix of a prediction that is background everywhere, from the row sums (pixels by true class)."""
    return all_of_one(confusion, BACKGROUND)


def all_of_one(confusion: ConfusionMatrix, class_id: int) -> ConfusionMatrix:
    """The matrix of a prediction that is one class everywhere, from the row sums (pixels by true class)."""
    result = ConfusionMatrix(confusion.num_classes)
    result.counts[:, class_id] = confusion.counts.sum(axis=1)
    return result


def _number(value: float) -> float | None:
    """JSON has no NaN: null says that there is nothing to score."""
    return None if value != value else round(float(value), 6)
