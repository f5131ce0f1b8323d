"""A score of maps and masks that needs no ground truth: do they decide, and are their regions regions of the picture?

Ours, not the paper's. The score of an image is the product of two shares of explained variance, each in 0..1:
    of the strongest map, by the two levels background and foreground (what Otsu 1979 maximises over thresholds): maps
    that say yes or no get more than maps that fade, and the threshold in the valley of their histogram gets most;
    of the colours, by the regions (background and each class): regions that follow the picture get more than regions
    that cut through it.
Where a data set has no background, the first share is that of the maps of all present classes, by the class that wins:
there is no threshold, and an image of one class says nothing.
No network is asked, so maps of different classifiers are measured with one ruler. docs/log.md has the rank correlation
with the true mIoU and what else was tried; `subcat results` prints it for finished runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

CELLS = 20
"""Cells along the short side of the grid that images, maps and masks are compared on."""


def explained_variance(values: np.ndarray, regions: np.ndarray) -> float:
    """Share of the variance of `values` that lies between the regions, 0..1; 0 where nothing varies.

    values: (N, D) float. regions: (N,) integers, any ids.
    """
    values = np.asarray(values, np.float64)
    centred = values - values.mean(axis=0)
    total = float((centred**2).sum())
    if total <= 0:
        return 0.0
    _, region_of = np.unique(regions, return_inverse=True)
    counts = np.bincount(region_of).astype(np.float64)
    sums = np.stack([np.bincount(region_of, weights=column) for column in centred.T], axis=1)
    return float((sums**2 / counts[:, None]).sum() / total)


def region_score(maps: np.ndarray, colours: np.ndarray, regions: np.ndarray, *, has_background: bool = True) -> float:
    """The score of one image, 0..1.

    maps: (N,) the largest map of each cell; without background (N, n), all of them. colours: (N, 3). regions: (N,)
    class ids, 0 background.
    """
    decided = explained_variance(maps.reshape(len(maps), -1), regions > 0 if has_background else regions)
    return decided * explained_variance(colours, regions) if decided else 0.0


class LabelFreeGrid:
    """One image and its maps on a grid of CELLS cells along the short side, ready to score thresholds and masks.

    cam: (n, h, w) float in 0..1 of the n present classes, at least one. class_ids: theirs. image: (H, W, 3) uint8 RGB.
    has_background: as of the class table; without, the score of an image of one class is 0.
    """

    def __init__(
        self,
        cam: np.ndarray,
        class_ids: Sequence[int] | np.ndarray,
        image: np.ndarray,
        *,
        has_background: bool = True,
    ) -> None:
        if not len(cam) or len(cam) != len(class_ids):
            raise ValueError(f"got {len(cam)} maps for {len(class_ids)} classes; expected one each, and at least one")
        self.has_background = has_background
        height, width = image.shape[:2]
        scale = min(1.0, CELLS / min(height, width))
        self.size = (max(1, round(height * scale)), max(1, round(width * scale)))
        self.colours = _cells(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), self.size)
        maps = F.interpolate(
            torch.from_numpy(np.ascontiguousarray(cam, np.float32))[None], self.size, mode="bilinear", antialias=True
        )[0]
        self.strongest = maps.amax(dim=0).flatten().numpy()
        self._values = self.strongest if has_background else maps.flatten(1).T.numpy()
        self._winners = np.asarray(class_ids)[maps.argmax(dim=0).flatten().numpy()]

    def threshold_scores(self, thresholds: Sequence[float]) -> np.ndarray:
        """(T,) float64: the score of {background: constant threshold} against the maps, at each threshold.

        Without background, give one that no map is below.
        """
        regions = (np.where(self.strongest > threshold, self._winners, 0) for threshold in thresholds)
        return np.array([self._score(region) for region in regions])

    def mask_score(self, mask: np.ndarray) -> float:
        """The score of a mask made from these maps: (H, W) class ids at the image's size."""
        rows = ((np.arange(self.size[0]) + 0.5) * mask.shape[0] / self.size[0]).astype(int)
        columns = ((np.arange(self.size[1]) + 0.5) * mask.shape[1] / self.size[1]).astype(int)
        return self._score(mask[np.ix_(rows, columns)].ravel())

    def _score(self, regions: np.ndarray) -> float:
        return region_score(self._values, self.colours, regions, has_background=self.has_background)


def _cells(channels: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """(C, H, W) -> (cells, C) float64: the mean of each cell."""
    return F.adaptive_avg_pool2d(channels.float()[None], size)[0].flatten(1).T.double().numpy()


def clearly_better(scores: np.ndarray, than: np.ndarray, num_errors: float = 2.0) -> bool:
    """Whether the mean of paired scores of the same images is higher by more than `num_errors` standard errors.

    scores, than: (N,) each. One image, or none, proves nothing.
    """
    differences = np.asarray(scores, np.float64) - np.asarray(than, np.float64)
    if len(differences) < 2:
        return False
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return bool(differences.mean() > num_errors * error)
