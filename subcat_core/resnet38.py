"""ResNet-38d, the paper's backbone: wide pre-activation blocks at stride 8, under the tensor names of its published
weights.

Model A1 of Wu et al. 2019 ("Wider or deeper", ademxapp), with two strides turned into dilations by Ahn & Kwak 2018
(PSA); Chang et al. 2020 (SC-CAM) use it as it is. There is no pooling: three strided blocks bring it to stride 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

NAME = "resnet38d"
"""In settings: subcat:resnet38d."""
OUTPUT_STRIDE = 8
"""The only one: the weights of b5 to b7 were published for these dilations."""
NUM_FEATURES = 4096
STAGES = (("conv1a",), ("b2",), ("b3",), ("b4",), ("b5",), ("b6",), ("b7", "bn7"))
"""The stem, and the stages, by prefixes of their tensors' names. The paper freezes the first two."""
HEADS = ("fc8.", "fc8_20.", "fc8_200.", "f8_", "f9.", "linear1000")
"""Prefixes of what published files hold beside the backbone: the heads of PSA and SC-CAM, PSA's affinity net, and the
1000 classes of ImageNet."""
MIDDLE = "b6.relu_branch2a"
"""Where conv5 (1024 channels) comes out: the end of b5, whose stride is 16 in Model A1 before dilation."""

_BASIC_STAGES = (  # name, blocks, channels in the middle, channels out, stride of the first block, dilation
    ("b2", 3, 128, 128, 2, 1),
    ("b3", 3, 256, 256, 2, 1),
    ("b4", 6, 512, 512, 2, 1),
    ("b5", 3, 512, 1024, 1, 2),
)
_TAPPED = ("b5", "b6")

_MXNET_KINDS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
_MXNET_CONVOLUTION = re.compile(r"res(\d)(a|b\d+)_(branch\w+)_weight")
_MXNET_NORM = re.compile(rf"bn(\d)(?:(a|b\d+)_(branch\w+?))?_({'|'.join(_MXNET_KINDS)})")


class Taps(NamedTuple):
    """Feature maps (N, 512 | 1024 | 4096, ceil(H/8), ceil(W/8)) >= 0, named as in PSA, whose affinity net reads them.

    conv4, conv5: what b5 and b6 see after their first batch norm and ReLU; conv6: the network's own output.
    """

    conv4: torch.Tensor
    conv5: torch.Tensor
    conv6: torch.Tensor


