"""The segmenter that learns from pseudo masks, DeepLab-v2 on any backbone or a DeepLabV3+: its loss, and prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import BackboneSettings, build_backbone
from subcat_core.classes import IGNORE
from subcat_core.losses import global_mean, soft_bootstrap
from subcat_core.multi_scale import maximum_logits, scaled_images, shrink_masks
from subcat_core.schedule import parameter_groups
from subcat_core.settings import Settings
from subcat_core.views import resize_batch, view_sizes
from subcat_core.weights import LoadReport, ReadUri

if TYPE_CHECKING:
    from subcat_core.crf import CrfSettings

Refine = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(probability (C+1, H, W), image (H, W, 3) uint8) -> probability (C+1, H, W)."""


class SegmenterSettings(Settings):
    """Which segmenter, and on what."""

    architecture: Literal["deeplabv2", "deeplabv3plus"] = "deeplabv2"
    """deeplabv2: the paper's. deeplabv3plus: of segmentation_models_pytorch; finer borders, output stride 8 or 16."""
    backbone: BackboneSettings = BackboneSettings()
    """The network below the head; output stride 8 or 16, for 32 is too coarse for masks."""
    rates: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Dilations of the ASPP; none: DeepLab-v2's 6, 12, 18, 24 and DeepLabV3+'s 12, 24, 36 at output stride 8, and
    half of them at 16, which sees as far."""
    train_scales: tuple[Annotated[float, Field(gt=0, le=2)], ...] = Field(default=(1.0,), min_length=1)
    """Sizes at which each training crop is seen, as factors (deeplab-pytorch: 1, 0.5, 0.75). With several, the largest
    logit over them is one more output, at the size of the first, and the losses of all are summed."""
    loss_at: Literal["mask", "logits"] = "mask"
    """mask: logits are brought up to the mask's pixels. logits: the mask is brought down to the logits, by Pillow's
    nearest neighbour (deeplab-pytorch)."""

    @model_validator(mode="after")
    def _library_has_it(self) -> SegmenterSettings:
        if self.architecture == "deeplabv3plus" and self.backbone.name.startswith("subcat:"):
            raise ValueError(
                f"deeplabv3plus on {self.backbone.name}: segmentation_models_pytorch has no such encoder; give "
                "deeplabv2, or a backbone of torchvision or timm"
            )
        return self


class Aspp(nn.Module):
    """DeepLab-v2's head: the sum of 3x3 convolutions with bias, one a dilation, each straight to the logits.

    Weights start from N(0, 0.01), biases from 0 (deeplab-pytorch).
    """

    def __init__(self, num_features: int, num_outputs: int, rates: Sequence[int]) -> None:
        super().__init__()
        branches = [nn.Conv2d(num_features, num_outputs, 3, padding=rate, dilation=rate) for rate in rates]
        for branch in branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(cast(nn.Parameter, branch.bias))
        self.branches = nn.ModuleList(branches)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, sum(branch(features) for branch in self.branches))


class Segmenter(nn.Module):
    """backbone: what carries pretrained weights; heads: what starts from random values and learns ten times as fast."""

    backbone: nn.Module
    weights_account: str = ""
    """What was loaded into the backbone, in a line (`LoadReport.summary`)."""

    def forward(self, images: torch.Tensor, scales: Sequence[float] | None = None) -> torch.Tensor | list[torch.Tensor]:
        """images: (N, 3, H, W) RGB 0..255, uint8 or float -> logits (N, C+1, h, w); row 0 is background.

        With scales, a list: the logits of the images at each of them, as `scaled_images` makes them.
        """
        if scales is None:
            return self.logits(images)
        return [self.logits(view) for view in scaled_images(images, scales)]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """As forward, at one scale."""
        raise NotImplementedError

    def heads(self) -> list[nn.Module]:
        """All that is not the backbone."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone weights 1x, ASPP or decoder weights 10x, biases twice that and not decayed (deeplab-pytorch)."""
        return parameter_groups(self.backbone, self.heads())


class DeepLabV2(Segmenter):
    """ASPP on the backbone's feature map; logits at the backbone's output stride."""

    def __init__(self, backbone: nn.Module, aspp: Aspp) -> None:
        super().__init__()
        self.backbone = backbone
        self.aspp = aspp

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.aspp(self.backbone(images)))

    def heads(self) -> list[nn.Module]:
        return [self.aspp]


