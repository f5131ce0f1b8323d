"""Several scales: sizes, the largest logit, and masks brought down pixel for pixel as Pillow does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from subcat_core.images import resize_mask
from subcat_core.multi_scale import maximum_logits, nearest_places, scaled_images, shrink_masks


def pillows_places(size: int, new_size: int) -> np.ndarray:
    row = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    return np.asarray(row.resize((new_size, 1), Image.Resampling.NEAREST))[0]


def test_nearest_places_by_hand() -> None:
    assert nearest_places(4, 2).tolist() == [1, 3]  # torch's "nearest" takes 0 and 2
    assert nearest_places(5, 2).tolist() == [1, 3]
    assert nearest_places(2, 4).tolist() == [0, 0, 1, 1]
    assert nearest_places(7, 7).tolist() == list(range(7))


def test_nearest_places_are_pillows() -> None:
    for size in [*range(1, 50), 240, 321, 513]:
        for new_size in (*range(1, 45), 61, 321):
            np.testing.assert_array_equal(nearest_places(size, new_size), pillows_places(size, new_size))


def test_centres_are_added_up_as_pillow_adds_them() -> None:
    """Multiplied out, a centre between two pixels goes to the other one now and then."""
    multiplied = [
        (size, new)
        for size in range(1, 60)
        for new in range(1, 60)
        if any(int((place + 0.5) * (size / new)) != found for place, found in enumerate(nearest_places(size, new)))
    ]
    assert multiplied
    for size, new_size in multiplied:
        np.testing.assert_array_equal(nearest_places(size, new_size), pillows_places(size, new_size))


@pytest.mark.parametrize("cells", [(41, 41), (21, 31), (13, 50), (321, 200)])
def test_shrink_masks_agrees_with_pillow(rng: np.random.Generator, cells: tuple[int, int]) -> None:
    masks = rng.integers(0, 256, (2, 321, 200), dtype=np.uint8)
    shrunk = shrink_masks(torch.from_numpy(masks), *cells)
    assert shrunk.dtype == torch.uint8
    np.testing.assert_array_equal(shrunk.numpy(), [resize_mask(mask, *cells) for mask in masks])


def test_scaled_images_have_the_published_sizes() -> None:
    images = torch.zeros(2, 3, 321, 9, dtype=torch.uint8)
    views = list(scaled_images(images, (1.0, 0.5, 0.75)))
    assert [tuple(view.shape[2:]) for view in views] == [(321, 9), (160, 4), (240, 6)]
    assert views[0] is images
    assert views[1].dtype == torch.float32
    assert next(scaled_images(images[:, :, :1, :1], (0.5,))).shape == (2, 3, 1, 1)


def test_scaling_and_normalising_may_change_places() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 21, 34, dtype=torch.float64) * 255
    [scaled] = scaled_images(images, (0.75,))
    normal = F.interpolate((images - 104.0) / 58.0, (15, 25), mode="bilinear", align_corners=False)
    torch.testing.assert_close((scaled - 104.0) / 58.0, normal, rtol=1e-9, atol=1e-9)


def test_maximum_by_hand() -> None:
    first = torch.tensor([[[[0.0, 5.0, 1.0, 2.0]]]])
    second = torch.tensor([[[[1.0, 3.0]]]])  # at four cells: 1, 1.5, 2.5, 3
    assert maximum_logits([first, second]).flatten().tolist() == [1.0, 5.0, 2.5, 3.0]
    assert maximum_logits([first]) is first
    assert maximum_logits([first.bfloat16(), second.bfloat16()]).dtype == torch.float32
