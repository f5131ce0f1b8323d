"""ResNet-38d: the published table, the block equations in float64, the taps and freezing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import Backbone, BackboneSettings, build_backbone, input_statistics, split_name
from subcat_core.classifier import Classifier
from subcat_core.freezing import freeze_batch_norm
from subcat_core.resnet38 import BasicBlock, Bottleneck, ResNet38d
from tests.subcat_core.resnet38_table import BASIC, BOTTLENECKS, NAME, PROJECTED, build_on_meta, shake


def plain_norm(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return torch.clamp_min((x - mean) / torch.sqrt(var + 1e-5) * weight + bias, 0)


def plain_basic(
    x: torch.Tensor, state: dict[str, torch.Tensor], name: str, stride: int, first: int, dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block and its pre-activated input, by the definition."""
    active = plain_norm(x, state, f"{name}.bn_branch2a")
    y = F.conv2d(active, state[f"{name}.conv_branch2a.weight"], stride=stride, padding=first, dilation=first)
    y = plain_norm(y, state, f"{name}.bn_branch2b1")
    y = F.conv2d(y, state[f"{name}.conv_branch2b1.weight"], padding=dilation, dilation=dilation)
    if f"{name}.conv_branch1.weight" in state:
        x = F.conv2d(active, state[f"{name}.conv_branch1.weight"], stride=stride)
    return x + y, active


def plain_bottleneck(
    x: torch.Tensor, state: dict[str, torch.Tensor], name: str, dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    active = plain_norm(x, state, f"{name}.bn_branch2a")
    y = plain_norm(F.conv2d(active, state[f"{name}.conv_branch2a.weight"]), state, f"{name}.bn_branch2b1")
    y = F.conv2d(y, state[f"{name}.conv_branch2b1.weight"], padding=dilation, dilation=dilation)
    y = F.conv2d(plain_norm(y, state, f"{name}.bn_branch2b2"), state[f"{name}.conv_branch2b2.weight"])
    return F.conv2d(active, state[f"{name}.conv_branch1.weight"]) + y, active


@pytest.mark.parametrize(
    ("channels", "stride", "first", "dilation"),
    [((4, 6, 6), 2, 1, 1), ((6, 6, 6), 1, 1, 1), ((4, 6, 8), 1, 1, 2), ((8, 6, 8), 1, 2, 2), ((6, 5, 6), 2, 1, 1)],
)
def test_basic_block_is_its_equation(channels: tuple[int, int, int], stride: int, first: int, dilation: int) -> None:
    torch.manual_seed(0)
    block = BasicBlock(*channels, stride, first, dilation).double().eval()
    shake(block)
    x = torch.randn(2, channels[0], 9, 7, dtype=torch.float64)
    state = {f"b.{name}": tensor for name, tensor in block.state_dict().items()}
    before = x.clone()
    with torch.no_grad():
        expected, _ = plain_basic(x, state, "b", stride, first, dilation)
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_bottleneck_is_its_equation() -> None:
    torch.manual_seed(0)
    block = Bottleneck(6, 8, dilation=4, dropout=0.5).double().eval()
    shake(block)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    state = {f"b.{name}": tensor for name, tensor in block.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain_bottleneck(x, state, "b", 4)[0], rtol=1e-12, atol=1e-12)


def test_bottleneck_drops_whole_channels_twice() -> None:
    torch.manual_seed(0)
    block = Bottleneck(64, 512, dilation=1, dropout=0.5)
    freeze_batch_norm(block)
    shake(block)
    seen = []
    for layer in (block.conv_branch2b1, block.conv_branch2b2):
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    x = torch.randn(1, 64, 4, 4)
    block.train()(x)
    block.eval()(x)
    for dropped, whole in ((seen[0], seen[2]), (seen[1], seen[3])):
        lost = (dropped == 0).all(dim=(2, 3))[0] & (whole != 0).any(dim=(2, 3))[0]
        assert 0.3 < lost.float().mean() < 0.7
    torch.testing.assert_close(seen[0], 2 * seen[2] * (seen[0] != 0))  # 1 / (1 - 0.5)
    rates = [layer.p for layer in build_on_meta().net.modules() if isinstance(layer, nn.Dropout2d)]
    assert rates == [0.3, 0.3, 0.5, 0.5]


def test_parameters_strides_and_dilations_are_those_of_the_table() -> None:
    net = build_on_meta().net

    def count(name: str) -> int:
        return sum(parameter.numel() for parameter in net.get_submodule(name).parameters())

    blocks = [*((row[0], row[-1]) for row in BASIC), *((row[0], row[-1]) for row in BOTTLENECKS)]
    expected = {"conv1a": 1_728, **dict(blocks), "bn7": 8_192, "relu7": 0}
    assert {name: count(name) for name, _ in net.named_children()} == expected
    for name, _, _, _, stride, first, dilation, _ in BASIC:
        block = net.get_submodule(name)
        assert (block.conv_branch2a.stride[0], block.conv_branch2a.dilation[0]) == (stride, first)
        assert (block.conv_branch2b1.stride[0], block.conv_branch2b1.dilation[0]) == (1, dilation)
    for name, _, _, dilation, _ in BOTTLENECKS:
        assert net.get_submodule(name).conv_branch2b1.dilation[0] == dilation
    assert {name for name, child in net.named_children() if getattr(child, "conv_branch1", None)} == set(PROJECTED)


def test_with_both_heads_it_has_the_published_size() -> None:
    model = Classifier(build_on_meta(), num_classes=20, num_clusters=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 105_972_032
    assert len(model.state_dict()) == 230
    assert (model.backbone.num_features, model.backbone.output_stride) == (4096, 8)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (321, 321), (448, 448), (375, 500), (8, 9), (1, 17)])
