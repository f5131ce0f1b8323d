"""Class activation maps over scales and flips, for the asked classes only, on a grid coarser than the pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from subcat_core.cam_affinity import AffinitySettings, spread_maps
from subcat_core.classes import BACKGROUND, to_class_ids
from subcat_core.classifier import Classifier
from subcat_core.settings import Settings
from subcat_core.views import passes, resize_batch, view_sizes

EPSILON = 1e-5  # added to a class's maximum before dividing (authors' code)


class CamSettings(Settings):
    """The views that a map is the sum of, and the grid it is kept on."""

    scales: tuple[float, ...] = Field(default=(1.0, 0.5, 1.5, 2.0), min_length=1)
    """Sizes of the image that are looked at (authors' code: 1, 0.5, 1.5, 2)."""
    flip: bool = True
    """Look at each scale mirrored as well."""
    base_px: int | None = Field(default=None, ge=8)
    """Short side that scale 1 stands for; none: the image's own, as in the paper."""
    max_px: int | None = Field(default=1024, ge=8)
    """Long side at scale 1 is brought down to this; bounds time and memory for large pictures."""
    grid_stride_px: int = Field(default=4, ge=1)
    """Pixels of the image, brought down to max_px, to one cell of the map that is kept."""
    pass_px: int = Field(default=500_000, ge=1)
    """Pixels in one forward pass, flips counted: bounds memory; a GPU takes ten times as many."""
    normalise: Literal["maximum", "softmax"] = "maximum"
    """`maximum`: ReLU, and each class divided by its maximum (the paper). `softmax`: no ReLU; the mean over the views,
    then a softmax over the tagged classes, for data sets without background: its largest class is that of the sums."""
    affinity: AffinitySettings | None = None
    """Spread the maps over cells of like features (cam_affinity.py); none: the maps as they are, as in the paper."""
    bf16: bool = False
    """Autocast to bfloat16: twice as fast on GPUs and on CPUs with AVX512_BF16 or AMX, slower on others; maps differ by
    about 0.01."""


def compute_cam(
    classifier: Classifier,
    image: np.ndarray,
    class_indices: Sequence[int],
    settings: CamSettings,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Maps of one image, as `compute_cams`: (H, W, 3) uint8 RGB -> (n, ceil(H/4), ceil(W/4)) float32 of 0..1."""
    return compute_cams(classifier, [image], [class_indices], settings, device)[0].maps


@dataclasses.dataclass(frozen=True)
class Cam:
    """maps: (n, h, w) float32 of 0..1. plain: the same before `affinity` spread them; maps itself without affinity."""

    maps: np.ndarray
    plain: np.ndarray


def compute_cams(
    classifier: Classifier,
    images: Sequence[np.ndarray],
    class_indices: Sequence[Sequence[int]],
    settings: CamSettings,
    device: torch.device | str = "cpu",
) -> list[Cam]:
    """Maps of several images; equal sizes share forward passes (padding would change what the borders see).

    images: (H, W, 3) uint8 RGB. class_indices: the n present classes of each image. classifier: in eval mode, on
    `device`. Returns one (n, ceil(H / grid_stride_px), ceil(W / grid_stride_px)) float32 an image (of the size that
    max_px leaves it), each class divided by its maximum + 1e-5, or the softmax of settings.normalise.

    Chang et al. 2020, equation 1 and section 4.1 (authors' code: every view of all classes is brought to full size,
    multiplied by the labels and summed). Sums of linear maps may change places, so here a mirrored pair is added at
    the network's own resolution and each scale is brought to the grid once, for present classes alone. Raises
    ValueError when the lists differ in length.
    """
    if len(images) != len(class_indices):
        raise ValueError(
            f"got {len(images)} images and class_indices for {len(class_indices)}; expected one list an image"
        )
    if classifier.training:
        raise ValueError("got a classifier in training mode, where dropout is on; call classifier.eval() first")
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(image.shape, []).append(position)
    cams: dict[int, Cam] = {}
    for positions in groups.values():
        union = sorted({index for position in positions for index in class_indices[position]})
        batch = torch.from_numpy(np.stack([images[position] for position in positions])).permute(0, 3, 1, 2)
        summed, spread = _sum_views(classifier, batch, union, settings, torch.device(device))
        row_of = {class_index: row for row, class_index in enumerate(union)}
        for position, plain, maps in zip(positions, summed, spread, strict=True):
            rows = [row_of[index] for index in class_indices[position]]
            cams[position] = Cam(*(_normalised(part[rows], settings) for part in (maps, plain)))
    return [cams[position] for position in range(len(images))]


def normalise_cam(cam: np.ndarray) -> np.ndarray:
    """(n, h, w) float32 >= 0 -> each class divided by its maximum + 1e-5 (no minimum is subtracted)."""
    if not len(cam):
        return cam
    return cam / (cam.max(axis=(1, 2), keepdims=True) + np.float32(EPSILON))


def softmax_cam(cam: np.ndarray) -> np.ndarray:
    """(n, h, w) float32 of any values -> softmax over the n classes of each cell; ones where n is 1."""
    if not len(cam):
        return cam
    power = np.exp(cam - cam.max(axis=0))
    return power / power.sum(axis=0)


def _normalised(total: np.ndarray, settings: CamSettings) -> np.ndarray:
    """(n, h, w) sums over the views -> maps of 0..1."""
    if settings.normalise == "maximum":
        return normalise_cam(total)
    return softmax_cam(total / np.float32(len(settings.scales) * (1 + settings.flip)))


@torch.inference_mode()
def _sum_views(
    classifier: Classifier, images: torch.Tensor, class_indices: list[int], settings: CamSettings, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """images: (N, 3, H, W) uint8 -> (N, n, grid height, grid width) float32: the sum over all views, plain and spread.

    The features that maps are spread by are those of the scale nearest to 1, not mirrored.
    """
    num_images, _, height, width = images.shape
    grid = _grid(height, width, settings)
    total = torch.zeros((num_images, len(class_indices), *grid), device=device)
    if not class_indices:
        return total.cpu().numpy(), total.cpu().numpy()
    images = images.to(device)
    scale_of_middle = min(settings.scales, key=lambda scale: abs(scale - 1)) if settings.affinity else None
    middle: list[torch.Tensor] = []
    pass_px = settings.pass_px * (10 if device.type == "cuda" else 1)
    sizes = view_sizes(height, width, settings.scales, settings.base_px, settings.max_px)
    for scale, (view_height, view_width) in zip(settings.scales, sizes, strict=True):
        for part in passes(num_images, view_height * view_width * (1 + settings.flip), pass_px):
            view = resize_batch(images[part], view_height, view_width)
            maps, features = _maps(classifier, view, class_indices, settings, with_middle=scale == scale_of_middle)
            total[part] += F.interpolate(maps, grid, mode="bilinear", align_corners=False)
            if features is not None:
                middle += features.unbind()
    plain = total.cpu().numpy().copy()  # on the CPU numpy() shares memory, and total changes below
    if settings.affinity is None:
        return plain, plain
    for position, features in enumerate(middle):
        cells = spread_maps(total[position], features, settings.affinity)
        total[position] = F.interpolate(cells[None], grid, mode="bilinear", align_corners=False)[0]
    return plain, total.cpu().numpy()


def _grid(height: int, width: int, settings: CamSettings) -> tuple[int, int]:
    """Cells of the map of an image: of its size, or of what max_px leaves of it, for the network sees no more."""
    [(height, width)] = view_sizes(height, width, (1.0,), None, settings.max_px)
    return math.ceil(height / settings.grid_stride_px), math.ceil(width / settings.grid_stride_px)


def _maps(
    classifier: Classifier, view: torch.Tensor, class_indices: list[int], settings: CamSettings, *, with_middle: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N, n, h, w) float32 at the network's resolution: the view, and its mirror image turned back, in one pass.

    with_middle: also the straight view's features (N, D', h', w') at stride 16.
    """
    both = torch.cat([view, view.flip(3)]) if settings.flip else view
    both = both.contiguous(memory_format=torch.channels_last)
    middle, relu = None, settings.normalise == "maximum"
    with torch.autocast(view.device.type, torch.bfloat16, enabled=settings.bf16):
        if with_middle:
            maps, middle = classifier.parent_maps_and_middle(both, class_indices, relu=relu)
            middle = middle[: len(view)]
        else:
            maps = classifier.parent_maps(both, class_indices, relu=relu)
    if not settings.flip:
        return maps, middle
    straight, mirrored = maps.chunk(2)
    return straight + mirrored.flip(3), middle


def upsample_cam(cam: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, h, w) -> (n, height, width) float32, bilinear, align_corners=False."""
    if not len(cam):
        return np.zeros((0, height, width), np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(cam, dtype=np.float32))[None]
    return F.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)[0].numpy()


def cam_to_labels(cam: np.ndarray, class_indices: Sequence[int], threshold: float) -> np.ndarray:
    """The strongest class of each pixel where it exceeds `threshold`, else background; ties go to the lower row.

    cam: (n, H, W) of 0..1 -> (H, W) uint8. The authors' argmax over {constant threshold, classes}.
    The plain version that `metrics.ThresholdSweep` and `make_pseudo_mask` are tested against.
    """
    if not len(cam):
        return np.full(cam.shape[1:], BACKGROUND, np.uint8)
    ids = to_class_ids(np.asarray(class_indices)).astype(np.uint8)
    return np.where(cam.max(axis=0) > threshold, ids[cam.argmax(axis=0)], np.uint8(BACKGROUND))
