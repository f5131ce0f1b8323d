"""Networks of our own, by their name after "subcat:", and what a backbone has to know of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from subcat_core import caffe_resnet, resnet38
from subcat_core.weights import Rename


@dataclasses.dataclass(frozen=True)
class OwnNetwork:
    """build: output stride -> network that turns normalised images into a feature map (N, num_features, h, w).

    mean, std: by RGB, on the 0..255 scale; takes_bgr: whether the network wants blue first. stages: prefixes of tensor
    names, the stem's and then each stage's. middle: module of the last stage whose stride is 16 before dilation.
    heads: prefixes of what published files hold beside the backbone. strides: those it offers; None: any. from_mxnet:
    turns the arrays of its published MXNet file into a state dict; None where there is no such file.
    """

    build: Callable[[int], nn.Module]
    num_features: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    takes_bgr: bool
    stages: tuple[tuple[str, ...], ...]
    middle: str
    heads: tuple[str, ...]
    strides: tuple[int, ...] | None = None
    from_mxnet: Rename | None = None


OWN_NETWORKS = {
    "resnet101-caffe": OwnNetwork(
        build=caffe_resnet.CaffeResNet101,
        num_features=caffe_resnet.NUM_FEATURES,
        mean=(122.675, 116.669, 104.008),
        std=(1.0, 1.0, 1.0),
        takes_bgr=True,
        stages=tuple((name,) for name in caffe_resnet.STAGES),
        middle="layer4",
        heads=("fc.", "aspp."),
    ),
    resnet38.NAME: OwnNetwork(
        build=lambda output_stride: resnet38.ResNet38d(),
        num_features=resnet38.NUM_FEATURES,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        takes_bgr=False,
        stages=resnet38.STAGES,
        middle=resnet38.MIDDLE,
        heads=resnet38.HEADS,
        strides=(resnet38.OUTPUT_STRIDE,),
        from_mxnet=resnet38.from_mxnet,
    ),
}
