"""The mean feature of the region where a class shows: by hand, and against plain loops in float64."""

from __future__ import annotations

import numpy as np
import torch

from subcat_core.region_features import region_means


def plain_region_mean(features: np.ndarray, cam: np.ndarray, threshold: float) -> np.ndarray:
    """(D,) float64 of features (D, h, w) and one map (h, w)."""
    total, weight = np.zeros(len(features)), 0.0
    for y, x in np.ndindex(cam.shape):
        share = cam[y, x] / cam.max() if cam.max() > 0 else 1.0
        if share > threshold or cam.max() == 0:
            total += share * features[:, y, x]
            weight += share
    return total / weight


def test_by_hand() -> None:
    features = torch.tensor([[[1.0, 2.0, 3.0, 10.0]], [[0.0, 4.0, 0.0, 0.0]]])
    maps = torch.tensor([[[8.0, 4.0, 3.2, 0.0]], [[0.0, 0.0, 0.0, 0.5]], [[0.0, 0.0, 0.0, 0.0]]])
    # class 0: cells 0 and 1 with weights 1 and 0.5 (cell 2 has just the threshold); class 1: cell 3; class 2: all cells
    expected = [[(1 + 0.5 * 2) / 1.5, 0.5 * 4 / 1.5], [10.0, 0.0], [4.0, 1.0]]
    torch.testing.assert_close(region_means(features, maps, 0.4), torch.tensor(expected))


def test_agrees_with_plain_loops(rng: np.random.Generator) -> None:
    features = rng.standard_normal((6, 5, 7))
    maps = np.maximum(rng.standard_normal((4, 5, 7)), 0)
    maps[2] = 0
    for threshold in (0.0, 0.4, 0.9):
        found = region_means(torch.from_numpy(features), torch.from_numpy(maps), threshold).numpy()
        expected = [plain_region_mean(features, cam, threshold) for cam in maps]
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_no_class_gives_no_rows() -> None:
    assert region_means(torch.ones((3, 2, 2)), torch.ones((0, 2, 2)), 0.4).shape == (0, 3)
