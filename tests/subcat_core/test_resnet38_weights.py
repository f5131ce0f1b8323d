"""Weights of ResNet-38d: state dicts under the published names, and MXNet's files through the rule of names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from subcat_core.backbones import BackboneSettings, build_backbone
from subcat_core.resnet38 import HEADS, BasicBlock, Bottleneck, ResNet38d, from_mxnet
from subcat_core.weights import load_weights
from tests.subcat_core.mxnet_files import params_bytes
from tests.subcat_core.resnet38_table import build_on_meta, mxnet_name, published_state, shake


def thin(shape: tuple[int, ...]) -> torch.Tensor:
    """One number in memory and on disk, whatever the shape."""
    return torch.zeros(1).expand(shape)


def test_a_published_state_dict_is_accounted_for(tmp_path: Path) -> None:
    """Old files have no counters, and heads that stay behind; a file of something else is refused."""
    state = {name: thin(shape) for name, shape in published_state()}
    heads = {"fc8.weight": (20, 4096, 1, 1), "fc8_20.weight": (20, 4096, 1, 1), "fc8_200.weight": (200, 4096, 1, 1)}
    heads |= {"f8_3.weight": (64, 512, 1, 1), "f9.weight": (448, 448, 1, 1)}
    path = str(tmp_path / "res38_cls.pth")
    torch.save({**state, **{name: thin(shape) for name, shape in heads.items()}}, path)
    net = ResNet38d()
    report = load_weights(net, path, allowed_unexpected=HEADS)
    assert (report.num_loaded, report.unexpected) == (191, tuple(heads))
    assert len(report.missing) == 37
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    assert not any(tensor.any() for tensor in net.state_dict().values())
    del state["b7.conv_branch2b2.weight"]
    torch.save({**state, "fc.weight": thin((1,))}, path)
    with pytest.raises(ValueError, match=r"1 missing \(b7\.conv_branch2b2\.weight\); 1 unexpected \(fc\.weight\)"):
        build_on_meta(weights=path)


def test_every_mxnet_name_is_known() -> None:
    names = [name for name, _ in published_state()]
    assert len(names) == 191
    theirs = [mxnet_name(name) for name in names]
    assert {  # by hand, of ademxapp's symbols
        "arg:res2a_branch2a_weight",
        "arg:bn2a_branch2a_gamma",
        "aux:bn2b1_branch2b1_moving_var",
        "arg:res4b5_branch2b1_weight",
        "arg:res5a_branch1_weight",
        "arg:res7a_branch2b2_weight",
        "aux:bn6a_branch2b2_moving_mean",
        "arg:bn7_beta",
    } < set(theirs)
    tensors = {name: torch.tensor(index) for index, name in enumerate(theirs)}
    one = torch.tensor(-1)
    renamed = from_mxnet({**tensors, "arg:linear1000_weight": one, "arg:linear1000_bias": one})
    assert [int(renamed[name]) for name in names] == list(range(191))
    left = set(renamed) - set(names)
    assert left == {"linear1000_weight", "linear1000_bias"}
    assert all(name.startswith(HEADS) for name in left)
    assert set(names) == {name for name in build_on_meta().net.state_dict() if "num_batches" not in name}


def test_unknown_mxnet_names_stay_and_doubles_are_refused() -> None:
    one = torch.zeros(1)
    odd = ["conv6a_weight", "res2_branch1_weight", "bn2a_branch2a_weight", "bn4a_gamma", "res2a_branch1_gamma", "data"]
    assert list(from_mxnet({f"arg:{name}": one for name in odd})) == odd
    with pytest.raises(ValueError, match=r"'aux:bn7_beta' and another array both become 'bn7\.bias'"):
        from_mxnet({"arg:bn7_beta": one, "aux:bn7_beta": one})


class Small(nn.Module):
    """A few channels under published names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 4, 3, bias=False)
        self.b2 = BasicBlock(4, 6, 6, 2, 1, 1)
        self.b2_1 = BasicBlock(6, 6, 6, 1, 1, 1)
        self.b6 = Bottleneck(6, 8, 4, 0.3)
        self.bn7 = nn.BatchNorm2d(8)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_mxnet_file_lands_in_the_network(version: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Small()
    shake(source)
    wanted = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    arrays = {mxnet_name(name): tensor.numpy() for name, tensor in wanted.items()}
    arrays["arg:linear1000_weight"] = np.zeros((1000, 8), np.float32)
    path = tmp_path / "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"
    path.write_bytes(params_bytes(arrays, version))
    for uri, reader in ((str(path), None), ("s3://bucket/a1.params", lambda uri: path.read_bytes())):
        net = Small()
        report = load_weights(net, uri, read_uri=reader, from_mxnet=from_mxnet, allowed_unexpected=HEADS)
        assert (report.num_loaded, report.unexpected) == (len(wanted), ("linear1000_weight",))
        state = net.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_mxnet_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "voc.params"
    kernel = np.zeros((64, 3, 3, 3), np.float32)
    path.write_bytes(params_bytes({"arg:conv1a_weight": kernel, "arg:conv6a_weight": kernel}))
    with pytest.raises(ValueError, match=r"1 tensors fit; 190 missing \(.*; 1 unexpected \(conv6a_weight\)"):
        build_on_meta(weights=str(path))
    with pytest.raises(ValueError, match=r"voc\.params' are MXNet's.*the backbone subcat:resnet38d"):
        build_backbone(BackboneSettings(name="torchvision:resnet18", weights=str(path)))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}', byte \d+: an array of shape"):
        build_on_meta(weights=str(path))
