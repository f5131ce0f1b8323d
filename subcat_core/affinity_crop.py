"""Training crops for affinity nets: image and label map cut, mirrored and padded together, cell by cell."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from subcat_core.classes import IGNORE
from subcat_core.images import resize, resize_mask
from subcat_core.random_crop import crop_span, jitter_colours
from subcat_core.settings import Settings


class AffinityCropSettings(Settings):
    """PSA's crops: never resized (values of the authors' code)."""

    crop_px: int = Field(default=448, ge=32)
    """Side of the square crop; smaller images are padded at a random offset."""
    flip_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability of a left-right flip."""
    jitter: tuple[float, float, float, float] = (0.3, 0.3, 0.3, 0.1)
    """Brightness, contrast, saturation and hue: factors within 1 +- value, hue within +- value of a turn."""

    @model_validator(mode="after")
    def _in_range(self) -> AffinityCropSettings:
        if not all(0 <= value <= 1 for value in self.jitter[:3]) or not 0 <= self.jitter[3] <= 0.5:
            raise ValueError(
                f"jitter {self.jitter}: brightness, contrast and saturation are 0..1, hue 0..0.5; 0 switches one off"
            )
        return self


class ScaledCropSettings(AffinityCropSettings):
    """IRNet's crops: resized at random, colours as they are (values of the authors' code)."""

    crop_px: int = Field(default=512, ge=32)
    """Side of the square crop; smaller images are padded at a random offset."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Brightness, contrast, saturation and hue, as in PSA's crops; the authors have none."""
    scale_min: float = Field(default=0.5, gt=0, le=8)
    """Smallest factor that the image is resized by, uniformly."""
    scale_max: float = Field(default=1.5, gt=0, le=8)
    """Largest factor."""

    @model_validator(mode="after")
    def _scales_in_order(self) -> ScaledCropSettings:
        if self.scale_max < self.scale_min:
            raise ValueError(f"scale_max = {self.scale_max:g} is below scale_min = {self.scale_min:g}; swap the two")
        return self


def aligned_crop(
    image: np.ndarray,
    labels: np.ndarray,
    settings: AffinityCropSettings,
    rng: np.random.Generator,
    *,
    stride_px: int,
    pad_rgb: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """A crop along the cells that the labels are of.

    image: (H, W, 3) uint8 RGB. labels: (ceil(H / stride_px), ceil(W / stride_px)) uint8. pad_rgb: the backbone's mean
    colour, so that padding is zero after normalisation. Returns (3, crop, crop) uint8, and labels of (crop / stride_px,
    crop / stride_px) uint8 with IGNORE where there is no image. ValueError where the sizes do not fit. The authors cut
    anywhere and average the labels' probabilities afterwards; crops along the cells spare keeping those.
    """
    expected = (-(-image.shape[0] // stride_px), -(-image.shape[1] // stride_px))
    if labels.shape != expected or settings.crop_px % stride_px:
        raise ValueError(
            f"labels of {labels.shape} and a crop of {settings.crop_px} px for an image of {image.shape[:2]} px with "
            f"cells of {stride_px} px; expected labels of {expected} and a whole number of cells"
        )
    num_cells = settings.crop_px // stride_px
    from_y, to_y = crop_span(labels.shape[0], num_cells, rng)
    from_x, to_x = crop_span(labels.shape[1], num_cells, rng)
    label_crop = np.full((num_cells, num_cells), IGNORE, np.uint8)
    label_crop[to_y, to_x] = labels[from_y, from_x]
    rows, columns = (slice(span.start * stride_px, span.stop * stride_px) for span in (from_y, from_x))
    at = (to_y.start * stride_px, to_x.start * stride_px)
    return _finished(image[rows, columns], at, label_crop, settings, rng, pad_rgb)


def scaled_crop(
    image: np.ndarray,
    labels: np.ndarray,
    settings: ScaledCropSettings,
    rng: np.random.Generator,
    *,
    stride_px: int,
    pad_rgb: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of the image resized by a random factor; arguments as `aligned_crop`, but labels: (H, W) uint8.

    Labels are resized by nearest neighbour, and a cell's label is that of its first pixel (authors' code).
    """
    if labels.shape != image.shape[:2] or settings.crop_px % stride_px:
        raise ValueError(
            f"labels of {labels.shape} and a crop of {settings.crop_px} px for an image of {image.shape[:2]} px with "
            f"cells of {stride_px} px; expected labels of the image's size and a whole number of cells"
        )
    factor = rng.uniform(settings.scale_min, settings.scale_max)
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    from_y, to_y = crop_span(height, settings.crop_px, rng)
    from_x, to_x = crop_span(width, settings.crop_px, rng)
    label_crop = np.full((settings.crop_px, settings.crop_px), IGNORE, np.uint8)
    label_crop[to_y, to_x] = resize_mask(labels, height, width)[from_y, from_x]
    pixels = resize(image, height, width)[from_y, from_x]
    planes, label_crop = _finished(pixels, (to_y.start, to_x.start), label_crop, settings, rng, pad_rgb)
    return planes, np.ascontiguousarray(label_crop[::stride_px, ::stride_px])


def _finished(
    pixels: np.ndarray,
    at: tuple[int, int],
    labels: np.ndarray,
    settings: AffinityCropSettings,
    rng: np.random.Generator,
    pad_rgb: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Colours jittered, laid at (top, left) = `at` on the padding, and both mirrored or not."""
    crop = np.empty((settings.crop_px, settings.crop_px, 3), np.uint8)
    crop[:] = pad_rgb
    top, left = at
    crop[top : top + pixels.shape[0], left : left + pixels.shape[1]] = jitter_colours(pixels, settings.jitter, rng)
    if rng.random() < settings.flip_prob:
        crop, labels = crop[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(crop.transpose(2, 0, 1)), np.ascontiguousarray(labels)
