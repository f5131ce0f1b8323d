"""A model on its device: which batch norm is synchronised, held or refused."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from cluster.trainee import OptimiserSettings, TrainContext
from cluster.training_device import place_model, synchronise_batch_norm
from subcat_core.backbones import BackboneSettings
from subcat_core.freezing import freeze_batch_norm
from subcat_core.segmenter import SegmenterSettings, build_segmenter


def context(world_size: int) -> TrainContext:
    return TrainContext(0, world_size, torch.device("cpu"), lambda kind, step, values: None, None)


class Net(nn.Module):
    """A backbone that is half frozen, and a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.BatchNorm2d(4), timm.layers.BatchNormAct2d(4))
        self.decoder = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def test_frozen_layers_stay_held_where_others_are_synchronised() -> None:
    model = Net()
    freeze_batch_norm(model.backbone[0])
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    synchronise_batch_norm(model)
    model.train()
    assert type(model.backbone[0]) is nn.BatchNorm2d
    assert not model.backbone[0].training
    for layer in (model.backbone[1], model.decoder[1]):
        assert isinstance(layer, nn.SyncBatchNorm)
        assert layer.training
    assert isinstance(model.backbone[1].act, nn.ReLU)  # timm's layer keeps its activation
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_deeplabv3plus_of_one_image_a_worker_is_refused_before_training() -> None:
    backbone = BackboneSettings(name="torchvision:resnet18", weights="none")
    model, _ = build_segmenter(SegmenterSettings(architecture="deeplabv3plus", backbone=backbone), 2)
    with pytest.raises(ValueError, match=r"batch_size 2 over 2 workers gives each one image,.* take batch_size 4"):
        place_model(model, OptimiserSettings(batch_size=2), context(2))
    place_model(model, OptimiserSettings(batch_size=4), context(2))
    frozen, _ = build_segmenter(SegmenterSettings(backbone=backbone), 2)
    place_model(frozen, OptimiserSettings(batch_size=2), context(2))
