"""One feature for each tagged class of an image: the mean over the region where the class shows (beyond the paper)."""

from __future__ import annotations

import torch


def region_means(features: torch.Tensor, maps: torch.Tensor, threshold: float) -> torch.Tensor:
    """(n, D) float32: for each class the mean of the cells' features, weighted by its map where that is confident.

    features: (D, h, w) float32. maps: (n, h, w) float32 >= 0, unnormalised (`Classifier.parent_maps`); each is divided
    by its maximum, and cells of `threshold` (0 <= threshold < 1) or less weigh nothing. A class whose map is 0
    everywhere gets the plain mean over all cells, which is the paper's feature.
    """
    highest = maps.amax(dim=(1, 2), keepdim=True)
    cam = maps / torch.where(highest > 0, highest, 1)
    weights = torch.where(highest > 0, torch.where(cam > threshold, cam, 0), 1)
    return torch.einsum("nhw,dhw->nd", weights, features) / weights.sum(dim=(1, 2))[:, None]
