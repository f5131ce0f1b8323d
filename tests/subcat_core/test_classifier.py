"""Classifier: heads on one pooled feature, and maps that are the logits before pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import BackboneSettings, build_backbone
from subcat_core.classifier import Classifier


def build(num_clusters: int = 3) -> Classifier:
    torch.manual_seed(0)
    backbone, _ = build_backbone(BackboneSettings(name="torchvision:resnet18", weights="none"))
    return Classifier(backbone, num_classes=4, num_clusters=num_clusters)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_outputs(images: torch.Tensor) -> None:
    model = build().eval()
    with torch.inference_mode():
        output = model(images)
        maps = model.backbone(images)
        parent = output.features @ model.parent_head.weight.T
        sub = output.features @ model.sub_head.weight.T
    assert (output.parent.shape, output.sub.shape, output.features.shape) == ((2, 4), (2, 12), (2, 512))
    torch.testing.assert_close(output.features, maps.mean(dim=(2, 3)))
    torch.testing.assert_close(output.parent, parent)
    torch.testing.assert_close(output.sub, sub)


def test_round_0_has_no_subcategories(images: torch.Tensor) -> None:
    model = build(num_clusters=0)
    assert model(images).sub is None
    assert not [name for name in model.state_dict() if name.startswith("sub_head")]


def test_heads_are_xavier_without_bias() -> None:
    model = build()
    assert model.parent_head.bias is None
    assert model.sub_head is not None
    assert model.sub_head.bias is None
    for head in (model.parent_head, model.sub_head):
        limit = (6 / (head.in_features + head.out_features)) ** 0.5
        assert limit * 0.9 < head.weight.abs().max() <= limit


def test_both_heads_see_the_same_dropped_feature(images: torch.Tensor) -> None:
    model = build()
    model.backbone.eval()
    assert model.sub_head is not None
    with torch.no_grad():
        model.parent_head.weight.copy_(model.sub_head.weight[:4])
    output = model(images)
    torch.testing.assert_close(output.parent, output.sub[:, :4])
    plain = output.features @ model.parent_head.weight.T
    assert not torch.allclose(output.parent, plain)


def test_maps_are_the_logits_before_pooling(images: torch.Tensor) -> None:
    model = build().eval()
    with torch.inference_mode():
        maps = model.parent_maps(images, [2, 0])
        whole = F.conv2d(model.backbone(images), model.parent_head.weight[:, :, None, None])
        torch.testing.assert_close(maps, F.relu(whole[:, [2, 0]]))
        torch.testing.assert_close(whole.mean(dim=(2, 3)), model(images).parent, rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, 2, 3, 4)
    assert maps.min() >= 0


def test_maps_of_no_class_and_of_unknown_class(images: torch.Tensor) -> None:
    model = build().eval()
    with torch.inference_mode():
        with pytest.raises(ValueError, match="got class_index 4; expected 0 to 3"):
            model.parent_maps(images, [4])
        with pytest.raises(ValueError, match="class_index -1"):
            model.parent_maps(images, [-1])


def test_parameter_groups_cover_the_model() -> None:
    model = build()
    groups = model.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [(group["lr_factor"], group["weight_decay_factor"]) for group in groups] == [(1, 1), (2, 0), (10, 1)]
    assert {id(parameter) for parameter in groups[-1]["params"]} == {
        id(head.weight) for head in (model.parent_head, model.sub_head) if isinstance(head, nn.Linear)
    }


@pytest.mark.parametrize(("num_classes", "num_clusters"), [(0, 0), (3, -1)])
def test_refuses_sizes(num_classes: int, num_clusters: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 and at least 0"):
        Classifier(build().backbone, num_classes, num_clusters)


def test_a_few_steps_learn() -> None:
    """Red and blue pictures are told apart after a few steps of plain SGD."""
    torch.manual_seed(0)
    model = build(num_clusters=0)
    images = torch.zeros(8, 3, 32, 32)
    images[:4, 0], images[4:, 2] = 255, 255
    targets = torch.eye(4)[[0] * 4 + [1] * 4]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = F.binary_cross_entropy_with_logits(model(images).parent, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
