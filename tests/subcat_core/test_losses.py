"""Losses: torch's own, by hand, and weighted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from subcat_core.classes import IGNORE
from subcat_core.losses import (
    easy_pixel_weights,
    global_mean,
    guess_loss,
    joint_loss,
    multilabel_soft_margin,
    soft_bootstrap,
)
from subcat_core.segmenter import segmentation_loss


def test_is_torchs_multilabel_soft_margin_loss() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 7) * 4, (torch.rand(5, 7) < 0.3).float()
    torch.testing.assert_close(multilabel_soft_margin(logits, targets), F.multilabel_soft_margin_loss(logits, targets))
    torch.testing.assert_close(
        multilabel_soft_margin(logits, targets, torch.ones(5)), F.multilabel_soft_margin_loss(logits, targets)
    )


def test_weight_leaves_samples_out() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3), (torch.rand(4, 3) < 0.5).float()
    weighted = multilabel_soft_margin(logits, targets, torch.tensor([1.0, 0.0, 3.0, 0.0]))
    first, third = (multilabel_soft_margin(logits[[row]], targets[[row]]) for row in (0, 2))
    torch.testing.assert_close(weighted, (first + 3 * third) / 4)


def test_no_sample_counts() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = multilabel_soft_margin(logits, torch.ones(2, 3), torch.zeros(2))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_joint_loss_by_hand() -> None:
    # Two classes, two clusters each; logit 0 costs log 2 whatever the target, logit log 3 has probability 3/4.
    parent, sub = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0, 0.0, 0.0]])
    parent_targets, sub_targets = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    loss, parts = joint_loss(parent, sub, parent_targets, sub_targets, subcategory_weight=5.0)
    expected_sub = (-math.log(3 / 4) + 3 * math.log(2)) / 4
    assert parts["parent_loss"].item() == pytest.approx(math.log(2))
    assert parts["sub_loss"].item() == pytest.approx(expected_sub)
    assert loss.item() == pytest.approx(math.log(2) + 5 * expected_sub)
    assert parts["loss"].item() == loss.item()


def test_round_0_is_the_parent_loss() -> None:
    parent, targets = torch.randn(3, 4), torch.ones(3, 4)
    loss, parts = joint_loss(parent, None, parent_targets=targets, sub_targets=None)
    torch.testing.assert_close(loss, multilabel_soft_margin(parent, targets))
    assert set(parts) == {"loss", "parent_loss"}


def test_bf16_logits_are_scored_in_float32() -> None:
    logits, targets = torch.randn(3, 4).bfloat16(), torch.ones(3, 4)
    loss = multilabel_soft_margin(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, multilabel_soft_margin(logits.float(), targets))


def test_targets_are_asked_for() -> None:
    with pytest.raises(ValueError, match="12 sub-category outputs and no targets"):
        joint_loss(torch.zeros(1, 3), torch.zeros(1, 12), torch.zeros(1, 3), None)


class Both(nn.Module):
    """Pixels (N, 2, 4, 4) -> parent (N, 3), sub (N, 6) and mask (N, 4, 4, 4) logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parent, self.sub, self.mask = nn.Linear(32, 3), nn.Linear(32, 6), nn.Conv2d(2, 4, 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = pixels.flatten(1)
        return self.parent(flat), self.sub(flat), self.mask(pixels)


def both_losses(model: nn.Module, rows: slice) -> torch.Tensor:
    """Classifier and segmenter loss on rows of six images, of very uneven weights and numbers of valid pixels."""
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(6, 2, 4, 4, generator=generator)
    targets = (torch.rand(6, 9, generator=generator) < 0.4).float()
    masks = torch.randint(0, 4, (6, 8, 8), generator=generator).to(torch.uint8)
    masks[0, 1:] = IGNORE
    masks[4] = IGNORE
    weight = torch.tensor([0.0, 0.2, 0.0, 1.0, 3.0, 1.0])
    parent, sub, logits = model(pixels[rows])
    classified, _ = joint_loss(parent, sub, targets[rows, :3], targets[rows, 3:], sample_weight=weight[rows])
    return classified + segmentation_loss(logits, masks[rows], weight[rows]) + segmentation_loss(logits, masks[rows])


def train_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(Both())
    loss = both_losses(model, slice(3 * rank, 3 * rank + 3))
    loss.backward()
    alone = None
    if rank == 0:  # a rank that validates waits for nobody
        with torch.no_grad():
            alone = both_losses(model.module, slice(0, 3))
    gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    torch.save((loss.detach(), gradients, alone), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_of_uneven_weights_have_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(train_one_rank, (str(tmp_path),), nprocs=2)
    model = Both()
    expected = both_losses(model, slice(0, 6))
    expected.backward()
    (loss_0, gradients, alone), (loss_1, others, _) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    for name, parameter in model.named_parameters():
        assert torch.equal(gradients[name], others[name])
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close((loss_0 + loss_1) / 2, expected.detach())
    torch.testing.assert_close(alone, both_losses(model, slice(0, 3)).detach())


def test_mean_of_nothing_is_zero_and_the_count_has_no_gradient() -> None:
    total, count = torch.tensor(0.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    global_mean(total, count).backward()
    assert count.grad is None
    assert global_mean(torch.tensor(6.0), torch.tensor(4.0)).item() == 1.5


def test_guess_loss_is_that_of_the_best_constant_answer() -> None:
    positives, num_samples = np.array([1, 4, 2]), 4  # log 2 for the third class, 0 for the one that all have
    by_hand = (-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) + 0.0 + np.log(2)) / 3
    assert guess_loss(positives, num_samples) == pytest.approx(by_hand, abs=1e-12)
    targets = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 0]])
    logits = torch.tensor([[np.log(1 / 3), 40.0, 0.0]]).expand(4, 3)
    assert multilabel_soft_margin(logits, targets).item() == pytest.approx(by_hand, abs=1e-6)


