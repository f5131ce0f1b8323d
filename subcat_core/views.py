"""The views of an image at test time: scaled and flipped, resized in batches on whatever device the network is on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F


def view_sizes(
    height: int, width: int, scales: tuple[float, ...], base_px: int | None, max_px: int | None
) -> list[tuple[int, int]]:
    """(height, width) of each scale, at least 1 px a side; sizes in px.

    base_px: short side that scale 1 is brought to; None keeps the image's own. max_px: the long side at scale 1 is no
    more. Python's round(), as the authors' code has it.
    """
    factor = 1.0 if base_px is None else base_px / min(height, width)
    if max_px is not None:
        factor = min(factor, max_px / max(height, width))
    return [(max(1, round(height * factor * scale)), max(1, round(width * factor * scale))) for scale in scales]


def resize_batch(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, height, width) uint8, bicubic with antialias; within one grey level of Pillow's."""
    if tuple(images.shape[2:]) == (height, width):
        return images
    if images.device.type == "cpu":
        return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
    resized = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def passes(num_images: int, pixels_per_image: int, max_pixels: int) -> Iterator[slice]:
    """Slices of a batch, each of at most max_pixels pixels or of one image: bounds the memory of a forward pass."""
    step = max(1, max_pixels // max(1, pixels_per_image))
    for start in range(0, num_images, step):
        yield slice(start, min(start + step, num_images))
