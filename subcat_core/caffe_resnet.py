"""ResNet-101 as Caffe has it, DeepLab-v2's backbone: a block's stride is on its first 1x1, the tensors have the names
of deeplab-pytorch.

He et al. 2016 in the form of MSRA's Caffe models, dilated as in Chen et al. 2018 (DeepLab-v2). torchvision's ResNet-101
puts the stride on the 3x3 and has a max-pool without ceil mode: weights of one fit into the other and are wrong there.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

STAGES = ("layer1", "layer2", "layer3", "layer4", "layer5")
"""The stem, and the four stages of blocks."""
NUM_FEATURES = 2048

_NUM_BLOCKS = (3, 4, 23, 3)
_STEM_CHANNELS = 64


class ConvNorm(nn.Sequential):
    """Convolution without bias, and batch norm; published names conv and bn."""

    def __init__(
        self, num_inputs: int, num_outputs: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(num_inputs, num_outputs, kernel, stride, padding, dilation, bias=False))
        self.add_module("bn", nn.BatchNorm2d(num_outputs))


class Bottleneck(nn.Module):
    """1x1 with the stride, 3x3 with the dilation, 1x1 to num_outputs; the shortcut is a 1x1 with the same stride in a
    stage's first block (project), and nothing else in the others.
    """

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        middle = num_outputs // 4
        self.reduce = ConvNorm(num_inputs, middle, 1, stride)
        self.conv3x3 = ConvNorm(middle, middle, 3, 1, dilation, dilation)
        self.increase = ConvNorm(middle, num_outputs, 1)
        self.shortcut = ConvNorm(num_inputs, num_outputs, 1, stride) if project else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.reduce(features), inplace=True)
        inner = F.relu(self.conv3x3(inner), inplace=True)
        return F.relu(self.increase(inner) + self.shortcut(features), inplace=True)


class Stem(nn.Module):
    """7x7 of stride 2 and a 3x3 max-pool of stride 2 that rounds its size up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, _STEM_CHANNELS, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.pool(F.relu(self.conv1(images), inplace=True)))


class CaffeResNet101(nn.Sequential):
    """(N, 3, H, W) float32 BGR minus the mean -> (N, 2048, h, w).

    output_stride: 8 as published (dilations 1, 1, 2, 4 in layer2 to layer5), or 16 or 32: the same weights and the
    same function on a coarser grid.
    """

    def __init__(self, output_stride: int = 8) -> None:
        super().__init__()
        self.add_module("layer1", Stem())
        num_inputs, reached, dilation = _STEM_CHANNELS, 4, 1
        for index, num_blocks in enumerate(_NUM_BLOCKS):
            num_outputs, stride = 256 * 2**index, 1
            if index and reached < output_stride:
                stride, reached = 2, 2 * reached
            elif index:
                dilation *= 2
            stage = nn.Sequential()
            for block in range(num_blocks):
                first = block == 0
                made = Bottleneck(
                    num_inputs if first else num_outputs, num_outputs, stride if first else 1, dilation, project=first
                )
                stage.add_module(f"block{block + 1}", made)
            self.add_module(STAGES[index + 1], stage)
            num_inputs = num_outputs
