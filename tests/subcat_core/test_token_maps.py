"""Transformers as backbones: timm's own tokens on a grid, at any size, through the real loading path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from subcat_core.backbones import BackboneSettings, OutputStride, build_backbone
from subcat_core.cam import CamSettings, compute_cam
from subcat_core.classifier import Classifier
from subcat_core.macs import count_macs
from subcat_core.segmenter import SegmenterSettings, build_segmenter

SMALL = "timm:test_vit"  # timm's own toy: patches of 16 px, 64 channels, 2 heads


def build(name: str, output_stride: OutputStride = 16, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_backbone(BackboneSettings(name=name, output_stride=output_stride, weights="none", **options))[0].eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "stride"), [(SMALL, 16), ("timm:vit_small_patch14_reg4_dinov2", 14)])
def test_the_map_holds_timms_patch_tokens_in_order(name: str, stride: OutputStride) -> None:
    backbone = build(name, stride)
    vit = backbone.net.vit
    pixels = torch.randn(1, 3, 3 * stride, 2 * stride)
    tokens = vit.forward_features(pixels)[:, vit.num_prefix_tokens :]
    features = backbone.net(pixels)
    assert features.shape == (1, vit.num_features, 3, 2)
    for row in range(3):
        for column in range(2):
            torch.testing.assert_close(features[0, :, row, column], tokens[0, 2 * row + column], atol=1e-6, rtol=0)


@torch.no_grad()
def test_registers_and_the_class_token_are_no_cells() -> None:
    vit = build("timm:vit_small_patch14_reg4_dinov2", 14).net.vit
    assert vit.num_prefix_tokens == 5
    assert vit.forward_features(torch.zeros(1, 3, 28, 28)).shape == (1, 5 + 4, 384)


@torch.no_grad()
@pytest.mark.parametrize(("size", "cells"), [((16, 16), (1, 1)), ((17, 48), (2, 3)), ((100, 65), (7, 5))])
def test_any_size_is_padded_to_whole_patches(size: tuple[int, int], cells: tuple[int, int]) -> None:
    assert build(SMALL)(torch.zeros(2, 3, *size)).shape == (2, 64, *cells)


@torch.no_grad()
def test_padding_is_of_zeros_after_normalisation_on_both_sides() -> None:
    backbone = build(SMALL)
    pixels = torch.randn(1, 3, 20, 29)
    padded = torch.zeros(1, 3, 32, 32)
    padded[:, :, 6:26, 1:30] = pixels  # 12 rows and 3 columns to add
    torch.testing.assert_close(backbone.net(pixels), backbone.net(padded), atol=0, rtol=0)


def test_a_file_of_timms_own_tensors_loads_whole(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model("test_vit", num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    settings = BackboneSettings(name=SMALL, weights=str(tmp_path / "vit.pth"), frozen_stages=1)
    backbone, report = build_backbone(settings)
    assert report.missing == ()
    assert report.unexpected == ("head.weight", "head.bias")
    with torch.no_grad():
        pixels = torch.randn(1, 3, 160, 160)
        expected = whole.eval().forward_features(pixels)[:, 1:].transpose(1, 2).reshape(1, 64, 10, 10)
        torch.testing.assert_close(backbone.eval().net(pixels), expected, atol=1e-5, rtol=0)
    trained = {name for name, parameter in backbone.net.vit.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("patch_embed", "pos_embed", "cls_token", "blocks.0.")) for name in trained)
    assert any(name.startswith("blocks.1.") for name in trained)

    torch.save({**whole.state_dict(), "blocks.9.norm1.weight": torch.zeros(64)}, tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match=r"another architecture.*1 unexpected \(blocks\.9\.norm1\.weight\)"):
        build_backbone(BackboneSettings(name=SMALL, weights=str(tmp_path / "deeper.pth")))


def test_maps_and_masks_come_from_tokens() -> None:
    classifier = Classifier(build(SMALL), 3, 0).eval()
    image = torch.randint(0, 255, (40, 56, 3), dtype=torch.uint8).numpy()
    cam = compute_cam(classifier, image, [0, 2], CamSettings(scales=(1.0,), affinity={}))  # type: ignore[arg-type]
    assert cam.shape == (2, 10, 14)
    settings = SegmenterSettings(backbone=BackboneSettings(name=SMALL, weights="none"))
    segmenter, _ = build_segmenter(settings, 3)
    logits = segmenter(torch.zeros(1, 3, 33, 64))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (1, 4, 3, 4)
    logits.sum().backward()


def test_multiply_adds_by_hand() -> None:
    with torch.device("meta"):
        backbone = build(SMALL)
    vit = backbone.net.vit
    depth, wide, hidden = len(vit.blocks), vit.num_features, vit.blocks[0].mlp.fc1.out_features
    tokens = 4 * 6 + vit.num_prefix_tokens
    linear = tokens * wide * (3 * wide + wide + 2 * hidden)  # qkv, projection, two layers of the MLP
    attention = 2 * tokens * tokens * wide  # queries by keys, weights by values
    assert count_macs(backbone, 64, 96) == depth * (linear + attention) + 4 * 6 * wide * 3 * 16 * 16


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="output_stride = 16: timm:vit_small_patch14_dinov2 has stride 14 only"):
        BackboneSettings(name="timm:vit_small_patch14_dinov2", output_stride=16)
    with pytest.raises(ValueError, match="for timm:resnet18 give 8, 16 or 32"):
        BackboneSettings(name="timm:resnet18", output_stride=14)
    plus = SegmenterSettings(architecture="deeplabv3plus", backbone=BackboneSettings(name=SMALL, weights="none"))
    with pytest.raises(ValueError, match="deeplabv3plus"):
        build_segmenter(plus, 3)
