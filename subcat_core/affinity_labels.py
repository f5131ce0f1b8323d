"""From CAMs to what affinity nets learn from: a map of confident foreground, confident background, and IGNORE between.

Ahn & Kwak 2018 (PSA): the CRF twice, with a background that is strong (what still is foreground is so surely) and one
that is weak. Ahn et al. 2019 (IRNet): the same with two constant backgrounds, and the CRF on labels instead of scores.

Legend: n present classes, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from subcat_core.cam import cam_to_labels, upsample_cam
from subcat_core.classes import BACKGROUND, IGNORE, to_class_ids
from subcat_core.crf import CrfSettings, dense_crf
from subcat_core.pseudo_mask import PseudoMaskSettings, check_cam, with_background
from subcat_core.settings import Settings


class PsaLabelSettings(Settings):
    """PSA's labels; the defaults are those of its code (its paper has 4 and 24)."""

    alpha_low: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Background (1 - max_c cam)^alpha_low is strong: what is foreground against it is foreground."""
    alpha_high: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """Background with this power is weak: where it wins all the same there is background."""
    crf: CrfSettings | None = CrfSettings()
    """Dense CRF on the image, once for each; none: the scores decide."""

    @model_validator(mode="after")
    def _in_order(self) -> PsaLabelSettings:
        if self.alpha_high <= self.alpha_low:
            raise ValueError(
                f"alpha_high = {self.alpha_high:g} is not above alpha_low = {self.alpha_low:g}; swap the two"
            )
        return self


class IrnLabelSettings(Settings):
    """IRNet's labels; the defaults are those of its code."""

    foreground_score: float = Field(default=0.30, ge=0, le=1)
    """Constant background that foreground must exceed."""
    background_score: float = Field(default=0.05, ge=0, le=1)
    """Constant background below which there is background."""
    label_probability: float = Field(default=0.7, gt=0, lt=1)
    """Probability that the CRF gives a label at its start; the others share the rest."""
    crf: CrfSettings | None = CrfSettings(bilateral_sigma_px=50.0, bilateral_sigma_rgb=5.0)
    """Dense CRF on the image, once for each; none: the labels as they are."""

    @model_validator(mode="after")
    def _in_order(self) -> IrnLabelSettings:
        if self.foreground_score <= self.background_score:
            raise ValueError(
                f"foreground_score = {self.foreground_score:g} is not above background_score = "
                f"{self.background_score:g}; swap the two"
            )
        return self


def psa_labels(
    cam: np.ndarray, class_indices: Sequence[int], image: np.ndarray, settings: PsaLabelSettings, stride_px: int
) -> np.ndarray:
    """(ceil(H / stride_px), ceil(W / stride_px)) uint8 of class ids, BACKGROUND and IGNORE.

    cam: (n, h, w) float32 of 0..1, n >= 1, on any coarser grid; image: (H, W, 3) uint8 RGB. The marginals are averaged
    over each cell, over the pixels that it has at the border, before the best one is taken (authors' code, which
    averages after it has cut a training crop; here crops are cut along the cells). Background is where the weak one
    wins, else a class is where it wins against the strong one, else nothing is known.
    """
    indices = _checked(cam, class_indices, image)
    upsampled = upsample_cam(cam, *image.shape[:2])

    def best(alpha: float) -> np.ndarray:
        scores = with_background(upsampled, PseudoMaskSettings(alpha=alpha))
        marginals = scores if settings.crf is None else dense_crf(scores, image, settings.crf)
        return averaged_cells(marginals, stride_px).argmax(axis=0)

    against_strong, against_weak = best(settings.alpha_low), best(settings.alpha_high)
    labels = np.where(against_strong == 0, np.uint8(IGNORE), _ids(indices)[against_strong])
    labels[against_weak == 0] = BACKGROUND
    return labels


def irn_labels(
    cam: np.ndarray, class_indices: Sequence[int], image: np.ndarray, settings: IrnLabelSettings
) -> np.ndarray:
    """(H, W) uint8 of class ids, BACKGROUND and IGNORE; arguments as `psa_labels`.

    Foreground where a map exceeds the higher constant, after the CRF; background where neither CRF finds a class.
    """
    indices = _checked(cam, class_indices, image)
    upsampled = upsample_cam(cam, *image.shape[:2])
    rows = range(len(indices))

    def best(threshold: float) -> np.ndarray:
        labels = cam_to_labels(upsampled, rows, threshold)  # rows of scores: 0 background, 1..n classes
        if settings.crf is None:
            return labels
        scores = np.full((len(indices) + 1, *labels.shape), (1 - settings.label_probability) / len(indices), np.float32)
        np.put_along_axis(scores, labels[None].astype(np.int64), settings.label_probability, axis=0)
        return dense_crf(scores, image, settings.crf).argmax(axis=0)

    sure, perhaps = best(settings.foreground_score), best(settings.background_score)
    labels = np.where(sure == 0, np.uint8(IGNORE), _ids(indices)[sure])
    labels[(sure == 0) & (perhaps == 0)] = BACKGROUND
    return labels


def averaged_cells(maps: np.ndarray, stride_px: int) -> np.ndarray:
    """(n, H, W) float -> the mean over each cell: (n, ceil(H / stride_px), ceil(W / stride_px)); a cell at the border
    is the mean of the pixels it has.
    """
    pooled = F.avg_pool2d(torch.from_numpy(maps)[None], stride_px, ceil_mode=True, count_include_pad=False)
    return pooled[0].numpy()


def _checked(cam: np.ndarray, class_indices: Sequence[int], image: np.ndarray) -> np.ndarray:
    indices = np.asarray(class_indices, np.int64)
    check_cam(cam, indices, image)
    if not len(indices):
        raise ValueError("got no present class; an image without tags says nothing of affinity: leave it out")
    return indices


def _ids(indices: np.ndarray) -> np.ndarray:
    return np.concatenate([np.array([BACKGROUND], np.uint8), to_class_ids(indices)])
