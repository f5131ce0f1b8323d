"""IRNet: class boundaries, whose absence between two cells is their affinity, and a field of displacements.

Ahn et al. 2019: on a frozen backbone, one branch tells where classes end and one points from every
cell to the middle of its object; both learn from pairs of cells. Only the boundaries take part in the random walk; the
displacements part instances, which nothing here uses, and are trained because the paper's training has them.

Legend: N images, h w cells of 4 px, P offsets of pairs (see affinity_pairs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from subcat_core.affinity_pairs import Offset, PairKinds, balanced_loss, pair_ends, pair_offsets
from subcat_core.backbone_taps import BackboneTaps
from subcat_core.backbones import Backbone, BackboneSettings, build_backbone
from subcat_core.freezing import freeze_batch_norm
from subcat_core.losses import global_mean
from subcat_core.settings import Settings
from subcat_core.weights import ReadUri

STRIDE_PX = 4
"""Pixels to one cell of boundaries and displacements."""
_NUM_TAPS = 5
_DISPLACEMENT_FACTOR = 10.0  # on the learning rate (authors' code)
_MEAN_MOMENTUM = 0.1


class IrnSettings(Settings):
    """The network, and which cells make pairs in training."""

    backbone: BackboneSettings = BackboneSettings()
    """Frozen; all its stages are looked at (authors: ResNet-50 at stride 16, with the weights of ImageNet)."""
    radius: int = Field(default=10, ge=2, le=32)
    """Cells nearer than this make a training pair (value of the authors' code)."""
    pad_border: bool = False
    """Whether cells near the border are sources of training pairs; the authors leave them out. The random walk always
    has them."""


class IrnNet(nn.Module):
    """Images (N, 3, H, W) RGB 0..255 -> boundary logits (N, 1, h, w), displacements (N, 2, h, w) as (dy, dx) in cells.

    h, w: ceil(H / 4), ceil(W / 4). Each of the last five stages is brought to 32 channels for the boundaries. For the
    displacements the last three are mixed at the grid of the third from last before the finer ones join (a network of
    four stages, such as ConvNeXt, has one finer map).
    """

    def __init__(self, backbone: Backbone, settings: IrnSettings) -> None:
        super().__init__()
        self.weights_account = ""
        """What was loaded into the backbone, in a line (`LoadReport.summary`)."""
        self.stride_px = STRIDE_PX
        self.radius, self.pad_border = settings.radius, settings.pad_border
        self.backbone = backbone
        self.backbone.requires_grad_(False)
        freeze_batch_norm(self.backbone)
        self.taps = BackboneTaps(backbone, _NUM_TAPS, at_least=4)
        channels = self.taps.channels
        self.edge_narrow = nn.ModuleList([_narrow(number, 32, 4) for number in channels])
        self.edge_mix = nn.Conv2d(32 * len(channels), 1, 1)
        fine = [(64, 8), (128, 16)][5 - len(channels) :]
        widths = [*fine, (256, 16), (256, 16), (256, 16)]
        self.displacement_narrow = nn.ModuleList(
            [_narrow(number, width, groups) for number, (width, groups) in zip(channels, widths, strict=True)]
        )
        self.displacement_deep = _narrow(3 * 256, 256, 16)
        self.displacement_mix = nn.Sequential(
            _narrow(sum(width for width, _ in fine) + 256, 256, 16), nn.ReLU(), nn.Conv2d(256, 2, 1, bias=False)
        )
        self.mean_shift = MeanShift()

    def train(self, mode: bool = True) -> IrnNet:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grid = (-(-images.shape[2] // STRIDE_PX), -(-images.shape[3] // STRIDE_PX))
        with torch.no_grad():
            maps = self.taps(self.backbone.normalise(images))
        edge = self._edge(maps, grid)
        narrow = [layer(tap) for layer, tap in zip(self.displacement_narrow, maps, strict=True)]
        middle = maps[-3].shape[2:]
        deep = self.displacement_deep(torch.cat([F.relu(_resized(tap, middle)) for tap in narrow[-3:]], dim=1))
        fine = [F.relu(_resized(tap, grid)) for tap in [*narrow[:-3], deep]]
        return edge, self.mean_shift(self.displacement_mix(torch.cat(fine, dim=1)))

    def _edge(self, maps: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Logits (N, 1, *grid) of boundaries; brought to the grid between the norm and the ReLU, as the authors do."""
        narrow = [F.relu(_resized(layer(tap), grid)) for layer, tap in zip(self.edge_narrow, maps, strict=True)]
        return cast(torch.Tensor, self.edge_mix(torch.cat(narrow, dim=1)))

    def boundaries(self, images: torch.Tensor) -> torch.Tensor:
        """(N, h, w) of 0..1: the mean of the logits of the image and of its mirror image, turned back."""
        grid = (-(-images.shape[2] // STRIDE_PX), -(-images.shape[3] // STRIDE_PX))
        maps = self.taps(self.backbone.normalise(torch.cat([images, images.flip(3)])))
        straight, mirrored = self._edge(maps, grid)[:, 0].float().chunk(2)
        return torch.sigmoid((straight + mirrored.flip(2)) / 2)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The boundary branch 1x, the displacement branch 10x; everything is decayed, norms and biases too."""
        edge = [*self.edge_narrow.parameters(), *self.edge_mix.parameters()]
        parts = (self.displacement_narrow, self.displacement_deep, self.displacement_mix)
        displacement = [parameter for part in parts for parameter in part.parameters()]
        return [
            {"params": edge, "lr_factor": 1.0, "weight_decay_factor": 1.0},
            {"params": displacement, "lr_factor": _DISPLACEMENT_FACTOR, "weight_decay_factor": 1.0},
        ]


class MeanShift(nn.Module):
    """After training, displacements whose running mean over all cells is subtracted: a whole image has none."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, displacement: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return displacement - self.mean.to(displacement.dtype).view(1, 2, 1, 1)
        with torch.no_grad():
            self.mean.lerp_(displacement.detach().float().mean(dim=(0, 2, 3)), _MEAN_MOMENTUM)
        return displacement


def build_irn(settings: IrnSettings, *, read_uri: ReadUri | None = None) -> IrnNet:
    """The net with the backbone's pretrained weights. Raises ValueError as `build_backbone` and `BackboneTaps`."""
    backbone, report = build_backbone(settings.backbone, read_uri=read_uri)
    net = IrnNet(backbone, settings)
    net.weights_account = report.summary()
    return net


def straight_path(offset: Offset) -> list[Offset]:
    """(y, x) of the cells on the way from (0, 0) to `offset`, both ends too.

    Those in the rectangle between the ends whose middle is nearer than one cell to the straight line (authors' code).
    """
    dy, dx = offset
    rows, columns = range(min(0, dy), max(0, dy) + 1), range(min(0, dx), max(0, dx) + 1)
    return [(y, x) for y in rows for x in columns if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]


def path_affinity(boundaries: torch.Tensor, radius: int) -> torch.Tensor:
    """1 - the strongest boundary on the straight path between the cells of a pair (Ahn et al. 2019).

    boundaries: (N, h, w) of 0..1. Returns (N, P, h, w) at the sources, 0 where a pair is not inside the grid. Only
    which cell of a path is the strongest is kept for the backward pass, not the paths.
    """
    height, width = boundaries.shape[1:]
    found = []
    for offset in pair_offsets(radius):
        rows, columns = pair_ends(height, width, offset)[0]
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        if tall <= 0 or wide <= 0:
            found.append(torch.zeros_like(boundaries))
            continue
        path = [
            boundaries[:, rows.start + y : rows.start + y + tall, columns.start + x : columns.start + x + wide]
            for y, x in straight_path(offset)
        ]
        clear = 1 - torch.stack(path).max(dim=0).values
        found.append(F.pad(clear, (columns.start, width - columns.stop, rows.start, height - rows.stop)))
    return torch.stack(found, dim=1)


def irn_loss(
    edge: torch.Tensor, displacement: torch.Tensor, kinds: PairKinds, radius: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`balanced_loss` of the boundaries, plus half of either displacement loss (authors' code).

    edge: (N, 1, h, w) logits; displacement: (N, 2, h, w) in cells. Returns the loss, and detached scalars to log.
    """
    boundary_loss, parts = balanced_loss(path_affinity(torch.sigmoid(edge[:, 0]), radius), kinds)
    foreground, background = displacement_losses(displacement, kinds, radius)
    loss = boundary_loss + (foreground + background) / 2
    told = {"dp_fg_loss": foreground.detach(), "dp_bg_loss": background.detach()}
    return loss, {**parts, **told, "loss": loss.detach()}


def displacement_losses(displacement: torch.Tensor, kinds: PairKinds, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over pairs and over y and x of |D_source - D_partner - offset| (one object), |D_source - D_partner| (none).

    Ahn et al. 2019: two cells of one object point to one place, so their displacements differ by
    what lies between them; those of background do not differ. Over the pairs of all ranks, by `global_mean`.
    """
    height, width = displacement.shape[2:]
    sums = [displacement.sum() * 0, displacement.sum() * 0]
    for index, offset in enumerate(pair_offsets(radius)):
        sources, partners = pair_ends(height, width, offset)
        difference = displacement[:, :, *sources] - displacement[:, :, *partners]
        expected = torch.tensor(offset, dtype=difference.dtype, device=difference.device).view(1, 2, 1, 1)
        for number, (kind, target) in enumerate(((kinds.foreground, expected), (kinds.background, 0 * expected))):
            weight = kind[:, index, *sources][:, None].to(difference.dtype)
            sums[number] = sums[number] + ((difference - target).abs() * weight).sum()
    counts = [2 * kind.sum().to(displacement.dtype) for kind in (kinds.foreground, kinds.background)]
    return global_mean(sums[0], counts[0]), global_mean(sums[1], counts[1])


def _narrow(num_in: int, num_out: int, num_groups: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 1, bias=False), nn.GroupNorm(num_groups, num_out))


def _resized(tap: torch.Tensor, grid: tuple[int, ...] | torch.Size) -> torch.Tensor:
    if tap.shape[2:] == torch.Size(grid):
        return tap
    return cast(torch.Tensor, F.interpolate(tap, tuple(grid), mode="bilinear", align_corners=False))
