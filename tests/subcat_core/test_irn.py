"""IRNet: paths, affinity from boundaries, both branches and their losses, against plain loops and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from subcat_core.affinity_pairs import PairKinds, balanced_loss, pair_kinds, pair_offsets
from subcat_core.backbones import BackboneSettings
from subcat_core.classes import IGNORE
from subcat_core.irn import (
    IrnNet,
    IrnSettings,
    MeanShift,
    build_irn,
    displacement_losses,
    irn_loss,
    path_affinity,
    straight_path,
)
from tests.subcat_core.plain_affinity import all_pairs, plain_kind

RESNET = BackboneSettings(name="torchvision:resnet18", output_stride=16, weights="none")


def _net(name: str = RESNET.name) -> IrnNet:
    torch.manual_seed(0)
    return build_irn(IrnSettings(backbone=RESNET.model_copy(update={"name": name})))


def test_paths_by_hand() -> None:
    assert straight_path((0, 3)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert straight_path((2, 0)) == [(0, 0), (1, 0), (2, 0)]
    # A diagonal is thick: its side cells are 0.71 cells away from the line.
    assert straight_path((1, 1)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    # (1, 2): (0, 1) lies 1 / sqrt(5) away, (0, 2) and (1, 0) 2 / sqrt(5), so all six cells belong to it.
    assert len(straight_path((1, 2))) == 6
    assert straight_path((1, -2)) == [(y, -x) for y, x in sorted(straight_path((1, 2)), key=lambda c: (c[0], -c[1]))]
    # (1, 4): (0, 4) lies 4 / sqrt(17) = 0.97 away, and (2, 2) has its corners at sqrt(2).
    assert len(straight_path((1, 4))) == 10
    assert len(straight_path((2, 2))) == 7


def test_affinity_agrees_with_plain_loops_in_float64(rng: np.random.Generator) -> None:
    boundaries = rng.random((2, 7, 9))
    found = path_affinity(torch.from_numpy(boundaries), 5).numpy()
    expected = np.zeros((2, len(pair_offsets(5)), 7, 9))
    for (y, x), (to_y, to_x) in all_pairs(7, 9, 5, pad_border=True):
        dy, dx = to_y - y, to_x - x
        on_path = [
            boundaries[:, row, column]
            for row in range(min(y, to_y), max(y, to_y) + 1)
            for column in range(min(x, to_x), max(x, to_x) + 1)
            if abs(dy * (column - x) - dx * (row - y)) / np.hypot(dy, dx) < 1 - 1e-12
        ]
        expected[:, pair_offsets(5).index((dy, dx)), y, x] = 1 - np.max(on_path, axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_strongest_boundary_gets_the_gradient() -> None:
    boundaries = torch.tensor([[[0.1, 0.8, 0.3]]], requires_grad=True)
    affinity = path_affinity(boundaries, 3)
    assert affinity[0, :2, 0].tolist() == [pytest.approx([0.2, 0.2, 0.0]), pytest.approx([0.2, 0.0, 0.0])]
    affinity[0, 1, 0, 0].backward()
    assert boundaries.grad.tolist() == [[[0.0, -1.0, 0.0]]]


def test_displacement_losses_by_hand() -> None:
    # Two cells of one object, one to the right of the other: both point to the right one, so nothing is lost.
    kinds = pair_kinds(torch.tensor([[[3, 3]]], dtype=torch.uint8), 2, True)
    right = torch.tensor([[[[0.0, 0.0]], [[1.0, 0.0]]]])
    assert [value.item() for value in displacement_losses(right, kinds, 2)] == [0.0, 0.0]
    # Neither points anywhere: |0 - 0 - 1| in x and 0 in y, over the two of them.
    assert displacement_losses(torch.zeros(1, 2, 1, 2), kinds, 2)[0].item() == pytest.approx(0.5)
    background = pair_kinds(torch.zeros((1, 1, 2), dtype=torch.uint8), 2, True)
    assert displacement_losses(right, background, 2)[1].item() == pytest.approx(0.5)


def test_losses_agree_with_plain_loops_in_float64(rng: np.random.Generator) -> None:
    radius = 4
    labels = rng.choice([0, 0, 1, 2, IGNORE], size=(2, 6, 8)).astype(np.uint8)
    displacement, edge = rng.normal(size=(2, 2, 6, 8)), rng.normal(size=(2, 1, 6, 8))
    kinds = pair_kinds(torch.from_numpy(labels), radius, pad_border=True)
    sums, counts = {"foreground": 0.0, "background": 0.0}, {"foreground": 1e-5, "background": 1e-5}
    for image in range(2):
        for source, partner in all_pairs(6, 8, radius, pad_border=True):
            kind = plain_kind(labels[image][source], labels[image][partner])
            if kind not in sums:
                continue
            difference = displacement[image][:, *source] - displacement[image][:, *partner]
            expected = np.subtract(partner, source) if kind == "foreground" else np.zeros(2)
            sums[kind] += np.abs(difference - expected).sum()
            counts[kind] += 2
    plain = {kind: sums[kind] / counts[kind] for kind in sums}
    found = displacement_losses(torch.from_numpy(displacement), kinds, radius)
    assert found[0].item() == pytest.approx(plain["foreground"], rel=1e-6)
    assert found[1].item() == pytest.approx(plain["background"], rel=1e-6)

    loss, parts = irn_loss(torch.from_numpy(edge), torch.from_numpy(displacement), kinds, radius)
    boundaries = torch.from_numpy(1 / (1 + np.exp(-edge[:, 0])))
    boundary_loss = balanced_loss(path_affinity(boundaries, radius), kinds)[0].item()
    assert loss.item() == pytest.approx(boundary_loss + (plain["foreground"] + plain["background"]) / 2, rel=1e-6)
    assert set(parts) == {"loss", "bg_loss", "fg_loss", "neg_loss", "dp_fg_loss", "dp_bg_loss"}
    assert parts["loss"].item() == loss.item()


def test_no_pair_at_all_gives_0_with_a_gradient() -> None:
    displacement = torch.zeros(1, 2, 3, 3, requires_grad=True)
    none = torch.zeros((1, len(pair_offsets(2)), 3, 3), dtype=torch.bool)
    sum(displacement_losses(displacement, PairKinds(none, none, none), 2)).backward()
    assert torch.equal(displacement.grad, torch.zeros_like(displacement))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:mobilenetv2_050", "timm:convnext_atto"])
def test_branches_have_cells_of_4_px_and_the_backbone_stays_frozen(name: str) -> None:
    net = _net(name).train()
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    images = torch.randint(0, 256, (2, 3, 66, 47), dtype=torch.uint8)
    edge, displacement = net(images)
    assert edge.shape == (2, 1, 17, 12)
    assert displacement.shape == (2, 2, 17, 12)
    (edge.square().sum() + displacement.square().sum()).backward()
    assert not any(parameter.requires_grad for parameter in net.backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.backbone.state_dict().items())
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    groups = net.parameter_groups()
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, trained))
    assert [group["lr_factor"] for group in groups] == [1.0, 10.0]


def test_boundaries_are_the_mean_over_the_mirror_image() -> None:
    net = _net().eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        found = net.boundaries(images)
        straight, mirrored = net(images)[0], net(images.flip(3))[0].flip(3)
        torch.testing.assert_close(found, torch.sigmoid((straight + mirrored) / 2)[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.boundaries(images.flip(3)), found.flip(2), atol=1e-5, rtol=1e-5)


def test_the_mean_displacement_is_followed_in_training_and_subtracted_after_it() -> None:
    shift = MeanShift().train()
    field = torch.stack([torch.full((4, 5), 2.0), torch.full((4, 5), -1.0)])[None]
    assert torch.equal(shift(field), field)
    torch.testing.assert_close(shift.mean, torch.tensor([0.2, -0.1]))
    shift.eval()
    torch.testing.assert_close(shift(field)[0, :, 0, 0], torch.tensor([1.8, -0.9]))
