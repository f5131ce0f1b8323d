"""The random parts of a training crop: its settings, where it is cut, and its colours as one affine map."""

from __future__ import annotations

import math
import operator
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageStat
from pydantic import Field, model_validator

from subcat_core.settings import Settings

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey
# RGB -> YIQ (ITU-R BT.601 primaries); hue is a rotation of its last two rows.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


class AugmentSettings(Settings):
    """Random resize, flip, colour jitter and crop of training (Chang et al. 2020: long side 256..512, crop 224)."""

    resize_side: Literal["short", "long"] = "short"
    """Which side the drawn size is for; the authors' code resizes the long side."""
    resize_min_px: int = Field(default=288, ge=1)
    """Smallest size drawn, uniformly among whole pixels."""
    resize_max_px: int = Field(default=384, ge=1)
    """Largest size drawn."""
    scales: tuple[Annotated[float, Field(gt=0, le=8)], ...] | None = Field(default=None, min_length=1)
    """Factors of the image's own size, one of which is drawn in place of a size (deeplab-pytorch: 0.5, 0.75, 1, 1.25,
    1.5); null draws between resize_min_px and resize_max_px."""
    crop_px: int = Field(default=288, ge=8)
    """Side of the square crop."""
    pad: Literal["random", "end"] = "random"
    """Where an image smaller than the crop lies in it. random: at a random offset, as in the authors' code. end: at
    the top left, padded at the right and the bottom, before the flip, as in deeplab-pytorch."""
    flip_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability of a left-right flip."""
    any_orientation: bool = Field(default=False, exclude_if=operator.not_)
    """Crops are also turned by 0 to 3 quarter turns: for pictures that have no up, such as tissue and surfaces. Left
    out of what is written while false, so that outputs from before there was this setting stay valid."""
    jitter: tuple[float, float, float, float] = (0.3, 0.3, 0.3, 0.1)
    """Brightness, contrast, saturation and hue: factors within 1 +- value, hue within +- value of a turn."""

    @model_validator(mode="after")
    def _in_range(self) -> AugmentSettings:
        if self.resize_max_px < self.resize_min_px:
            raise ValueError(
                f"resize_max_px = {self.resize_max_px} is below resize_min_px = {self.resize_min_px}; swap the two"
            )
        if not all(0 <= value <= 1 for value in self.jitter[:3]) or not 0 <= self.jitter[3] <= 0.5:
            raise ValueError(
                f"jitter {self.jitter}: brightness, contrast and saturation are 0..1, hue 0..0.5; 0 switches one off"
            )
        return self

    @property
    def middle_px(self) -> int | None:
        """The middle of the sizes drawn, which validation and prediction bring images to; None: their own size."""
        return None if self.scales is not None else (self.resize_min_px + self.resize_max_px) // 2


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


def crop_span(size: int, crop: int, rng: np.random.Generator, *, pad_end: bool = False) -> tuple[slice, slice]:
    """(where to cut, where to put) along one side: a random place in a larger image, a random offset for a smaller, or
    offset 0 with pad_end.
    """
    start = int(rng.integers(0, abs(size - crop) + 1))
    if size >= crop:
        return slice(start, start + crop), slice(0, crop)
    start = 0 if pad_end else start
    return slice(0, size), slice(start, start + size)
