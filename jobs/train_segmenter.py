"""Train the segmenter on the pseudo masks; no annotated mask is seen.

Reads:   manifest (train), pseudo_masks
Writes:  segmenter: model.pt, segmenter.json (what `predict` needs), result.json, checkpoints; the model in MLflow
Runs on: Ray Train workers, data-parallel; in process with segmenter.compute.num_workers = 0
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.storage import Storage, StorageError, read_uri
from cluster.tracking import ChildRun
from cluster.training import OptimiserSettings, TrainComputeSettings, train
from cluster.training_rows import write_rows
from jobs.context import StageContext, complete, training_stats, warn_of_loss
from jobs.joins import with_column
from jobs.manifest import Manifest
from jobs.tile_masks import tile_mask_name
from subcat_core.backbones import input_statistics
from subcat_core.classes import IGNORE, ClassTable
from subcat_core.images import AugmentSettings, augment, decode_image, decode_mask
from subcat_core.segmenter import Segmenter, SegmenterSettings, build_segmenter, multi_scale_loss
from subcat_core.settings import Settings

logger = logging.getLogger("subcat")

_MAX_EXAMPLES = 20


class SegmenterOptimiserSettings(OptimiserSettings):
    """As the classifier's, with a smaller step: the heads of a segmenter sum thousands of products an output."""

    learning_rate: float = Field(default=2.5e-4, gt=0)
    """Of the backbone's weights at step 0 (value of deeplab-pytorch); heads take ten times as much. A loss that rises
    at first, far above log(C + 1), says that it is too large."""


class SegmenterStageSettings(Settings):
    """Architecture and training of the segmenter."""

    model: SegmenterSettings = SegmenterSettings()
    augment: AugmentSettings = AugmentSettings()
    optimiser: SegmenterOptimiserSettings = SegmenterOptimiserSettings()
    compute: TrainComputeSettings = TrainComputeSettings()


@dataclasses.dataclass(frozen=True)
class SegmenterTrainee:
    """What the worker loop needs to know of the segmenter."""

    settings: SegmenterStageSettings
    classes: ClassTable
    """Whose mask values say what the stored masks mean: none for pseudo masks, which hold class ids."""

    def build_model(self) -> torch.nn.Module:
        model, report = build_segmenter(self.settings.model, self.classes.num_classes, read_uri=read_uri)
        model.weights_account = report.summary()
        return model

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = decode_image(read_uri(row["uri"]))
        mask = decode_mask(read_uri(row["mask_uri"]), self.classes.mask_lut())
        mean, _ = input_statistics(self.settings.model.backbone.name)
        pad_rgb = (round(mean[0]), round(mean[1]), round(mean[2]))
        crop, mask_crop = augment(image, self.settings.augment, rng, pad_rgb=pad_rgb, mask=mask)
        assert mask_crop is not None
        return {"image": crop, "mask": mask_crop}

    def empty_sample(self) -> dict[str, np.ndarray]:
        crop = self.settings.augment.crop_px
        return {"image": np.zeros((3, crop, crop), np.uint8), "mask": np.full((crop, crop), IGNORE, np.uint8)}

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings = self.settings.model
        logits = model(batch["image"], settings.train_scales)
        loss = multi_scale_loss(logits, batch["mask"], batch["weight"], loss_at=settings.loss_at)
        return loss, {"loss": loss.detach()}

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        assert isinstance(model, Segmenter)
        return model.parameter_groups()

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        return {}


def run(context: StageContext, manifest: Manifest, pseudo_masks: Artifact, tiles: Manifest | None = None) -> Artifact:
    """Train on every image that has a pseudo mask; with `tiles`, on the tiles of these images and their masks."""
    masks: dict[str, Any] = {"pseudo_masks": pseudo_masks.output_fingerprint}
    if tiles is not None:
        masks["tiles"] = tiles.fingerprint
    return train_on(
        context,
        manifest,
        lambda: pseudo_mask_rows(manifest, pseudo_masks, tiles),
        masks=masks,
        classes=ClassTable(manifest.classes.names, has_background=manifest.classes.has_background),
    )


def pseudo_mask_rows(manifest: Manifest, pseudo_masks: Artifact, tiles: Manifest | None = None) -> Iterator[pa.Table]:
    """image_id, uri and mask_uri of the images that have a pseudo mask, or of the tiles of these images, by shard."""

    def with_mask(name: str, rows: pa.Table) -> pa.Table:
        masks = pseudo_masks.folder.read_table(f"{name}.parquet", ["image_id", "mask_uri"])
        if tiles is not None:
            return _with_tile_mask(rows, masks, pseudo_masks.folder)
        return with_column(rows, masks, "mask_uri")

    if tiles is not None:  # its shards have the names of the manifest's
        return tiles.joined("train", ["image_id", "uri", "parent_id"], with_mask)
    return manifest.joined("train", ["image_id", "uri"], with_mask)


