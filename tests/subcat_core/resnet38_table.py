"""The published table of ResNet-38d, the names of its tensors on both sides, and networks for its tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from subcat_core.backbones import Backbone, BackboneSettings, build_backbone

NAME = "subcat:resnet38d"

# Name, channels in, in the middle and out, stride, first and other dilation, parameters: the released network, counted.
BASIC = [
    ("b2", 64, 128, 128, 2, 1, 1, 229_760),
    *((f"b2_{i}", 128, 128, 128, 1, 1, 1, 295_424) for i in (1, 2)),
    ("b3", 128, 256, 256, 2, 1, 1, 918_272),
    *((f"b3_{i}", 256, 256, 256, 1, 1, 1, 1_180_672) for i in (1, 2)),
    ("b4", 256, 512, 512, 2, 1, 1, 3_671_552),
    *((f"b4_{i}", 512, 512, 512, 1, 1, 1, 4_720_640) for i in (1, 2, 3, 4, 5)),
    ("b5", 512, 512, 1024, 1, 1, 2, 7_604_224),
    *((f"b5_{i}", 1024, 512, 1024, 1, 2, 2, 9_440_256) for i in (1, 2)),
]
BOTTLENECKS = [("b6", 1024, 2048, 4, 9_442_304), ("b7", 2048, 4096, 4, 37_758_976)]
PROJECTED = ("b2", "b3", "b4", "b5", "b6", "b7")


def build_on_meta(frozen_stages: int = 0, weights: str = "none") -> Backbone:
    """Shapes and names without the 400 MB."""
    settings = BackboneSettings(name=NAME, output_stride=8, weights=weights, frozen_stages=frozen_stages)
    with torch.device("meta"):
        return build_backbone(settings)[0]


def shake(module: nn.Module) -> None:
    """Batch norm as of a trained network, not the 0 and 1 that hide mistakes."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in ((layer.weight, 0.5, 1.5), (layer.bias, -0.3, 0.3)):
                nn.init.uniform_(tensor, low, high)
            layer.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def published_state() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The released file's tensors without counters and heads, from the table above."""
    yield "conv1a.weight", (64, 3, 3, 3)
    norms: dict[str, int] = {}
    for name, inputs, middle, outputs, *_ in BASIC:
        norms |= {f"{name}.bn_branch2a": inputs, f"{name}.bn_branch2b1": middle}
        yield f"{name}.conv_branch2a.weight", (middle, inputs, 3, 3)
        yield f"{name}.conv_branch2b1.weight", (outputs, middle, 3, 3)
        if name in PROJECTED:
            yield f"{name}.conv_branch1.weight", (outputs, inputs, 1, 1)
    for name, inputs, outputs, *_ in BOTTLENECKS:
        norms |= {f"{name}.bn_branch2a": inputs, f"{name}.bn_branch2b1": outputs // 4}
        norms[f"{name}.bn_branch2b2"] = outputs // 2
        yield f"{name}.conv_branch2a.weight", (outputs // 4, inputs, 1, 1)
        yield f"{name}.conv_branch2b1.weight", (outputs // 2, outputs // 4, 3, 3)
        yield f"{name}.conv_branch2b2.weight", (outputs, outputs // 2, 1, 1)
        yield f"{name}.conv_branch1.weight", (outputs, inputs, 1, 1)
    for name, channels in {**norms, "bn7": 4096}.items():
        for kind in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{kind}", (channels,)


def mxnet_name(name: str) -> str:
    """Of a tensor of the table, in ademxapp: b4_2.conv_branch2a.weight is arg:res4b2_branch2a_weight there."""
    block, _, layer = name.partition(".")
    kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    if name == "conv1a.weight":
        return "arg:conv1a_weight"
    place = block[1] + ("b" + block[3] if "_" in block else "a")
    if layer.startswith("conv_"):
        return f"arg:res{place}_{layer.split('.')[0].removeprefix('conv_')}_weight"
    kind = name.rsplit(".", 1)[1]
    group = "aux" if kind.startswith("running") else "arg"
    if block == "bn7":
        return f"{group}:bn7_{kinds[kind]}"
    return f"{group}:bn{place}_{layer.split('.')[0].removeprefix('bn_')}_{kinds[kind]}"
