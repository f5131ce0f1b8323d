"""From CAMs and a trained affinity net to scores at the image's size, with background first: what becomes a mask.

Legend: n present classes, H W pixels, h w cells.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from subcat_core.affinity_net import AffinityNet, pair_affinity
from subcat_core.affinity_pairs import pair_offsets
from subcat_core.cam import upsample_cam
from subcat_core.irn import IrnNet, path_affinity
from subcat_core.pseudo_mask import PseudoMaskSettings, with_background
from subcat_core.random_walk import RandomWalkSettings, random_walk, transition
from subcat_core.views import resize_batch, view_sizes


class PsaWalkSettings(RandomWalkSettings):
    """PSA's walk, in which background takes part."""

    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """Background that walks along: (1 - max_c cam)^alpha (value of the authors' code)."""


class IrnWalkSettings(RandomWalkSettings):
    """IRNet's walk; background is a constant beside its result (values of the authors' code)."""

    beta: float = Field(default=10.0, gt=0, le=64, allow_inf_nan=False)
    """Power of the affinities: higher keeps the walk to what no boundary parts."""
    radius: int = Field(default=5, ge=2, le=32)
    """A cell's neighbours are nearer than this."""
    background_score: float = Field(default=0.25, ge=0, le=1)
    """Background, against maps divided by the largest value of all."""


@dataclasses.dataclass(frozen=True)
class WalkedScores:
    """before, after: (1 + n, H, W) float32 of 0..1, background first, before and after the walk; no sums of 1."""

    before: np.ndarray
    after: np.ndarray


@torch.inference_mode()
def walk_by_features(
    net: AffinityNet, cam: np.ndarray, image: np.ndarray, settings: PsaWalkSettings, device: torch.device | str = "cpu"
) -> WalkedScores:
    """PSA: scores are averaged over the net's cells, walk, and are brought back bilinearly (authors' code).

    cam: (n, h, w) float32 of 0..1 of the present classes, n >= 1, on any grid. image: (H, W, 3) uint8 RGB. net: in
    eval mode, on `device`. Only present classes walk. A cell that reaches beyond the image is averaged with zeros.
    """
    _check(net, cam)
    (height, width), view = _view(image, settings, device)
    background = PseudoMaskSettings(alpha=settings.alpha)
    affinity = pair_affinity(net(view).float(), net.radius, net.pad_border)[0].cpu().numpy()
    scores = with_background(upsample_cam(cam, height, width), background)
    below, right = -height % net.stride_px, -width % net.stride_px
    cells = F.avg_pool2d(F.pad(torch.from_numpy(scores), (0, right, 0, below))[None], net.stride_px)[0].numpy()
    step = transition(affinity, pair_offsets(net.radius), settings.beta)
    walked = random_walk(cells, step, 2**settings.log_steps)
    fine = upsample_cam(walked, height + below, width + right)[:, :height, :width]
    before = with_background(upsample_cam(cam, *image.shape[:2]), background)
    return WalkedScores(before, _at_size(fine, image))


@torch.inference_mode()
def walk_by_boundaries(
    net: IrnNet, cam: np.ndarray, image: np.ndarray, settings: IrnWalkSettings, device: torch.device | str = "cpu"
) -> WalkedScores:
    """IRNet: maps without what lies on boundaries walk, and are divided by the largest value (authors' code).

    Arguments as `walk_by_features`. Pairs reach to the border of the image; the authors pad it with boundaries, which
    is the same.
    """
    _check(net, cam)
    (height, width), view = _view(image, settings, device)
    boundaries = net.boundaries(view)
    affinity = path_affinity(boundaries, settings.radius)[0].clamp_(0, 1).cpu().numpy()
    grid = boundaries.shape[1:]
    cells = upsample_cam(cam, grid[0], grid[1]) * (1 - boundaries[0].cpu().numpy())
    walked = random_walk(
        cells, transition(affinity, pair_offsets(settings.radius), settings.beta), 2**settings.log_steps
    )
    fine = upsample_cam(walked, grid[0] * net.stride_px, grid[1] * net.stride_px)[:, :height, :width]
    fine = fine / max(float(fine.max()), np.finfo(np.float32).tiny)
    background = PseudoMaskSettings(background="constant", background_score=settings.background_score)
    before = with_background(upsample_cam(cam, *image.shape[:2]), background)
    return WalkedScores(before, with_background(_at_size(fine, image), background))


def _check(net: torch.nn.Module, cam: np.ndarray) -> None:
    if net.training:
        raise ValueError("got an affinity net in training mode; call net.eval() first")
    if not len(cam):
        raise ValueError("got no map; an image without present classes is background all over, and needs no walk")
    if not (cam.min() >= 0 and cam.max() <= 1):
        raise ValueError(
            f"CAM: values from {cam.min()} to {cam.max()}, expected finite values in 0..1; normalise the maps"
        )


def _view(
    image: np.ndarray, settings: RandomWalkSettings, device: torch.device | str
) -> tuple[tuple[int, int], torch.Tensor]:
    """The size that max_px leaves of the image, and the image at that size: (1, 3, height, width) uint8."""
    [size] = view_sizes(image.shape[0], image.shape[1], (1.0,), None, settings.max_px)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None]
    return size, resize_batch(pixels, *size)


def _at_size(maps: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Maps at the size of the image."""
    return maps if maps.shape[1:] == image.shape[:2] else upsample_cam(maps, image.shape[0], image.shape[1])
