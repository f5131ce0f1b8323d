"""Class activation maps of the tagged classes, and their score wherever there is ground truth.

Reads:   manifest, classifier of the round
Writes:  rounds/RR/cams: part-*.parquet (schema CAMS, a quarter of the resolution); scores.json with the threshold
         curves. `run_train` writes the same tables of the whole train split, of the round that was chosen, to cams
Runs on: a fixed pool of Ray Data actors, a shard at a time; in process with stream.num_actors = 0

A round's own folder covers what rounds are compared by: the images with ground truth, and a sample of the train split
that is scored without it (subcat_core/label_free.py). Tags gate the maps on every split: no deployable numbers, and the
protocol says so. Maps of tiles are scored once they are put together to those of whole images; without ground truth, a
sampled tile is scored by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.image_reading import max_pixels
from cluster.storage import MissingFileError, Storage, read_uri
from cluster.streams import BadRow, ShardOutput, ShardSummary, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, round_folder, stream_stats
from jobs.manifest import Manifest
from jobs.protocol import TAGS, Protocol
from jobs.sample import sample_ids
from jobs.scoring import PAPER_THRESHOLD, SplitSweeps
from jobs.tile_images import TILE_COLUMNS, TileScorer, is_of_scored_image
from jobs.train_classifier import ClassifierSettings, load_classifier
from subcat_core import schemas
from subcat_core.cam import CamSettings, compute_cams, upsample_cam
from subcat_core.classes import ClassTable, to_class_ids
from subcat_core.images import ImageError, decode_mask
from subcat_core.label_free import LabelFreeGrid
from subcat_core.metrics import ThresholdSweep
from subcat_core.settings import Settings

COLUMNS = ["image_id", "uri", "height_px", "width_px", "labels", "mask_uri"]


NO_THRESHOLD = -1.0
"""Stands for the threshold where there is no background."""


class CamStageSettings(Settings):
    """How maps are made and scored."""

    cam: CamSettings = CamSettings()
    output_stride: Literal[8, 16, 32] | None = None
    """Stride of the maps, by dilating the trained network; None: as trained. Half the stride costs twice the time."""
    batch_size: int = Field(default=8, ge=1)
    """Images whose maps are computed together; only equal sizes share a forward pass."""
    num_label_free: int = Field(default=160, ge=2, le=100_000)
    """Images of the train split that are scored without ground truth, to choose a round by; few suffice, since the
    same images are compared in every round."""
    num_thresholds: int = Field(default=60, ge=2, le=1000)
    """Points of the threshold curve between 0 and 1; the paper's 0.15 is always one of them."""

    def thresholds(self, classes: ClassTable) -> list[float]:
        """Background scores of the curve; without background one that no map is below, so that the largest map wins."""
        if not classes.has_background:
            return [NO_THRESHOLD]
        grid = np.round(np.arange(self.num_thresholds) / self.num_thresholds, 4).tolist()
        return sorted({*grid, PAPER_THRESHOLD})


class CamWorker:
    """One actor: holds the network, turns a manifest shard into a CAM shard and a confusion matrix a threshold."""

    def __init__(
        self,
        *,
        classifier: Storage,
        classifier_settings: ClassifierSettings,
        classes: ClassTable,
        settings: CamStageSettings,
        sample: frozenset[str] | None,
    ) -> None:
        """sample: image_ids that are scored without ground truth; None: all images, and none is scored."""
        self.settings = settings
        self.classes = classes
        self.sample = sample
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = (
            load_classifier(classifier, classifier_settings, classes.num_classes, settings.output_stride)
            .to(self.device)
            .to(memory_format=torch.channels_last)
        )

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        table, images = inputs["manifest"], inputs.get("images")
        if self.sample is not None:
            in_sample = pc.is_in(table["image_id"], value_set=pa.array(sorted(self.sample), pa.string()))
            scored = table["mask_uri"].is_valid() if images is None else is_of_scored_image(table, images)
            table = table.filter(pc.or_(scored, in_sample))
        num_classes, thresholds = self.classes.num_classes, self.settings.thresholds(self.classes)
        made = _Made(ThresholdSweep(num_classes, thresholds), ThresholdSweep(num_classes, thresholds))
        if images is not None:
            made.tiles = TileScorer(
                table, images, lambda row: read_truth(row, self.classes), made.sweeps(self.settings)
            )
        waiting: list[tuple[dict[str, Any], np.ndarray]] = []
        for row, image in iter_images(table):
            if isinstance(image, BadRow):
                made.bad.append(image)
                if made.tiles is not None:
                    made.tiles.drop(row["parent_id"])
                continue
            waiting.append((row, image))
            if len(waiting) == self.settings.batch_size:
                self._flush(waiting, made)
        self._flush(waiting, made)
        if made.tiles is not None:
            made.tiles.finish()
            made.bad += made.tiles.bad
            made.num_scored = made.tiles.num_scored
        stats = {"sweep": made.sweep.to_json(), "num_scored": made.num_scored, "label_free": made.label_free}
        if self.settings.cam.affinity is not None:
            stats["plain_sweep"] = made.plain_sweep.to_json()
        table = pa.Table.from_pylist(made.rows, schemas.CAMS)
        return ShardOutput(table, bad=made.bad, stats=stats, num_rows=len(made.rows))

    def _flush(self, waiting: list[tuple[dict[str, Any], np.ndarray]], made: _Made) -> None:
        """Maps of the images that wait, and their scores where there is ground truth."""
        labels = [list(row["labels"] or []) for row, _ in waiting]
        cams = compute_cams(self.model, [image for _, image in waiting], labels, self.settings.cam, self.device)
        for (row, image), present, cam in zip(waiting, labels, cams, strict=True):
            stored = cam.maps.astype(np.float16)
            made.rows.append(
                {
                    "image_id": row["image_id"],
                    "class_indices": present,
                    "cam_height": stored.shape[1],
                    "cam_width": stored.shape[2],
                    "cam": stored.ravel(),
                }
            )
            if self.sample is None:
                continue
            if row["image_id"] in self.sample and len(present) >= (1 if self.classes.has_background else 2):
                grid = LabelFreeGrid(
                    cam.maps, to_class_ids(np.asarray(present)), image, has_background=self.classes.has_background
                )
                thresholds = self.settings.thresholds(self.classes)
                made.label_free[row["image_id"]] = grid.threshold_scores(thresholds).tolist()
            size, sweeps = image.shape[:2], made.sweeps(self.settings)
            scored = {"sweep": stored.astype(np.float32), "plain_sweep": cam.plain}
            if made.tiles is not None:
                made.tiles.add(row, present, {name: upsample_cam(scored[name], *size) for name in sweeps})
                continue
            if not row["mask_uri"] or not present:  # without tags nothing competes with background
                continue
            try:
                truth = read_truth(row, self.classes)
            except (ImageError, MissingFileError) as error:
                made.bad.append(BadRow(row["image_id"], row["mask_uri"], str(error)))
                continue
            for name, sweep in sweeps.items():
                sweep.update(upsample_cam(scored[name], *size), present, truth)
            made.num_scored += 1
        waiting.clear()