def test_all_maps_have_stride_8(height: int, width: int) -> None:
    net = build_on_meta().net.eval()
    assert isinstance(net, ResNet38d)
    shapes = [tuple(tap.shape) for tap in net.taps(torch.zeros(2, 3, height, width, device="meta"))]
    assert shapes == [(2, channels, -(-height // 8), -(-width // 8)) for channels in (512, 1024, 4096)]


def test_whole_network_taps_and_middle_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    net = ResNet38d().eval()
    shake(net)
    backbone = Backbone(net, NAME, 4096, 8).double()
    images = torch.randint(0, 256, (1, 3, 25, 17), dtype=torch.uint8)
    with torch.inference_mode():
        pixels = backbone.normalise(images)
        state = net.state_dict()
        x, active = F.conv2d(pixels, state["conv1a.weight"], padding=1), {}
        for name, _, _, _, stride, first, dilation, _ in BASIC:
            x, active[name] = plain_basic(x, state, name, stride, first, dilation)
        for name, _, _, dilation, _ in BOTTLENECKS:
            x, active[name] = plain_bottleneck(x, state, name, dilation)
        conv6 = plain_norm(x, state, "bn7")
        features, middle = backbone.forward_with_middle(images)
        taps = net.taps(pixels)
    assert features.shape == (1, 4096, 4, 3)
    for found, expected in [
        (features, conv6),
        (taps.conv6, conv6),
        (taps.conv5, active["b6"]),
        (taps.conv4, active["b5"]),
        (middle, active["b6"]),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_input_is_normalised_as_published() -> None:
    mean, std = input_statistics(NAME)
    assert np.allclose(np.array(mean) / 255, (0.485, 0.456, 0.406))
    assert np.allclose(np.array(std) / 255, (0.229, 0.224, 0.225))


def test_one_frozen_stage_is_the_papers() -> None:
    backbone = build_on_meta(frozen_stages=1)
    frozen = {name.split(".")[0] for name, item in backbone.net.named_parameters() if not item.requires_grad}
    assert frozen == {"conv1a", "b2", "b2_1", "b2_2"}
    freeze_batch_norm(backbone)
    groups = Classifier(backbone, 20, 10).parameter_groups()
    assert [round(sum(item.numel() for item in group["params"]) / 1e6, 2) for group in groups] == [104.20, 0.90]
    last = build_on_meta(frozen_stages=6).net
    assert not any(parameter.requires_grad for parameter in last.parameters())
    with pytest.raises(ValueError, match="the backbone has 6 stages"):
        build_on_meta(frozen_stages=7)


def test_what_it_does_not_offer_is_said() -> None:
    with pytest.raises(ValueError, match="output_stride = 16: subcat:resnet38d has stride 8 only; give that"):
        BackboneSettings(name=NAME)
    settings = BackboneSettings(name=NAME, output_stride=8, weights="none")
    with pytest.raises(ValueError, match="output_stride = 32: subcat:resnet38d has stride 8 only"):
        build_backbone(settings.model_copy(update={"output_stride": 32}))
    with pytest.raises(ValueError, match="not published for subcat:resnet38d; give a file's path or URI"):
        build_on_meta(weights="enum:A1")
    with pytest.raises(ValueError, match="not known to subcat; near names: subcat:resnet38d"):
        split_name("subcat:resnet38")
