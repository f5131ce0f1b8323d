"""Caffe's ResNet-101: published names and sizes, the stride on the first 1x1, BGR input, and published files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subcat_core import caffe_resnet
from subcat_core.backbones import (
    BackboneSettings,
    InputNormalisation,
    build_backbone,
    hub_state,
    input_statistics,
    split_name,
    takes_bgr,
)
from subcat_core.caffe_resnet import Bottleneck, CaffeResNet101, Stem
from subcat_core.multi_scale import maximum_logits
from subcat_core.segmenter import SegmenterSettings, build_segmenter

NAME = "subcat:resnet101-caffe"


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network with one block a stage, or two: quick, and of the same kinds of layers."""
    monkeypatch.setattr(caffe_resnet, "_NUM_BLOCKS", (1, 1, 2, 1))


def shake_batch_norm(module: nn.Module) -> None:
    """Statistics of a trained network, not the 0 and 1 that hide mistakes."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.weight, layer.bias):
                tensor.data.normal_(std=0.3)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def published_names(num_blocks: tuple[int, ...] = (3, 4, 23, 3)) -> set[str]:
    """Entries of deeplab-pytorch's files, without their "base."."""
    units = ["layer1.conv1"]
    for layer, count in enumerate(num_blocks, 2):
        units += [f"layer{layer}.block1.shortcut"]
        for block in range(1, count + 1):
            units += [f"layer{layer}.block{block}.{part}" for part in ("reduce", "conv3x3", "increase")]
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{unit}.conv.weight" for unit in units} | {f"{unit}.bn.{kind}" for unit in units for kind in of_norm}
    return names | {f"aspp.c{branch}.{kind}" for branch in range(4) for kind in ("weight", "bias")}


def test_names_and_parameters_are_the_published_ones() -> None:
    with torch.device("meta"):
        model, _ = build_segmenter(
            SegmenterSettings(backbone=BackboneSettings(name=NAME, output_stride=8, weights="none")), 20
        )
    own = {name.removeprefix("backbone.net.").replace("aspp.branches.", "aspp.c") for name in model.state_dict()}
    assert own == published_names()
    assert len(own) == 632
    sizes = [sum(item.numel() for item in part.parameters()) for part in (model, *model.heads())]
    assert [round(size / 1e6, 2) for size in sizes] == [44.05, 1.55]


def test_sizes_at_the_published_crop() -> None:
    with torch.device("meta"):
        model, _ = build_segmenter(
            SegmenterSettings(backbone=BackboneSettings(name=NAME, output_stride=8, weights="none")), 20
        )
        logits = model(torch.zeros(1, 3, 321, 321), (1.0, 0.5, 0.75))
    assert [tuple(item.shape[1:]) for item in [*logits, maximum_logits(logits)]] == [
        (21, side, side) for side in (41, 21, 31, 41)
    ]


def test_dilations_are_the_published_ones() -> None:
    with torch.device("meta"):
        net = CaffeResNet101(8)
    dilations = {
        name.split(".")[0]: layer.dilation[0]
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    }
    assert dilations == {"layer2": 1, "layer3": 1, "layer4": 2, "layer5": 4}
    strided = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    assert strided == ["layer1.conv1.conv", "layer3.block1.reduce.conv", "layer3.block1.shortcut.conv"]


