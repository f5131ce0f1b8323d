"""What each stage of a run will cost, from counts and stated assumptions: no image is read, nothing is started.

Legend: e the experiment (with the overrides of the stage's round), n counts of the data, a assumptions; D feature
dimensions, MAC multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs.cost import (
    MANIFEST_ROW_BYTES,
    OPS_PER_MAC,
    CostAssumptions,
    DataCounts,
    StageCost,
    backbone_on_meta,
    crf_seconds,
    macs_of,
    segmenter_on_meta,
)
from jobs.cost_tiles import counts_in_tiles, cut_supervised_masks, cut_tiles
from jobs.cost_training import train_affinity, train_classifier, train_segmenter
from jobs.pipeline import StagePlan, plan
from jobs.train_segmenter import trained_px
from subcat_core.macs import is_depthwise
from subcat_core.views import view_sizes

if TYPE_CHECKING:
    from jobs.config import Experiment
    from subcat_core.crf import CrfSettings

_VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_PREDICT_MAX_PX = 2048  # of segmenter.predict_mask


def stage_costs(experiment: Experiment, counts: DataCounts, assumptions: CostAssumptions) -> list[StageCost]:
    """The cost of each step of the plan, in its order; stages that this model does not know have no estimate."""
    costs, in_tiles = [], counts_in_tiles(experiment, counts)
    for step in plan(experiment):
        estimate = _ESTIMATES.get(step.stage)
        settings = experiment if step.round_index is None else experiment.for_round(step.round_index)
        seen = in_tiles.get(step.stage, counts)
        costs.append(estimate(step, settings, seen, assumptions) if estimate else StageCost(step))
    return costs


def _prepare(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    num_images, num_masks = sum(n.num_images.values()), sum(n.num_masks.values())
    drawn = e.prepare.source.kind == "coco"
    written = num_images * MANIFEST_ROW_BYTES + (num_masks * n.image_px * a.mask_bytes_per_px if drawn else 0)
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


def _make_cams(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    """Of the images with ground truth, and of the sample that is scored without it."""
    num_scored = sum(n.num_masks.values())
    return _cams(step, e, n, a, num_scored + min(n.num_train, e.cams.num_label_free), num_scored)


def _make_train_cams(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    """Of the whole train split; which round will be chosen is not known, so the last one's settings are taken."""
    return _cams(step, e.for_round(e.rounds), n, a, n.num_train, 0)


def _cams(
    step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions, num_images: int, num_scored: int
) -> StageCost:
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
        network_ops=OPS_PER_MAC * macs * num_images,
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
        network_ops=OPS_PER_MAC * macs * n.num_train,
        depthwise=is_depthwise(network),
        cpu_s=1e-9 * n.num_train * (n.image_px * a.decode_ns_per_px + size[0] * size[1] * a.view_ns_per_px),
        what=f"{macs / 1e9:.1f} GMAC an image of {size[0]} x {size[1]} px; D = {network.num_features:,}",
    )


def _feature_rows(e: Experiment, n: DataCounts) -> int:
    return round(n.num_train * n.labels_per_image) if e.features.pool == "region" else n.num_train


def _feature_bytes(e: Experiment, n: DataCounts) -> int:
    return _feature_rows(e, n) * backbone_on_meta(e.classifier.backbone).num_features * _VALUE_BYTES[e.features.dtype]


