"""CAMs spread over what looks alike to the network: a map times a random walk along the cells' feature affinity.

The affinity of two cells is the cosine of their features at stride 16, before the last stages, cut at 0 and raised to
a power: where a map stops at the telling part, the rest of the object still has features like it. Wang et al. 2020
(SEAM) learn such a module (pixel correlation) with the classifier; here nothing is learned, the features are those
that the classifier has anyway. Not in Chang et al. 2020, whose maps end where `compute_cams` without it does.

Legend: n present classes, D feature channels, h w cells of the feature map, M = h * w.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn import functional as F

from subcat_core.settings import Settings

_FLOOR = 1e-9  # a cell without any feature is like no other, not even itself; its map value becomes 0


class AffinitySettings(Settings):
    """How far maps spread."""

    power: float = Field(default=4.0, gt=0, le=64, allow_inf_nan=False)
    """Higher: only cells of very similar features share their maps."""
    num_steps: int = Field(default=3, ge=1, le=64)
    """Steps of the walk: more spread further."""
    max_cells: int = Field(default=4096, ge=16)
    """Cells of the feature map, at most: finer ones are averaged first. The affinities take 4 * max_cells**2 bytes."""


def feature_affinity(features: torch.Tensor, settings: AffinitySettings) -> torch.Tensor:
    """(M, M) float32 >= 0, each row summing to 1 (to 0 for a cell without features): one step of the walk.

    features: (D, h, w). Row i holds the weights of the cells that cell i takes its new value from:
    max(0, cos(f_i, f_j)) ** power over their sum.
    """
    unit = F.normalize(features.float().flatten(1), dim=0)
    weights = (unit.T @ unit).clamp_(0, 1) ** settings.power
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(_FLOOR)


def spread_maps(maps: torch.Tensor, features: torch.Tensor, settings: AffinitySettings) -> torch.Tensor:
    """Maps (n, H, W) >= 0 on any grid -> (n, h, w) float32 >= 0 on the cells of features (D, h, w), after the walk.

    Maps and features lie over the same image. No new value is above the largest old one.
    """
    height, width = features.shape[1:]
    if height * width > settings.max_cells:
        shrink = (settings.max_cells / (height * width)) ** 0.5
        height, width = max(1, int(height * shrink)), max(1, int(width * shrink))
        features = F.adaptive_avg_pool2d(features.float(), (height, width))
    cells = F.interpolate(maps[None].float(), (height, width), mode="bilinear", align_corners=False)[0].flatten(1)
    step = feature_affinity(features, settings)
    for _ in range(settings.num_steps):
        cells = cells @ step.T
    return cells.view(-1, height, width)
