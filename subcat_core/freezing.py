"""What of a network does not learn: batch norm at its pretrained statistics, the stem and the first stages."""

from __future__ import annotations

import functools

import timm
import timm.models
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subcat_core.own_networks import OWN_NETWORKS

TORCHVISION_STAGES = ("layer1", "layer2", "layer3", "layer4")


def freeze_batch_norm(module: nn.Module) -> None:
    """Keep every batch norm below `module` as it is: in eval mode across `.train()` calls, its affine not trained."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            _hold(layer)
            for parameter in layer.parameters():
                parameter.requires_grad_(False)


def _hold(layer: nn.Module) -> None:
    """Eval mode for good: nn.Module.train() walks the tree through each child's `train`, so the child can refuse."""
    layer.eval()
    layer.train = functools.partial(_stay_in_eval, layer)  # type: ignore[method-assign]


def _stay_in_eval(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


def canonical(name: str) -> str:
    """A tensor's name, whether or not its network was flattened: timm and its users write stages.0 or stages_0."""
    return name.replace(".", "_")


def freeze_stages(net: nn.Module, num_stages: int, backbone_name: str) -> None:
    """Freeze the stem and the first `num_stages` stages; 0 freezes nothing. Raises ValueError when there are fewer.

    No gradient flows back beyond the first trained stage, so what is frozen costs no backward pass and no memory for
    one.
    """
    if num_stages == 0:
        return
    library, _, network = backbone_name.partition(":")
    if library in ("torchvision", "subcat"):
        stages: list[tuple[str, ...]] = [("conv1", "bn1"), *((name,) for name in TORCHVISION_STAGES)]
        if library == "subcat":
            stages = list(OWN_NETWORKS[network].stages)
        groups = [[name for name, _ in net.named_parameters() if name.startswith(stage)] for stage in stages]
    else:
        with torch.device("meta"):  # parts of networks, as encoders are, do not know their stages
            whole = timm.create_model(network, pretrained=False, num_classes=0)
        matched = timm.models.group_parameters(whole, whole.group_matcher(coarse=True))  # type: ignore[operator]
        groups = [matched[index] for index in sorted(matched)]
    if num_stages >= len(groups):
        raise ValueError(f"frozen_stages = {num_stages}, but the backbone has {len(groups) - 1} stages; give fewer")
    frozen = {canonical(name) for group in groups[: num_stages + 1] for name in group}
    for name, parameter in net.named_parameters():
        if canonical(name) in frozen:
            parameter.requires_grad_(False)
    for prefix, layer in net.named_modules():
        if isinstance(layer, _BatchNorm) and canonical(f"{prefix}.weight") in frozen:
            _hold(layer)
