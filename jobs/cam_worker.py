"""The actor of make_cams: a manifest shard to a CAM shard, scored with ground truth and without; and its settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from cluster.storage import MissingFileError, Storage
from cluster.streams import BadRow, ShardOutput, iter_images
from jobs.cam_tables import read_truth
from jobs.scoring import PAPER_THRESHOLD
from jobs.tile_images import TileScorer, is_of_scored_image
from jobs.train_classifier import ClassifierSettings, load_classifier
from subcat_core import schemas
from subcat_core.backbones import OutputStride
from subcat_core.cam import CamSettings, compute_cams, upsample_cam
from subcat_core.classes import ClassTable, to_class_ids
from subcat_core.images import ImageError
from subcat_core.label_free import LabelFreeGrid
from subcat_core.metrics import ThresholdSweep
from subcat_core.settings import Settings

NO_THRESHOLD = -1.0
"""Stands for the threshold where there is no background."""


class CamStageSettings(Settings):
    """How maps are made and scored."""

    cam: CamSettings = CamSettings()
    output_stride: OutputStride | None = None
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