@dataclasses.dataclass
class _Made:
    """What a shard has so far. plain_sweep: of the maps before affinity spreads them. label_free: image_id -> (T,)."""

    sweep: ThresholdSweep
    plain_sweep: ThresholdSweep
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bad: list[BadRow] = dataclasses.field(default_factory=list)
    label_free: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    num_scored: int = 0
    tiles: TileScorer | None = None

    def sweeps(self, settings: CamStageSettings) -> dict[str, ThresholdSweep]:
        """Those that are filled, by their names in the stats."""
        sweeps = {"sweep": self.sweep}
        return sweeps if settings.cam.affinity is None else {**sweeps, "plain_sweep": self.plain_sweep}


def read_truth(row: dict[str, Any], classes: ClassTable) -> np.ndarray:
    """(H, W) uint8 class ids of a manifest row's ground truth. Raises ImageError or StorageError."""
    return decode_mask(read_uri(row["mask_uri"]), classes.mask_lut(), max_pixels(row))


def read_cams(table: pa.Table) -> dict[str, tuple[list[int], np.ndarray]]:
    """image_id -> (class_indices, maps (n, h, w) float16) of a CAM table; the maps are views, not copies."""
    column = table["cam"].combine_chunks()
    values, ends = column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())
    cams = {}
    for row, end in zip(table.drop_columns(["cam"]).to_pylist(), ends, strict=True):
        shape = (len(row["class_indices"]), row["cam_height"], row["cam_width"])
        cams[row["image_id"]] = (row["class_indices"], values[end - math.prod(shape) : end].reshape(shape))
    return cams


