"""Plain vision transformers of timm as backbones: their last block's patch tokens are the feature map.

Covers timm's ViT, DeiT, CLIP, DINO, DINOv2 (with registers or without), DINOv3 and EVA. A patch is a cell, so the
output stride is the side of a patch, and nothing is dilated. DINO's tokens are known to separate objects without any
label (Caron et al. 2021); the method only sees a feature map.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import timm
import timm.models
import torch
from torch import nn
from torch.nn import functional as F

_MODULES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")


class TokenMaps(nn.Module):
    """(N, 3, H, W) normalised -> (N, D, ceil(H / patch), ceil(W / patch)): normed patch tokens, no class token.

    Images are padded to whole patches with zeros after normalisation, half on each side, so that the map of a mirrored
    image turned back lies right up to a pixel. Position embeddings are interpolated to the grid. Raises ValueError,
    when built, for a network whose patches are not square.
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
        tokens = cast(Any, self.vit).forward_features(padded)[:, self.num_prefix :]
        rows = padded.shape[2] // self.patch_px
        return cast(torch.Tensor, tokens.transpose(1, 2).reshape(len(tokens), self.num_features, rows, -1))


def build_vit(network: str) -> nn.Module:
    """timm's transformer of that name, for images of any size, without classifier, under timm's tensor names."""
    return timm.create_model(network, pretrained=False, num_classes=0, global_pool="", dynamic_img_size=True)


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
