"""The same segmenter trained on the full masks of the same images: what tags are measured against.

Reads:   manifest (train), pseudo_masks (which images they cover), the annotated masks of those images
Writes:  supervised/segmenter, supervised/predictions, supervised/evaluation, as the stages of the segmenter do
Runs on: as train_segmenter, predict and evaluate

Nothing of it goes back into the run: it is a yardstick, made where `[supervised]` stands in the config. Where the
segmenter sees tiles, so does the yardstick, with the full masks cut alike (supervised_tiles.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact
from cluster.storage import Storage
from jobs import evaluate, predict
from jobs.context import StageContext
from jobs.joins import with_column
from jobs.manifest import Manifest
from jobs.train_segmenter import train_on
from subcat_core.classes import ClassTable
from subcat_core.settings import Settings

FOLDER = "supervised"


class SupervisedSettings(Settings):
    """Which full masks train the yardstick."""

    masks_folder: str | None = None
    """Folder or s3:// prefix of <image_id>.png, in the values of the data set's own masks; null: the masks that the
    manifest names, where an image without one is left out."""


def full_mask_rows(manifest: Manifest, pseudo_masks: Artifact, settings: SupervisedSettings) -> Iterator[pa.Table]:
    """image_id, uri and mask_uri of the images that train the segmenter, with their annotated masks, by shard."""
    folder = None if settings.masks_folder is None else Storage(settings.masks_folder)

    def with_mask(name: str, rows: pa.Table) -> pa.Table:
        masks = pseudo_masks.folder.read_table(f"{name}.parquet", ["image_id"])
        rows = rows.filter(pc.is_in(rows["image_id"], value_set=masks["image_id"].combine_chunks()))
        if folder is None:
            return rows.filter(pc.is_valid(rows["mask_uri"]))
        uris = [folder.uri(f"{image_id}.png") for image_id in rows["image_id"].to_pylist()]
        return rows.drop_columns(["mask_uri"]).append_column("mask_uri", pa.array(uris, pa.string()))

    return manifest.joined("train", ["image_id", "uri", "mask_uri"], with_mask)


def full_mask_tiles(tiles: Manifest, pseudo_masks: Artifact, tile_masks: Artifact) -> Iterator[pa.Table]:
    """image_id, uri and mask_uri of the tiles that train the segmenter, with their part of the annotated masks."""

    def with_mask(name: str, rows: pa.Table) -> pa.Table:
        masks = pseudo_masks.folder.read_table(f"{name}.parquet", ["image_id"])
        rows = rows.filter(pc.is_in(rows["parent_id"], value_set=masks["image_id"].combine_chunks()))
        return with_column(
            rows.drop_columns(["parent_id"]), tile_masks.folder.read_table(f"{name}.parquet"), "mask_uri"
        )

    return tiles.joined("train", ["image_id", "uri", "parent_id"], with_mask)


def train(
    context: StageContext,
    manifest: Manifest,
    pseudo_masks: Artifact,
    tiles: Manifest | None = None,
    tile_masks: Artifact | None = None,
) -> Artifact:
    """The yardstick's training. tiles, tile_masks: where the segmenter sees tiles, with what supervised_tiles cut."""
    settings = context.experiment.supervised
    assert settings is not None
    masks: dict[str, Any] = {
        "manifest": manifest.fingerprint,
        "pseudo_masks_of": pseudo_masks.output_fingerprint,
        "supervised": settings.model_dump(mode="json"),
    }
    classes = manifest.classes
    if tile_masks is not None:
        masks["tile_masks"] = tile_masks.output_fingerprint
        classes = ClassTable(classes.names, has_background=classes.has_background)  # they hold class ids

    def rows() -> Iterator[pa.Table]:
        if tiles is None or tile_masks is None:
            return full_mask_rows(manifest, pseudo_masks, settings)
        return full_mask_tiles(tiles, pseudo_masks, tile_masks)

    segmenter = context.experiment.segmenter
    if segmenter.loss == "confidence":  # full masks are sure
        sure = segmenter.model_copy(update={"loss": "cross_entropy"})
        context = dataclasses.replace(context, experiment=context.experiment.model_copy(update={"segmenter": sure}))
    return train_on(
        context,
        manifest,
        rows,
        masks=masks,
        classes=classes,
        name=f"{FOLDER}/segmenter",
        stage="train_supervised",
    )


def predict_masks(context: StageContext, manifest: Manifest, segmenter: Artifact) -> Artifact:
    """The yardstick's masks."""
    return predict.run(context, manifest, segmenter, name=f"{FOLDER}/predictions", stage="predict_supervised")


def score(context: StageContext, manifest: Manifest, predictions: Artifact) -> Artifact:
    """The yardstick's scores."""
    return evaluate.run(
        context,
        manifest,
        predictions,
        name=f"{FOLDER}/evaluation",
        stage="evaluate_supervised",
        supervision="full masks",
        segmenter=f"{FOLDER}/segmenter",
    )