def run(
    context: StageContext, manifest: Manifest, round_index: int, classifier: Artifact, images: Manifest | None = None
) -> Artifact:
    """CAMs of one round, of the images that rounds are compared by. images: of which `manifest` holds the tiles.

    Raises ValueError for maps that are a softmax over classes beside which there is background.
    """
    experiment = context.experiment
    settings = experiment.cams
    has_background = manifest.classes.has_background
    if settings.cam.normalise == "softmax" and has_background:
        raise ValueError(
            'cams.cam.normalise = "softmax": an image of one class would be that class all over, and nothing '
            'background; use "maximum", or a source without background (has_background = false)'
        )

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        sample = sample_ids(manifest, settings.num_label_free)
        scored = set((images or manifest).shard_names(with_masks=True)) & set(manifest.shard_names())
        shards = sorted({*scored, *sample})
        in_sample = frozenset(image_id for ids in sample.values() for image_id in ids)
        sweeps, plain_sweeps = SplitSweeps(manifest, "sweep"), SplitSweeps(manifest, "plain_sweep")
        label_free: dict[str, list[float]] = {}

        def fold(summary: ShardSummary) -> None:
            sweeps.add(summary)
            label_free.update(summary.stats["label_free"])
            if settings.cam.affinity is not None:
                plain_sweeps.add(summary)

        where = f"round {round_index}"
        stats = _stream(context, manifest, artifact, classifier, shards, where, in_sample, fold, images)
        affinity = settings.cam.affinity
        protocol = Protocol(
            supervision=TAGS,
            masks=experiment.evaluation.masks,
            tags="used: only the tagged classes have maps, on every split",
            threshold="constant background score; best one picked on the split itself"
            if has_background
            else "none: argmax over the tagged classes; the data set has no background",
            crf=None,
            scales=settings.cam.scales,
            flip=settings.cam.flip,
            base_px=settings.cam.base_px,
            weights=experiment.classifier.backbone.weights,
            rng_seed=experiment.rng_seed,
            details={
                "affinity": "no" if affinity is None else affinity.model_dump(mode="json"),
                "normalise": settings.cam.normalise,
                **experiment.prepare.protocol(),
            },
        ).to_json()
        child.log_params({f"protocol.{key}": value for key, value in protocol.items()})
        scores: dict[str, Any] = {"protocol": protocol, "splits": sweeps.scores()}
        for split, plain in plain_sweeps.scores().items():
            scores["splits"][split]["plain"] = {key: plain[key] for key in ("fixed", "best", "miou") if key in plain}
        scores["label_free"] = label_free_scores(settings.thresholds(manifest.classes), label_free)
        artifact.folder.write_json("scores.json", scores)
        for split, score in scores["splits"].items():
            curve = {"best": score["best"], "015": score["fixed"]} if "best" in score else {"argmax": score}
            values = {f"make_cams/miou_{split}_{kind}": part["miou"] for kind, part in curve.items()}
            child.log_metrics(values, round_index)
        child.log_metrics({"make_cams/label_free": scores["label_free"]["best"]["score"]}, round_index)
        return stats

    return complete(
        context,
        name=round_folder(round_index, "cams"),
        stage="make_cams",
        round_index=round_index,
        inputs={**_inputs(settings, manifest, classifier), "covers": "images with ground truth, and a sample of train"},
        work=work,
    )


def run_train(context: StageContext, manifest: Manifest, round_index: int, classifier: Artifact) -> Artifact:
    """CAMs of the whole train split by the classifier of the chosen round; `context` has that round's settings.

    manifest: of images, or of their tiles.
    """

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        shards, where = manifest.shard_names("train"), f"train split, round {round_index}"
        return _stream(context, manifest, artifact, classifier, shards, where, None, lambda summary: None)

    return complete(
        context,
        name="cams",
        stage="make_train_cams",
        inputs={
            **_inputs(context.experiment.cams, manifest, classifier, leave_out={"num_label_free", "num_thresholds"}),
            "covers": "train",
        },
        work=work,
    )


def label_free_scores(thresholds: list[float], by_image: dict[str, list[float]]) -> dict[str, Any]:
    """The label-free part of scores.json: the mean curve, its best threshold, and each image's score there."""
    ids = sorted(by_image)
    curves = np.array([by_image[image_id] for image_id in ids]).reshape(len(ids), len(thresholds))
    curve = curves.mean(axis=0) if ids else np.zeros(len(thresholds))
    best = int(curve.argmax())
    return {
        "num_images": len(ids),
        "thresholds": thresholds,
        "score": [round(float(value), 6) for value in curve],
        "best": {"threshold": thresholds[best], "score": round(float(curve[best]), 6)},
        "images": {image_id: round(float(value), 6) for image_id, value in zip(ids, curves[:, best], strict=True)},
    }


def _inputs(
    settings: CamStageSettings, manifest: Manifest, classifier: Artifact, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    in_cam = {"pass_px"} | ({"normalise"} if settings.cam.normalise == "maximum" else set())  # younger than runs
    excluded: dict[str, Any] = {"batch_size": True, "cam": in_cam, **dict.fromkeys(leave_out, True)}
    return {
        "settings": settings.model_dump(mode="json", exclude=excluded),
        "manifest": manifest.fingerprint,
        "classifier": classifier.output_fingerprint,
    }


def _stream(
    context: StageContext,
    manifest: Manifest,
    artifact: Artifact,
    classifier: Artifact,
    shards: list[str],
    where: str,
    sample: frozenset[str] | None,
    fold: Callable[[ShardSummary], None],
    images: Manifest | None = None,
) -> dict[str, Any]:
    """Maps of some shards; returns the stream's stats. where: for the progress bar. images: of tiles to be scored."""
    experiment = context.experiment
    total = sum(shard.num_rows for shard in manifest.shards if shard.name in set(shards))
    with context.progress.stage(f"make CAMs, {where}", total=total, unit="images") as bar:
        summaries = map_shards(
            CamWorker,
            {
                "classifier": classifier.folder,
                "classifier_settings": experiment.classifier,
                "classes": manifest.classes,
                "settings": experiment.cams,
                "sample": sample,
            },
            inputs={"manifest": manifest.folder} | ({} if images is None else {"images": images.folder}),
            columns={"manifest": COLUMNS if images is None else [*COLUMNS, *TILE_COLUMNS], "images": COLUMNS},
            shards=shards,
            output=artifact.folder,
            settings=experiment.stream,
            bar=bar,
            stage="make_cams",
            fold=fold,
        )
    return stream_stats(summaries)
