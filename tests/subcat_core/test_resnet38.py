"""ResNet-38d: the published table, the block equations in float64, the taps, freezing, and both kinds of weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import Backbone, BackboneSettings, build_backbone, input_statistics, split_name
from subcat_core.classifier import Classifier
from subcat_core.freezing import freeze_batch_norm
from subcat_core.resnet38 import HEADS, BasicBlock, Bottleneck, ResNet38d, from_mxnet
from subcat_core.weights import load_weights
from tests.subcat_core.mxnet_files import params_bytes

NAME = "subcat:resnet38d"

# Name, channels in, in the middle and out, stride, first and other dilation, parameters: the released network, counted.
BASIC = [
    ("b2", 64, 128, 128, 2, 1, 1, 229_760),
    *((f"b2_{i}", 128, 128, 128, 1, 1, 1, 295_424) for i in (1, 2)),
    ("b3", 128, 256, 256, 2, 1, 1, 918_272),
    *((f"b3_{i}", 256, 256, 256, 1, 1, 1, 1_180_672) for i in (1, 2)),
    ("b4", 256, 512, 512, 2, 1, 1, 3_671_552),
    *((f"b4_{i}", 512, 512, 512, 1, 1, 1, 4_720_640) for i in (1, 2, 3, 4, 5)),
    ("b5", 512, 512, 1024, 1, 1, 2, 7_604_224),
    *((f"b5_{i}", 1024, 512, 1024, 1, 2, 2, 9_440_256) for i in (1, 2)),
]
BOTTLENECKS = [("b6", 1024, 2048, 4, 9_442_304), ("b7", 2048, 4096, 4, 37_758_976)]
PROJECTED = ("b2", "b3", "b4", "b5", "b6", "b7")


def build_on_meta(frozen_stages: int = 0, weights: str = "none") -> Backbone:
    """Shapes and names without the 400 MB."""
    settings = BackboneSettings(name=NAME, output_stride=8, weights=weights, frozen_stages=frozen_stages)
    with torch.device("meta"):
        return build_backbone(settings)[0]


def shake(module: nn.Module) -> None:
    """Batch norm as of a trained network, not the 0 and 1 that hide mistakes."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in ((layer.weight, 0.5, 1.5), (layer.bias, -0.3, 0.3)):
                nn.init.uniform_(tensor, low, high)
            layer.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def plain_norm(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return torch.clamp_min((x - mean) / torch.sqrt(var + 1e-5) * weight + bias, 0)


def plain_basic(
    x: torch.Tensor, state: dict[str, torch.Tensor], name: str, stride: int, first: int, dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block and its pre-activated input, by the definition."""
    active = plain_norm(x, state, f"{name}.bn_branch2a")
    y = F.conv2d(active, state[f"{name}.conv_branch2a.weight"], stride=stride, padding=first, dilation=first)
    y = plain_norm(y, state, f"{name}.bn_branch2b1")
    y = F.conv2d(y, state[f"{name}.conv_branch2b1.weight"], padding=dilation, dilation=dilation)
    if f"{name}.conv_branch1.weight" in state:
        x = F.conv2d(active, state[f"{name}.conv_branch1.weight"], stride=stride)
    return x + y, active


def plain_bottleneck(
    x: torch.Tensor, state: dict[str, torch.Tensor], name: str, dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    active = plain_norm(x, state, f"{name}.bn_branch2a")
    y = plain_norm(F.conv2d(active, state[f"{name}.conv_branch2a.weight"]), state, f"{name}.bn_branch2b1")
    y = F.conv2d(y, state[f"{name}.conv_branch2b1.weight"], padding=dilation, dilation=dilation)
    y = F.conv2d(plain_norm(y, state, f"{name}.bn_branch2b2"), state[f"{name}.conv_branch2b2.weight"])
    return F.conv2d(active, state[f"{name}.conv_branch1.weight"]) + y, active


@pytest.mark.parametrize(
    ("channels", "stride", "first", "dilation"),
    [((4, 6, 6), 2, 1, 1), ((6, 6, 6), 1, 1, 1), ((4, 6, 8), 1, 1, 2), ((8, 6, 8), 1, 2, 2), ((6, 5, 6), 2, 1, 1)],
)
def test_basic_block_is_its_equation(channels: tuple[int, int, int], stride: int, first: int, dilation: int) -> None:
    torch.manual_seed(0)
    block = BasicBlock(*channels, stride, first, dilation).double().eval()
    shake(block)
    x = torch.randn(2, channels[0], 9, 7, dtype=torch.float64)
    state = {f"b.{name}": tensor for name, tensor in block.state_dict().items()}
    before = x.clone()
    with torch.no_grad():
        expected, _ = plain_basic(x, state, "b", stride, first, dilation)
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_bottleneck_is_its_equation() -> None:
    torch.manual_seed(0)
    block = Bottleneck(6, 8, dilation=4, dropout=0.5).double().eval()
    shake(block)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    state = {f"b.{name}": tensor for name, tensor in block.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain_bottleneck(x, state, "b", 4)[0], rtol=1e-12, atol=1e-12)


def test_bottleneck_drops_whole_channels_twice() -> None:
    torch.manual_seed(0)
    block = Bottleneck(64, 512, dilation=1, dropout=0.5)
    freeze_batch_norm(block)
    shake(block)
    seen = []
    for layer in (block.conv_branch2b1, block.conv_branch2b2):
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    x = torch.randn(1, 64, 4, 4)
    block.train()(x)
    block.eval()(x)
    for dropped, whole in ((seen[0], seen[2]), (seen[1], seen[3])):
        lost = (dropped == 0).all(dim=(2, 3))[0] & (whole != 0).any(dim=(2, 3))[0]
        assert 0.3 < lost.float().mean() < 0.7
    torch.testing.assert_close(seen[0], 2 * seen[2] * (seen[0] != 0))  # 1 / (1 - 0.5)
    rates = [layer.p for layer in build_on_meta().net.modules() if isinstance(layer, nn.Dropout2d)]
    assert rates == [0.3, 0.3, 0.5, 0.5]


def test_parameters_strides_and_dilations_are_those_of_the_table() -> None:
    net = build_on_meta().net

    def count(name: str) -> int:
        return sum(parameter.numel() for parameter in net.get_submodule(name).parameters())

    blocks = [*((row[0], row[-1]) for row in BASIC), *((row[0], row[-1]) for row in BOTTLENECKS)]
    expected = {"conv1a": 1_728, **dict(blocks), "bn7": 8_192, "relu7": 0}
    assert {name: count(name) for name, _ in net.named_children()} == expected
    for name, _, _, _, stride, first, dilation, _ in BASIC:
        block = net.get_submodule(name)
        assert (block.conv_branch2a.stride[0], block.conv_branch2a.dilation[0]) == (stride, first)
        assert (block.conv_branch2b1.stride[0], block.conv_branch2b1.dilation[0]) == (1, dilation)
    for name, _, _, dilation, _ in BOTTLENECKS:
        assert net.get_submodule(name).conv_branch2b1.dilation[0] == dilation
    assert {name for name, child in net.named_children() if getattr(child, "conv_branch1", None)} == set(PROJECTED)


def test_with_both_heads_it_has_the_published_size() -> None:
    model = Classifier(build_on_meta(), num_classes=20, num_clusters=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 105_972_032
    assert len(model.state_dict()) == 230
    assert (model.backbone.num_features, model.backbone.output_stride) == (4096, 8)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (321, 321), (448, 448), (375, 500), (8, 9), (1, 17)])
def test_all_maps_have_stride_8(height: int, width: int) -> None:
    net = build_on_meta().net.eval()
    assert isinstance(net, ResNet38d)
    shapes = [tuple(tap.shape) for tap in net.taps(torch.zeros(2, 3, height, width, device="meta"))]
    assert shapes == [(2, channels, -(-height // 8), -(-width // 8)) for channels in (512, 1024, 4096)]


def test_whole_network_taps_and_middle_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    net = ResNet38d().eval()
    shake(net)
    backbone = Backbone(net, NAME, 4096, 8).double()
    images = torch.randint(0, 256, (1, 3, 25, 17), dtype=torch.uint8)
    with torch.inference_mode():
        pixels = backbone.normalise(images)
        state = net.state_dict()
        x, active = F.conv2d(pixels, state["conv1a.weight"], padding=1), {}
        for name, _, _, _, stride, first, dilation, _ in BASIC:
            x, active[name] = plain_basic(x, state, name, stride, first, dilation)
        for name, _, _, dilation, _ in BOTTLENECKS:
            x, active[name] = plain_bottleneck(x, state, name, dilation)
        conv6 = plain_norm(x, state, "bn7")
        features, middle = backbone.forward_with_middle(images)
        taps = net.taps(pixels)
    assert features.shape == (1, 4096, 4, 3)
    for found, expected in [
        (features, conv6),
        (taps.conv6, conv6),
        (taps.conv5, active["b6"]),
        (taps.conv4, active["b5"]),
        (middle, active["b6"]),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_input_is_normalised_as_published() -> None:
    mean, std = input_statistics(NAME)
    assert np.allclose(np.array(mean) / 255, (0.485, 0.456, 0.406))
    assert np.allclose(np.array(std) / 255, (0.229, 0.224, 0.225))


def test_one_frozen_stage_is_the_papers() -> None:
    backbone = build_on_meta(frozen_stages=1)
    frozen = {name.split(".")[0] for name, item in backbone.net.named_parameters() if not item.requires_grad}
    assert frozen == {"conv1a", "b2", "b2_1", "b2_2"}
    freeze_batch_norm(backbone)
    groups = Classifier(backbone, 20, 10).parameter_groups()
    assert [round(sum(item.numel() for item in group["params"]) / 1e6, 2) for group in groups] == [104.20, 0.90]
    last = build_on_meta(frozen_stages=6).net
    assert not any(parameter.requires_grad for parameter in last.parameters())
    with pytest.raises(ValueError, match="the backbone has 6 stages"):
        build_on_meta(frozen_stages=7)


def published_state() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The released file's tensors without counters and heads, from the table above."""
    yield "conv1a.weight", (64, 3, 3, 3)
    norms: dict[str, int] = {}
    for name, inputs, middle, outputs, *_ in BASIC:
        norms |= {f"{name}.bn_branch2a": inputs, f"{name}.bn_branch2b1": middle}
        yield f"{name}.conv_branch2a.weight", (middle, inputs, 3, 3)
        yield f"{name}.conv_branch2b1.weight", (outputs, middle, 3, 3)
        if name in PROJECTED:
            yield f"{name}.conv_branch1.weight", (outputs, inputs, 1, 1)
    for name, inputs, outputs, *_ in BOTTLENECKS:
        norms |= {f"{name}.bn_branch2a": inputs, f"{name}.bn_branch2b1": outputs // 4}
        norms[f"{name}.bn_branch2b2"] = outputs // 2
        yield f"{name}.conv_branch2a.weight", (outputs // 4, inputs, 1, 1)
        yield f"{name}.conv_branch2b1.weight", (outputs // 2, outputs // 4, 3, 3)
        yield f"{name}.conv_branch2b2.weight", (outputs, outputs // 2, 1, 1)
        yield f"{name}.conv_branch1.weight", (outputs, inputs, 1, 1)
    for name, channels in {**norms, "bn7": 4096}.items():
        for kind in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{kind}", (channels,)


def mxnet_name(name: str) -> str:
    """Of a tensor of the table, in ademxapp: b4_2.conv_branch2a.weight is arg:res4b2_branch2a_weight there."""
    block, _, layer = name.partition(".")
    kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    if name == "conv1a.weight":
        return "arg:conv1a_weight"
    place = block[1] + ("b" + block[3] if "_" in block else "a")
    if layer.startswith("conv_"):
        return f"arg:res{place}_{layer.split('.')[0].removeprefix('conv_')}_weight"
    kind = name.rsplit(".", 1)[1]
    group = "aux" if kind.startswith("running") else "arg"
    if block == "bn7":
        return f"{group}:bn7_{kinds[kind]}"
    return f"{group}:bn{place}_{layer.split('.')[0].removeprefix('bn_')}_{kinds[kind]}"


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


def test_what_it_does_not_offer_is_said() -> None:
    with pytest.raises(ValueError, match="output_stride = 16: subcat:resnet38d has stride 8 only; give that"):
        BackboneSettings(name=NAME)
    settings = BackboneSettings(name=NAME, output_stride=8, weights="none")
    with pytest.raises(ValueError, match="output_stride = 32: subcat:resnet38d has stride 8 only"):
        build_backbone(settings.model_copy(update={"output_stride": 32}))
    with pytest.raises(ValueError, match=r"not published for subcat:resnet38d by name; give the path .*\.params"):
        build_on_meta(weights="enum:A1")
    with pytest.raises(ValueError, match="not known to subcat; near names: subcat:resnet38d"):
        split_name("subcat:resnet38")
