"""What each training of a run will cost, from counts and stated assumptions (legend: jobs/cost_stages.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from cluster.trainee import OptimiserSettings
from jobs.cost import (
    OPS_PER_MAC,
    CostAssumptions,
    DataCounts,
    StageCost,
    backbone_on_meta,
    macs_of,
    segmenter_on_meta,
)
from jobs.pipeline import StagePlan
from subcat_core.macs import count_parameters, is_depthwise

if TYPE_CHECKING:
    from jobs.config import Experiment

_TRAINING_PASSES = 3  # forward, and twice as much backward; what is frozen is not taken off


def _training(
    step: StagePlan,
    network: nn.Module,
    crop_px: int,
    optimiser: OptimiserSettings,
    n: DataCounts,
    a: CostAssumptions,
    *,
    num_validated: int = 0,
    bytes_per_px: float,
    scales: tuple[float, ...] = (1.0,),
) -> StageCost:
    """num_validated: images of a forward pass after the training, each time it is validated. scales: factors at which
    each crop is seen.
    """
    macs = sum(macs_of(network, int(crop_px * scale), int(crop_px * scale)) for scale in scales)
    num_steps, num_epochs = _training_length(optimiser, n.num_train)
    num_crops = num_steps * optimiser.batch_size
    if num_validated:
        every = optimiser.validate_every or num_epochs
        num_validated *= -(-num_epochs // every)
    state_bytes = 4 * count_parameters(network)
    decode_s = n.image_px * a.decode_ns_per_px * 1e-9
    return StageCost(
        step,
        n.num_train,
        read_bytes=(num_crops + num_validated) * n.image_px * bytes_per_px,
        written_bytes=state_bytes * (1 + 2 * num_epochs),  # a checkpoint holds the momentum too
        kept_bytes=state_bytes * (1 + 2 * min(optimiser.keep_checkpoints, num_epochs)),
        network_ops=OPS_PER_MAC * macs * (_TRAINING_PASSES * num_crops + num_validated),
        bf16=optimiser.precision != "fp32",
        depthwise=is_depthwise(network),
        cpu_s=num_crops * (decode_s + crop_px**2 * a.augment_ns_per_px * 1e-9) + num_validated * decode_s,
        what=f"{num_epochs} epochs, {num_steps:,} steps; {macs / 1e9:.1f} GMAC a crop of {crop_px} px",
    )


def _training_length(optimiser: OptimiserSettings, num_rows: int) -> tuple[int, int]:
    """(steps, epochs) of a training on so many images."""
    length = optimiser.length(num_rows)
    return length.num_steps, length.num_epochs


def train_classifier(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    settings = e.classifier
    return _training(
        step,
        backbone_on_meta(settings.backbone),
        settings.augment.crop_px,
        settings.optimiser,
        n,
        a,
        num_validated=n.num_images.get(settings.validation_split or "", 0),
        bytes_per_px=a.image_bytes_per_px,
    )


def train_segmenter(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    settings = e.segmenter
    network = segmenter_on_meta(settings.model, n.num_classes)
    bytes_per_px = a.image_bytes_per_px + a.mask_bytes_per_px
    return _training(
        step,
        network,
        settings.augment.crop_px,
        settings.optimiser,
        n,
        a,
        bytes_per_px=bytes_per_px,
        scales=settings.model.train_scales,
    )


def train_affinity(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    """The backbone alone: the layers on top are a few per cent."""
    assert e.affinity is not None
    settings = e.affinity
    return _training(
        step,
        backbone_on_meta(settings.net.backbone),
        settings.augment.crop_px,
        settings.optimiser,
        n,
        a,
        bytes_per_px=a.image_bytes_per_px + a.mask_bytes_per_px,
    )
