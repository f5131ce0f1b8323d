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
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.storage import Storage, StorageError, read_uri
from cluster.tracking import ChildRun
from cluster.training import OptimiserSettings, TrainComputeSettings, train
from jobs.context import StageContext, complete, training_stats, warn_of_loss
from jobs.joins import with_column
from jobs.manifest import Manifest
from jobs.tile_masks import tile_mask_name
from subcat_core.backbones import input_statistics
from subcat_core.classes import IGNORE, ClassTable
from subcat_core.gated_crf import GatedCrfSettings, gated_crf_loss
from subcat_core.images import AugmentSettings, augment, decode_image, decode_mask
from subcat_core.segmenter import Segmenter, SegmenterSettings, build_segmenter, multi_scale_loss
from subcat_core.settings import Settings

logger = logging.getLogger("subcat")

FOLDER = "segmenter"
_MAX_EXAMPLES = 20


class SegmenterOptimiserSettings(OptimiserSettings):
    """As the classifier's, with a smaller step: the heads of a segmenter sum thousands of products an output."""

    learning_rate: float = Field(default=2.5e-4, gt=0)
    """Of the backbone's weights at step 0 (value of deeplab-pytorch); heads take ten times as much. A loss that rises
    at first, far above log(C + 1), says that it is too large."""


class SegmenterStageSettings(Settings):
    """Architecture and training of the segmenter."""

    model: SegmenterSettings = SegmenterSettings()
    loss: Literal["cross_entropy", "soft_bootstrap"] = "cross_entropy"
    """soft_bootstrap: for masks that may be wrong, the target is mixed with the network's own answer."""
    bootstrap_beta: float = Field(default=0.8, gt=0, lt=1)
    """Share of the mask in the target of soft_bootstrap; Reed et al. took 0.95."""
    boundary_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of the gated CRF loss beside that on the masks, in place of a CRF after prediction; 0: none; its authors: 0.1."""
    boundary: GatedCrfSettings = GatedCrfSettings()
    """Neighbours and kernel of the gated CRF loss."""
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
        crop, mask_crop = augment(image, self.settings.augment, rng, pad_rgb=self._pad_rgb(), mask=mask)
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
        beta = self.settings.bootstrap_beta if self.settings.loss == "soft_bootstrap" else 1.0
        loss = multi_scale_loss(logits, batch["mask"], batch["weight"], loss_at=settings.loss_at, bootstrap_beta=beta)
        if not self.settings.boundary_weight:
            return loss, {"loss": loss.detach()}
        boundary = gated_crf_loss(logits[0], batch["image"], self._gate(batch), self.settings.boundary)
        total = loss + self.settings.boundary_weight * boundary
        return total, {"loss": total.detach(), "mask_loss": loss.detach(), "boundary_loss": boundary.detach()}

    def _gate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, H, W) float32, 0 for padding and for bad images: pixels that are only unsure have neighbours too."""
        colour = torch.tensor(self._pad_rgb(), dtype=torch.uint8, device=batch["image"].device)
        padding = (batch["mask"] == IGNORE) & (batch["image"] == colour[:, None, None]).all(dim=1)
        return (~padding).float() * batch["weight"].float()[:, None, None]

    def _pad_rgb(self) -> tuple[int, int, int]:
        """The network's mean colour."""
        mean, _ = input_statistics(self.settings.model.backbone.name)
        return round(mean[0]), round(mean[1]), round(mean[2])

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        assert isinstance(model, Segmenter)
        return model.parameter_groups()

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        return {}


def run(
    context: StageContext,
    manifest: Manifest,
    pseudo_masks: Artifact,
    tiles: Manifest | None = None,
    *,
    name: str = FOLDER,
    round_index: int | None = None,
) -> Artifact:
    """Train on every image that has a pseudo mask; with `tiles`, on the tiles of these images and their masks.

    name: the folder to write. round_index: of self-training, whose masks take the place of the pseudo masks.
    """
    masks: dict[str, Any] = {"pseudo_masks": pseudo_masks.output_fingerprint}
    if tiles is not None:
        masks["tiles"] = tiles.fingerprint
    return train_on(
        context,
        manifest,
        lambda: pseudo_mask_rows(manifest, pseudo_masks, tiles),
        masks=masks,
        classes=ClassTable(manifest.classes.names, has_background=manifest.classes.has_background),
        name=name,
        round_index=round_index,
    )


def pseudo_mask_rows(manifest: Manifest, pseudo_masks: Artifact, tiles: Manifest | None = None) -> pa.Table:
    """image_id, uri and mask_uri of the images that have a pseudo mask, or of the tiles of these images."""
    names = manifest.shard_names("train")
    masks = pa.concat_tables(
        [pseudo_masks.folder.read_table(f"{name}.parquet", ["image_id", "mask_uri"]) for name in names]
    )
    if tiles is not None:
        return _rows_of_tiles(tiles, masks, pseudo_masks.folder)
    return with_column(manifest.rows("train", ["image_id", "uri"]), masks, "mask_uri")


def train_on(
    context: StageContext,
    manifest: Manifest,
    rows: Callable[[], pa.Table],
    *,
    masks: dict[str, Any],
    classes: ClassTable,
    name: str = FOLDER,
    stage: str = "train_segmenter",
    round_index: int | None = None,
) -> Artifact:
    """Train the segmenter of the settings on some masks.

    rows: image_id, uri, mask_uri. masks: what names those masks in the fingerprint. classes: what their values mean.
    name: the folder to write. The model of the run's own folder, and no other, goes to MLflow.
    """
    experiment = context.experiment
    settings = experiment.segmenter
    title = stage.replace("_", " ")

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        table = rows()
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
        if name == FOLDER:
            log_model(context, manifest, artifact.folder)
        return training_stats(artifact, result)

    return complete(
        context,
        name=name,
        stage=stage,
        round_index=round_index,
        inputs={
            "settings": fingerprinted(settings),
            "rng_seed": experiment.rng_seed,
            **masks,
        },
        work=work,
    )


def fingerprinted(settings: SegmenterStageSettings) -> dict[str, Any]:
    """The settings without those that change no result, and without options that are off."""
    excluded: dict[str, Any] = {"compute": True, "optimiser": {"keep_checkpoints"}}
    if settings.loss == "cross_entropy":
        excluded |= {"loss": True, "bootstrap_beta": True}
    if not settings.boundary_weight:
        excluded |= {"boundary_weight": True, "boundary": True}
    return settings.model_dump(mode="json", exclude=excluded)


def _rows_of_tiles(tiles: Manifest, masks: pa.Table, folder: Storage) -> pa.Table:
    """image_id, uri and mask_uri of the tiles of images that have a pseudo mask."""
    rows = tiles.rows("train", ["image_id", "uri", "parent_id"])
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