def test_soft_bootstrap_by_hand() -> None:
    # Probabilities 0.75 and 0.25, label 1: 0.8 * log 4 + 0.2 * (0.75 * log(4 / 3) + 0.25 * log 4).
    logits = torch.tensor([[math.log(3.0), 0.0]])
    cross_entropy = F.cross_entropy(logits, torch.tensor([1]), reduction="none")
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    expected = 0.8 * math.log(4) + 0.2 * entropy
    assert soft_bootstrap(cross_entropy, logits, 0.8).item() == pytest.approx(expected, rel=1e-6)


def test_soft_bootstrap_agrees_with_a_plain_loop_and_is_no_smaller_step() -> None:
    rng = np.random.default_rng(3)
    values, masks = rng.normal(size=(2, 3, 4, 5)) * 3, rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (2, 4, 5))
    total, count = 0.0, 0
    for image, row, column in np.ndindex(masks.shape):
        if masks[image, row, column] != IGNORE:
            own = np.exp(values[image, :, row, column]) / np.exp(values[image, :, row, column]).sum()
            target = 0.8 * np.eye(3)[masks[image, row, column]] + 0.2 * own
            total, count = total - float((target * np.log(own)).sum()), count + 1
    logits = torch.from_numpy(values).float().requires_grad_()
    loss = segmentation_loss(logits, torch.from_numpy(masks), bootstrap_beta=0.8)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    [gradient] = torch.autograd.grad(loss, logits)
    [plain] = torch.autograd.grad(segmentation_loss(logits, torch.from_numpy(masks)), logits)
    assert (gradient - 0.8 * plain).abs().max() > 0.05 * plain.abs().max()


def test_easy_pixel_weights_by_hand() -> None:
    """exp(-loss) of 1, 1/2 and 1/2, the last one left out: 2 * (2/3, 1/3); an image of padding counts nothing."""
    terms = torch.tensor([[[0.0, math.log(2), math.log(2)]], [[1.0, 2.0, 3.0]]], requires_grad=True)
    valid = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])
    weights = easy_pixel_weights(terms, valid)
    torch.testing.assert_close(weights, torch.tensor([[[4 / 3, 2 / 3, 0.0]], [[0.0, 0.0, 0.0]]]))
    assert not weights.requires_grad


def test_easy_pixels_in_the_segmenters_loss_agree_with_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).float()
    masks = torch.randint(0, 3, (2, 4, 5), generator=generator).to(torch.uint8)
    masks[0, 0, :3] = 255
    total, count = 0.0, 0
    for image in range(2):
        losses = [
            -math.log(math.exp(logits[image, int(label), y, x]) / sum(math.exp(v) for v in logits[image, :, y, x]))
            for (y, x), label in np.ndenumerate(masks[image].numpy())
            if label != 255
        ]
        easy = [math.exp(-loss) for loss in losses]
        total += sum(loss * len(losses) * e / sum(easy) for loss, e in zip(losses, easy, strict=True))
        count += len(losses)
    found = segmentation_loss(logits, masks, easy_pixels=True)
    assert found.item() == pytest.approx(total / count, rel=1e-5)
