"""From CAMs to the mask that trains the segmenter: background score, dense CRF, argmax, and IGNORE where unsure.

Ahn & Kwak 2018 (PSA), which Chang et al. 2020 build on: only the tagged classes compete, against a background score
of (1 - max_c cam)^alpha. Where PSA feeds the CRF's marginals to an affinity net, we take their argmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from subcat_core.cam import upsample_cam
from subcat_core.classes import BACKGROUND, IGNORE, MAX_CLASSES, to_class_ids
from subcat_core.crf import CrfSettings, dense_crf
from subcat_core.settings import Settings


class MaskSettings(Settings):
    """How scores or probabilities become a mask."""

    crf: CrfSettings | None = CrfSettings()
    """Dense CRF on the image, or on each tile of it; none ("none" in TOML): what goes in decides."""
    min_confidence: float = Field(default=0.0, ge=0, le=1)
    """Pixels whose class has a lower probability become 255 (ignore) and do not train the segmenter; 0 keeps all."""

    @field_validator("crf", mode="before")
    @classmethod
    def _no_crf(cls, value: object) -> object:
        """TOML has no null."""
        return None if value == "none" else value


class PseudoMaskSettings(MaskSettings):
    """How maps compete with background, and how they become a mask."""

    background: Literal["power", "constant"] = "power"
    """`power`: (1 - max_c cam)^alpha, high where no class is active. `constant`: background_score everywhere. Neither
    counts for classes without a background (`ClassTable.has_background`): there only the maps compete."""
    alpha: float = Field(default=12.0, gt=0, allow_inf_nan=False)
    """Higher: weaker background. 12 breaks even with a map at 0.15, the authors' threshold (PSA: 4 and 24 or 32)."""
    background_score: float = Field(default=0.15, ge=0, le=1)
    """Score of background when it is `constant` (value of the authors' code)."""


@dataclasses.dataclass(frozen=True)
class PseudoMask:
    """The pseudo mask of one image.

    mask: (H, W) uint8 class ids, IGNORE where unsure. labels: the same before IGNORE, for scoring. chosen: (H, W)
    float32, the probability of each pixel's label. confidence: its mean over pixels that are not IGNORE, 0 where there
    are none. coverage_frac: foreground pixels / all pixels. ignore_frac: IGNORE pixels / all pixels. class_ids:
    foreground ids in the mask, ascending.
    """

    mask: np.ndarray
    labels: np.ndarray
    chosen: np.ndarray
    confidence: float
    coverage_frac: float
    ignore_frac: float
    class_ids: tuple[int, ...]


def make_pseudo_mask(
    cam: np.ndarray,
    class_indices: Sequence[int] | np.ndarray,
    image: np.ndarray,
    settings: PseudoMaskSettings,
    *,
    has_background: bool = True,
) -> PseudoMask:
    """Pseudo mask of one image: as `class_probability` takes and refuses it, then `mask_of_probability`."""
    ids, probability = class_probability(cam, class_indices, image, settings, has_background=has_background)
    labels, chosen = np.zeros(image.shape[:2], np.uint8), np.zeros(image.shape[:2], np.float32)
    if len(ids):
        labels, chosen = ids[probability.argmax(axis=0)], probability.max(axis=0)
    return mask_of_probability(labels, chosen, settings, has_background=has_background)