def build_segmenter(
    settings: SegmenterSettings, num_classes: int, read_uri: ReadUri | None = None
) -> tuple[Segmenter, LoadReport]:
    """The segmenter for C classes and background, with the backbone's pretrained weights.

    Raises ValueError as `build_backbone`, and for an output stride of 32, with which no mask is fine enough.
    """
    backbone = settings.backbone
    if backbone.output_stride == 32:
        raise ValueError(f"{settings.architecture}: got output_stride 32; give 8 or 16")
    rates = settings.rates
    if rates is None:
        full = (6, 12, 18, 24) if settings.architecture == "deeplabv2" else (12, 24, 36)
        rates = full if backbone.output_stride == 8 else tuple(rate // 2 for rate in full)
    if settings.architecture == "deeplabv3plus":
        from subcat_core.deeplabv3plus import build_deeplabv3plus  # here: it is a Segmenter and so imports this file

        return build_deeplabv3plus(backbone, num_classes, rates, read_uri)
    trunk, report = build_backbone(backbone, read_uri=read_uri)
    return DeepLabV2(trunk, Aspp(trunk.num_features, num_classes + 1, rates)), report


def segmentation_loss(
    logits: torch.Tensor,
    masks: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    loss_at: Literal["mask", "logits"] = "mask",
    bootstrap_beta: float = 1.0,
    confidence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy, averaged over the pixels (or with loss_at = "logits" the cells) that are not IGNORE
    (`global_mean`).

    logits: (N, C+1, h, w); masks: (N, H, W) uint8 class ids with IGNORE = 255. loss_at: logits go to (H, W) bilinearly,
    or masks to (h, w) by `shrink_masks`. weight: (N,) >= 0 an image, or None for 1: an image counts as weight times
    its valid pixels. No valid pixel at all gives 0 with a gradient of 0. Computed in float32. bootstrap_beta: below 1,
    `soft_bootstrap` in place of cross entropy. confidence: (N, H, W) uint8, 255 for 1, by which pixels count, or None.
    """
    if loss_at == "logits":
        masks = shrink_masks(masks, logits.shape[2], logits.shape[3])
        confidence = None if confidence is None else shrink_masks(confidence, logits.shape[2], logits.shape[3])
    logits = F.interpolate(logits.float(), masks.shape[1:], mode="bilinear", align_corners=False)
    terms = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="none")
    if bootstrap_beta < 1:
        terms = soft_bootstrap(terms, logits, bootstrap_beta)
    valid = (masks != IGNORE).float()
    if confidence is not None:
        valid = valid * confidence.float() / 255
    if weight is not None:
        valid = valid * weight.float()[:, None, None]
    return global_mean((terms * valid).sum(), valid.sum())


def multi_scale_loss(
    logits: Sequence[torch.Tensor],
    masks: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    loss_at: Literal["mask", "logits"] = "mask",
    bootstrap_beta: float = 1.0,
    confidence: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum, not the mean, of `segmentation_loss` over the logits of each scale and, where there are several, over
    their maximum (deeplab-pytorch). The other arguments as there.
    """
    outputs = [*logits, maximum_logits(logits)] if len(logits) > 1 else logits
    options: dict[str, Any] = {"loss_at": loss_at, "bootstrap_beta": bootstrap_beta, "confidence": confidence}
    return torch.stack([segmentation_loss(output, masks, weight, **options) for output in outputs]).sum()


_STRIP_VALUES = 2**22  # of one map of all classes over a strip of rows: 16 MB


@torch.inference_mode()
def predict_mask(
    segmenter: Segmenter,
    image: np.ndarray,
    *,
    scales: tuple[float, ...] = (1.0,),
    merge: Literal["mean", "max"] = "mean",
    flip: bool = True,
    base_px: int | None = None,
    max_px: int | None = 2048,
    allowed_class_ids: Sequence[int] | None = None,
    background: bool = True,
    crf: CrfSettings | Refine | None = None,
    bf16: bool = False,
    device: torch.device | str = "cpu",
    probability_out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One image's mask at the image's own size, from several scales and flips.

    image: (H, W, 3) uint8 RGB. merge: "mean" brings every view's logits to the image's size and averages their
    softmax; "max" takes the largest logit over the views at the size of the first scale's logits (deeplab-pytorch),
    from views made as in training at several scales. base_px: short side that scale 1 is brought to (None: its own);
    max_px: its long side at most. allowed_class_ids: tags, as class ids; all other classes but background get
    probability 0, and so does background with background=False. crf: settings of our dense CRF, or any function
    (probability (C+1, H, W) float32 that sums to 1, image) -> probability. Returns mask (H, W) uint8 class ids and
    confidence (H, W) float32, the probability of the class in the mask. probability_out: (C+1, H, W) float32 that takes
    the probabilities; without it and without a CRF, maps of all classes are never held at the image's size, but at that
    of the logits, and for a strip of rows. Raises ValueError in training mode and for tags outside 1..C.
    """
    if segmenter.training:
        raise ValueError("got a segmenter in training mode; call segmenter.eval() first")
    device = torch.device(device)
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None]
    views: list[torch.Tensor] = []
    for view in _resized(pixels, scales, merge, base_px, max_px):
        both = torch.cat([view, view.flip(3)]) if flip else view
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = segmenter(both.contiguous(memory_format=torch.channels_last)).float()
        views += [logits[0], *(mirrored.flip(2) for mirrored in logits[1:])]
    if merge == "max":
        views = [maximum_logits([logits[None] for logits in views])[0]]
    num_outputs = len(views[0])
    allowed = range(1, num_outputs) if allowed_class_ids is None else allowed_class_ids
    wrong = [class_id for class_id in allowed if not 1 <= class_id < num_outputs]
    if wrong:
        raise ValueError(f"got class id {wrong[0]} among the tags; expected 1 to {num_outputs - 1}")
    keep = torch.zeros(num_outputs, 1, 1, device=device)
    keep[[*([0] if background else []), *allowed]] = 1.0
    probability = probability_out
    if probability is None and crf is not None:
        probability = np.empty((num_outputs, height, width), np.float32)
    mask, confidence = np.empty((height, width), np.uint8), np.empty((height, width), np.float32)
    num_rows = max(1, _STRIP_VALUES // (num_outputs * width))
    for top in range(0, height, num_rows):
        rows = slice(top, min(top + num_rows, height))
        total = sum(_upsampled_rows(view, height, width, rows).softmax(dim=0) for view in views) * keep
        strip = total / total.sum(dim=0, keepdim=True)
        if probability is not None:
            probability[:, rows] = strip.cpu().numpy()
        else:
            best, ids = strip.max(dim=0)
            mask[rows], confidence[rows] = ids.cpu().numpy(), best.cpu().numpy()
    if probability is None:
        return mask, confidence
    if crf is not None:
        probability[:] = _refined(probability, image, crf)
    return probability.argmax(axis=0).astype(np.uint8), probability.max(axis=0)


def _resized(
    pixels: torch.Tensor, scales: tuple[float, ...], merge: str, base_px: int | None, max_px: int | None
) -> Iterator[torch.Tensor]:
    """(1, 3, H, W) uint8 at each scale: bicubic with antialias from the pixels, or with "max" as training scales."""
    height, width = pixels.shape[2:]
    sizes = view_sizes(height, width, scales if merge == "mean" else (1.0,), base_px, max_px)
    views = (resize_batch(pixels, *size) for size in sizes)
    return views if merge == "mean" else scaled_images(next(views), scales)


def _upsampled_rows(logits: torch.Tensor, height: int, width: int, rows: slice) -> torch.Tensor:
    """Some rows of logits (C+1, h, w) brought to (H, W) bilinearly, as F.interpolate gives them, up to rounding."""
    last = logits.shape[1] - 1
    places = (torch.arange(rows.start, rows.stop, device=logits.device) + 0.5) * ((last + 1) / height) - 0.5
    places = places.clamp(0, last)
    above = places.long()
    lines = torch.lerp(logits[:, above], logits[:, (above + 1).clamp(max=last)], (places - above)[:, None])
    return F.interpolate(lines[None], (lines.shape[1], width), mode="bilinear", align_corners=False)[0]


def _refined(probability: np.ndarray, image: np.ndarray, crf: CrfSettings | Refine) -> np.ndarray:
    """Refine classes that have a chance somewhere; the others keep probability 0."""
    present = np.flatnonzero(probability.max(axis=(1, 2)) > 0)
    kept = np.maximum(probability[present], 1e-8)
    result = np.zeros_like(probability)
    if callable(crf):
        result[present] = crf(kept, image)
    else:
        from subcat_core.crf import dense_crf  # here: training a segmenter should not need numba

        result[present] = dense_crf(kept, image, crf)
    return result
