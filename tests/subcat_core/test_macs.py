"""Multiply-adds counted without computing, against hand-counted and published ones."""

import pytest
import torch
from torch import nn

from subcat_core.backbones import BackboneSettings, build_backbone
from subcat_core.macs import count_macs, count_parameters, is_depthwise


class _Net(nn.Module):
    """A strided, a depthwise and a 1x1 convolution, and a linear layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.depthwise(self.first(images)).relu()).mean(dim=(2, 3)))


def test_a_small_net_by_hand() -> None:
    with torch.device("meta"):
        net = _Net()
    cells = 5 * 10  # of 10 x 20 px at stride 2
    assert count_macs(net, 10, 20) == cells * 8 * 3 * 9 + cells * 8 * 9 + cells * 16 * 8 + 5 * 16
    assert count_parameters(net) == 8 * 27 + 8 + 8 * 9 + 8 + 16 * 8 + 16 + 5 * 16 + 5
    assert net.training  # as it was


def test_resnet_50_has_its_published_number() -> None:
    with torch.device("meta"):
        backbone, _ = build_backbone(BackboneSettings(name="torchvision:resnet50", output_stride=32, weights="none"))
    assert count_macs(backbone, 224, 224) / 1e9 == pytest.approx(4.09, abs=0.01)  # without the last linear layer
    assert count_parameters(backbone) / 1e6 == pytest.approx(23.5, abs=0.05)


def test_depthwise_networks_are_told_apart() -> None:
    with torch.device("meta"):
        lite, _ = build_backbone(BackboneSettings(weights="none"))
        resnet, _ = build_backbone(BackboneSettings(name="torchvision:resnet18", weights="none"))
    assert is_depthwise(lite)
    assert not is_depthwise(resnet)


def test_a_network_with_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got a network on cpu; build it under"):
        count_macs(nn.Conv2d(3, 4, 1), 8, 8)
