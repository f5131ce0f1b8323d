"""The gated CRF loss: neighbours of one colour should get one class; drives borders to edges while training.

Obukhov et al. 2019, "Gated CRF Loss for Weakly Supervised Semantic Image Segmentation".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch.nn import functional as F

from subcat_core.losses import global_mean
from subcat_core.settings import Settings

Offset = tuple[int, int]


class GatedCrfSettings(Settings):
    """Which pixels are neighbours, and how alike."""

    cell_px: int = Field(default=4, ge=1)
    """Side of the cells of the training crop that are compared in place of its pixels."""
    radius: int = Field(default=5, ge=1)
    """In cells: neighbours are those in the square of 2 * radius + 1 cells around a cell (value of the authors)."""
    position_sigma: float = Field(default=6.0, gt=0)
    """Standard deviation of the distance, in cells (value of the authors' code)."""
    colour_sigma: float = Field(default=25.5, gt=0)
    """Standard deviation of the colours' distance, in grey levels of 0..255 (0.1 of the range, as the authors)."""


def gated_crf_loss(
    logits: torch.Tensor,
    images: torch.Tensor,
    gate: torch.Tensor,
    settings: GatedCrfSettings,
) -> torch.Tensor:
    """Potts energy of the softmax under a kernel of colour and position, a mean over cells of all ranks.

    logits: (N, M, h, w). images: (N, 3, H, W) RGB 0..255, uint8 or float. gate: (N, H, W) float32 >= 0, 0 for pixels
    that count nothing, such as padding; a cell's gate is its smallest pixel's. Images are averaged and logits brought
    bilinearly to (H // cell_px, W // cell_px) cells, at least one a side. Returns

        sum_i sum_{j != i, in i's square} g_i g_j k_ij (1 - sum_c p_ic p_jc) / sum_i g_i

    with k_ij = exp(-|distance|^2 / (2 position_sigma^2) - |colour difference|^2 / (2 colour_sigma^2)), in float32. No
    gate open gives 0 with a gradient of 0. Half the 120 neighbours of a cell at radius 5, of its colour and another
    class, cost some 45, so its weight beside a cross entropy is small (the authors' is 0.1).
    """
    height, width = (max(1, size // settings.cell_px) for size in images.shape[2:])
    with torch.no_grad():
        colours = F.adaptive_avg_pool2d(images.float(), (height, width)) / settings.colour_sigma
        open_ = -F.adaptive_max_pool2d(-gate.float(), (height, width))
    resized = F.interpolate(logits.float(), (height, width), mode="bilinear", align_corners=False)
    probability = resized.softmax(dim=1)
    energy = logits.new_zeros((), dtype=torch.float32)
    for offset in half_square(min(settings.radius, max(height, width) - 1)):
        if abs(offset[0]) >= height or abs(offset[1]) >= width:
            continue
        here, there = _pair(probability, offset)
        with torch.no_grad():
            distance = (offset[0] ** 2 + offset[1] ** 2) / settings.position_sigma**2
            one, other = _pair(colours, offset)
            kernel = (-0.5 * ((one - other).square().sum(dim=1) + distance)).exp()
            one, other = _pair(open_, offset)
            kernel = kernel * one * other
        energy = energy + 2 * (kernel * (1 - (here * there).sum(dim=1))).sum()  # 2: from either side
    return global_mean(energy, open_.sum())


def half_square(radius: int) -> Iterator[Offset]:
    """One offset (rows, columns) of each two opposite ones in a square around a cell, without the cell itself."""
    for rows in range(radius + 1):
        for columns in range(-radius if rows else 1, radius + 1):
            yield rows, columns


def _pair(maps: torch.Tensor, offset: Offset) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., h, w) -> the cells that have a neighbour at the offset, and those neighbours. offset: rows >= 0."""
    rows, columns = offset
    height, width = maps.shape[-2:]
    here = maps[..., : height - rows, max(0, -columns) : width - max(0, columns)]
    there = maps[..., rows:, max(0, columns) : width + min(0, columns)]
    return here, there
