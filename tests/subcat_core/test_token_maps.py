"""Transformers as backbones: timm's own tokens on a grid, at any size, through the real loading path."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import BackboneSettings, OutputStride, build_backbone
from subcat_core.cam import CamSettings, compute_cam
from subcat_core.classifier import Classifier
from subcat_core.macs import count_macs
from subcat_core.schedule import parameter_groups
from subcat_core.segmenter import SegmenterSettings, build_segmenter
from subcat_core.token_maps import NOT_NEEDED, TokenMaps, to_timm
from subcat_core.weights import LoadReport, load_weights

SMALL = "timm:test_vit"  # timm's own toy: patches of 16 px, 64 channels, 2 heads


def shake(net: nn.Module) -> nn.Module:
    """Weights of a trained network, not the zeros, ones and layer scales of 1e-5 that hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return net.eval()


def tiny_dinov2() -> nn.Module:
    """DINOv2's kind with registers, native to 28 px: 2 x 2 patches."""
    return shake(
        VisionTransformer(
            img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool="", reg_tokens=4,
            no_embed_class=True, init_values=1e-5, dynamic_img_size=True,
        )
    )  # fmt: skip


def tiny_dinov3(qkv_bias: bool = False) -> nn.Module:
    """DINOv3's kind: rotary positions, registers, no biases of queries, keys and values."""
    return shake(
        Eva(
            img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0, qkv_bias=qkv_bias,
            init_values=1e-5, num_reg_tokens=4, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3",
            rope_rotate_half=True, use_fc_norm=False, dynamic_img_size=True,
        )
    )  # fmt: skip


