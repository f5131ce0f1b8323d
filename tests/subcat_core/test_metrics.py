"""Scores against numbers worked out by hand, scikit-learn, and plain loops."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from subcat_core.cam import cam_to_labels
from subcat_core.classes import IGNORE
from subcat_core.metrics import ConfusionMatrix, ThresholdSweep, average_precision

THRESHOLDS = (0.0, 0.1, 0.15, 0.3, 0.75)


def test_confusion_by_hand() -> None:
    matrix = ConfusionMatrix(3)
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 0]], np.uint8)
    prediction = np.array([[0, 1, 1, 2], [2, 255, 3, 0]], np.uint8)
    matrix.update(prediction, truth)
    assert matrix.counts.dtype == np.int64
    assert matrix.counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    # background 2 / (3 + 3 - 2), class 1: 1 / (2 + 2 - 1), class 2: 1 / (2 + 2 - 1), class 3 has no ground truth
    np.testing.assert_allclose(matrix.iou(), [2 / 4, 1 / 3, 1 / 3, np.nan])
    assert matrix.miou() == pytest.approx((2 / 4 + 1 / 3 + 1 / 3) / 3)
    assert matrix.pixel_accuracy() == pytest.approx(4 / 7)


def test_skipped_predictions_leave_the_pixel_out() -> None:
    matrix = ConfusionMatrix(2, ignore_prediction="skip")
    matrix.update(np.array([255, 1], np.uint8), np.array([1, 1], np.uint8))
    assert matrix.counts.sum() == 1


def test_class_predicted_but_absent_from_truth_is_nan_and_costs_others() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([2, 0], np.uint8), np.array([0, 0], np.uint8))
    np.testing.assert_allclose(matrix.iou(), [0.5, np.nan, np.nan])
    assert matrix.miou() == 0.5


def test_empty_matrix_scores_nan() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(np.full((2, 2), 1, np.uint8), np.full((2, 2), IGNORE, np.uint8))
    assert np.isnan(matrix.miou())
    assert np.isnan(matrix.pixel_accuracy())


def test_merge_and_json_equal_one_pass(rng: np.random.Generator) -> None:
    pairs = [rng.integers(0, 6, (2, 20, 30)).astype(np.int64) for _ in range(4)]
    whole, parts = ConfusionMatrix(5), []
    for prediction, truth in pairs:
        whole.update(prediction, truth)
        part = ConfusionMatrix(5)
        part.update(prediction, truth)
        parts.append(ConfusionMatrix.from_json(part.to_json()))
    merged = ConfusionMatrix(5)
    for part in reversed(parts):
        merged.merge(part)
    assert np.array_equal(merged.counts, whole.counts)
    plain = np.zeros((6, 6), np.int64)
    for prediction, truth in pairs:
        np.add.at(plain, (truth.ravel(), prediction.ravel()), 1)
    assert np.array_equal(whole.counts, plain)


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([3], [0], r"prediction holds the value 3 \(1 pixels\).*0\.\.2"),
        ([0], [254], "ground truth holds the value 254"),
        ([-1], [0], "prediction holds the value -1"),
        ([0], [300], "ground truth holds the value 300"),
        ([0.5], [0], "float64, expected integer"),
        ([0, 0], [0], r"prediction \(2,\) and ground truth \(1,\) differ"),
    ],
)
def test_confusion_errors(prediction: list[float], truth: list[int], message: str) -> None:
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=message):
        matrix.update(np.array(prediction), np.array(truth))
    assert matrix.counts.sum() == 0


def test_confusion_refuses_what_does_not_add_up() -> None:
    with pytest.raises(ValueError, match="do not add up"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))
    with pytest.raises(ValueError, match=r"1\.\.254"):
        ConfusionMatrix(255)
    with pytest.raises(ValueError, match="'background' or 'skip'"):
        ConfusionMatrix(2, ignore_prediction="drop")  # type: ignore[arg-type]
    broken = json.loads(ConfusionMatrix(2).to_json()) | {"num_classes": 3}
    with pytest.raises(ValueError, match=r"counts are \(3, 3\)"):
        ConfusionMatrix.from_json(json.dumps(broken))


def _sweep_inputs(rng: np.random.Generator, num_maps: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps on a grid of values that hits the thresholds exactly, with ties between classes."""
    cam = (rng.integers(0, 21, (num_maps, 24, 31)) / np.float32(20)).astype(np.float32)
    truth = rng.integers(0, 6, (24, 31)).astype(np.uint8)
    truth[:3] = IGNORE
    return cam, truth