def class_probability(
    cam: np.ndarray,
    class_indices: Sequence[int] | np.ndarray,
    image: np.ndarray,
    settings: PseudoMaskSettings,
    *,
    has_background: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """What competes in an image, (L,) uint8 class ids, and how likely it is, (L, H, W) float32 that sums to 1.

    cam: (n, h, w) float32 in 0..1 of the n present classes, on a coarser grid. class_indices: their class_index, all
    different. image: (H, W, 3) uint8 RGB. With has_background, background comes first (L = n + 1), and an image without
    a present class is background all over; without, L = n, and the one present class is everywhere. ValueError for
    shapes that do not fit, and for maps that are not finite or outside 0..1.
    """
    indices = np.asarray(class_indices, np.int64)
    check_cam(cam, indices, image)
    height, width = image.shape[:2]
    ids = np.concatenate([np.zeros(int(has_background), np.uint8), to_class_ids(indices)])
    if len(ids) <= 1:
        return ids, np.ones((len(ids), height, width), np.float32)
    scores = upsample_cam(cam, height, width)
    if has_background:
        return ids, probability_of_scores(with_background(scores, settings), image, settings)
    scores = scores + np.finfo(np.float32).tiny  # where no map is above 0, all are as likely
    return ids, probability_of_scores(scores, image, settings)


def mask_of_scores(
    scores: np.ndarray, class_indices: Sequence[int] | np.ndarray, image: np.ndarray, settings: PseudoMaskSettings
) -> PseudoMask:
    """Pseudo mask from scores (1 + n, H, W) float32 >= 0, background first, as `with_background` or a walk gives them.

    Of the settings, those of the background are not looked at: it is in the scores.
    """
    probability = probability_of_scores(scores, image, settings)
    return mask_of_probability(labels_of_scores(probability, class_indices), probability.max(axis=0), settings)


def probability_of_scores(scores: np.ndarray, image: np.ndarray, settings: PseudoMaskSettings) -> np.ndarray:
    """(L, H, W) float32 scores >= 0 of what competes -> probabilities: by the CRF, or each over their sum."""
    if settings.crf is not None:
        return dense_crf(scores, image, settings.crf)
    return scores / np.maximum(scores.sum(axis=0), np.finfo(np.float32).tiny)


def mask_of_probability(
    labels: np.ndarray, chosen: np.ndarray, settings: MaskSettings, *, has_background: bool = True
) -> PseudoMask:
    """IGNORE where unsure, and the numbers of a mask.

    labels: (H, W) uint8, the likeliest class. chosen: (H, W) float32, its probability; without background 0 where
    nothing is known, which is IGNORE whatever min_confidence.
    """
    unsure = chosen < settings.min_confidence
    if not has_background:
        unsure |= chosen == 0
    mask = np.where(unsure, np.uint8(IGNORE), labels)
    sure = chosen[~unsure]
    foreground = (mask != BACKGROUND) & (mask != IGNORE)
    return PseudoMask(
        mask,
        labels,
        chosen,
        confidence=float(sure.mean(dtype=np.float64)) if sure.size else 0.0,
        coverage_frac=float(foreground.mean()),
        ignore_frac=float(unsure.mean()),
        class_ids=tuple(int(value) for value in np.unique(mask[foreground])),
    )


def confidence_levels(chosen: np.ndarray) -> np.ndarray:
    """(H, W) float32 probabilities in 0..1 -> uint8, 255 for 1, by which pixels may count in the segmenter's loss."""
    return np.rint(chosen * 255).clip(0, 255).astype(np.uint8)


def labels_of_scores(scores: np.ndarray, class_indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """(1 + n, H, W) scores, background first -> (H, W) uint8 class ids of the best; ties go to the lower row."""
    ids = np.concatenate([np.array([BACKGROUND], np.uint8), to_class_ids(np.asarray(class_indices))])
    return ids[scores.argmax(axis=0)]


def with_background(cam: np.ndarray, settings: PseudoMaskSettings) -> np.ndarray:
    """(n, H, W) maps in 0..1 -> (1 + n, H, W) float32 scores, background first; they do not sum to 1."""
    scores = np.empty((len(cam) + 1, *cam.shape[1:]), np.float32)
    scores[1:] = cam
    if settings.background == "constant":
        scores[0] = settings.background_score
    else:
        # Interpolation may round a little above 1, and a negative base would give nan.
        scores[0] = np.maximum(1 - cam.max(axis=0), 0) ** np.float32(settings.alpha)
    return scores


def check_cam(cam: np.ndarray, indices: np.ndarray, image: np.ndarray) -> None:
    """ValueError for maps, present classes and an image that do not fit, and for maps not finite or outside 0..1."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: got {image.dtype} {image.shape}, expected uint8 of (H, W, 3)")
    if cam.ndim != 3 or len(cam) != len(indices):
        raise ValueError(f"CAM: got {cam.shape} for {len(indices)} present classes, expected ({len(indices)}, h, w)")
    outside = indices[(indices < 0) | (indices >= MAX_CLASSES)]
    if outside.size:
        raise ValueError(
            f"class_index {outside[0]} is outside 0..{MAX_CLASSES - 1}; an 8-bit mask holds no more classes"
        )
    if len(np.unique(indices)) != len(indices):
        raise ValueError(f"class indices {indices.tolist()} name a class twice; give one map a class")
    if cam.size and not (cam.min() >= 0 and cam.max() <= 1):
        raise ValueError(
            f"CAM: values from {cam.min()} to {cam.max()}, expected finite values in 0..1; normalise the maps first "
            "(0..255 maps would make background certain everywhere)"
        )
