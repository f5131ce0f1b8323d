"""Crops for affinity nets: image and labels stay together, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from subcat_core.affinity_crop import AffinityCropSettings, ScaledCropSettings, aligned_crop, scaled_crop
from subcat_core.classes import IGNORE

PAD = (200, 201, 202)
PLAIN = AffinityCropSettings(crop_px=32, jitter=(0.0, 0.0, 0.0, 0.0))


def _picture(height: int, width: int, stride_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Each cell has a number of its own; the image shows it in all its pixels."""
    cells = np.arange(-(-height // stride_px) * -(-width // stride_px), dtype=np.uint8)
    labels = cells.reshape(-(-height // stride_px), -(-width // stride_px))
    pixels = labels.repeat(stride_px, axis=0).repeat(stride_px, axis=1)[:height, :width]
    return np.stack([pixels] * 3, axis=-1), labels


@pytest.mark.parametrize("size", [(50, 61), (20, 17), (32, 90), (8, 8)])
def test_every_cell_keeps_its_label_and_padding_has_none(size: tuple[int, int]) -> None:
    image, labels = _picture(*size, 8)
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        crop, cut = aligned_crop(image, labels, PLAIN, rng, stride_px=8, pad_rgb=PAD)
        assert crop.shape == (3, 32, 32)
        assert cut.shape == (4, 4)
        assert (crop.dtype, cut.dtype) == (np.uint8, np.uint8)
        big = cut.repeat(8, axis=0).repeat(8, axis=1)
        shown = crop[0] != PAD[0]
        np.testing.assert_array_equal(crop[0][shown], big[shown])
        assert (big[shown] != IGNORE).all()
        assert set(np.unique(crop[:, ~shown])) <= set(PAD)
        for cell in np.unique(cut[cut != IGNORE]):  # even a cell that is cut short shows all the pixels it has
            assert int((crop[0] == cell).sum()) == int((image[..., 0] == cell).sum())
        seen.add(cut.tobytes())
    assert len(seen) > 1, "mirrored or cut elsewhere"


def test_the_same_generator_gives_the_same_crop_and_flips_happen_as_often_as_told() -> None:
    image, labels = _picture(32, 32, 8)
    never = PLAIN.model_copy(update={"flip_prob": 0.0})
    _, cut = aligned_crop(image, labels, never, np.random.default_rng(1), stride_px=8, pad_rgb=PAD)
    np.testing.assert_array_equal(cut, labels)
    always = PLAIN.model_copy(update={"flip_prob": 1.0})
    crop, cut = aligned_crop(image, labels, always, np.random.default_rng(1), stride_px=8, pad_rgb=PAD)
    np.testing.assert_array_equal(cut, labels[:, ::-1])
    np.testing.assert_array_equal(crop[0], image[:, ::-1, 0])
    jittered = AffinityCropSettings(crop_px=32)
    first, second = (
        aligned_crop(image, labels, jittered, np.random.default_rng(3), stride_px=8, pad_rgb=PAD)[0] for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, crop)


def test_scaled_crops_take_the_first_pixel_of_a_cell() -> None:
    image, labels = _picture(40, 48, 1)
    image[:] = (np.arange(40)[:, None, None] * 5) % 251
    labels = image[..., 0].copy()
    settings = ScaledCropSettings(crop_px=32, scale_min=1.0, scale_max=1.0, flip_prob=0.0)
    crop, cut = scaled_crop(image, labels, settings, np.random.default_rng(0), stride_px=4, pad_rgb=PAD)
    assert cut.shape == (8, 8)
    np.testing.assert_array_equal(cut, crop[0][::4, ::4])
    small = ScaledCropSettings(crop_px=32, scale_min=0.5, scale_max=0.5)
    crop, cut = scaled_crop(image, labels, small, np.random.default_rng(0), stride_px=4, pad_rgb=PAD)
    assert int((crop[0] != PAD[0]).sum()) == 20 * 24
    assert 5 * 6 <= int((cut != IGNORE).sum()) <= 6 * 7


def test_what_does_not_fit_is_named() -> None:
    image, labels = _picture(40, 40, 8)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"expected labels of \(3, 3\) and a whole number of cells"):
        aligned_crop(image, labels, PLAIN, rng, stride_px=16, pad_rgb=PAD)
    odd = PLAIN.model_copy(update={"crop_px": 36})
    with pytest.raises(ValueError, match="a crop of 36 px"):
        aligned_crop(image, labels, odd, rng, stride_px=8, pad_rgb=PAD)
    with pytest.raises(ValueError, match="expected labels of the image's size"):
        scaled_crop(image, labels, ScaledCropSettings(), rng, stride_px=4, pad_rgb=PAD)
    with pytest.raises(ValidationError, match=r"scale_max = 0\.25 is below scale_min = 0\.5; swap the two"):
        ScaledCropSettings(scale_max=0.25)
    with pytest.raises(ValidationError, match=r"hue 0\.\.0\.5"):
        AffinityCropSettings(jitter=(0.1, 0.1, 0.1, 0.6))
