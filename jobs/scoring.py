"""From the confusion counts that shards return to the scores that stages store: by split, with the curve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.streams import ShardSummary
from jobs.manifest import Manifest
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


def split_confusions(summaries: Iterable[ShardSummary], manifest: Manifest) -> dict[str, tuple[ConfusionMatrix, int]]:
    """Merge the `confusion` of each shard by the shard's split; splits without ground truth are left out."""
    split_of = {shard.name: shard.split for shard in manifest.shards}
    merged: dict[str, tuple[ConfusionMatrix, int]] = {}
    for summary in summaries:
        num_scored = summary.stats.get("num_scored", 0)
        if not num_scored:
            continue
        split = split_of[summary.name]
        confusion, before = merged.get(split, (ConfusionMatrix(manifest.classes.num_classes), 0))
        confusion.merge(ConfusionMatrix.from_json(summary.stats["confusion"]))
        merged[split] = (confusion, before + num_scored)
    return merged


def sweep_scores(summaries: Iterable[ShardSummary], manifest: Manifest) -> dict[str, Any]:
    """Scores of CAMs by split: the whole curve, the paper's threshold and the best one."""
    split_of = {shard.name: shard.split for shard in manifest.shards}
    merged: dict[str, ThresholdSweep] = {}
    counted: dict[str, int] = {}
    for summary in summaries:
        if not summary.stats.get("num_scored"):
            continue
        split, sweep = split_of[summary.name], ThresholdSweep.from_json(summary.stats["sweep"])
        counted[split] = counted.get(split, 0) + summary.stats["num_scored"]
        if split in merged:
            merged[split].merge(sweep)
        else:
            merged[split] = sweep
    scores = {}
    for split, sweep in merged.items():
        confusions = sweep.confusions()
        curve = [confusion.miou() for confusion in confusions]
        best = max(range(len(curve)), key=lambda index: (curve[index], -index))
        fixed = min(range(len(curve)), key=lambda index: abs(sweep.thresholds[index] - PAPER_THRESHOLD))
        scores[split] = {
            "num_images": counted[split],
            "thresholds": list(sweep.thresholds),
            "miou": [_number(value) for value in curve],
            "fixed": {"threshold": sweep.thresholds[fixed], **confusion_scores(confusions[fixed], counted[split])},
            "best": {"threshold": sweep.thresholds[best], **confusion_scores(confusions[best], counted[split])},
        }
    return scores


def _number(value: float) -> float | None:
    """JSON has no NaN: null says that there is nothing to score."""
    return None if value != value else round(float(value), 6)
