"""The segmenter that learns from pseudo masks: DeepLab-v2 on any backbone, or the DeepLabV3+ of
segmentation_models_pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import segmentation_models_pytorch as smp
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import (
    BackboneSettings,
    InputNormalisation,
    build_backbone,
    input_statistics,
    split_name,
)
from subcat_core.classes import IGNORE
from subcat_core.freezing import canonical, freeze_stages
from subcat_core.losses import global_mean
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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (N, 3, H, W) RGB 0..255, uint8 or float -> logits (N, C+1, h, w); row 0 is background."""
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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.aspp(self.backbone(images)))

    def heads(self) -> list[nn.Module]:
        return [self.aspp]


class DeepLabV3Plus(Segmenter):
    """The library's DeepLabV3+ behind our normalisation; logits at stride 4.

    The decoder needs sides that are multiples of the output stride: images are padded with the mean colour at the
    right and the bottom, and the logits cut back to ceil(H/4), ceil(W/4).
    """

    def __init__(self, net: smp.DeepLabV3Plus, backbone_name: str, output_stride: int) -> None:
        super().__init__()
        self.backbone = net.encoder
        self.decoder = net.decoder
        self.classify = net.segmentation_head
        self.normalise = InputNormalisation(*input_statistics(backbone_name))
        self.output_stride = output_stride

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        padding = (0, -width % self.output_stride, 0, -height % self.output_stride)
        features = self.backbone(F.pad(self.normalise(images), padding))
        logits = self.classify(self.decoder(features))
        return cast(torch.Tensor, logits[:, :, : -(-height // 4), : -(-width // 4)])

    def heads(self) -> list[nn.Module]:
        return [self.decoder, self.classify]


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
        return _build_deeplabv3plus(backbone, num_classes, rates, read_uri)
    trunk, report = build_backbone(backbone, read_uri=read_uri)
    return DeepLabV2(trunk, Aspp(trunk.num_features, num_classes + 1, rates)), report


def _build_deeplabv3plus(
    backbone: BackboneSettings, num_classes: int, rates: Sequence[int], read_uri: ReadUri | None
) -> tuple[Segmenter, LoadReport]:
    library, name = split_name(backbone.name)
    if len(rates) != 3:
        raise ValueError(f"deeplabv3plus: got {len(rates)} rates {tuple(rates)}; expected 3")
    try:
        net = smp.DeepLabV3Plus(
            f"tu-{name}" if library == "timm" else name,
            encoder_weights=None,
            encoder_output_stride=backbone.output_stride,
            decoder_atrous_rates=tuple(rates),
            classes=num_classes + 1,
            upsampling=1,
        )
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"deeplabv3plus on {backbone.name!r} at output stride {backbone.output_stride}: "
            f"segmentation_models_pytorch refuses ({reason[:200]}); give a ResNet or EfficientNet, or deeplabv2"
        ) from error
    report = _load_encoder(net.encoder.model if library == "timm" else net.encoder, backbone, read_uri)
    return DeepLabV3Plus(net, backbone.name, backbone.output_stride), report


def _load_encoder(encoder: nn.Module, settings: BackboneSettings, read_uri: ReadUri | None) -> LoadReport:
    """Weights go into the whole network first, under the same account as a classifier's, and from there into the
    encoder.

    The library's encoders are the same networks without their last layers; some write "stages_0" for "stages.0".
    """
    if settings.weights == "none":
        freeze_stages(encoder, settings.frozen_stages, settings.name)
        return LoadReport("none")
    whole, report = build_backbone(
        settings.model_copy(update={"output_stride": 32, "frozen_stages": 0}), read_uri=read_uri
    )
    loaded = {canonical(name): tensor for name, tensor in whole.net.state_dict().items()}
    wanted = {name: canonical(name) for name in encoder.state_dict()}
    lacking = [name for name, key in wanted.items() if key not in loaded]
    if lacking:
        raise ValueError(
            f"deeplabv3plus on {settings.name!r}: {len(lacking)} tensors of the encoder have no pretrained partner "
            f'({lacking[0]}, ...); give another backbone, or weights "none"'
        )
    encoder.load_state_dict({name: loaded[key] for name, key in wanted.items()})
    freeze_stages(encoder, settings.frozen_stages, settings.name)
    return report


def segmentation_loss(logits: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy at the masks' resolution, averaged over the pixels that are not IGNORE (`global_mean`).

    logits: (N, C+1, h, w), brought to (H, W) bilinearly; masks: (N, H, W) uint8 class ids with IGNORE = 255; weight:
    (N,) >= 0 an image, or None for 1: an image counts as weight times its valid pixels. No valid pixel at all gives 0
    with a gradient of 0. Computed in float32.
    """
    logits = F.interpolate(logits.float(), masks.shape[1:], mode="bilinear", align_corners=False)
    terms = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="none")
    valid = (masks != IGNORE).float()
    if weight is not None:
        valid = valid * weight.float()[:, None, None]
    return global_mean((terms * valid).sum(), valid.sum())


_STRIP_VALUES = 2**22  # of one map of all classes over a strip of rows: 16 MB


@torch.inference_mode()
def predict_mask(
    segmenter: Segmenter,
    image: np.ndarray,
    *,
    scales: tuple[float, ...] = (1.0,),
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
    """One image's mask: softmax averaged over scales and flips, at the image's own size.

    image: (H, W, 3) uint8 RGB. base_px: short side that scale 1 is brought to (None: its own); max_px: its long side
    at most. allowed_class_ids: tags, as class ids; all other classes but background get probability 0, and so does
    background with background=False. crf: settings of our dense CRF, or any function (probability (C+1, H, W) float32
    that sums to 1, image) -> probability. Returns mask (H, W) uint8 class ids and confidence (H, W) float32, the
    probability of the class in the mask. probability_out: (C+1, H, W) float32 that takes the probabilities; without it
    and without a CRF, maps of all classes are never held at the image's size, but at that of the logits, and for a
    strip of rows. Raises ValueError in training mode and for tags outside 1..C.
    """
    if segmenter.training:
        raise ValueError("got a segmenter in training mode; call segmenter.eval() first")
    device = torch.device(device)
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None]
    views: list[torch.Tensor] = []
    for view_height, view_width in view_sizes(height, width, scales, base_px, max_px):
        view = resize_batch(pixels, view_height, view_width)
        both = torch.cat([view, view.flip(3)]) if flip else view
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = segmenter(both.contiguous(memory_format=torch.channels_last)).float()
        views += [logits[0], *(mirrored.flip(2) for mirrored in logits[1:])]
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
