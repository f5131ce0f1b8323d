"""Scores after the walk: the released inference steps, written plainly with the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subcat_core.affinity_net import AffinityNetSettings, build_affinity_net
from subcat_core.affinity_walk import IrnWalkSettings, PsaWalkSettings, walk_by_boundaries, walk_by_features
from subcat_core.backbones import BackboneSettings
from subcat_core.cam import upsample_cam
from subcat_core.irn import IrnSettings, build_irn, straight_path
from tests.subcat_core.plain_affinity import all_pairs, dense_walk

RESNET = BackboneSettings(name="torchvision:resnet18", output_stride=8, weights="none")


@pytest.fixture
def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of 50 x 61 px, and two maps on a grid of 4 px."""
    return rng.integers(0, 256, (50, 61, 3)).astype(np.uint8), rng.random((2, 13, 16)).astype(np.float32)


@pytest.mark.parametrize("pad_border", [True, False])
def test_by_features_is_the_released_inference(pad_border: bool, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, cam = scene
    torch.manual_seed(0)
    net = build_affinity_net(AffinityNetSettings(backbone=RESNET, pad_border=pad_border)).eval()
    found = walk_by_features(net, cam, image, PsaWalkSettings())
    full = upsample_cam(cam, 50, 61).astype(np.float64)
    scores = np.concatenate([(1 - full.max(axis=0, keepdims=True)) ** 16, full])
    np.testing.assert_allclose(found.before, scores, atol=1e-5)
    with torch.inference_mode():
        features = net(torch.from_numpy(image).permute(2, 0, 1)[None])[0].double().numpy()
    assert features.shape[1:] == (7, 8)
    affinity = {
        (one, two): float(np.exp(-np.abs(features[:, *one] - features[:, *two]).mean()))
        for one, two in all_pairs(7, 8, 5, pad_border)
    }
    padded = np.pad(scores, ((0, 0), (0, 6), (0, 3)))
    cells = padded.reshape(3, 7, 8, 8, 8).mean(axis=(2, 4))
    walked = torch.from_numpy(dense_walk(cells, affinity, 8.0, 8))
    expected = F.interpolate(walked[None], (56, 64), mode="bilinear", align_corners=False)[0, :, :50, :61]
    np.testing.assert_allclose(found.after, expected, atol=1e-5)
    assert found.after.dtype == np.float32


def test_by_boundaries_is_the_released_inference(scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, cam = scene
    torch.manual_seed(0)
    net = build_irn(IrnSettings(backbone=RESNET)).eval()
    found = walk_by_boundaries(net, cam, image, IrnWalkSettings())
    with torch.inference_mode():
        edge = net.boundaries(torch.from_numpy(image).permute(2, 0, 1)[None])[0].double().numpy()
    assert edge.shape == cam.shape[1:]
    affinity = {}
    for one, two in all_pairs(13, 16, 5, pad_border=True):
        path = [edge[one[0] + y, one[1] + x] for y, x in straight_path((two[0] - one[0], two[1] - one[1]))]
        affinity[one, two] = 1 - max(path)
    walked = torch.from_numpy(dense_walk(cam * (1 - edge), affinity, 10.0, 8))
    fine = F.interpolate(walked[None], (52, 64), mode="bilinear", align_corners=False)[0, :, :50, :61].numpy()
    np.testing.assert_allclose(found.after[1:], fine / fine.max(), atol=1e-5)
    np.testing.assert_allclose(found.after[0], 0.25)
    np.testing.assert_allclose(found.before[1:], upsample_cam(cam, 50, 61))
    np.testing.assert_allclose(found.before[0], 0.25)


def test_large_images_walk_at_a_smaller_size_and_come_back(scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, cam = scene
    net = build_affinity_net(AffinityNetSettings(backbone=RESNET)).eval()
    found = walk_by_features(net, cam, image, PsaWalkSettings(max_px=32, log_steps=2))
    assert found.after.shape == found.before.shape == (3, 50, 61)
    irn = build_irn(IrnSettings(backbone=RESNET)).eval()
    found = walk_by_boundaries(irn, cam, image, IrnWalkSettings(max_px=32, log_steps=2))
    assert found.after.shape == found.before.shape == (3, 50, 61)


def test_what_cannot_walk_is_named(scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, cam = scene
    net = build_affinity_net(AffinityNetSettings(backbone=RESNET))
    with pytest.raises(ValueError, match=r"training mode; call net\.eval\(\) first"):
        walk_by_features(net, cam, image, PsaWalkSettings())
    with pytest.raises(ValueError, match="got no map; an image without present classes is background"):
        walk_by_features(net.eval(), cam[:0], image, PsaWalkSettings())
