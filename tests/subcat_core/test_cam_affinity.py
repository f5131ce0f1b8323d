"""Maps spread along feature affinity: by hand, against the plain loop, and what bounds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from subcat_core.backbones import BackboneSettings, build_backbone
from subcat_core.cam import CamSettings, compute_cams
from subcat_core.cam_affinity import AffinitySettings, feature_affinity, spread_maps
from subcat_core.classifier import Classifier


def plain_spread(maps: np.ndarray, features: np.ndarray, power: float, num_steps: int) -> np.ndarray:
    """The definition in float64, cell by cell."""
    num_classes, height, width = maps.shape
    cells = maps.reshape(num_classes, -1).astype(np.float64)
    vectors = features.reshape(len(features), -1).T.astype(np.float64)
    for _ in range(num_steps):
        new = np.zeros_like(cells)
        for i, at in enumerate(vectors):
            cosines = [at @ other / (np.linalg.norm(at) * np.linalg.norm(other)) for other in vectors]
            weights = np.array([max(0.0, cosine) ** power for cosine in cosines])
            new[:, i] = cells @ (weights / weights.sum())
        cells = new
    return cells.reshape(num_classes, height, width)


def test_one_step_by_hand() -> None:
    # Cells 0 and 1 are alike (cosine 1), cell 2 is at 60 degrees of both (cosine 1/2), cell 3 is opposite to 2.
    features = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.0, 0.0, 3**0.5 / 2, -(3**0.5)]])[:, None, :]
    maps = torch.tensor([[[1.0, 0.0, 0.0, 0.5]]])
    one = spread_maps(maps, features, AffinitySettings(power=1.0, num_steps=1))
    # cell 0: weights 1, 1, 1/2, 0 of 2.5; cell 2: 1/2, 1/2, 1, 0 of 2; cell 3 is like itself alone
    torch.testing.assert_close(one, torch.tensor([[[0.4, 0.4, 0.25, 0.5]]]))
    squared = spread_maps(maps, features, AffinitySettings(power=2.0, num_steps=1))
    torch.testing.assert_close(squared[0, 0, 2], torch.tensor(0.25 / 1.5))


@pytest.mark.parametrize(("power", "num_steps"), [(1.0, 1), (4.0, 3), (2.5, 2)])
def test_agrees_with_the_plain_loop(power: float, num_steps: int) -> None:
    rng = np.random.default_rng(0)
    maps, features = rng.random((3, 5, 7)), rng.normal(size=(6, 5, 7))
    settings = AffinitySettings(power=power, num_steps=num_steps)
    found = spread_maps(torch.from_numpy(maps), torch.from_numpy(features), settings)
    np.testing.assert_allclose(found, plain_spread(maps, features, power, num_steps), atol=1e-6)


def test_rows_sum_to_one_but_for_a_cell_without_features() -> None:
    features = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    features[:, 1, 1] = 0
    sums = feature_affinity(features, AffinitySettings()).sum(dim=1)
    expected = torch.ones(9)
    expected[4] = 0
    torch.testing.assert_close(sums, expected)
    assert spread_maps(torch.ones(1, 3, 3), features, AffinitySettings()).isfinite().all()


def test_fine_feature_maps_are_averaged_first() -> None:
    settings = AffinitySettings(max_cells=20)
    assert spread_maps(torch.rand(2, 30, 60), torch.rand(4, 20, 40), settings).shape == (2, 3, 6)


def test_compute_cams_spreads_by_the_stage_of_stride_16_and_keeps_the_plain_maps() -> None:
    torch.manual_seed(0)
    name = "timm:tf_efficientnet_lite0"
    backbone, _ = build_backbone(BackboneSettings(name=name, output_stride=16, weights="none"))
    model = Classifier(backbone, 3, 0).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    affinity = AffinitySettings(power=2.0, num_steps=2)
    settings = CamSettings(scales=(0.5, 1.0), flip=False, grid_stride_px=16, affinity=affinity)
    [cam] = compute_cams(model, [image], [[2, 0]], settings)
    [without] = compute_cams(model, [image], [[2, 0]], settings.model_copy(update={"affinity": None}))
    np.testing.assert_array_equal(cam.plain, without.maps)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.inference_mode():
        stages = backbone.net.forward_intermediates(backbone.normalise(pixels), indices=[3], intermediates_only=True)
    assert stages[0].shape == (1, 112, 4, 6)
    expected = plain_spread(without.maps, stages[0][0].numpy(), affinity.power, affinity.num_steps)
    expected /= expected.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(cam.maps, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:convnext_atto"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_other_networks_have_such_a_stage_at_any_stride(name: str, output_stride: int) -> None:
    settings = BackboneSettings(name=name, output_stride=output_stride, weights="none")
    backbone = build_backbone(settings)[0].eval()
    with torch.inference_mode():
        features, middle = backbone.forward_with_middle(torch.zeros(1, 3, 64, 96))
    side = min(16, output_stride)
    assert middle.shape[2:] == (64 // side, 96 // side)
    assert features.shape[1] == 2 * middle.shape[1]


def test_settings_refuse_what_spreads_nothing() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        AffinitySettings(power=0.0)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        AffinitySettings(num_steps=0)
