"""CNNs of torchvision and timm up to their last feature map, their strides turned into dilations where asked."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import timm
import torch
import torchvision.models
from torch import nn

from subcat_core.freezing import TORCHVISION_STAGES

_SURE_NETWORKS = "a network such as timm:tf_efficientnet_lite0, timm:resnet50 or timm:convnext_tiny"


def torchvision_net(name: str, output_stride: int) -> tuple[nn.Module, int]:
    """A ResNet up to its last stage, under torchvision's tensor names."""
    resnet = torchvision.models.get_model(name, weights=None)
    num_features = resnet.fc.in_features
    parts = ("conv1", "bn1", "relu", "maxpool", *TORCHVISION_STAGES)
    net = nn.Sequential(OrderedDict((part, getattr(resnet, part)) for part in parts))
    dilation = 1
    for stage, stride in zip(TORCHVISION_STAGES[1:], (8, 16, 32), strict=True):
        if stride > output_stride:
            dilation *= 2
            _dilate(getattr(net, stage), dilation)
    return net, num_features


def _dilate(stage: nn.Module, dilation: int) -> None:
    """Turn a ResNet stage's stride of 2 into a dilation: the same function on a grid twice as fine.

    torchvision offers this for Bottleneck only. The convolution that had the stride still sees the grid of the stage
    before it, so it takes half the dilation; all after it take the whole.
    """
    current = dilation // 2
    for layer in stage.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        strided = layer.stride == (2, 2)
        layer.stride = (1, 1)
        if layer.kernel_size != (1, 1):
            layer.dilation = (current, current)
            layer.padding = (current, current)
            if strided:
                current = dilation


def timm_net(name: str, output_stride: int) -> tuple[nn.Module, int]:
    """A timm CNN without classifier and pooling; timm itself turns strides into dilations."""
    options: dict[str, Any] = {} if output_stride == 32 else {"output_stride": output_stride}
    try:
        net = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **options)
        with torch.inference_mode():
            side_px = 4 * output_stride
            shape = tuple(net.eval()(torch.zeros(1, 3, side_px, side_px)).shape)
    except (TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"backbone 'timm:{name}' does not offer output stride {output_stride} ({reason}); "
            f"give 32, or {_SURE_NETWORKS}"
        ) from error
    if len(shape) != 4 or shape[2:] != (4, 4):
        raise ValueError(
            f"backbone 'timm:{name}' gives no feature map of output stride {output_stride} "
            f"(got {shape} for {side_px} px); give {_SURE_NETWORKS}"
        )
    return net.train(), shape[1]
