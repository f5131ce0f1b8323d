"""The segmenter over a large image, window by window at full resolution; probabilities are averaged in overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from subcat_core.segmenter import Segmenter, predict_mask
from subcat_core.tiles import stitch, tile_grid


def predict_windows(
    segmenter: Segmenter, image: np.ndarray, num_classes: int, *, window_px: int, stride_px: int, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """One image's mask, by windows that overlap: each pixel's class probabilities are the mean over its windows.

    image: (H, W, 3) uint8 RGB. num_classes: C. window_px, stride_px: sides and steps of the windows, in pixels of the
    image (`tile_grid`). options: as of `predict_mask`, for each window: base_px is the short side that a window is
    brought to. Returns mask (H, W) uint8 class ids and confidence (H, W) float32. Beside them it holds the
    probabilities of all classes for one window's height at the image's width. A window of the image's size gives what
    `predict_mask` gives. Raises ValueError as `tile_starts` and `predict_mask`.
    """
    height, width = image.shape[:2]

    def probabilities() -> Iterator[tuple[int, int, np.ndarray]]:
        for y, x in tile_grid(height, width, window_px, stride_px):
            window = image[y : y + window_px, x : x + window_px]
            probability = np.empty((num_classes + 1, *window.shape[:2]), np.float32)
            predict_mask(segmenter, window, probability_out=probability, **options)
            yield y, x, probability

    mask, confidence = np.empty((height, width), np.uint8), np.empty((height, width), np.float32)
    for band in stitch(probabilities(), num_classes + 1, height, width):
        mask[band.rows] = band.maps.argmax(axis=0)
        confidence[band.rows] = band.maps.max(axis=0)
    return mask, confidence
