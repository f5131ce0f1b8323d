"""Pairs of neighbouring cells: which there are, what a label map says of them, and the balanced loss over them.

Ahn & Kwak 2018 (PSA), section 3.2, and Ahn et al. 2019 (IRNet): two cells nearer than a radius are alike (both
background, or both of one class), unlike, or unknown. A pair is kept at its upper cell, or at its left one in the
same row (its source); the other one (its partner) lies an offset (dy, dx) further on, so each pair is there once.

Legend: N images, h w cells, P offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from subcat_core.classes import BACKGROUND, IGNORE
from subcat_core.losses import global_mean

EPSILON = 1e-5  # inside the logarithms (authors' code)

Offset = tuple[int, int]
Cells = tuple[slice, slice]


def pair_offsets(radius: int) -> list[Offset]:
    """(dy, dx) of the half of all neighbours at a distance below `radius` cells: 34 at radius 5, as PSA orders them."""
    beside = [(0, dx) for dx in range(1, radius)]
    reach = range(1 - radius, radius)
    return beside + [(dy, dx) for dy in range(1, radius) for dx in reach if dy * dy + dx * dx < radius * radius]


def pair_ends(height: int, width: int, offset: Offset) -> tuple[Cells, Cells]:
    """(rows, columns) of the sources, and of their partners, of all pairs inside the grid; empty where none fits."""
    dy, dx = offset
    top, left = slice(0, max(height - dy, 0)), slice(0, max(width - abs(dx), 0))
    bottom, right = slice(min(dy, height), height), slice(min(abs(dx), width), width)
    return ((top, left), (bottom, right)) if dx >= 0 else ((top, right), (bottom, left))


def source_mask(height: int, width: int, radius: int, pad_border: bool) -> torch.Tensor:
    """(h, w) bool: which cells may be sources.

    pad_border: all of them, as in IRNet's random walk. Otherwise only cells whose partners all lie inside the grid, as
    in PSA: not the last radius - 1 rows, nor as many columns at either side. Cells near the border then have few pairs,
    and those in the upper left and both lower corners none at all.
    """
    mask = torch.full((height, width), pad_border)
    if not pad_border:
        margin = radius - 1
        mask[: max(height - margin, 0), margin : max(width - margin, margin)] = True
    return mask


class PairKinds(NamedTuple):
    """(N, P, h, w) bool at the sources: alike as background, alike as one class, of two classes; else unknown."""

    background: torch.Tensor
    foreground: torch.Tensor
    negative: torch.Tensor


def pair_kinds(labels: torch.Tensor, radius: int, pad_border: bool) -> PairKinds:
    """What labels (N, h, w) uint8 (class ids, IGNORE where unknown) say of every pair."""
    height, width = labels.shape[1:]
    margin = radius - 1
    around = F.pad(labels, (margin, margin, 0, margin), value=IGNORE)
    partners = torch.stack(
        [around[:, dy : dy + height, margin + dx : margin + dx + width] for dy, dx in pair_offsets(radius)], dim=1
    )
    sources = labels[:, None]
    known = (sources != IGNORE) & (partners != IGNORE)
    known &= source_mask(height, width, radius, pad_border).to(labels.device)
    alike = known & (sources == partners)
    return PairKinds(alike & (sources == BACKGROUND), alike & (sources != BACKGROUND), known & (sources != partners))


def balanced_loss(affinity: torch.Tensor, kinds: PairKinds) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """bg / 4 + fg / 4 + neg / 2, each the mean of -log p over its pairs of all images of all ranks (`global_mean`).

    affinity: (N, P, h, w) of 0..1; p is the affinity of pairs that are alike, and 1 - affinity of others, plus 1e-5.
    A kind without pairs gives 0. Returns the loss in float32 (or float64) and detached scalars to log. PSA's and
    IRNet's loss; the authors take their means over the batch of one process, and add 1e-5 to the counts.
    """
    alike, unlike = -torch.log(affinity + EPSILON), -torch.log(1 + EPSILON - affinity)

    def mean(terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return global_mean(torch.where(mask, terms, 0).sum(), mask.sum().to(terms.dtype))

    parts = {
        "bg_loss": mean(alike, kinds.background),
        "fg_loss": mean(alike, kinds.foreground),
        "neg_loss": mean(unlike, kinds.negative),
    }
    loss = parts["bg_loss"] / 4 + parts["fg_loss"] / 4 + parts["neg_loss"] / 2
    return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}
