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
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.storage import Storage, StorageError, read_uri
from cluster.tracking import ChildRun
from cluster.training import OptimiserSettings, TrainComputeSettings, train
from cluster.training_rows import write_rows
from jobs.context import StageContext, complete, training_stats, warn_of_loss
from jobs.manifest import Manifest
from jobs.training_masks import pseudo_mask_rows
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
    loss: Literal["cross_entropy", "confidence", "soft_bootstrap"] = "cross_entropy"
    """confidence: each pixel counts by the probability of its class in the pseudo mask, which
    pseudo_masks.write_confidence keeps; full masks are sure. soft_bootstrap: for masks that may be wrong, the target is
    mixed with the network's own answer."""
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
        planes = {"mask": decode_mask(read_uri(row["mask_uri"]), self.classes.mask_lut())}
        if self.settings.loss == "confidence":
            planes["confidence"] = decode_mask(read_uri(row["confidence_uri"]), np.arange(256, dtype=np.int16))
        stacked = np.stack(list(planes.values()), axis=2) if len(planes) > 1 else planes["mask"]
        crop, cut = augment(image, self.settings.augment, rng, pad_rgb=self._pad_rgb(), mask=stacked)
        assert cut is not None
        cut = np.atleast_3d(cut)
        return {"image": crop, **{name: np.ascontiguousarray(cut[:, :, at]) for at, name in enumerate(planes)}}

    def empty_sample(self) -> dict[str, np.ndarray]:
        crop = self.settings.augment.crop_px
        names = ["mask"] + (["confidence"] if self.settings.loss == "confidence" else [])
        nothing = {name: np.full((crop, crop), IGNORE, np.uint8) for name in names}
        return {"image": np.zeros((3, crop, crop), np.uint8), **nothing}

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings = self.settings.model
        logits = model(batch["image"], settings.train_scales)
        beta = self.settings.bootstrap_beta if self.settings.loss == "soft_bootstrap" else 1.0
        options: dict[str, Any] = {"loss_at": settings.loss_at, "bootstrap_beta": beta}
        options["confidence"] = batch.get("confidence")
        loss = multi_scale_loss(logits, batch["mask"], batch["weight"], **options)
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


def train_on(
    context: StageContext,
    manifest: Manifest,
    rows: Callable[[], Iterable[pa.Table]],
    *,
    masks: dict[str, Any],
    classes: ClassTable,
    name: str = FOLDER,
    stage: str = "train_segmenter",
    round_index: int | None = None,
) -> Artifact:
    """Train the segmenter of the settings on some masks.

    rows: tables of image_id, uri, mask_uri (and confidence_uri). masks: what names those masks in the fingerprint.
    classes: what their values mean. name: the folder to write. The model of the run's own folder, and no other, goes to
    MLflow.
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
        excluded["loss"] = True
    if settings.loss != "soft_bootstrap":
        excluded["bootstrap_beta"] = True
    if not settings.boundary_weight:
        excluded |= {"boundary_weight": True, "boundary": True}
    return settings.model_dump(mode="json", exclude=excluded)


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
