"""The same segmenter trained on the full masks of the same images: what tags are measured against.

Reads:   manifest (train), pseudo_masks (which images they cover), the annotated masks of those images
Writes:  supervised/segmenter, supervised/predictions, supervised/evaluation, as the stages of the segmenter do
Runs on: as train_segmenter, predict and evaluate

Nothing of it goes back into the run: it is a yardstick, made where `[supervised]` stands in the config.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact
from cluster.storage import Storage
from jobs import evaluate, predict
from jobs.context import StageContext
from jobs.joins import with_column
from jobs.manifest import Manifest
from jobs.train_segmenter import pseudo_mask_rows, train_on
from subcat_core.settings import Settings

FOLDER = "supervised"


class SupervisedSettings(Settings):
    """Which full masks train the yardstick."""

    masks_folder: str | None = None
    """Folder or s3:// prefix of <image_id>.png, in the values of the data set's own masks; null: the masks that the
    manifest names, where an image without one is left out."""


def full_mask_rows(manifest: Manifest, pseudo_masks: Artifact, settings: SupervisedSettings) -> pa.Table:
    """image_id, uri and mask_uri of the images that train the segmenter, with their annotated masks."""
    images = pseudo_mask_rows(manifest, pseudo_masks).drop_columns(["mask_uri"])
    if settings.masks_folder is not None:
        folder = Storage(settings.masks_folder)
        uris = [folder.uri(f"{image_id}.png") for image_id in images["image_id"].to_pylist()]
        return images.append_column("mask_uri", pa.array(uris, pa.string()))
    rows = with_column(images, manifest.rows("train", ["image_id", "mask_uri"]), "mask_uri")
    return rows.filter(pc.is_valid(rows["mask_uri"]))


def train(context: StageContext, manifest: Manifest, pseudo_masks: Artifact) -> Artifact:
    """The yardstick's training."""
    settings = context.experiment.supervised
    assert settings is not None
    return train_on(
        context,
        manifest,
        lambda: full_mask_rows(manifest, pseudo_masks, settings),
        masks={
            "manifest": manifest.fingerprint,
            "pseudo_masks_of": pseudo_masks.output_fingerprint,
            "supervised": settings.model_dump(mode="json"),
        },
        classes=manifest.classes,
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
