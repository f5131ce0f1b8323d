"""The random parts of a training crop: where it is cut, and its colours as one affine map."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageStat

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey
# RGB -> YIQ (ITU-R BT.601 primaries); hue is a rotation of its last two rows.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


def jitter_colours(image: np.ndarray, strength: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue in a random order; strength 0 leaves one as it is.

    image: (H, W, 3) uint8 RGB; returns the same. strength: factors are drawn within 1 +- value, hue within +- value of
    a turn (Chang et al.'s code: ColorJitter(0.3, 0.3, 0.3, 0.1)). Always draws the same numbers from rng.

    Each is an affine map of colour, so they are composed first and the pixels are touched, rounded and clipped once.
    That differs from torchvision's ColorJitter in two ways: no clipping in between, and hue turns in YIQ (luma stays)
    instead of HSV, which takes a quarter of the time.
    """
    factors = [1 + rng.uniform(-value, value) for value in strength[:3]]
    angle = 2 * math.pi * rng.uniform(-strength[3], strength[3])
    order = rng.permutation(4)
    if not any(strength):
        return image
    pixels = Image.fromarray(np.ascontiguousarray(image))
    matrix, offset, mean = np.eye(3), np.zeros(3), np.array(ImageStat.Stat(pixels).mean)
    for step in order:
        if step == 0:
            linear, shift = np.eye(3) * factors[0], np.zeros(3)
        elif step == 1:
            grey = float(_LUMA @ (matrix @ mean + offset))
            linear, shift = np.eye(3) * factors[1], np.full(3, (1 - factors[1]) * grey)
        elif step == 2:
            linear, shift = factors[2] * np.eye(3) + (1 - factors[2]) * np.tile(_LUMA, (3, 1)), np.zeros(3)
        else:
            turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
            linear, shift = np.linalg.solve(_YIQ, turn @ _YIQ), np.zeros(3)
        matrix, offset = linear @ matrix, linear @ offset + shift
    affine = tuple(np.column_stack([matrix, offset]).ravel().tolist())
    return np.asarray(pixels.convert("RGB", affine))


def crop_span(size: int, crop: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """(where to cut, where to put) along one side: a random place in a larger image, a random offset for a smaller."""
    start = int(rng.integers(0, abs(size - crop) + 1))
    if size >= crop:
        return slice(start, start + crop), slice(0, crop)
    return slice(0, size), slice(start, start + size)