def train_on(
    context: StageContext,
    manifest: Manifest,
    rows: Callable[[], Iterable[pa.Table]],
    *,
    masks: dict[str, Any],
    classes: ClassTable,
    name: str = "segmenter",
    stage: str = "train_segmenter",
) -> Artifact:
    """Train the segmenter of the settings on some masks.

    rows: tables of image_id, uri, mask_uri. masks: what names those masks in the fingerprint. classes: what the values
    of the masks mean. name: the folder to write. The model goes to MLflow where the masks are pseudo masks.
    """
    experiment = context.experiment
    settings = experiment.segmenter
    title = stage.replace("_", " ")

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        table = write_rows(artifact.folder, "rows.arrow", rows())
        artifact.folder.write_json(
            "segmenter.json",
            {
                "model": settings.model.model_dump(mode="json"),
                "classes": list(classes.names),
                "has_background": classes.has_background,
                "base_px": trained_px(settings),
                "num_train_images": table.num_rows,
            },
        )
        total = settings.optimiser.length(table.num_rows).num_images
        with context.progress.stage(title, total=total, unit="images") as bar:
            result = train(
                SegmenterTrainee(settings, classes),
                table,
                val_rows=None,
                folder=artifact.folder,
                optimiser=settings.optimiser,
                compute=settings.compute,
                rng_seed=experiment.rng_seed,
                max_bad_frac=experiment.stream.max_bad_frac,
                bar=bar,
                on_metrics=lambda step, values: child.log_metrics(
                    {f"{stage}/{key}": value for key, value in values.items()}, step
                ),
            )
        warn_of_loss(context, title, result)
        if "pseudo_masks" in masks:
            log_model(context, manifest, artifact.folder)
        return training_stats(artifact, result)

    return complete(
        context,
        name=name,
        stage=stage,
        inputs={
            "settings": settings.model_dump(mode="json", exclude={"compute": True, "optimiser": {"keep_checkpoints"}}),
            "rng_seed": experiment.rng_seed,
            **masks,
        },
        work=work,
    )


def _with_tile_mask(rows: pa.Table, masks: pa.Table, folder: Storage) -> pa.Table:
    """image_id, uri and mask_uri of the tiles of images that have a pseudo mask."""
    rows = rows.filter(pc.is_in(rows["parent_id"], value_set=masks["image_id"].combine_chunks()))
    uris = [folder.uri(tile_mask_name(tile_id)) for tile_id in rows["image_id"].to_pylist()]
    return rows.drop_columns(["parent_id"]).append_column("mask_uri", pa.array(uris, pa.string()))


def log_model(context: StageContext, manifest: Manifest, folder: Storage) -> None:
    """Put the trained segmenter into MLflow, with signature and the first readable image as input example."""
    if not context.experiment.tracking.enabled:
        return
    example = None
    for uri in manifest.rows("train", columns=["uri"], limit=_MAX_EXAMPLES)["uri"].to_pylist():
        with contextlib.suppress(StorageError):
            example = read_uri(uri)
            break
    if example is None:
        logger.warning("the model is not logged to MLflow: none of the first %d images can be read", _MAX_EXAMPLES)
        return
    context.tracker.log_model(
        state=folder.read_bytes("model.pt"),
        settings=context.experiment.segmenter.model,
        classes=manifest.classes,
        base_px=context.experiment.predict.base_px or trained_px(context.experiment.segmenter),
        scales=context.experiment.predict.scales,
        flip=context.experiment.predict.flip,
        merge=context.experiment.predict.merge,
        example=example,
    )


def trained_px(settings: SegmenterStageSettings) -> int | None:
    """The middle of the short sides that training saw: what prediction brings images to unless told otherwise; None
    where training saw images around their own size.
    """
    return settings.augment.middle_px


def load_segmenter(folder: Storage) -> tuple[Segmenter, ClassTable, int | None]:
    """The trained segmenter of an output folder, in eval mode, its classes, and the short side it was trained for
    (None: the images' own).

    Raises ValueError when the folder holds none.
    """
    if not folder.exists("segmenter.json") or not folder.exists("model.pt"):
        raise ValueError(
            f"{folder.root}: no trained segmenter here (expected model.pt and segmenter.json); "
            "give the folder `segmenter` of a finished run"
        )
    described = folder.read_json("segmenter.json")
    settings = SegmenterSettings.model_validate_json(json.dumps(described["model"]))
    settings = settings.model_copy(update={"backbone": settings.backbone.model_copy(update={"weights": "none"})})
    model, _ = build_segmenter(settings, len(described["classes"]))
    with folder.fetch("model.pt") as path:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    classes = ClassTable(tuple(described["classes"]), has_background=described.get("has_background", True))
    return model.eval(), classes, described["base_px"]
