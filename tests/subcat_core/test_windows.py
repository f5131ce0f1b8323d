"""Prediction through windows: one window is the whole prediction, several are the plain mean of theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from subcat_core.segmenter import Segmenter, predict_mask
from subcat_core.tiles import tile_grid
from subcat_core.windows import predict_windows


class Blurred(Segmenter):
    """Three channels of logits from the pixels around: what a window sees depends on where its border is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.backbone = nn.Conv2d(3, 3, 7, padding=3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images.float() / 16)  # type: ignore[operator]


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (40, 52, 3)).astype(np.uint8)


@pytest.mark.parametrize("background", [True, False])
def test_one_window_is_the_whole_prediction(image: np.ndarray, background: bool) -> None:
    model = Blurred().eval()
    mask, confidence = predict_mask(model, image, background=background)
    found, sure = predict_windows(model, image, 2, window_px=64, stride_px=32, background=background)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_allclose(sure, confidence, rtol=1e-6)


def test_windows_agree_with_the_plain_mean(image: np.ndarray) -> None:
    model = Blurred().eval()
    total, count = np.zeros((3, 40, 52), np.float64), np.zeros((40, 52), np.int64)
    for y, x in tile_grid(40, 52, 24, 10):
        part = np.s_[y : y + 24, x : x + 24]
        probability = np.empty((3, 24, 24), np.float32)
        predict_mask(model, image[part], scales=(1.0, 0.5), probability_out=probability)
        total[:, part[0], part[1]] += probability
        count[part] += 1
    expected = total / count
    mask, confidence = predict_windows(model, image, 2, window_px=24, stride_px=10, scales=(1.0, 0.5))
    assert count.max() >= 9
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=1e-6)
    sure = np.sort(expected, axis=0)
    sure = sure[2] - sure[1] > 1e-5
    np.testing.assert_array_equal(mask[sure], expected.argmax(axis=0)[sure])
    assert sure.mean() > 0.99


def test_probabilities_are_handed_out_and_background_may_be_left_out(image: np.ndarray) -> None:
    model = Blurred().eval()
    kept, without = np.empty((3, 40, 52), np.float32), np.empty((3, 40, 52), np.float32)
    mask, confidence = predict_mask(model, image, probability_out=kept)
    np.testing.assert_allclose(kept.sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(mask, kept.argmax(axis=0))
    np.testing.assert_array_equal(confidence, kept.max(axis=0))
    mask, _ = predict_mask(model, image, background=False, probability_out=without)
    assert mask.min() == 1
    np.testing.assert_allclose(without[1:], kept[1:] / kept[1:].sum(axis=0), rtol=1e-5)
    assert not without[0].any()


def test_a_refinement_sees_each_window(image: np.ndarray) -> None:
    sizes = []

    def refine(probability: np.ndarray, window: np.ndarray) -> np.ndarray:
        sizes.append(window.shape[:2])
        return probability[::-1]

    model = Blurred().eval()
    kept = np.empty((3, 40, 52), np.float32)
    predict_mask(model, image, probability_out=kept)
    mask, _ = predict_windows(model, image, 2, window_px=52, stride_px=52, crf=refine)
    np.testing.assert_array_equal(mask, kept[::-1].argmax(axis=0))
    predict_windows(model, image, 2, window_px=30, stride_px=30, crf=refine)
    assert sizes == [(40, 52), *[(30, 30)] * 4]


def test_gaps_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="would leave gaps"):
        predict_windows(Blurred().eval(), image, 2, window_px=16, stride_px=17)
