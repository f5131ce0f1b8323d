"""AffinityNet: features of which two cells' nearness says whether they belong together.

Ahn & Kwak 2018 (PSA), section 3.2: three of the backbone's maps are brought to 64, 128 and 256 channels, laid together
and mixed; the affinity of two cells is exp(-mean over channels of |f_i - f_j|). On any backbone; PSA's is ResNet-38 at
stride 8, with its maps conv4, conv5 and conv6.

Legend: N images, D feature channels, h w cells, P offsets of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from subcat_core.affinity_pairs import Offset, pair_ends, pair_offsets, source_mask
from subcat_core.backbone_taps import BackboneTaps
from subcat_core.backbones import Backbone, BackboneSettings, build_backbone
from subcat_core.schedule import parameter_groups
from subcat_core.settings import Settings
from subcat_core.weights import ReadUri

WIDTHS = (64, 128, 256)
"""Channels that the three maps are brought to (value of the authors' code)."""


class AffinityNetSettings(Settings):
    """The network, and which cells make pairs."""

    backbone: BackboneSettings = BackboneSettings(output_stride=8)
    """Its output stride is the side of a cell (authors: 8; where only the name is given, the default is 16)."""
    radius: int = Field(default=5, ge=2, le=32)
    """Cells nearer than this make a pair, in training and in the walk (value of the authors' code)."""
    pad_border: bool = True
    """Every cell has pairs with all its neighbours in the image (IRNet's repair); false: as PSA, where cells near the
    left, right and lower border have few, and those in three corners none, so that nothing ever reaches them."""


class AffinityNet(nn.Module):
    """Images (N, 3, H, W) RGB 0..255 -> features (N, 448, ceil(H / stride_px), ceil(W / stride_px))."""

    def __init__(self, backbone: Backbone, settings: AffinityNetSettings) -> None:
        super().__init__()
        self.weights_account = ""
        """What was loaded into the backbone, in a line (`LoadReport.summary`)."""
        self.stride_px = backbone.output_stride
        self.radius, self.pad_border = settings.radius, settings.pad_border
        self.backbone = backbone
        self.taps = BackboneTaps(backbone, len(WIDTHS))
        shapes = zip(self.taps.channels, WIDTHS, strict=True)
        self.narrow = nn.ModuleList([nn.Conv2d(channels, width, 1, bias=False) for channels, width in shapes])
        self.mix = nn.Conv2d(sum(WIDTHS), sum(WIDTHS), 1, bias=False)
        for layer in self.narrow:
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.mix.weight, gain=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images are padded at the right and the bottom to whole cells, with zeros after normalisation (PSA).

        Maps finer than the last one are averaged down to its grid.
        """
        height, width = images.shape[2:]
        padding = (0, -width % self.stride_px, 0, -height % self.stride_px)
        maps = self.taps(F.pad(self.backbone.normalise(images), padding))
        grid = (maps[-1].shape[2], maps[-1].shape[3])
        narrowed = [
            F.elu(layer(tap if tap.shape[2:] == grid else F.adaptive_avg_pool2d(tap, grid)))
            for layer, tap in zip(self.narrow, maps, strict=True)
        ]
        return F.elu(cast(torch.Tensor, self.mix(torch.cat(narrowed, dim=1))))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone weights 1x, biases 2x without decay, the new layers 10x (they have no bias)."""
        return parameter_groups(self.backbone, [self.narrow, self.mix])


def build_affinity_net(settings: AffinityNetSettings, *, read_uri: ReadUri | None = None) -> AffinityNet:
    """The net with the backbone's pretrained weights. Raises ValueError as `build_backbone` and `BackboneTaps`."""
    backbone, report = build_backbone(settings.backbone, read_uri=read_uri)
    net = AffinityNet(backbone, settings)
    net.weights_account = report.summary()
    return net


def pair_affinity(features: torch.Tensor, radius: int, pad_border: bool) -> torch.Tensor:
    """exp(-mean_D |f_source - f_partner|) of every pair: (N, P, h, w) at the sources, 0 where there is no pair.

    features: (N, D, h, w) float32 (float64 in tests). Pairs are gathered offset by offset, forwards and backwards: the
    authors' tensor of all pairs' features, (N, D, P, h * w), is never there.
    """
    height, width = features.shape[2:]
    offsets = pair_offsets(radius)
    distance = cast(torch.Tensor, _PairDistance.apply(features, offsets))
    exists = torch.zeros((len(offsets), height, width), dtype=torch.bool)
    for index, offset in enumerate(offsets):
        exists[index][pair_ends(height, width, offset)[0]] = True
    exists &= source_mask(height, width, radius, pad_border)
    return torch.where(exists.to(features.device), torch.exp(-distance), 0)


class _PairDistance(torch.autograd.Function):
    """Mean absolute difference over channels; it keeps the features alone for its backward pass."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, offsets: Sequence[Offset]) -> torch.Tensor:
        height, width = features.shape[2:]
        ctx.save_for_backward(features)
        ctx.offsets = offsets
        distance = features.new_zeros((len(features), len(offsets), height, width))
        for index, offset in enumerate(offsets):
            sources, partners = pair_ends(height, width, offset)
            difference = features[:, :, *sources] - features[:, :, *partners]
            distance[:, index, *sources] = difference.abs_().mean(dim=1)
        return distance

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        [features], [grad] = ctx.saved_tensors, grads
        height, width = features.shape[2:]
        result = torch.zeros_like(features)
        for index, offset in enumerate(ctx.offsets):
            sources, partners = pair_ends(height, width, offset)
            slope = torch.sign(features[:, :, *sources] - features[:, :, *partners])
            slope *= grad[:, index, *sources][:, None] / features.shape[1]
            result[:, :, *sources] += slope
            result[:, :, *partners] -= slope
        return result, None
