"""Scores: a confusion matrix that merges, a sweep over CAM thresholds that merges, and average precision.

Only integer counts travel between workers, so any number of workers and any order gives the same bits. The IoU
counts every pixel of the set at once ("all pixels with ground truth 0..C, 255 skipped"), as the authors' scorer does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from subcat_core.classes import BACKGROUND, IGNORE, MAX_CLASSES

_VALUES = 256


class ConfusionMatrix:
    """Pixel counts by ground truth and prediction over any number of images.

    num_classes: C, background not counted. counts: (C + 1, C + 1) int64, rows ground truth, columns prediction,
    both by class_id. Pixels whose ground truth is IGNORE are skipped. A predicted IGNORE counts as background, or
    with ignore_prediction="skip" leaves the pixel out. int64 holds 4.9e13 images of 375 x 500 pixels.
    """

    def __init__(self, num_classes: int, *, ignore_prediction: Literal["background", "skip"] = "background") -> None:
        _check_num_classes(num_classes)
        if ignore_prediction not in ("background", "skip"):
            raise ValueError(f"ignore_prediction: got {ignore_prediction!r}, expected 'background' or 'skip'")
        self.num_classes = num_classes
        self.ignore_prediction = ignore_prediction
        self.counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Count one image. prediction, truth: same shape, class ids 0..C or IGNORE; ValueError names other values."""
        predicted, true = _as_ids(prediction, "prediction"), _as_ids(truth, "ground truth")
        if predicted.shape != true.shape:
            raise ValueError(
                f"prediction {predicted.shape} and ground truth {true.shape} differ in size; "
                "bring both to the size of the image"
            )
        code = (true.astype(np.uint16) << 8) | predicted
        table = np.bincount(code.ravel(), minlength=_VALUES * _VALUES).reshape(_VALUES, _VALUES)
        size = self.num_classes + 1
        _check_values(table.sum(axis=1), size, "ground truth")
        _check_values(table.sum(axis=0), size, "prediction")
        self.counts += table[:size, :size]
        if self.ignore_prediction == "background":
            self.counts[:, BACKGROUND] += table[:size, IGNORE]

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix of the same classes, in place."""
        mine, theirs = (self.num_classes, self.ignore_prediction), (other.num_classes, other.ignore_prediction)
        if mine != theirs:
            raise ValueError(
                f"confusion matrices of {theirs} and {mine} (num_classes, ignore_prediction) do not add up; "
                "score both with the same class table and options"
            )
        self.counts += other.counts

    def iou(self) -> np.ndarray:
        """(C + 1,) float64 in 0..1 by class_id: diagonal / (row + column - diagonal); nan without truth."""
        hit, true = np.diag(self.counts), self.counts.sum(axis=1)
        union = true + self.counts.sum(axis=0) - hit
        return np.divide(hit, union, out=np.full(self.num_classes + 1, np.nan), where=true > 0)

    def miou(self) -> float:
        """Mean IoU over the classes (background too) that occur in ground truth; nan without any pixel."""
        return _nanmean(self.iou())

    def pixel_accuracy(self) -> float:
        """Fraction of counted pixels with the right class; nan without any pixel."""
        total = int(self.counts.sum())
        return float(np.trace(self.counts)) / total if total else float("nan")

    def to_json(self) -> str:
        """Text that `from_json` reads back to the same integers."""
        values: dict[str, Any] = {"num_classes": self.num_classes, "ignore_prediction": self.ignore_prediction}
        return json.dumps({**values, "counts": self.counts.tolist()})

    @classmethod
    def from_json(cls, text: str | bytes) -> ConfusionMatrix:
        """The matrix that `to_json` wrote; ValueError where the counts do not fit the number of classes."""
        data: dict[str, Any] = json.loads(text)
        matrix = cls(data["num_classes"], ignore_prediction=data["ignore_prediction"])
        counts = np.asarray(data["counts"], np.int64)
        if counts.shape != matrix.counts.shape:
            raise ValueError(f"confusion matrix: counts are {counts.shape}, expected {matrix.counts.shape}")
        matrix.counts = counts
        return matrix


class ThresholdSweep:
    """Confusion matrices of CAM labels for many thresholds, from one pass over each image.

    A pixel is background where max_c cam <= threshold, else the class of the largest map (the first of equals):
    argmax over {constant background score, class maps}. The class does not depend on the threshold, so one histogram
    over (number of thresholds below the maximum, class, ground truth) holds every matrix: running sums bring them out.

    thresholds: strictly ascending, finite. histogram: (T + 1, C + 1, C) int64 by level, ground-truth class_id and
    class_index of the largest map.
    """

    def __init__(self, num_classes: int, thresholds: Iterable[float]) -> None:
        _check_num_classes(num_classes)
        self.num_classes = num_classes
        self.thresholds = tuple(float(value) for value in thresholds)
        # Maps are float32: comparing in float32 too gives what `cam > threshold` gives.
        self._edges = np.asarray(self.thresholds, np.float32)
        if not self.thresholds or not np.isfinite(self._edges).all() or (np.diff(self._edges) <= 0).any():
            raise ValueError(
                f"thresholds: got {list(self.thresholds)[:8]}, expected at least one finite value, strictly ascending"
            )
        self.histogram = np.zeros((len(self.thresholds) + 1, num_classes + 1, num_classes), np.int64)

    def update(self, cam: np.ndarray, class_indices: Sequence[int] | np.ndarray, truth: np.ndarray) -> None:
        """Count one image.

        cam: (n, H, W) float32, normalised, at the size of the truth. class_indices: n different class_index of its
        maps; with n = 0 every pixel is background. truth: (H, W) class ids 0..C or IGNORE. ValueError names the
        value that is out of range, or the sizes that differ.
        """
        true = _as_ids(truth, "ground truth")
        indices = np.asarray(class_indices, np.int64)
        self._check(cam, indices, true)
        if len(indices):
            largest = cam.argmax(axis=0)
            level = np.searchsorted(self._edges, cam.max(axis=0).astype(np.float32, copy=False), side="left")
        else:
            largest = level = np.zeros(true.shape, np.int64)
        num_maps, num_levels = max(len(indices), 1), len(self.thresholds) + 1
        code = (level * num_maps + largest) * _VALUES + true
        table = np.bincount(code.ravel(), minlength=num_levels * num_maps * _VALUES)
        table = table.reshape(num_levels, num_maps, _VALUES)
        size = self.num_classes + 1
        _check_values(table.sum(axis=(0, 1)), size, "ground truth")
        columns = indices if len(indices) else np.zeros(1, np.int64)
        self.histogram[:, :, columns] += table[:, :, :size].transpose(0, 2, 1)

    def merge(self, other: ThresholdSweep) -> None:
        """Add the counts of another sweep of the same classes and thresholds, in place."""
        if self.num_classes != other.num_classes or self.thresholds != other.thresholds:
            raise ValueError(
                f"sweeps over {other.num_classes} classes and {len(other.thresholds)} thresholds, and over "
                f"{self.num_classes} and {len(self.thresholds)}, do not add up; sweep both with the same settings"
            )
        self.histogram += other.histogram

    def confusion(self, index: int) -> ConfusionMatrix:
        """The confusion matrix at thresholds[index]."""
        index = range(len(self.thresholds))[index]
        matrix = ConfusionMatrix(self.num_classes)
        matrix.counts[:, BACKGROUND] = self.histogram[: index + 1].sum(axis=(0, 2))
        matrix.counts[:, 1:] = self.histogram[index + 1 :].sum(axis=0)
        return matrix

    def confusions(self) -> list[ConfusionMatrix]:
        """One confusion matrix a threshold, in order."""
        return [self.confusion(index) for index in range(len(self.thresholds))]

    def to_json(self) -> str:
        """Text that `from_json` reads back to the same integers; only cells that are not zero are written."""
        (cells,) = np.nonzero(self.histogram.ravel())
        counts = self.histogram.ravel()[cells]
        data: dict[str, Any] = {"num_classes": self.num_classes, "thresholds": list(self.thresholds)}
        return json.dumps({**data, "cells": cells.tolist(), "counts": counts.tolist()})

    @classmethod
    def from_json(cls, text: str | bytes) -> ThresholdSweep:
        """The sweep that `to_json` wrote; ValueError where the cells do not fit the number of classes."""
        data: dict[str, Any] = json.loads(text)
        sweep = cls(data["num_classes"], data["thresholds"])
        cells, counts = np.asarray(data["cells"], np.int64), np.asarray(data["counts"], np.int64)
        if cells.shape != counts.shape or (cells.size and not 0 <= cells.min() <= cells.max() < sweep.histogram.size):
            raise ValueError(f"threshold sweep: cells do not fit a histogram of {sweep.histogram.shape}")
        sweep.histogram.ravel()[cells] = counts
        return sweep

    def _check(self, cam: np.ndarray, indices: np.ndarray, truth: np.ndarray) -> None:
        if cam.ndim != 3 or len(cam) != len(indices) or (len(cam) and cam.shape[1:] != truth.shape):
            raise ValueError(
                f"CAM {cam.shape} for {len(indices)} classes and ground truth {truth.shape}; expected "
                f"({len(indices)}, {', '.join(str(side) for side in truth.shape)}): upsample the CAM to the mask"
            )
        outside = indices[(indices < 0) | (indices >= self.num_classes)]
        if outside.size:
            raise ValueError(f"class_index {outside[0]} is outside 0..{self.num_classes - 1}")
        if len(np.unique(indices)) != len(indices):
            raise ValueError(f"class indices {indices.tolist()} name a class twice; give one map a class")
        if not np.isfinite(cam).all():
            raise ValueError("CAM holds nan or infinite values; normalised maps are in 0..1")


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(C,) float64: area under the precision-recall steps of each class, nan where no image is positive.

    scores: (N, C) finite, higher is more certain. targets: (N, C) of 0 and 1. Equal scores enter together, as in
    scikit-learn's average_precision_score (not the interpolated area of VOC 2007).
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores {scores.shape} and targets {targets.shape}: expected two arrays of (N, C)")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold nan or infinite values; the classifier diverged, or was fed broken inputs")
    odd = targets[(targets != 0) & (targets != 1)]
    if odd.size:
        raise ValueError(f"targets hold {odd[0]}, expected only 0 and 1")
    return np.array([_one_average_precision(scores[:, c], targets[:, c] != 0) for c in range(scores.shape[1])])


def _one_average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    total = np.count_nonzero(positive)
    if total == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_ties = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    hits = np.cumsum(positive[order])[last_of_ties]
    return float(np.sum(np.diff(hits, prepend=0) * (hits / (last_of_ties + 1))) / total)


def _as_ids(values: np.ndarray, what: str) -> np.ndarray:
    """Class ids as uint8; ValueError names a value that no mask can hold."""
    ids = np.asarray(values)
    if ids.dtype == np.uint8:
        return ids
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{what}: got an array of {ids.dtype}, expected integer class ids")
    outside = ids[(ids < 0) | (ids >= _VALUES)]
    if outside.size:
        raise ValueError(f"{what} holds the value {outside[0]}; expected class ids 0..{MAX_CLASSES} or {IGNORE}")
    return ids.astype(np.uint8)


def _check_values(counts: np.ndarray, size: int, what: str) -> None:
    """counts: (256,) pixels by value."""
    outside = size + np.flatnonzero(counts[size:IGNORE])
    if outside.size:
        raise ValueError(
            f"{what} holds the value {outside[0]} ({counts[outside[0]]} pixels); expected class ids 0..{size - 1} "
            f"or {IGNORE} (ignore): check the class table"
        )


def _check_num_classes(num_classes: int) -> None:
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes: got {num_classes}, expected 1..{MAX_CLASSES}, background not counted")


def _nanmean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
