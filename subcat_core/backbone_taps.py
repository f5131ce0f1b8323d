"""Feature maps of a backbone's last stages, from any network of timm and torchvision, or one that has them itself."""

from __future__ import annotations

import functools

import timm
import torch
from torch import nn

from subcat_core.backbones import Backbone, split_name
from subcat_core.freezing import TORCHVISION_STAGES
from subcat_core.own_networks import OWN_NETWORKS


class BackboneTaps:
    """The maps of the last `num_taps` stages, the last one being what the backbone itself gives.

    All parameters of the backbone take part in the last map, so data-parallel training finds a gradient for each. A
    network with a method `taps` (normalised pixels -> its maps, fine to coarse) is asked by that, such as ResNet-38,
    whose maps are no output of a module. channels: of each map. It has no parameters of its own. Raises
    ValueError where the network has fewer than `at_least` (num_taps) stages that tell where they are, or their maps are
    not (N, D, h, w).
    """

    def __init__(self, backbone: Backbone, num_taps: int, at_least: int | None = None) -> None:
        self.backbone = backbone
        self._own = hasattr(backbone.net, "taps")
        self._stages = [] if self._own else stage_names(backbone.name)[-num_taps:-1]
        self._num_taps = num_taps
        self.channels = self._channels(at_least or num_taps)

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """pixels: (N, 3, H, W), normalised (`Backbone.normalise`) -> maps (N, D_i, h_i, w_i), fine to coarse."""
        net = self.backbone.net
        if self._own:
            return list(net.taps(pixels))[-self._num_taps :]  # type: ignore[operator]
        caught: dict[str, torch.Tensor] = {}
        hooks = [
            net.get_submodule(name).register_forward_hook(functools.partial(_keep, caught, name))
            for name in self._stages
        ]
        try:
            last = net(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return [*(caught[name] for name in self._stages if name in caught), last]

    @torch.inference_mode()
    def _channels(self, at_least: int) -> tuple[int, ...]:
        side_px = 4 * self.backbone.output_stride
        modes = [(module, module.training) for module in self.backbone.modules()]
        self.backbone.eval()
        maps = self(torch.zeros(1, 3, side_px, side_px))
        for module, mode in modes:
            module.training = mode
        if len(maps) < at_least or any(tap.ndim != 4 for tap in maps):
            raise ValueError(
                f"backbone {self.backbone.name!r} gives {len(maps)} maps of (N, D, h, w), expected {at_least} or more; "
                "take one such as torchvision:resnet50 or timm:tf_efficientnet_lite0"
            )
        return tuple(int(tap.shape[1]) for tap in maps)


def _keep(caught: dict[str, torch.Tensor], name: str, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
    caught[name] = output


@functools.lru_cache(maxsize=16)
def stage_names(backbone_name: str) -> tuple[str, ...]:
    """Modules at the ends of a network's stages, the stem first; () where timm does not tell them."""
    library, network = split_name(backbone_name)
    if library == "subcat":
        return tuple(stage[-1] for stage in OWN_NETWORKS[network].stages)
    if library == "torchvision":
        return ("maxpool", *TORCHVISION_STAGES)
    with torch.device("meta"):
        known = getattr(timm.create_model(network, pretrained=False, num_classes=0), "feature_info", [])
    return tuple(str(info["module"]) for info in getattr(known, "info", known))
