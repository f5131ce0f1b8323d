"""What each stage of a run will cost, from counts and stated assumptions: no image is read, nothing is started.

Legend: e the experiment (with the overrides of the stage's round), n counts of the data, a assumptions; D feature
dimensions, MAC multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from cluster.trainee import OptimiserSettings
from cluster.training_input import BatchPlan
from jobs.cost import (
    CostAssumptions,
    DataCounts,
    StageCost,
    backbone_on_meta,
    crf_seconds,
    macs_of,
    segmenter_on_meta,
)
from jobs.pipeline import StagePlan, plan
from jobs.train_segmenter import trained_px
from subcat_core.macs import count_parameters, is_depthwise
from subcat_core.views import view_sizes

if TYPE_CHECKING:
    from jobs.config import Experiment

_OPS_PER_MAC = 2
_TRAINING_PASSES = 3  # forward, and twice as much backward; what is frozen is not taken off
_MANIFEST_ROW_BYTES = 200
_VALUE_BYTES = {"float16": 2, "float32": 4}
_PREDICT_MAX_PX = 2048  # of segmenter.predict_mask


def stage_costs(experiment: Experiment, counts: DataCounts, assumptions: CostAssumptions) -> list[StageCost]:
    """The cost of each step of the plan, in its order; stages that this model does not know have no estimate."""
    costs = []
    for step in plan(experiment):
        estimate = _ESTIMATES.get(step.stage)
        settings = experiment if step.round_index is None else experiment.for_round(step.round_index)
        costs.append(estimate(step, settings, counts, assumptions) if estimate else StageCost(step))
    return costs


def _prepare(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    num_images, num_masks = sum(n.num_images.values()), sum(n.num_masks.values())
    drawn = e.prepare.source.kind == "coco"
    written = num_images * _MANIFEST_ROW_BYTES + (num_masks * n.image_px * a.mask_bytes_per_px if drawn else 0)
    pixels = e.prepare.decode == "full"
    return StageCost(
        step,
        num_images,
        read_bytes=n.image_px * (num_images * a.image_bytes_per_px + (0 if drawn else num_masks * a.mask_bytes_per_px)),
        written_bytes=written,
        kept_bytes=written,
        cpu_s=n.image_px * 1e-9 * (num_images * a.decode_ns_per_px * pixels + num_masks * a.png_ns_per_px),
        what=f"every image and {num_masks:,} masks are read once" + (", masks drawn" if drawn else ""),
    )


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
        network_ops=_OPS_PER_MAC * macs * (_TRAINING_PASSES * num_crops + num_validated),
        bf16=optimiser.precision != "fp32",
        depthwise=is_depthwise(network),
        cpu_s=num_crops * (decode_s + crop_px**2 * a.augment_ns_per_px * 1e-9) + num_validated * decode_s,
        what=f"{num_epochs} epochs, {num_steps:,} steps; {macs / 1e9:.1f} GMAC a crop of {crop_px} px",
    )


def _training_length(optimiser: OptimiserSettings, num_rows: int) -> tuple[int, int]:
    """(steps, epochs) of a training on so many images."""
    # needs branch deeplab: length = optimiser.length(num_rows); return length.num_steps, length.num_epochs
    return BatchPlan(num_rows, optimiser.batch_size, 0).steps_per_epoch * optimiser.epochs, optimiser.epochs


def _train_classifier(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
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


def _train_segmenter(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    settings = e.segmenter
    network = segmenter_on_meta(settings.model, n.num_classes)
    bytes_per_px = a.image_bytes_per_px + a.mask_bytes_per_px
    # needs branch deeplab: scales=settings.model.train_scales
    return _training(step, network, settings.augment.crop_px, settings.optimiser, n, a, bytes_per_px=bytes_per_px)


def _make_cams(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    num_scored = num_images = sum(n.num_masks.values())
    if step.round_index == e.rounds:  # the whole train split, and the other splits that are scored
        num_images = n.num_train + sum(n.num_images[split] for split in n.num_masks if split != "train")
    settings = e.cams.cam
    changes = {"output_stride": e.cams.output_stride or e.classifier.backbone.output_stride}
    network = backbone_on_meta(e.classifier.backbone.model_copy(update=changes))
    sizes = view_sizes(n.height_px, n.width_px, settings.scales, settings.base_px, settings.max_px)
    macs = sum(macs_of(network, *size) for size in sizes) * (1 + settings.flip)
    [(height, width)] = view_sizes(n.height_px, n.width_px, (1.0,), None, settings.max_px)
    cells = math.ceil(height / settings.grid_stride_px) * math.ceil(width / settings.grid_stride_px)
    written = num_images * n.labels_per_image * cells * 2
    image_ns = n.image_px * (a.decode_ns_per_px + a.cam_ns_per_px) + sum(h * w for h, w in sizes) * a.view_ns_per_px
    score_ns = n.image_px * (a.png_ns_per_px + a.score_ns_per_px)
    return StageCost(
        step,
        num_images,
        read_bytes=n.image_px * (num_images * a.image_bytes_per_px + num_scored * a.mask_bytes_per_px),
        written_bytes=written,
        kept_bytes=written,
        network_ops=_OPS_PER_MAC * macs * num_images,
        bf16=settings.bf16,
        depthwise=is_depthwise(network),
        cpu_s=1e-9 * (num_images * image_ns + num_scored * score_ns),
        what=f"{len(sizes) * (1 + settings.flip)} views, {macs / 1e9:.1f} GMAC an image; {num_scored:,} are scored",
    )


def _extract_features(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    network = backbone_on_meta(e.classifier.backbone)
    settings = e.features
    [size] = view_sizes(n.height_px, n.width_px, (1.0,), settings.base_px, settings.max_px)
    macs = macs_of(network, *size)
    written = _feature_bytes(e, n)
    return StageCost(
        step,
        n.num_train,
        read_bytes=n.num_train * n.image_px * a.image_bytes_per_px,
        written_bytes=written,
        kept_bytes=written,
        network_ops=_OPS_PER_MAC * macs * n.num_train,
        depthwise=is_depthwise(network),
        cpu_s=1e-9 * n.num_train * (n.image_px * a.decode_ns_per_px + size[0] * size[1] * a.view_ns_per_px),
        what=f"{macs / 1e9:.1f} GMAC an image of {size[0]} x {size[1]} px; D = {network.num_features:,}",
    )


def _feature_bytes(e: Experiment, n: DataCounts) -> int:
    return n.num_train * backbone_on_meta(e.classifier.backbone).num_features * _VALUE_BYTES[e.features.dtype]


def _cluster_features(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    settings = e.kmeans
    dimension = backbone_on_meta(e.classifier.backbone).num_features
    num_rows = round(n.num_train * n.labels_per_image)
    macs = num_rows * settings.num_clusters * dimension * settings.max_passes
    held = n.num_train * dimension * _VALUE_BYTES[settings.stored_dtype]
    return StageCost(
        step,
        n.num_train,
        read_bytes=_feature_bytes(e, n),
        written_bytes=num_rows * 12,
        kept_bytes=num_rows * 12,
        cpu_s=macs / (a.kmeans_gmacs * 1e9),
        what=f"{num_rows:,} rows, at most {settings.max_passes} passes; {held / 1e9:.2f} GB in memory",
    )


def _make_pseudo_masks(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    crf, num_labels = e.pseudo_masks.mask.crf, 1 + n.labels_per_image
    crf_s = 0.0 if crf is None else crf_seconds(n.image_px, num_labels, crf)
    image_s = n.image_px * 1e-9 * (a.decode_ns_per_px + a.png_ns_per_px) + crf_s
    cells = math.ceil(n.height_px / e.cams.cam.grid_stride_px) * math.ceil(n.width_px / e.cams.cam.grid_stride_px)
    written = n.num_train * n.image_px * a.mask_bytes_per_px
    return StageCost(
        step,
        n.num_train,
        read_bytes=n.num_train * (n.image_px * a.image_bytes_per_px + n.labels_per_image * cells * 2),
        written_bytes=written,
        kept_bytes=written,
        cpu_s=n.num_train * image_s,
        what="no CRF" if crf is None else f"CRF of {num_labels:.1f} labels, {crf_s:.2f} s an image",
    )


def _predict(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    settings = e.predict
    num_images = sum(n.num_images.get(split, 0) for split in settings.splits)
    network = segmenter_on_meta(e.segmenter.model, n.num_classes)
    base_px = settings.base_px or trained_px(e.segmenter)
    sizes = view_sizes(n.height_px, n.width_px, settings.scales, base_px, _PREDICT_MAX_PX)
    macs = sum(macs_of(network, *size) for size in sizes) * (1 + settings.flip)
    crf_s = 0.0 if settings.crf is None else crf_seconds(n.image_px, n.num_classes + 1, settings.crf)
    written = num_images * n.image_px * a.mask_bytes_per_px
    image_ns = n.image_px * (a.decode_ns_per_px + a.png_ns_per_px) + sum(h * w for h, w in sizes) * a.view_ns_per_px
    return StageCost(
        step,
        num_images,
        read_bytes=num_images * n.image_px * a.image_bytes_per_px,
        written_bytes=written,
        kept_bytes=written,
        network_ops=_OPS_PER_MAC * macs * num_images,
        depthwise=is_depthwise(network),
        cpu_s=num_images * (1e-9 * image_ns + crf_s),
        what=f"{len(sizes) * (1 + settings.flip)} views, {macs / 1e9:.1f} GMAC an image"
        + (f"; CRF of {n.num_classes + 1} labels, {crf_s:.2f} s" if crf_s else ""),
    )


def _evaluate(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    num_images = sum(n.num_masks.get(split, 0) for split in e.predict.splits)
    return StageCost(
        step,
        num_images,
        read_bytes=2 * num_images * n.image_px * a.mask_bytes_per_px,
        cpu_s=1e-9 * num_images * n.image_px * (2 * a.png_ns_per_px + a.score_ns_per_px),
        what="two masks an image",
    )


_ESTIMATES: dict[str, Callable[[StagePlan, Experiment, DataCounts, CostAssumptions], StageCost]] = {
    "prepare": _prepare,
    "train_classifier": _train_classifier,
    "make_cams": _make_cams,
    "extract_features": _extract_features,
    "cluster_features": _cluster_features,
    "make_pseudo_masks": _make_pseudo_masks,
    "train_segmenter": _train_segmenter,
    "predict": _predict,
    "evaluate": _evaluate,
}
