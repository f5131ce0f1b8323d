"""DeepLabV3+ of segmentation_models_pytorch behind our normalisation, with our account of its encoder's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import (
    BackboneSettings,
    InputNormalisation,
    build_backbone,
    input_statistics,
    split_name,
)
from subcat_core.freezing import canonical, freeze_stages
from subcat_core.segmenter import Segmenter
from subcat_core.weights import LoadReport, ReadUri


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

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        padding = (0, -width % self.output_stride, 0, -height % self.output_stride)
        features = self.backbone(F.pad(self.normalise(images), padding))
        logits = self.classify(self.decoder(features))
        return cast(torch.Tensor, logits[:, :, : -(-height // 4), : -(-width // 4)])

    def heads(self) -> list[nn.Module]:
        return [self.decoder, self.classify]


def build_deeplabv3plus(
    backbone: BackboneSettings, num_classes: int, rates: Sequence[int], read_uri: ReadUri | None
) -> tuple[Segmenter, LoadReport]:
    """For C classes and background; ValueError where the library does not take the backbone, or not three rates."""
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
