"""Views: sizes by hand, resizing against Pillow, batches that stay within their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from subcat_core.views import passes, resize_batch, view_sizes


def test_view_sizes_by_hand() -> None:
    assert view_sizes(375, 500, (1.0, 0.5), None, None) == [(375, 500), (188, 250)]  # round(187.5) is 188: half to even
    assert view_sizes(375, 500, (1.0,), 300, None) == [(300, 400)]
    assert view_sizes(3000, 4000, (1.0, 2.0), None, 1000) == [(750, 1000), (1500, 2000)]
    assert view_sizes(100, 4000, (1.0,), 300, 1000) == [(25, 1000)]
    assert view_sizes(1, 1, (0.5,), None, None) == [(1, 1)]


@pytest.mark.parametrize("size", [(40, 61), (100, 130)])
def test_resize_agrees_with_pillow(rng: np.random.Generator, size: tuple[int, int]) -> None:
    coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC))
    ours = resize_batch(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], *size)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_passes() -> None:
    assert list(passes(5, 10, 20)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(passes(2, 100, 20)) == [slice(0, 1), slice(1, 2)]
    assert list(passes(0, 10, 20)) == []