def plain_unit(unit: nn.Module, features: torch.Tensor, **options: int) -> torch.Tensor:
    """Convolution and batch norm written out."""
    conv, norm = unit.conv, unit.bn
    made = F.conv2d(features, conv.weight, **options)  # type: ignore[union-attr, arg-type]
    mean, var, weight, bias = (
        tensor.view(1, -1, 1, 1)  # type: ignore[operator]
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)  # type: ignore[union-attr]
    )
    return (made - mean) / (var + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize(("stride", "dilation", "project"), [(2, 1, True), (1, 4, True), (1, 2, False)])
def test_block_agrees_with_the_plain_version(stride: int, dilation: int, project: bool) -> None:
    torch.manual_seed(0)
    block = Bottleneck(6 if project else 8, 8, stride, dilation, project).double().eval()
    shake_batch_norm(block)
    features = torch.randn(2, 6 if project else 8, 11, 14, dtype=torch.float64)
    with torch.inference_mode():
        thinned = features[:, :, ::stride, ::stride]  # what the strided 1x1 sees
        inner = plain_unit(block.reduce, thinned).relu()
        inner = plain_unit(block.conv3x3, inner, padding=dilation, dilation=dilation).relu()
        shortcut = plain_unit(block.shortcut, thinned) if project else features
        expected = (plain_unit(block.increase, inner) + shortcut).relu()
        torch.testing.assert_close(block(features), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("side", "expected"), [(321, 81), (240, 61), (160, 41), (5, 2), (1, 1)])
def test_stem_rounds_its_size_up(side: int, expected: int) -> None:
    with torch.inference_mode():
        assert Stem().eval()(torch.zeros(1, 3, side, side)).shape == (1, 64, expected, expected)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("output_stride", [16, 32])
def test_other_strides_are_the_same_function_on_a_coarser_grid(output_stride: int) -> None:
    torch.manual_seed(0)
    fine, coarse = CaffeResNet101(8).double().eval(), CaffeResNet101(output_stride).double().eval()
    shake_batch_norm(fine)
    coarse.load_state_dict(fine.state_dict())
    images = torch.randn(1, 3, 97, 65, dtype=torch.float64)
    step = output_stride // 8
    with torch.inference_mode():
        torch.testing.assert_close(coarse(images), fine(images)[:, :, ::step, ::step], rtol=1e-9, atol=1e-9)


def test_input_is_bgr_minus_the_mean() -> None:
    normalise = InputNormalisation(*input_statistics(NAME), bgr=takes_bgr(NAME))
    pixel = torch.tensor([255, 0, 127], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [127 - 104.008, 0 - 116.669, 255 - 122.675]
    assert normalise(pixel).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert not takes_bgr("torchvision:resnet50")


@pytest.mark.usefixtures("few_blocks")
def test_a_published_file_goes_in_whatever_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = CaffeResNet101(8)
    shake_batch_norm(net)
    head = {f"aspp.c{branch}.bias": torch.zeros(21) for branch in range(4)}
    published = {f"base.{name}": tensor for name, tensor in {**net.state_dict(), **head}.items()}
    torch.save(published, tmp_path / "vocaug.pth")
    settings = BackboneSettings(name=NAME, output_stride=8, weights=str(tmp_path / "vocaug.pth"), frozen_stages=1)
    backbone, report = build_backbone(settings)
    assert (report.num_loaded, report.unexpected) == (len(net.state_dict()), tuple(head))
    assert backbone.num_features == 2048
    frozen = {name.split(".")[0] for name, item in backbone.net.named_parameters() if not item.requires_grad}
    assert frozen == {"layer1", "layer2"}
    images = torch.randint(0, 256, (1, 3, 65, 49), dtype=torch.uint8)
    blue_first = images.flip(1).float() - torch.tensor([104.008, 116.669, 122.675]).view(1, 3, 1, 1)
    with torch.inference_mode():
        features, middle = backbone.eval().forward_with_middle(images)
        torch.testing.assert_close(features, net.eval()(blue_first))
    assert (features.shape, middle.shape) == ((1, 2048, 9, 7), (1, 1024, 9, 7))


def test_names_that_are_unknown() -> None:
    with pytest.raises(ValueError, match="not known to subcat; near names: subcat:resnet101-caffe"):
        split_name("subcat:resnet101")
    with pytest.raises(ValueError, match="not published for subcat:resnet101-caffe; give a file's path"):
        hub_state(NAME, "IMAGENET1K_V1")
