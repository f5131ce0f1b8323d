"""The losses of the classifier, over parent classes and over sub-categories; the mean that all losses take; a loss for
labels that may be wrong.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F


def global_mean(local_sum: torch.Tensor, local_count: torch.Tensor) -> torch.Tensor:
    """The mean over what all ranks of a data-parallel training count, not over each rank's own.

    local_sum: scalar float32 with a gradient; local_count: scalar float32 >= 0, the sum of weights, whose gradient is
    left out. Divides by the mean count of a rank, so that the ranks' average, of gradients as of values, is what one
    process gives for all images together; alone that is the plain mean. Nothing counted at all gives 0 with a gradient
    of 0. With gradients on, all ranks must call it equally often; without, it asks no other rank.
    """
    count = local_count.detach()
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return local_sum / count.clamp_min(torch.finfo(torch.float32).tiny)


def multilabel_soft_margin(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross entropy on logits, averaged over the outputs of a sample, then over the samples (`global_mean`).

    logits: (N, M); targets: (N, M) of 0..1; weight: (N,) >= 0 a sample, or None for 1. A weight of 0 leaves a sample
    out; all weights 0 give 0 with a gradient of 0. Computed in float32.
    torch.nn.functional.multilabel_soft_margin_loss where weight is None.
    """
    terms = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=1)
    weight = torch.ones_like(terms) if weight is None else weight.float()
    return global_mean((terms * weight).sum(), weight.sum())


def soft_bootstrap(cross_entropy: torch.Tensor, logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Soft bootstrapping (Reed et al. 2015): cross entropy with the target beta * label + (1 - beta) * own softmax.

    cross_entropy: (N, ...) float32 with the labels alone, 0 where a label is left out. logits: (N, M, ...) float32.
    beta in 0..1. Returns (N, ...): beta * cross_entropy + (1 - beta) * entropy of the softmax. As theirs, the gradient
    goes through the target too, which rewards a sure answer whatever the label. With a target that is held fixed the
    gradient would be beta times that of cross entropy, a smaller step and nothing else.
    """
    log_probability = logits.log_softmax(dim=1)
    entropy = -(log_probability.exp() * log_probability).sum(dim=1)
    return beta * cross_entropy + (1 - beta) * entropy


def easy_pixel_weights(terms: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Online easy example mining (OEEM, Li et al. 2022): pixels of an image weigh softmax(-loss) over the image's mean.

    terms: (N, ...) float32, the loss of each pixel; valid: (N, ...) float32, 0 for those left out. Returns (N, ...)
    without gradient, 0 where left out; over the valid pixels of an image they are 1 on average, so a wrong label that
    the network does not believe counts little and the step stays as long.
    """
    scores = torch.where(valid > 0, -terms.detach(), -torch.inf).flatten(1)
    shares = scores.softmax(dim=1).nan_to_num(0.0)  # an image without valid pixels
    return (shares * (valid > 0).flatten(1).sum(dim=1, keepdim=True)).view_as(terms)


def guess_loss(positives: np.ndarray, num_samples: int) -> float:
    """`multilabel_soft_margin` of the best answer that is the same for all samples: how frequent each class is.

    positives: (C,) int, samples with each class. Returns the mean over classes of the binary entropy, in nats.
    """
    share = np.asarray(positives, np.float64) / max(num_samples, 1)
    tiny = np.finfo(np.float64).tiny  # 0 * log(0) counts as 0
    parts = [part * np.log(np.maximum(part, tiny)) for part in (share, 1 - share)]
    return float(-(parts[0] + parts[1]).mean())


def joint_loss(
    parent: torch.Tensor,
    sub: torch.Tensor | None,
    parent_targets: torch.Tensor,
    sub_targets: torch.Tensor | None,
    subcategory_weight: float = 5.0,
    sample_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Parent loss + subcategory_weight * sub-category loss (Chang et al. 2020; 5 in the authors' code).

    parent: (N, C) logits; sub: (N, C*K) logits, or None in round 0; targets of the same shapes; sample_weight: (N,)
    or None. Each loss is the mean over its own outputs, so one positive among C*K outputs weighs 1 / (C*K). Returns
    the scalar to minimise, and detached scalars to log: loss, parent_loss and, with sub-categories, sub_loss. Raises
    ValueError when there are sub-category outputs and no targets for them.
    """
    parent_loss = multilabel_soft_margin(parent, parent_targets, sample_weight)
    if sub is None:
        return parent_loss, {"loss": parent_loss.detach(), "parent_loss": parent_loss.detach()}
    if sub_targets is None:
        raise ValueError(
            f"got {sub.shape[1]} sub-category outputs and no targets; give sub_targets, or build with K = 0"
        )
    sub_loss = multilabel_soft_margin(sub, sub_targets, sample_weight)
    loss = parent_loss + subcategory_weight * sub_loss
    return loss, {"loss": loss.detach(), "parent_loss": parent_loss.detach(), "sub_loss": sub_loss.detach()}