def _cluster_features(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    settings = e.kmeans
    dimension = backbone_on_meta(e.classifier.backbone).num_features
    num_rows = round(n.num_train * n.labels_per_image)
    macs = num_rows * settings.num_clusters * dimension * settings.max_passes
    held = _feature_rows(e, n) * dimension * _VALUE_BYTES[settings.stored_dtype]
    return StageCost(
        step,
        n.num_train,
        read_bytes=_feature_bytes(e, n),
        written_bytes=num_rows * 12,
        kept_bytes=num_rows * 12,
        cpu_s=macs / (a.kmeans_gmacs * 1e9),
        what=f"{num_rows:,} rows, at most {settings.max_passes} passes; {held / 1e9:.2f} GB in memory",
    )


def _choose_round(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    """The pseudo masks of a sample with each candidate of background; the choice of the round itself costs nothing."""
    crf, settings = e.pseudo_masks.mask.crf, e.choice
    has_background = getattr(e.prepare.source, "has_background", True)
    if settings.background == "config" or e.affinity is not None or not has_background:
        return StageCost(step, 0, what="from the scores of the rounds")
    num_images = min(n.num_train, settings.num_masks)
    crf_s = 0.0 if crf is None else crf_seconds(n.image_px, 1 + n.labels_per_image, crf)
    return StageCost(
        step,
        num_images,
        read_bytes=num_images * n.image_px * a.image_bytes_per_px,
        cpu_s=num_images * (n.image_px * a.decode_ns_per_px * 1e-9 + len(settings.strengths) * crf_s),
        what=f"{len(settings.strengths)} masks an image of a sample",
    )


def _make_affinity_labels(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    assert e.affinity is not None
    crf, num_labels = e.affinity.labels.crf, 1 + n.labels_per_image
    crf_s = 0.0 if crf is None else 2 * crf_seconds(n.image_px, num_labels, crf)
    written = n.num_train * n.image_px * a.mask_bytes_per_px
    return StageCost(
        step,
        n.num_train,
        read_bytes=n.num_train * n.image_px * a.image_bytes_per_px,
        written_bytes=written,
        kept_bytes=written,
        cpu_s=n.num_train * (n.image_px * 1e-9 * (a.decode_ns_per_px + a.png_ns_per_px) + crf_s),
        what=f"two CRFs of {num_labels:.1f} labels, {crf_s:.2f} s an image",
    )


def _walk(e: Experiment, n: DataCounts) -> dict[str, Any]:
    """The net's pass over an image, before its walk on CPUs (0.2 to 0.7 s for 375 x 500 px, not counted)."""
    if e.affinity is None:
        return {}
    network = backbone_on_meta(e.affinity.net.backbone)
    [size] = view_sizes(n.height_px, n.width_px, (1.0,), None, e.affinity.walk.max_px)
    macs = macs_of(network, *size)
    return {"network_ops": OPS_PER_MAC * macs * n.num_train, "depthwise": is_depthwise(network)}


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
        what=("no CRF" if crf is None else f"CRF of {num_labels:.1f} labels, {crf_s:.2f} s an image")
        + (" after the walk" if e.affinity else ""),
        **_walk(e, n),
    )


def _predict(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    settings = e.predict
    num_images = sum(n.num_images.get(split, 0) for split in settings.splits)
    return _predicted(step, e, n, a, num_images, settings.crf, n.num_classes + 1)


def _predict_train(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    assert e.self_training is not None
    return _predicted(step, e, n, a, n.num_train, e.self_training.mask.crf, 1 + n.labels_per_image)


def _predicted(
    step: StagePlan,
    e: Experiment,
    n: DataCounts,
    a: CostAssumptions,
    num_images: int,
    crf: CrfSettings | None,
    num_labels: float,
) -> StageCost:
    settings = e.predict
    network = segmenter_on_meta(e.segmenter.model, n.num_classes)
    base_px = settings.base_px or trained_px(e.segmenter)
    sizes = view_sizes(n.height_px, n.width_px, settings.scales, base_px, _PREDICT_MAX_PX)
    macs = sum(macs_of(network, *size) for size in sizes) * (1 + settings.flip)
    crf_s = 0.0 if crf is None else crf_seconds(n.image_px, num_labels, crf)
    written = num_images * n.image_px * a.mask_bytes_per_px
    image_ns = n.image_px * (a.decode_ns_per_px + a.png_ns_per_px) + sum(h * w for h, w in sizes) * a.view_ns_per_px
    return StageCost(
        step,
        num_images,
        read_bytes=num_images * n.image_px * a.image_bytes_per_px,
        written_bytes=written,
        kept_bytes=written,
        network_ops=OPS_PER_MAC * macs * num_images,
        depthwise=is_depthwise(network),
        cpu_s=num_images * (1e-9 * image_ns + crf_s),
        what=f"{len(sizes) * (1 + settings.flip)} views, {macs / 1e9:.1f} GMAC an image"
        + (f"; CRF of {num_labels:.3g} labels, {crf_s:.2f} s" if crf_s else ""),
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
    "cut_tiles": cut_tiles,
    "train_classifier": train_classifier,
    "make_cams": _make_cams,
    "extract_features": _extract_features,
    "cluster_features": _cluster_features,
    "choose_round": _choose_round,
    "make_train_cams": _make_train_cams,
    "make_affinity_labels": _make_affinity_labels,
    "train_affinity": train_affinity,
    "make_pseudo_masks": _make_pseudo_masks,
    "train_segmenter": train_segmenter,
    "predict": _predict,
    "evaluate": _evaluate,
    "predict_train": _predict_train,
    "cut_supervised_masks": cut_supervised_masks,
    "train_supervised": train_segmenter,
    "predict_supervised": _predict,
    "evaluate_supervised": _evaluate,
}