@pytest.mark.parametrize("class_indices", [[3, 0], [4], [], [0, 1, 2, 3, 4]])
def test_sweep_equals_one_matrix_a_threshold(rng: np.random.Generator, class_indices: list[int]) -> None:
    cam, truth = _sweep_inputs(rng, len(class_indices))
    sweep = ThresholdSweep(5, THRESHOLDS)
    sweep.update(cam, class_indices, truth)
    for index, threshold in enumerate(sweep.thresholds):
        plain = ConfusionMatrix(5)
        labels = np.zeros_like(truth)
        if class_indices:
            labels = cam_to_labels(cam, class_indices, threshold)
        plain.update(labels, truth)
        assert np.array_equal(sweep.confusion(index).counts, plain.counts)
    assert len(sweep.confusions()) == len(THRESHOLDS)


def test_sweep_merges_and_survives_json(rng: np.random.Generator) -> None:
    whole, merged = ThresholdSweep(5, THRESHOLDS), ThresholdSweep(5, THRESHOLDS)
    for class_indices in ([1], [2, 4], []):
        cam, truth = _sweep_inputs(rng, len(class_indices))
        whole.update(cam, class_indices, truth)
        part = ThresholdSweep(5, THRESHOLDS)
        part.update(cam, class_indices, truth)
        merged.merge(ThresholdSweep.from_json(part.to_json()))
    assert merged.thresholds == THRESHOLDS
    assert np.array_equal(merged.histogram, whole.histogram)


@pytest.mark.parametrize(
    ("class_indices", "change", "message"),
    [
        ([0], {}, "for 1 classes"),
        ([0, 5], {}, r"class_index 5 is outside 0\.\.4"),
        ([1, 1], {}, "twice"),
        ([0, 1], {"truth": 77}, "ground truth holds the value 77"),
        ([0, 1], {"cam": np.nan}, "nan or infinite"),
    ],
)
def test_sweep_errors(
    rng: np.random.Generator, class_indices: list[int], change: dict[str, float], message: str
) -> None:
    cam, truth = _sweep_inputs(rng, 2)
    cam[0, 0, 0] = change.get("cam", 0.5)
    truth[0, 0] = change.get("truth", 0)
    sweep = ThresholdSweep(5, THRESHOLDS)
    with pytest.raises(ValueError, match=message):
        sweep.update(cam, class_indices, truth)
    assert sweep.histogram.sum() == 0


def test_sweep_refuses_odd_thresholds_sizes_and_partners(rng: np.random.Generator) -> None:
    for thresholds in ([], [0.2, 0.1], [0.1, 0.1], [float("nan")]):
        with pytest.raises(ValueError, match="strictly ascending"):
            ThresholdSweep(5, thresholds)
    cam, truth = _sweep_inputs(rng, 2)
    with pytest.raises(ValueError, match="upsample the CAM"):
        ThresholdSweep(5, THRESHOLDS).update(cam[:, :-1], [0, 1], truth)
    with pytest.raises(ValueError, match="do not add up"):
        ThresholdSweep(5, [0.1]).merge(ThresholdSweep(5, [0.2]))


def test_average_precision_by_hand() -> None:
    scores = np.array([[0.9], [0.8], [0.7], [0.6]])
    # hits at rank 1 and 3: (1/1 + 2/3) / 2
    assert average_precision(scores, np.array([[1], [0], [1], [0]]))[0] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_average_precision_equals_scikit_learn(rng: np.random.Generator, levels: int) -> None:
    scores = rng.integers(0, levels, (200, 6)).astype(np.float32)
    targets = (rng.random((200, 6)) < 0.2).astype(np.float32)
    targets[:, 5] = 0
    found = average_precision(scores, targets)
    assert np.isnan(found[5])
    expected = [average_precision_score(targets[:, c], scores[:, c]) for c in range(5)]
    np.testing.assert_allclose(found[:5], expected, rtol=1e-12)


def test_average_precision_errors() -> None:
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        average_precision(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="nan or infinite"):
        average_precision(np.full((2, 2), np.nan), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="targets hold 2"):
        average_precision(np.zeros((1, 1)), np.full((1, 1), 2))
