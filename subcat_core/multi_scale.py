"""DeepLab-v2 at several scales: one picture seen at several sizes, the largest logit of each class, masks brought down
to the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F


def scaled_images(images: torch.Tensor, scales: Sequence[float]) -> Iterator[torch.Tensor]:
    """(N, 3, H, W), uint8 or float, at each scale: (N, 3, int(H * scale), int(W * scale)), at least 1 px a side.

    Bilinear without antialias and without rounding to whole grey levels, so floats; scale 1 is the images as they
    are. As in deeplab-pytorch, whose images are normalised already: the two orders give the same.
    """
    height, width = images.shape[2:]
    for scale in scales:
        size = max(1, int(height * scale)), max(1, int(width * scale))
        if size == (height, width):
            yield images
        else:
            floats = images if images.is_floating_point() else images.float()
            yield F.interpolate(floats, size, mode="bilinear", align_corners=False)


def maximum_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest logit of each class and cell, over (N, C+1, h, w) of several sizes: at the size of the first, to
    which the others are brought bilinearly. float32.
    """
    largest = logits[0].float()
    for other in logits[1:]:
        resized = F.interpolate(other.float(), largest.shape[2:], mode="bilinear", align_corners=False)
        largest = torch.maximum(largest, resized)
    return largest


def shrink_masks(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(N, H, W) -> (N, height, width), nearest neighbour, the same pixels as Pillow takes (`resize_mask` of images.py),
    on whatever device the masks are.

    torch's own "nearest" takes each cell's first pixel and so moves a mask by up to half a cell against the logits.
    """
    rows, columns = (
        torch.from_numpy(nearest_places(size, new_size)).to(masks.device)
        for size, new_size in zip(masks.shape[1:], (height, width), strict=True)
    )
    return masks[:, rows[:, None], columns]


def nearest_places(size: int, new_size: int) -> np.ndarray:
    """(new_size,) int64: which of `size` pixels each of new_size ones takes, as Pillow's resize with NEAREST.

    The centre of the new pixel, rounded down. Centres are added up one by one in float64, as Pillow does: multiplied
    out, centres on the border of two pixels would round to the other one now and then.
    """
    step = size / new_size
    centres = np.cumsum(np.concatenate([[0.5 * step], np.full(new_size - 1, step)]))
    return np.minimum(centres.astype(np.int64), size - 1)
