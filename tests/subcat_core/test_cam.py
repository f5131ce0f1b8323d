"""CAMs against a slow plain version of the authors' code, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import Backbone, BackboneSettings, build_backbone
from subcat_core.cam import (
    CamSettings,
    cam_to_labels,
    compute_cam,
    compute_cams,
    normalise_cam,
    softmax_cam,
    upsample_cam,
)
from subcat_core.classifier import Classifier
from subcat_core.views import resize_batch

CPU = torch.device("cpu")


class Identity(Backbone):
    """The pixels themselves as features, at output stride 1: maps can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "torchvision:resnet18", num_features=3, output_stride=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(3)
    backbone, _ = build_backbone(BackboneSettings(name="torchvision:resnet18", output_stride=16, weights="none"))
    return Classifier(backbone, num_classes=5, num_clusters=0).eval()


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth structure rather than noise, so that maps differ from place to place."""
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 5, 6)).astype(np.float32))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return smooth[0].permute(1, 2, 0).numpy().astype(np.uint8)


@torch.inference_mode()
def plain_cam(classifier: Classifier, image: np.ndarray, present: list[int], settings: CamSettings) -> np.ndarray:
    """method.md section 8: every view alone, all classes, up to the grid, times the labels, flipped back, summed."""
    height, width = image.shape[:2]
    grid = (math.ceil(height / settings.grid_stride_px), math.ceil(width / settings.grid_stride_px))
    labels = torch.zeros(classifier.num_classes)
    labels[present] = 1
    total = np.zeros((classifier.num_classes, *grid), np.float64)
    for scale in settings.scales:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        view = resize_batch(pixels, round(height * scale), round(width * scale))
        for flipped in (False, True) if settings.flip else (False,):
            seen = torch.flip(view, [3]) if flipped else view
            maps = F.relu(F.conv2d(classifier.backbone(seen), classifier.parent_head.weight[:, :, None, None]))
            maps = F.interpolate(maps, grid, mode="bilinear", align_corners=False)[0] * labels[:, None, None]
            total += (torch.flip(maps, [2]) if flipped else maps).numpy()
    return np.stack([total[c] / (total[c].max() + 1e-5) for c in present])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("size", [(75, 100), (64, 64), (50, 37)])
def test_agrees_with_the_plain_version(
    classifier: Classifier, rng: np.random.Generator, size: tuple[int, int], flip: bool
) -> None:
    settings = CamSettings(scales=(1.0, 0.5, 1.5, 2.0), flip=flip)
    image, present = photo(rng, *size), [3, 0, 4]
    expected = plain_cam(classifier, image, present, settings)
    assert expected.max() > 0.9
    cam = compute_cam(classifier, image, present, settings, CPU)
    assert cam.shape == (3, math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert cam.dtype == np.float32
    assert np.abs(cam - expected).max() <= 5e-5  # float32 convolutions: other batch sizes round otherwise


def test_batches_of_mixed_sizes_agree_with_single_images(classifier: Classifier, rng: np.random.Generator) -> None:
    sizes = [(48, 64), (64, 48), (48, 64), (48, 64)]
    images = [photo(rng, *size) for size in sizes]
    present = [[0], [1, 2], [], [4, 0]]
    settings = CamSettings(scales=(1.0, 0.75), pass_px=2 * 2 * 48 * 64)
    together = [cam.maps for cam in compute_cams(classifier, images, present, settings, CPU)]
    for image, classes, cam in zip(images, present, together, strict=True):
        assert cam.shape == (len(classes), image.shape[0] // 4, image.shape[1] // 4)
        np.testing.assert_allclose(cam, compute_cam(classifier, image, classes, settings, CPU), atol=5e-5)


def test_by_hand() -> None:
    model = Classifier(Identity(), num_classes=2, num_clusters=0).eval()
    with torch.no_grad():
        model.parent_head.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, -1.0]]))
    image = np.zeros((1, 3, 3), np.uint8)
    image[0, :, 0] = [0, 50, 100]  # class 0 sees red
    image[0, :, 1] = [10, 40, 60]  # class 1 sees green - blue
    image[0, :, 2] = [30, 20, 20]
    settings = CamSettings(scales=(1.0,), flip=True, grid_stride_px=1)
    cam = compute_cam(model, image, [1, 0], settings, CPU)
    np.testing.assert_allclose(cam, [[[0, 0.5, 1.0]], [[0, 0.5, 1.0]]], atol=1e-6)
    constant = compute_cam(model, np.full((2, 2, 3), 7, np.uint8), [1], settings, CPU)
    np.testing.assert_array_equal(constant, np.zeros((1, 2, 2)))


def test_normalise_by_hand() -> None:
    cam = np.array([[[0.0, 3.0]], [[0.0, 0.0]], [[1e-5, 0.0]]], np.float32)
    np.testing.assert_allclose(normalise_cam(cam)[:, 0], [[0, 3 / 3.00001], [0, 0], [0.5, 0]], rtol=1e-6)
    np.testing.assert_array_equal(cam[0, 0], [0.0, 3.0])  # not in place


def test_only_present_classes_are_computed(
    classifier: Classifier, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    plain = Classifier.parent_maps

    def spy(self: Classifier, images: torch.Tensor, class_indices: list[int], *, relu: bool) -> torch.Tensor:
        assert relu
        asked.append(list(class_indices))
        return plain(self, images, class_indices)

    monkeypatch.setattr(Classifier, "parent_maps", spy)
    image = photo(rng, 32, 32)
    compute_cams(classifier, [image, image, image], [[4], [1, 4], []], CamSettings(scales=(1.0, 0.5)), CPU)
    assert asked == [[1, 4], [1, 4]]  # one pass a scale, two of the five classes
    asked.clear()
    assert compute_cam(classifier, image, [], CamSettings(), CPU).shape == (0, 8, 8)
    assert asked == []


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_tiny_images(classifier: Classifier, size: tuple[int, int]) -> None:
    cam = compute_cam(classifier, np.full((*size, 3), 200, np.uint8), [0, 1], CamSettings(), CPU)
    assert cam.shape == (2, 1, math.ceil(size[1] / 4))
    assert np.isfinite(cam).all()


def test_base_px_and_max_px_bound_the_views(classifier: Classifier, rng: np.random.Generator) -> None:
    image = photo(rng, 96, 128)
    small = resize_batch(torch.from_numpy(image).permute(2, 0, 1)[None], 48, 64)[0].permute(1, 2, 0).numpy()
    expected = plain_cam(classifier, small, [1], CamSettings(scales=(1.0,), grid_stride_px=2))
    for limit in ({"base_px": 48}, {"max_px": 64, "grid_stride_px": 2}):  # the grid follows max_px alone
        settings = CamSettings(scales=(1.0,), **limit)
        np.testing.assert_allclose(compute_cam(classifier, image, [1], settings, CPU), expected, atol=5e-5)


def test_bf16_is_close(classifier: Classifier, rng: np.random.Generator) -> None:
    image = photo(rng, 64, 64)
    exact = compute_cam(classifier, image, [0, 1], CamSettings(), CPU)
    rough = compute_cam(classifier, image, [0, 1], CamSettings(bf16=True), CPU)
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).mean() < 0.05


def test_refuses(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="got 1 images and class_indices for 2"):
        compute_cams(classifier, [np.zeros((8, 8, 3), np.uint8)], [[0], [1]], CamSettings(), CPU)
    classifier.train()
    with pytest.raises(ValueError, match="training mode"):
        compute_cam(classifier, np.zeros((8, 8, 3), np.uint8), [0], CamSettings(), CPU)
    classifier.eval()


def test_upsample_by_hand() -> None:
    cam = np.array([[[0.0, 1.0]]], np.float32)
    np.testing.assert_allclose(upsample_cam(cam, 1, 4), [[[0, 0.25, 0.75, 1]]])
    assert upsample_cam(np.zeros((0, 2, 2), np.float32), 4, 6).shape == (0, 4, 6)
    assert upsample_cam(cam.astype(np.float16), 2, 2).dtype == np.float32


def test_labels_by_hand() -> None:
    cam = np.array([[[0.1, 0.6, 0.15, 0.4]], [[0.05, 0.7, 0.1, 0.4]]], np.float32)
    labels = cam_to_labels(cam, [4, 1], 0.15)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, [[0, 2, 0, 5]])  # class ids are class_index + 1; 0.15 does not exceed 0.15
    np.testing.assert_array_equal(cam_to_labels(np.zeros((0, 1, 2), np.float32), [], 0.2), [[0, 0]])


def test_softmax_by_hand() -> None:
    cam = np.log(np.array([[[1.0, 2.0]], [[3.0, 2.0]]], np.float32))
    np.testing.assert_allclose(softmax_cam(cam), [[[0.25, 0.5]], [[0.75, 0.5]]], rtol=1e-6)
    np.testing.assert_array_equal(softmax_cam(cam[:1] - 1000), np.ones((1, 1, 2)))
    assert softmax_cam(np.zeros((0, 3, 4), np.float32)).shape == (0, 3, 4)


@torch.inference_mode()
@pytest.mark.parametrize("flip", [True, False])
def test_softmax_maps_agree_with_the_plain_version(
    classifier: Classifier, rng: np.random.Generator, flip: bool
) -> None:
    """The GlaS protocol: raw maps are summed over the views, without ReLU, and their largest one is the class."""
    settings = CamSettings(scales=(1.0, 1.25, 2.0), flip=flip, normalise="softmax")
    image, present = photo(rng, 48, 64), [3, 0]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    total = torch.zeros(5, 12, 16, dtype=torch.float64)
    for scale in settings.scales:
        view = resize_batch(pixels, round(48 * scale), round(64 * scale))
        for flipped in (False, True) if flip else (False,):
            seen = view.flip(3) if flipped else view
            maps = F.conv2d(classifier.backbone(seen), classifier.parent_head.weight[:, :, None, None])
            maps = F.interpolate(maps, (12, 16), mode="bilinear", align_corners=False)[0].double()
            total += maps.flip(2) if flipped else maps
    assert (total < 0).any()
    expected = (total[present] / (3 * (1 + flip))).softmax(dim=0).numpy()
    found = compute_cam(classifier, image, present, settings, CPU)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    clear = np.abs(expected[0] - expected[1]) > 1e-4
    np.testing.assert_array_equal(found.argmax(axis=0)[clear], total[present].argmax(dim=0).numpy()[clear])
