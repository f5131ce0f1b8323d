"""Networks of our own, by their name after "subcat:", and what a backbone has to know of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from subcat_core import caffe_resnet


@dataclasses.dataclass(frozen=True)
class OwnNetwork:
    """build: output stride -> network that turns normalised images into a feature map (N, num_features, h, w).

    mean, std: by RGB, on the 0..255 scale; takes_bgr: whether the network wants blue first. stages: prefixes of tensor
    names, the stem's and then each stage's. middle: module of the last stage whose stride is 16 before dilation.
    heads: prefixes of what published files hold beside the backbone.
    """

    build: Callable[[int], nn.Module]
    num_features: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    takes_bgr: bool
    stages: tuple[tuple[str, ...], ...]
    middle: str
    heads: tuple[str, ...]


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
}
