"""Affinity labels: by hand, against the released code's steps in plain loops, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from subcat_core.affinity_labels import IrnLabelSettings, PsaLabelSettings, averaged_cells, irn_labels, psa_labels
from subcat_core.cam import upsample_cam
from subcat_core.classes import IGNORE
from subcat_core.crf import dense_crf

PSA, IRN = PsaLabelSettings(crf=None), IrnLabelSettings(crf=None)


def _scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two classes on a picture of noise and two squares, 20 x 27 px, maps at a quarter of it."""
    image = rng.integers(60, 120, (20, 27, 3)).astype(np.uint8)
    image[4:12, 3:12] = (220, 60, 50)
    image[8:18, 16:25] = (40, 80, 220)
    cam = (0.3 * rng.random((2, 5, 7))).astype(np.float32)
    cam[0, 1:3, 1:3] = 0.9
    cam[1, 2:4, 4:6] = 0.8
    return image, cam


def test_psa_by_hand() -> None:
    # Against (1 - v)^4 a map wins above 0.276, and against (1 - v)^32 above 0.073.
    cam = np.array([[[0.9, 0.2, 0.03, 0.0]]], np.float32)
    image = np.zeros((1, 4, 3), np.uint8)
    assert psa_labels(cam, [6], image, PSA, 1).tolist() == [[7, IGNORE, 0, 0]]
    two = np.array([[[0.9, 0.2, 0.3, 0.0]], [[0.5, 0.1, 0.6, 0.02]]], np.float32)
    assert psa_labels(two, [6, 0], image, PSA, 1).tolist() == [[7, IGNORE, 1, 0]]


def test_irn_by_hand() -> None:
    cam = np.array([[[0.9, 0.31, 0.2, 0.04]], [[0.5, 0.32, 0.1, 0.02]]], np.float32)
    image = np.zeros((1, 4, 3), np.uint8)
    assert irn_labels(cam, [6, 0], image, IRN).tolist() == [[7, 1, IGNORE, 0]]


@pytest.mark.parametrize("with_crf", [True, False])
def test_psa_agrees_with_plain_loops(with_crf: bool, rng: np.random.Generator) -> None:
    """Both backgrounds, the CRF, the mean of each cell in float64, and the rule cell by cell."""
    image, cam = _scene(rng)
    settings = PsaLabelSettings() if with_crf else PSA
    full = upsample_cam(cam, 20, 27)
    best = {}
    for alpha in (4, 32):
        scores = np.concatenate([(1 - full.max(axis=0, keepdims=True)) ** alpha, full])
        marginals = dense_crf(scores, image, settings.crf) if settings.crf else scores
        for y in range(3):
            for x in range(4):
                cell = marginals[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].astype(np.float64)
                best[alpha, y, x] = int(cell.mean(axis=(1, 2)).argmax())
    labels = psa_labels(cam, [4, 1], image, settings, 8)
    assert labels.shape == (3, 4)
    assert labels.dtype == np.uint8
    for y in range(3):
        for x in range(4):
            expected = IGNORE if best[4, y, x] == 0 else [5, 2][best[4, y, x] - 1]
            expected = 0 if best[32, y, x] == 0 else expected
            assert labels[y, x] == expected


def test_irn_agrees_with_the_released_steps(rng: np.random.Generator) -> None:
    image, cam = _scene(rng)
    settings = IrnLabelSettings()
    full = upsample_cam(cam, 20, 27)
    refined = []
    for constant in (0.30, 0.05):
        hard = np.concatenate([np.full((1, 20, 27), constant, np.float32), full]).argmax(axis=0)
        scores = np.full((3, 20, 27), 0.15, np.float32)
        for y in range(20):
            for x in range(27):
                scores[hard[y, x], y, x] = 0.7
        refined.append(np.array([0, 5, 2])[dense_crf(scores, image, settings.crf).argmax(axis=0)])
    expected = refined[0].copy()
    expected[refined[0] == 0] = IGNORE
    expected[refined[0] + refined[1] == 0] = 0
    found = irn_labels(cam, [4, 1], image, settings)
    np.testing.assert_array_equal(found, expected)
    assert {2, 5, IGNORE} <= set(np.unique(found))


def test_border_cells_are_the_mean_of_the_pixels_they_have() -> None:
    maps = np.arange(15, dtype=np.float64).reshape(1, 3, 5)
    found = averaged_cells(maps, 2)
    assert found.shape == (1, 2, 3)
    assert found[0].tolist() == [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    assert averaged_cells(maps, 8).tolist() == [[[7.0]]]


def test_what_does_not_fit_is_named() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="got no present class"):
        psa_labels(np.zeros((0, 2, 2), np.float32), [], image, PSA, 8)
    with pytest.raises(ValueError, match=r"expected \(2, h, w\)"):
        irn_labels(np.zeros((1, 2, 2), np.float32), [0, 1], image, IRN)
    with pytest.raises(ValidationError, match="alpha_high = 4 is not above alpha_low = 4; swap the two"):
        PsaLabelSettings(alpha_high=4.0)
    with pytest.raises(ValidationError, match=r"foreground_score = 0\.01 is not above background_score = 0\.05"):
        IrnLabelSettings(foreground_score=0.01)
