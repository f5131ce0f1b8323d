"""AffinityNet: its taps, its features and the affinity of pairs, against plain loops and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subcat_core.affinity_net import AffinityNet, AffinityNetSettings, build_affinity_net, pair_affinity
from subcat_core.affinity_pairs import balanced_loss, pair_kinds, pair_offsets
from subcat_core.backbone_taps import BackboneTaps
from subcat_core.backbones import BackboneSettings, build_backbone
from tests.subcat_core.plain_affinity import all_pairs

RESNET = BackboneSettings(name="torchvision:resnet18", output_stride=8, weights="none")


@pytest.mark.parametrize("pad_border", [True, False])
def test_affinity_agrees_with_plain_loops_in_float64(pad_border: bool, rng: np.random.Generator) -> None:
    features = rng.normal(size=(2, 5, 8, 9))
    found = pair_affinity(torch.from_numpy(features), 4, pad_border).numpy()
    expected = np.zeros((2, len(pair_offsets(4)), 8, 9))
    for (y, x), (to_y, to_x) in all_pairs(8, 9, 4, pad_border):
        distance = np.abs(features[:, :, y, x] - features[:, :, to_y, to_x]).mean(axis=1)
        expected[:, pair_offsets(4).index((to_y - y, to_x - x)), y, x] = np.exp(-distance)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_affinity_by_hand() -> None:
    features = torch.tensor([[[[0.0, 1.0]], [[2.0, 5.0]]]])  # |0 - 1| and |2 - 5|: a mean of 2
    found = pair_affinity(features, 2, True)
    assert found[0, 0, 0].tolist() == [pytest.approx(math.exp(-2)), 0.0]
    assert not found[0, 1:].any()


def test_gradient_is_that_of_autograd_through_all_pairs(rng: np.random.Generator) -> None:
    labels = torch.from_numpy(rng.integers(0, 3, (2, 5, 6)).astype(np.uint8))
    features = torch.from_numpy(rng.normal(size=(2, 4, 5, 6))).requires_grad_()
    balanced_loss(pair_affinity(features, 3, True), pair_kinds(labels, 3, True))[0].backward()
    plain = features.detach().clone().requires_grad_()
    affinity = torch.zeros((2, len(pair_offsets(3)), 5, 6), dtype=torch.float64)
    for (y, x), (to_y, to_x) in all_pairs(5, 6, 3, True):
        distance = (plain[:, :, y, x] - plain[:, :, to_y, to_x]).abs().mean(dim=1)
        affinity[:, pair_offsets(3).index((to_y - y, to_x - x)), y, x] = torch.exp(-distance)
    balanced_loss(affinity, pair_kinds(labels, 3, True))[0].backward()
    assert plain.grad is not None
    torch.testing.assert_close(features.grad, plain.grad, atol=1e-12, rtol=1e-9)


def test_features_are_three_narrowed_maps_mixed() -> None:
    torch.manual_seed(0)
    net = build_affinity_net(AffinityNetSettings(backbone=RESNET)).eval()
    images = torch.randint(0, 256, (2, 3, 61, 48), dtype=torch.uint8)
    with torch.inference_mode():
        found = net(images)
        # Padded by 3 px of zeros to whole cells; ResNet's layer2, layer3 and layer4, all at stride 8.
        x = F.pad(net.backbone.normalise(images), (0, 0, 0, 3))
        maps = []
        for name, part in net.backbone.net.named_children():
            x = part(x)
            if name in ("layer2", "layer3", "layer4"):
                maps.append(x)
        parts = [F.elu(layer(tap)) for layer, tap in zip(net.narrow, maps, strict=True)]
        expected = F.elu(net.mix(torch.cat(parts, dim=1)))
    assert [layer.out_channels for layer in net.narrow] == [64, 128, 256]
    assert found.shape == (2, 448, 8, 6)
    torch.testing.assert_close(found, expected)


def test_finer_maps_are_averaged_down_to_the_last_one() -> None:
    torch.manual_seed(0)
    settings = AffinityNetSettings(backbone=RESNET.model_copy(update={"output_stride": 16}))
    net = build_affinity_net(settings).eval()
    images = torch.randint(0, 256, (1, 3, 64, 32), dtype=torch.uint8)
    with torch.inference_mode():
        maps = net.taps(net.backbone.normalise(images))
        assert [tuple(tap.shape[2:]) for tap in maps] == [(8, 4), (4, 2), (4, 2)]
        narrow = F.elu(net.narrow[0](F.avg_pool2d(maps[0], 2)))
        rest = [F.elu(net.narrow[index](maps[index])) for index in (1, 2)]
        torch.testing.assert_close(net(images), F.elu(net.mix(torch.cat([narrow, *rest], dim=1))))


def test_new_layers_start_as_the_authors_do() -> None:
    torch.manual_seed(0)
    net = build_affinity_net(AffinityNetSettings(backbone=RESNET))
    for layer, channels in zip(net.narrow, (128, 256, 512), strict=True):
        assert layer.bias is None
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / channels), rel=0.05)
    bound = 4 * math.sqrt(6 / (448 + 448))
    assert net.mix.bias is None
    assert 0.99 * bound < float(net.mix.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:mobilenetv2_050", "timm:convnext_atto"])
def test_every_trained_parameter_gets_a_gradient_and_a_group_once(name: str) -> None:
    """Or data-parallel training would wait for it."""
    backbone = BackboneSettings(name=name, output_stride=16, weights="none")
    net = build_affinity_net(AffinityNetSettings(backbone=backbone))
    net(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).square().sum().backward()
    assert [key for key, parameter in net.named_parameters() if parameter.grad is None] == []
    grouped = [id(parameter) for group in net.parameter_groups() for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in net.parameters())
    factors = {group["lr_factor"] for group in net.parameter_groups() for p in group["params"] if p is net.mix.weight}
    assert factors == {10.0}


def test_taps_leave_the_network_as_it_was() -> None:
    backbone, _ = build_backbone(RESNET)
    backbone.train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    taps = BackboneTaps(backbone, 3)
    assert taps.channels == (128, 256, 512)
    assert all(module.training for module in backbone.modules())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())


class _Own(nn.Module):
    """A network that has its maps itself, as ResNet-38 does."""

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.num_maps = num_maps
        self.convolution = nn.Conv2d(3, 6, 3, stride=8, padding=1)

    def taps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [self.convolution(pixels) * (index + 1) for index in range(self.num_maps)]


def test_a_network_with_maps_of_its_own_is_asked_for_them() -> None:
    backbone, _ = build_backbone(RESNET)
    backbone.net = _Own(3)
    net = AffinityNet(backbone, AffinityNetSettings(backbone=RESNET))
    assert net.taps.channels == (6, 6, 6)
    assert net(torch.zeros(1, 3, 32, 40)).shape == (1, 448, 4, 5)
    backbone.net = _Own(2)
    with pytest.raises(ValueError, match=r"gives 2 maps of \(N, D, h, w\), expected 3 or more; take one such as"):
        AffinityNet(backbone, AffinityNetSettings(backbone=RESNET))


@pytest.mark.parametrize(
    ("name", "channels", "cells"),
    [
        ("subcat:resnet38d", (512, 1024, 4096), (8, 12)),
        ("subcat:resnet101-caffe", (512, 1024, 2048), (9, 13)),  # its max-pool rounds up
    ],
)
def test_the_published_networks_have_the_published_heads(
    name: str, channels: tuple[int, ...], cells: tuple[int, int]
) -> None:
    with torch.device("meta"):
        net = build_affinity_net(
            AffinityNetSettings(backbone=BackboneSettings(name=name, output_stride=8, weights="none"))
        )
        assert net.taps.channels == channels
        assert tuple(net(torch.zeros(1, 3, 64, 96)).shape) == (1, 448, *cells)
