"""The classifier: one backbone, one pooled feature, a head for parent classes and one for sub-categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from subcat_core.backbones import Backbone
from subcat_core.region_features import region_means
from subcat_core.schedule import parameter_groups

__all__ = ["Classifier", "ClassifierOutput"]


class ClassifierOutput(NamedTuple):
    """parent: (N, C) logits; sub: (N, C*K) logits, None in round 0; features: (N, D) pooled, before dropout."""

    parent: torch.Tensor
    sub: torch.Tensor | None
    features: torch.Tensor


class Classifier(nn.Module):
    """Both heads are linear, without bias, on the same pooled feature (Chang et al. 2020, section 3; authors' code).

    num_clusters: K, or 0 for parents only (round 0). dropout: share of feature channels dropped in training; the
    authors drop whole channels of the feature map, which is the same as dropping them after pooling.
    """

    def __init__(self, backbone: Backbone, num_classes: int, num_clusters: int, dropout: float = 0.5) -> None:
        super().__init__()
        if num_classes < 1 or num_clusters < 0:
            raise ValueError(
                f"got {num_classes} classes and {num_clusters} clusters; expected at least 1 and at least 0"
            )
        self.backbone = backbone
        self.weights_account = ""
        """What was loaded into the backbone, in a line (`LoadReport.summary`)."""
        self.num_features = backbone.num_features
        self.num_classes = num_classes
        self.num_clusters = num_clusters
        self.dropout = dropout
        self.parent_head = nn.Linear(self.num_features, num_classes, bias=False)
        nn.init.xavier_uniform_(self.parent_head.weight)
        self.sub_head: nn.Linear | None = None
        if num_clusters:
            self.sub_head = nn.Linear(self.num_features, num_classes * num_clusters, bias=False)
            nn.init.xavier_uniform_(self.sub_head.weight)

    def start_sub_head(self, weight: torch.Tensor) -> None:
        """Take the weights of an earlier sub-category head, (C*K, D) float32, its outputs in this one's order.

        Raises ValueError for another shape.
        """
        expected = (self.num_classes * self.num_clusters, self.num_features)
        if self.sub_head is None or weight.shape != expected:
            raise ValueError(
                f"got a sub-category head of shape {tuple(weight.shape)}, expected {expected}; take the same backbone "
                'in both rounds, or classifier.subcategory_head = "new"'
            )
        with torch.no_grad():
            self.sub_head.weight.copy_(weight)

    def forward(self, images: torch.Tensor) -> ClassifierOutput:
        """images: (N, 3, H, W) RGB 0..255, uint8 or float."""
        features = self.extract(images)
        dropped = F.dropout(features, self.dropout, self.training)
        sub = self.sub_head(dropped) if self.sub_head is not None else None
        return ClassifierOutput(self.parent_head(dropped), sub, features)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """(N, D) float32: the mean of the feature map over all cells; k-means clusters these (authors' code)."""
        return cast(torch.Tensor, self.backbone(images).float().mean(dim=(2, 3)))

    def extract_regions(
        self, images: torch.Tensor, class_indices: Sequence[Sequence[int]], threshold: float
    ) -> list[torch.Tensor]:
        """For each image (n, D) float32: the mean feature of the confident region of each of its n asked classes.

        images: (N, 3, H, W). class_indices: N lists. A region is where the class's own map of this one view is above
        `threshold` of its maximum (`region_means`). An image with no asked class gets (1, D), its plain mean. Raises
        ValueError for a class_index outside 0..C-1.
        """
        found = []
        for features, indices in zip(self.backbone(images).float(), class_indices, strict=True):
            if len(indices):
                maps = self._maps_of(features[None], indices, relu=True)[0]
                found.append(region_means(features, maps, threshold))
            else:
                found.append(features.mean(dim=(1, 2))[None])
        return found

    def parent_maps(self, images: torch.Tensor, class_indices: Sequence[int], *, relu: bool = True) -> torch.Tensor:
        """ReLU'd maps of the asked classes only: (N, n, h, w) float32 >= 0, unnormalised (Chang et al. 2020, section
        3).

        relu=False: the same without ReLU, so that their mean over all cells is the logit. Raises ValueError for a
        class_index outside 0..C-1.
        """
        return self._maps_of(self.backbone(images), class_indices, relu)

    def parent_maps_and_middle(
        self, images: torch.Tensor, class_indices: Sequence[int], *, relu: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`parent_maps`, and the backbone's feature map at stride 16 (`Backbone.forward_with_middle`)."""
        features, middle = self.backbone.forward_with_middle(images)
        return self._maps_of(features, class_indices, relu), middle

    def _maps_of(self, features: torch.Tensor, class_indices: Sequence[int], relu: bool) -> torch.Tensor:
        wrong = [index for index in class_indices if not 0 <= index < self.num_classes]
        if wrong:
            raise ValueError(f"got class_index {wrong[0]}; expected 0 to {self.num_classes - 1}")
        index = torch.as_tensor(list(class_indices), dtype=torch.long, device=self.parent_head.weight.device)
        weight = self.parent_head.weight[index][:, :, None, None]
        maps = F.conv2d(features, weight)
        return (F.relu(maps) if relu else maps).float()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone weights 1x, biases 2x without decay, heads 10x (they have no bias)."""
        heads = [self.parent_head] if self.sub_head is None else [self.parent_head, self.sub_head]
        return parameter_groups(self.backbone, heads)
