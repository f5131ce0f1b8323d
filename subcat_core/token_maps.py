"""Plain vision transformers of timm as backbones: their last block's patch tokens are the feature map.

Covers timm's ViT, DeiT, CLIP, DINO, DINOv2 (with registers or without), DINOv3 and EVA. A patch is a cell, so the
output stride is the side of a patch, and nothing is dilated. DINO's tokens are known to separate objects without any
label (Caron et al. 2021); the method only sees a feature map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import timm
import timm.models
import torch
from timm.models import eva, vision_transformer
from torch import nn
from torch.nn import functional as F

from subcat_core.weights import StateDict

_MODULES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")

NOT_NEEDED = ("attn_pool.", "pre_logits.", "mask_token", "rope_embed.", "local_cls_norm.", "*.attn.qkv.bias_mask")
"""Names in published files of what a feature map takes no part in (prefixes, * being anything): pooling, what only
pre-training used, and what timm computes again."""


class TokenMaps(nn.Module):
    """(N, 3, H, W) normalised -> (N, D, ceil(H / patch), ceil(W / patch)): normed patch tokens, no class token.

    Images are padded to whole patches with zeros after normalisation, half on each side, so that the map of a mirrored
    image turned back lies right up to a pixel. Position embeddings are interpolated to the grid. A network that norms
    after its pooling (`fc_norm`) has each token normed by that instead. Raises ValueError, when built, for a network
    whose patches are not square.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.patch_px = patch_of(vit)
        self.num_features = int(cast(Any, vit).num_features)
        self.num_prefix = int(cast(Any, vit).num_prefix_tokens)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rest = [-size % self.patch_px for size in reversed(pixels.shape[2:])]
        padded = F.pad(pixels, [side for pad in rest for side in (pad // 2, pad - pad // 2)])
        vit = cast(Any, self.vit)
        tokens = vit.fc_norm(vit.forward_features(padded))[:, self.num_prefix :]
        rows = padded.shape[2] // self.patch_px
        return cast(torch.Tensor, tokens.transpose(1, 2).reshape(len(tokens), self.num_features, rows, -1))


def build_vit(network: str) -> nn.Module:
    """timm's transformer of that name, for images of any size, without classifier, under timm's tensor names."""
    net = timm.create_model(network, pretrained=False, num_classes=0, dynamic_img_size=True)
    cast(Any, net).reset_classifier(0, "")  # once built, so that it keeps the norm of its own pooling
    return net


@functools.lru_cache(maxsize=64)
def patch_px(network: str) -> int | None:
    """Side of a patch where timm's network of that name is a plain transformer, else None."""
    if timm.models.model_entrypoint(network.partition(".")[0]).__module__ not in _MODULES:
        return None
    with torch.device("meta"):
        return patch_of(build_vit(network))


def patch_of(vit: nn.Module) -> int:
    """Side of a patch. Raises ValueError where patches are not square."""
    height, width = cast(Any, vit).patch_embed.patch_size
    if height != width:
        raise ValueError(f"got patches of {height} x {width} px; take a transformer with square ones")
    return int(height)


def to_timm(vit: nn.Module, state: StateDict) -> StateDict:
    """Names and shapes of published files -> those of timm's network, by timm's own rules.

    Such as the authors' files of DINOv2 and DINOv3, or position embeddings for another image size (interpolated). What
    timm's rules drop stays in under its own name, so that the account of the weights tells of it.
    """
    module = eva if isinstance(vit, eva.Eva) else vision_transformer
    convert = cast(Callable[[StateDict, nn.Module], StateDict], module.checkpoint_filter_fn)
    aside = _biases_without_place(vit, state)
    try:
        converted = convert({name: tensor for name, tensor in state.items() if name not in aside}, vit)
    except (RuntimeError, KeyError, ValueError, IndexError, AttributeError):
        return state  # of quite another network: the account of the weights says so better
    taken = {tensor.untyped_storage().data_ptr() for tensor in converted.values()}
    for name, tensor in state.items():
        lost = name not in converted and tensor.untyped_storage().data_ptr() not in taken
        if lost and (name not in aside or bool(tensor.any())):
            converted[name] = tensor
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4:  # timm would resize them: those of another network would go unseen
        converted["patch_embed.proj.weight"] = patches
    return converted


def _biases_without_place(vit: nn.Module, state: StateDict) -> set[str]:
    """Query, key and value biases of DINOv3 files where timm's network has none, since they are zeros as published."""
    if not isinstance(vit, eva.Eva):
        return set()
    own = {name for name, _ in vit.named_parameters()}
    names = {name for name in state if name.endswith(".attn.qkv.bias")}
    return {name for name in names if name not in own and name.removesuffix("qkv.bias") + "q_bias" not in own}
