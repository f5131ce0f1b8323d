"""Train the affinity net, by which CAMs spread to the borders of objects before they become pseudo masks.

Reads:   manifest (train), affinity_labels
Writes:  affinity: model.pt, result.json, checkpoints
Runs on: Ray Train workers, data-parallel; in process with affinity.compute.num_workers = 0

Only with [affinity]. No annotated mask is seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.artifacts import Artifact
from cluster.storage import Storage, read_uri
from cluster.tracking import ChildRun
from cluster.training import train
from cluster.training_rows import write_rows
from jobs.affinity_settings import AffinitySettingsOfAKind, IrnStageSettings, PsaStageSettings
from jobs.context import StageContext, complete, training_stats, warn_of_loss
from jobs.joins import with_column
from jobs.manifest import Manifest
from subcat_core.affinity_crop import aligned_crop, scaled_crop
from subcat_core.affinity_net import AffinityNet, build_affinity_net, pair_affinity
from subcat_core.affinity_pairs import balanced_loss, pair_kinds
from subcat_core.backbones import input_statistics
from subcat_core.classes import IGNORE, ClassTable
from subcat_core.images import decode_image, decode_mask
from subcat_core.irn import STRIDE_PX, IrnNet, build_irn, irn_loss


@dataclasses.dataclass(frozen=True)
class AffinityTrainee:
    """What the worker loop needs to know of an affinity net; it has no validation."""

    settings: AffinitySettingsOfAKind
    num_classes: int

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = decode_image(read_uri(row["uri"]))
        lut = ClassTable(tuple(str(index) for index in range(self.num_classes))).mask_lut()
        labels = decode_mask(read_uri(row["label_uri"]), lut)
        mean, _ = input_statistics(self.settings.net.backbone.name)
        image, labels = self.crop(image, labels, rng, (round(mean[0]), round(mean[1]), round(mean[2])))
        return {"image": image, "labels": labels}

    def empty_sample(self) -> dict[str, np.ndarray]:
        """No label is known, so there are no pairs."""
        crop_px = self.settings.augment.crop_px
        cells = crop_px // self.stride_px
        return {"image": np.zeros((3, crop_px, crop_px), np.uint8), "labels": np.full((cells, cells), IGNORE, np.uint8)}

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        assert isinstance(model, AffinityNet | IrnNet)
        return model.parameter_groups()

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        return {}

    @property
    def stride_px(self) -> int:
        """Side of a cell of the labels that training sees."""
        raise NotImplementedError

    def crop(
        self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, pad_rgb: tuple[int, int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """One training crop of image and labels."""
        raise NotImplementedError

    def build_model(self) -> torch.nn.Module:
        raise NotImplementedError

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PsaTrainee(AffinityTrainee):
    """AffinityNet."""

    settings: PsaStageSettings

    @property
    def stride_px(self) -> int:
        return self.settings.net.backbone.output_stride

    def crop(
        self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, pad_rgb: tuple[int, int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        return aligned_crop(image, labels, self.settings.augment, rng, stride_px=self.stride_px, pad_rgb=pad_rgb)

    def build_model(self) -> torch.nn.Module:
        return build_affinity_net(self.settings.net, read_uri=read_uri)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        net = self.settings.net
        affinity = pair_affinity(model(batch["image"]).float(), net.radius, net.pad_border)
        return balanced_loss(affinity, pair_kinds(batch["labels"], net.radius, net.pad_border))


@dataclasses.dataclass(frozen=True)
class IrnTrainee(AffinityTrainee):
    """IRNet's two branches."""

    settings: IrnStageSettings

    @property
    def stride_px(self) -> int:
        return STRIDE_PX

    def crop(
        self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, pad_rgb: tuple[int, int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        return scaled_crop(image, labels, self.settings.augment, rng, stride_px=self.stride_px, pad_rgb=pad_rgb)

    def build_model(self) -> torch.nn.Module:
        return build_irn(self.settings.net, read_uri=read_uri)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        net = self.settings.net
        edge, displacement = model(batch["image"])
        kinds = pair_kinds(batch["labels"], net.radius, net.pad_border)
        return irn_loss(edge.float(), displacement.float(), kinds, net.radius)


def run(context: StageContext, manifest: Manifest, labels: Artifact) -> Artifact:
    """Train on every image that has a label map, by the settings of [affinity], which must be there."""
    experiment = context.experiment
    settings = experiment.affinity
    assert settings is not None

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        def with_labels(name: str, rows: pa.Table) -> pa.Table:
            table = labels.folder.read_table(f"{name}.parquet", ["image_id", "label_uri"])
            return with_column(rows, table, "label_uri")

        joined = manifest.joined("train", ["image_id", "uri"], with_labels)
        rows = write_rows(artifact.folder, "rows.arrow", joined)
        total = settings.optimiser.length(rows.num_rows).num_images
        with context.progress.stage("train affinity net", total=total, unit="images") as bar:
            result = train(
                trainee_of(settings, manifest.classes.num_classes),
                rows,
                val_rows=None,
                folder=artifact.folder,
                optimiser=settings.optimiser,
                compute=settings.compute,
                rng_seed=experiment.rng_seed,
                max_bad_frac=experiment.stream.max_bad_frac,
                bar=bar,
                on_metrics=lambda step, values: child.log_metrics(
                    {f"train_affinity/{key}": value for key, value in values.items()}, step
                ),
            )
        warn_of_loss(context, "train affinity net", result)
        return training_stats(artifact, result)

    left_out: Any = {"compute": True, "labels": True, "walk": True, "optimiser": {"keep_checkpoints"}}
    return complete(
        context,
        name="affinity",
        stage="train_affinity",
        inputs={
            "settings": settings.model_dump(mode="json", exclude=left_out),
            "rng_seed": experiment.rng_seed,
            "labels": labels.output_fingerprint,
        },
        work=work,
    )


def trainee_of(settings: AffinitySettingsOfAKind, num_classes: int) -> AffinityTrainee:
    """The trainee for settings of either kind."""
    if isinstance(settings, PsaStageSettings):
        return PsaTrainee(settings, num_classes)
    return IrnTrainee(settings, num_classes)


def load_affinity(folder: Storage, settings: AffinitySettingsOfAKind) -> AffinityNet | IrnNet:
    """The trained net of `folder`, in eval mode."""
    backbone = settings.net.backbone.model_copy(update={"weights": "none"})
    net: AffinityNet | IrnNet
    if isinstance(settings, PsaStageSettings):
        net = build_affinity_net(settings.net.model_copy(update={"backbone": backbone}))
    else:
        net = build_irn(settings.net.model_copy(update={"backbone": backbone}))
    with folder.fetch("model.pt") as path:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()