class _Block(nn.Module):
    """y = shortcut + branch(a) with a = ReLU(BN(x)), and no ReLU after the sum.

    The shortcut is x itself, or conv_branch1 (1x1, with the block's stride) on a.
    """

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(num_inputs)
        self.relu_branch2a = nn.ReLU(inplace=True)
        self.conv_branch1: nn.Conv2d | None = None

    def preactivate(self, features: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.relu_branch2a(self.bn_branch2a(features)))

    def join(self, features: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """features: what the block was given; active: `preactivate` of it."""
        shortcut = features if self.conv_branch1 is None else self.conv_branch1(active)
        return shortcut + self.branch(active)

    def branch(self, active: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.join(features, self.preactivate(features))


class BasicBlock(_Block):
    """Two 3x3 convolutions, the first with the stride; projected unless shape and stride stay."""

    def __init__(
        self, num_inputs: int, num_middle: int, num_outputs: int, stride: int, first_dilation: int, dilation: int
    ) -> None:
        super().__init__(num_inputs)
        self.conv_branch2a = nn.Conv2d(num_inputs, num_middle, 3, stride, first_dilation, first_dilation, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(num_middle)
        self.conv_branch2b1 = nn.Conv2d(num_middle, num_outputs, 3, 1, dilation, dilation, bias=False)
        if num_inputs != num_outputs or stride != 1:
            self.conv_branch1 = nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False)

    def branch(self, active: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.bn_branch2b1(self.conv_branch2a(active)), inplace=True)
        return cast(torch.Tensor, self.conv_branch2b1(inner))


class Bottleneck(_Block):
    """1x1 to a quarter of num_outputs, dilated 3x3 to a half, 1x1 to the whole; always projected.

    Dropout takes whole channels before the second and before the third convolution.
    """

    def __init__(self, num_inputs: int, num_outputs: int, dilation: int, dropout: float) -> None:
        super().__init__(num_inputs)
        quarter, half = num_outputs // 4, num_outputs // 2
        self.conv_branch2a = nn.Conv2d(num_inputs, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, 1, dilation, dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(half, num_outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(num_inputs, num_outputs, 1, bias=False)

    def branch(self, active: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.bn_branch2b1(self.conv_branch2a(active)), inplace=True)
        inner = F.relu(self.bn_branch2b2(self.conv_branch2b1(self.dropout_2b1(inner))), inplace=True)
        return cast(torch.Tensor, self.conv_branch2b2(self.dropout_2b2(inner)))


class ResNet38d(nn.Sequential):
    """(N, 3, H, W) float32, RGB / 255 less ImageNet's mean over its deviation -> conv6 (N, 4096, ceil(H/8), ceil(W/8)).

    105 million parameters, 100 billion multiplications for 224 x 224 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_module("conv1a", nn.Conv2d(3, 64, 3, padding=1, bias=False))
        num_inputs = 64
        for name, num_blocks, num_middle, num_outputs, stride, dilation in _BASIC_STAGES:
            # The first convolution of a stage still sees the grid before it, which has no dilation.
            self.add_module(name, BasicBlock(num_inputs, num_middle, num_outputs, stride, 1, dilation))
            for index in range(1, num_blocks):
                block = BasicBlock(num_outputs, num_middle, num_outputs, 1, dilation, dilation)
                self.add_module(f"{name}_{index}", block)
            num_inputs = num_outputs
        self.add_module("b6", Bottleneck(num_inputs, 2048, dilation=4, dropout=0.3))
        self.add_module("b7", Bottleneck(2048, NUM_FEATURES, dilation=4, dropout=0.5))
        self.add_module("bn7", nn.BatchNorm2d(NUM_FEATURES))
        self.add_module("relu7", nn.ReLU(inplace=True))

    def taps(self, images: torch.Tensor) -> Taps:
        """As forward, and the two maps on the way."""
        features, tapped = images, []
        for name, part in self.named_children():
            if name in _TAPPED:
                block = cast(_Block, part)
                tapped.append(block.preactivate(features))
                features = block.join(features, tapped[-1])
            else:
                features = part(features)
        conv4, conv5 = tapped
        return Taps(conv4, conv5, features)


def from_mxnet(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of ademxapp's Model A1 under the names of this network; names it does not know stay as they are.

    arg:res4b2_branch2b1_weight -> b4_2.conv_branch2b1.weight, aux:bn4a_branch2a_moving_var ->
    b4.bn_branch2a.running_var, arg:bn7_beta -> bn7.bias. Raises ValueError when two names become one.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        new = _torch_name(name.removeprefix("arg:").removeprefix("aux:"))
        if new in renamed:
            raise ValueError(f"MXNet weights: {name!r} and another array both become {new!r}; give the published file")
        renamed[new] = tensor
    return renamed


def _torch_name(name: str) -> str:
    if name == "conv1a_weight":
        return "conv1a.weight"
    if found := _MXNET_CONVOLUTION.fullmatch(name):
        level, place, branch = found.groups()
        return f"{_block_name(level, place)}.conv_{branch}.weight"
    if found := _MXNET_NORM.fullmatch(name):
        level, place, branch, kind = found.groups()
        layer = f"{_block_name(level, place)}.bn_{branch}" if place else f"bn{level}"
        return f"{layer}.{_MXNET_KINDS[kind]}"
    return name


def _block_name(level: str, place: str) -> str:
    """4, a -> b4; 4, b2 -> b4_2."""
    return f"b{level}" if place == "a" else f"b{level}_{place.removeprefix('b')}"