def plain_token_map(vit: nn.Module, padded: torch.Tensor) -> torch.Tensor:
    """Dosovitskiy et al. 2021, equations 1 to 4, with registers and layer scale; positions interpolated to the grid.

    padded: (1, 3, h * patch, w * patch) float64 -> (1, D, h, w).
    """
    state = {name: tensor.double() for name, tensor in vit.state_dict().items()}
    native_height, native_width = vit.patch_embed.grid_size  # type: ignore[union-attr, misc]
    cells = F.conv2d(padded, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=vit_patch(vit))
    height, width = cells.shape[2:]
    patches = cells[0].reshape(cells.shape[1], -1).T
    prefix = torch.cat([state[name][0] for name in ("cls_token", "reg_token") if name in state])
    of_prefix = 0 if vit.no_embed_class else len(prefix)
    positions = state["pos_embed"][0, of_prefix:].T.reshape(1, -1, native_height, native_width).float()
    positions = F.interpolate(positions, (height, width), mode="bicubic", antialias=True).double()
    patches = patches + positions[0].reshape(cells.shape[1], -1).T
    tokens = torch.cat([prefix + state["pos_embed"][0, :of_prefix] if of_prefix else prefix, patches])

    def layer(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, values: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(dim=1, keepdim=True)
        scaled = centred / (values.var(dim=1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    for index, block in enumerate(vit.blocks):  # type: ignore[arg-type]
        name = f"blocks.{index}"
        heads = layer(f"{name}.attn.qkv", norm(f"{name}.norm1", tokens)).chunk(3, dim=1)
        parts = []
        for q, k, v in zip(*(part.chunk(block.attn.num_heads, dim=1) for part in heads), strict=True):
            parts.append((q @ k.T / q.shape[1] ** 0.5).softmax(dim=1) @ v)
        seen = layer(f"{name}.attn.proj", torch.cat(parts, dim=1))
        tokens = tokens + seen * state.get(f"{name}.ls1.gamma", torch.ones(1))
        hidden = F.gelu(layer(f"{name}.mlp.fc1", norm(f"{name}.norm2", tokens)))
        tokens = tokens + layer(f"{name}.mlp.fc2", hidden) * state.get(f"{name}.ls2.gamma", torch.ones(1))
    return norm("norm", tokens)[len(prefix) :].T.reshape(1, -1, height, width)


def vit_patch(vit: nn.Module) -> int:
    return int(vit.patch_embed.patch_size[0])  # type: ignore[index, union-attr]


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


@pytest.mark.parametrize(("height", "width", "grid"), [(28, 28, (2, 2)), (30, 45, (3, 4)), (5, 56, (1, 4))])
def test_map_is_the_plain_equation_at_any_size(height: int, width: int, grid: tuple[int, int]) -> None:
    net = TokenMaps(tiny_dinov2().double())
    pixels = torch.randn(1, 3, height, width, dtype=torch.float64)
    padded = torch.zeros(1, 3, grid[0] * 14, grid[1] * 14, dtype=torch.float64)
    top, left = (grid[0] * 14 - height) // 2, (grid[1] * 14 - width) // 2
    padded[:, :, top : top + height, left : left + width] = pixels
    with torch.inference_mode():
        maps = net(pixels)
    assert maps.shape == (1, 32, *grid)
    torch.testing.assert_close(maps, plain_token_map(net.vit, padded), rtol=1e-6, atol=1e-6)


def test_class_token_with_a_position_of_its_own() -> None:
    vit = shake(timm.create_model("test_vit", num_classes=0)).double()
    pixels = torch.randn(1, 3, 48, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(TokenMaps(vit)(pixels), plain_token_map(vit, pixels), rtol=1e-6, atol=1e-6)


def load(net: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> LoadReport:
    torch.save(state, folder / "published.pth")
    convert = functools.partial(to_timm, net)
    return load_weights(net, str(folder / "published.pth"), convert=convert, allowed_unexpected=NOT_NEEDED)


def test_the_authors_file_of_dinov2(tmp_path: Path) -> None:
    """Registers by another name, class token and its position apart, a token of pre-training."""
    expected = tiny_dinov2().state_dict()
    published = {key: tensor.clone() for key, tensor in expected.items()}
    published["register_tokens"] = published.pop("reg_token")
    of_class = torch.randn(1, 1, 32)
    published["cls_token"] = published["cls_token"] - of_class
    published["pos_embed"] = torch.cat([of_class, published["pos_embed"]], dim=1)
    published["mask_token"] = torch.ones(1, 32)
    net = tiny_dinov2()
    nn.init.zeros_(net.get_parameter("blocks.1.mlp.fc2.weight"))
    report = load(net, published, tmp_path)
    assert (report.num_loaded, report.missing, report.unexpected) == (len(expected), (), ("mask_token",))
    torch.testing.assert_close(net.state_dict(), expected)


def test_the_authors_file_of_dinov3(tmp_path: Path) -> None:
    expected = tiny_dinov3().state_dict()
    published = {key.replace("gamma_", "ls"): tensor.clone() for key, tensor in expected.items()}
    for key in [key for key in published if key.endswith((".ls1", ".ls2"))]:
        published[f"{key}.gamma"] = published.pop(key)
    published["storage_tokens"] = published.pop("reg_token")
    published |= {"mask_token": torch.ones(1, 32), "rope_embed.periods": torch.ones(8)}
    for index in range(2):
        published[f"blocks.{index}.attn.qkv.bias"] = torch.zeros(96)
        published[f"blocks.{index}.attn.qkv.bias_mask"] = torch.ones(96)
    net = tiny_dinov3()
    nn.init.zeros_(net.get_parameter("blocks.1.mlp.fc2.weight"))
    report = load(net, published, tmp_path)
    assert (report.num_loaded, report.missing) == (len(expected), ())
    masks = tuple(f"blocks.{index}.attn.qkv.bias_mask" for index in range(2))
    assert sorted(report.unexpected) == sorted(("mask_token", "rope_embed.periods", *masks))
    torch.testing.assert_close(net.state_dict(), expected)
    published["blocks.1.attn.qkv.bias"][3] = 0.5
    with pytest.raises(ValueError, match=r"1 unexpected \(blocks\.1\.attn\.qkv\.bias\)"):
        load(net, published, tmp_path)
    assert TokenMaps(net)(torch.zeros(1, 3, 33, 16)).shape == (1, 32, 3, 1)


def test_positions_of_another_image_size_are_interpolated(tmp_path: Path) -> None:
    other = timm.create_model("test_vit", img_size=96)
    nn.init.constant_(other.get_parameter("pos_embed"), 0.3)
    torch.save(other.state_dict(), tmp_path / "vit.pt")
    backbone, report = build_backbone(BackboneSettings(name=SMALL, weights=str(tmp_path / "vit.pt")))
    positions = backbone.net.get_parameter("vit.pos_embed")
    assert positions.shape == (1, 1 + 10 * 10, 64)
    torch.testing.assert_close(positions, torch.full_like(positions, 0.3))
    assert report.missing == ()


def test_weights_of_other_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.pt"
    torch.save(timm.create_model("test_vit", patch_size=8).state_dict(), path)
    with pytest.raises(ValueError, match=r"of another shape \(patch_embed\.proj\.weight \(64, 3, 8, 8\), not"):
        build_backbone(BackboneSettings(name=SMALL, weights=str(path)))
    torch.save(timm.create_model("test_vit2").state_dict(), path)
    with pytest.raises(ValueError, match="belong to another architecture"):
        build_backbone(BackboneSettings(name=SMALL, weights=str(path)))
    torch.save({"pos_embed": torch.zeros(1, 7, 64), "conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 unexpected"):
        build_backbone(BackboneSettings(name=SMALL, weights=str(path)))


@pytest.mark.parametrize("name", ["timm:test_vit2", "timm:test_vit3"])
def test_every_parameter_learns(name: str) -> None:
    """Data-parallel training waits for the gradient of each."""
    backbone = build(name)
    backbone(torch.randn(1, 3, 33, 40) * 255).square().sum().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_biases_of_queries_and_values_are_biases() -> None:
    net = tiny_dinov3(qkv_bias=True)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    weights, biases = parameter_groups(net, [])
    assert {"blocks.0.attn.q_bias", "blocks.1.attn.v_bias"} <= {names[id(item)] for item in biases["params"]}
    assert not any(names[id(item)].endswith("bias") for item in weights["params"])
