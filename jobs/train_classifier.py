"""Train the classifier of one round: parent classes, and from round 1 on the sub-categories of the round before.

Reads:   manifest (train, and the validation split where there is one), sub-categories of round r - 1
Writes:  rounds/RR/classifier: model.pt, result.json (loss by epoch, per-class average precision, mAP), checkpoints
Runs on: Ray Train workers, data-parallel; in process with classifier.compute.num_workers = 0
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.storage import Storage, read_uri
from cluster.tracking import ChildRun
from cluster.training import OptimiserSettings, TrainComputeSettings, train
from cluster.training_rows import write_rows
from jobs.context import StageContext, complete, round_folder, training_stats, warn_of_loss
from jobs.joins import one_row_an_image, with_column
from jobs.manifest import Manifest
from jobs.previous_head import PreviousRound, previous_head
from jobs.soft_targets import write_soft_targets
from subcat_core.backbones import BackboneSettings, OutputStride, build_backbone, input_statistics
from subcat_core.classes import multi_hot
from subcat_core.classifier import Classifier
from subcat_core.images import AugmentSettings, augment, centre_crop, decode_image, resize_short_side
from subcat_core.losses import guess_loss, joint_loss
from subcat_core.metrics import average_precision
from subcat_core.settings import Settings
from subcat_core.subcategories import soft_subcategory_targets, subcategory_targets

_COLUMNS = ["image_id", "uri", "labels"]


class ClassifierSettings(Settings):
    """One round of classifier training."""

    backbone: BackboneSettings = BackboneSettings()
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """On the feature map, before pooling (Chang et al.: 0.5)."""
    subcategory_weight: float = Field(default=5.0, ge=0)
    """Weight of the sub-category loss beside the parent loss (lambda of Chang et al.: 5)."""
    subcategory_targets: Literal["hard", "soft"] = "hard"
    """`hard`: 1 for the cluster of the image (the paper). `soft`: the softmax over the clusters of
    -(squared distance to the centroid) / (soft_temperature * the class's mean squared distance to the own one)."""
    soft_temperature: float = Field(default=1.0, gt=0)
    """With `soft`: lower is nearer to `hard`."""
    subcategory_head: Literal["new", "previous"] = "new"
    """`new`: random in every round (the paper). `previous`: from round 2 on the head of the round before, each cluster
    taking the weights of the one it has most images in common with, one to one; the rest starts as ever. Rounds of
    different kmeans.num_clusters take a new one."""
    augment: AugmentSettings = AugmentSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    compute: TrainComputeSettings = TrainComputeSettings()
    validation_split: str | None = "val"
    """Average precision is taken on this split, if the manifest has it."""


@dataclasses.dataclass(frozen=True)
class ClassifierTrainee:
    """What the worker loop needs to know of the classifier.

    num_clusters: K, 0 in round 0. sub_head: (C*K, D) float32 that the sub-category head starts from; None: random.
    """

    settings: ClassifierSettings
    num_classes: int
    num_clusters: int
    sub_head: np.ndarray | None = None

    def build_model(self) -> Classifier:
        backbone, report = build_backbone(self.settings.backbone, read_uri=read_uri)
        model = Classifier(backbone, self.num_classes, self.num_clusters, dropout=self.settings.dropout)
        model.weights_account = report.summary()
        if self.sub_head is not None:
            model.start_sub_head(torch.from_numpy(self.sub_head))
        return model

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = decode_image(read_uri(row["uri"]))
        return self._sample(augment(image, self.settings.augment, rng, pad_rgb=self._pad_rgb())[0], row)

    def make_validation_sample(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """The middle of the image at the middle of the training sizes: no chance, no jitter."""
        settings = self.settings.augment
        image = decode_image(read_uri(row["uri"]))
        if settings.middle_px is not None:
            image = resize_short_side(image, settings.middle_px)
        return self._sample(centre_crop(image, settings.crop_px, self._pad_rgb()), row)

    def _pad_rgb(self) -> tuple[int, int, int]:
        mean, _ = input_statistics(self.settings.backbone.name)
        return round(mean[0]), round(mean[1]), round(mean[2])

    def _sample(self, image: np.ndarray, row: dict[str, Any]) -> dict[str, np.ndarray]:
        sample = {"image": image, "parent": multi_hot(row["labels"], self.num_classes)}
        if self.num_clusters and row.get("soft_targets") is not None:
            shares = row["soft_targets"]
            sample["sub"] = soft_subcategory_targets(row["labels"], shares, self.num_classes, self.num_clusters)
        elif self.num_clusters:
            sample["sub"] = subcategory_targets(row["labels"], row["cluster_ids"], self.num_classes, self.num_clusters)
        return sample

    def empty_sample(self) -> dict[str, np.ndarray]:
        crop = self.settings.augment.crop_px
        sample: dict[str, np.ndarray] = {"image": np.zeros((3, crop, crop), np.uint8)}
        sample["parent"] = np.zeros(self.num_classes, np.float32)
        if self.num_clusters:
            sample["sub"] = np.zeros(self.num_classes * self.num_clusters, np.float32)
        return sample

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(batch["image"])
        return joint_loss(
            output.parent,
            output.sub,
            batch["parent"],
            batch.get("sub"),
            subcategory_weight=self.settings.subcategory_weight,
            sample_weight=batch["weight"],
        )

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        assert isinstance(model, Classifier)
        return model.parameter_groups()

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"score": model(batch["image"]).parent.float(), "target": batch["parent"]}

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        """`map` and `ap/<class_index>`, over classes that occur."""
        precision = average_precision(outputs["score"], outputs["target"])
        values = {f"ap/{index}": float(value) for index, value in enumerate(precision) if not np.isnan(value)}
        return {"map": float(np.nanmean(precision)) if values else float("nan"), **values}


def run(
    context: StageContext,
    manifest: Manifest,
    round_index: int,
    subcategories: Artifact | None,
    previous: PreviousRound | None = None,
) -> Artifact:
    """Train, or skip what is trained. subcategories: of `cluster_features` of the round before; None in round 0.

    previous: what the sub-category head may go on from; None in rounds 0 and 1.
    """
    experiment = context.experiment
    settings = experiment.classifier
    if settings.subcategory_head == "new":
        previous = None

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        num_clusters, head, join = 0, None, None
        if subcategories is not None:
            num_clusters = subcategories.folder.read_json("result.json")["num_clusters"]
            folder, column = subcategories.folder, "cluster_ids"
            if settings.subcategory_targets == "soft":
                folder, column = artifact.folder.child("soft_targets"), "soft_targets"
                write_soft_targets(
                    context, manifest, round_index, subcategories.folder, folder, settings.soft_temperature
                )
            join = functools.partial(_with_targets, folder, column)
            if previous is not None:
                names = manifest.shard_names("train")
                head = previous_head(previous, subcategories.folder, names, manifest.classes.num_classes)
                if head is None:
                    context.progress.note(
                        f"train classifier, round {round_index}: kmeans.num_clusters differs from the round before's; "
                        "the sub-category head starts anew"
                    )
        rows = write_rows(artifact.folder, "rows.arrow", manifest.joined("train", _COLUMNS, join))
        split = settings.validation_split
        validation = None
        if split is not None and manifest.shard_names(split):
            tagged = functools.partial(_tagged, with_clusters=num_clusters > 0)
            validation = write_rows(artifact.folder, "val_rows.arrow", manifest.joined(split, _COLUMNS, tagged))
        title = f"train classifier, round {round_index}"
        positives = np.zeros(manifest.classes.num_classes, np.int64)
        for batch in rows.batches():
            positives += np.bincount(pc.list_flatten(batch["labels"]).to_numpy(), minlength=len(positives))
        total = settings.optimiser.length(rows.num_rows).num_images
        with context.progress.stage(title, total=total, unit="images") as bar:
            result = train(
                ClassifierTrainee(settings, manifest.classes.num_classes, num_clusters, head),
                rows,
                val_rows=validation,
                folder=artifact.folder,
                optimiser=settings.optimiser,
                compute=settings.compute,
                rng_seed=experiment.rng_seed,
                max_bad_frac=experiment.stream.max_bad_frac,
                bar=bar,
                on_metrics=lambda step, values: child.log_metrics(
                    {f"train_classifier/{key}": value for key, value in values.items()}, step
                ),
            )
        warn_of_loss(context, title, result, guess_loss(positives, rows.num_rows))
        final = {key: value for key, value in result.metrics.items() if isinstance(value, int | float)}
        return {**training_stats(artifact, result), **final}

    return complete(
        context,
        name=round_folder(round_index, "classifier"),
        stage="train_classifier",
        round_index=round_index,
        inputs={
            "settings": settings.model_dump(mode="json", exclude=_without_effect(settings, round_index)),
            "rng_seed": experiment.rng_seed,
            "manifest": manifest.fingerprint,
            "subcategories": subcategories.output_fingerprint if subcategories else None,
            **_fingerprints(previous),
        },
        work=work,
    )


def _with_targets(folder: Storage, column: str, name: str, rows: pa.Table) -> pa.Table:
    """The rows of a shard that have targets in a column of the shard of that name in `folder`, with them."""
    table = folder.read_table(f"{name}.parquet", ["image_id", "labels", column])
    return with_column(rows, one_row_an_image(table, [column]), column)


def _tagged(name: str, rows: pa.Table, *, with_clusters: bool) -> pa.Table:
    """Validation rows whose tags are known (the others are no negatives); with_clusters: all cluster ids 0."""
    rows = rows.filter(pc.greater(pc.list_value_length(rows["labels"]), 0))
    if not with_clusters:
        return rows
    unknown = pa.array([[0] * len(labels) for labels in rows["labels"].to_pylist()], pa.list_(pa.int32()))
    return rows.append_column("cluster_ids", unknown)


def _without_effect(settings: ClassifierSettings, round_index: int) -> dict[str, Any]:
    """What to leave out of the fingerprint: what changes no result, and options in rounds that they do not touch."""
    excluded: dict[str, Any] = {"compute": True, "optimiser": {"keep_checkpoints"}}
    if settings.subcategory_targets == "hard" or round_index == 0:
        excluded |= {"subcategory_targets": True, "soft_temperature": True}
    if settings.subcategory_head == "new" or round_index < 2:
        excluded |= {"subcategory_head": True}
    return excluded


def _fingerprints(previous: PreviousRound | None) -> dict[str, str]:
    if previous is None:
        return {}
    return {
        "previous_classifier": previous.classifier.output_fingerprint,
        "previous_subcategories": previous.subcategories.output_fingerprint,
    }


def load_classifier(
    folder: Storage,
    settings: ClassifierSettings,
    num_classes: int,
    output_stride: OutputStride | None = None,
) -> Classifier:
    """The trained parent classifier of `folder`, in eval mode; maps and features never use the sub-category head.

    output_stride: another stride than it was trained at, by dilation: the same weights on a finer or coarser grid.
    """
    changes: dict[str, Any] = {"weights": "none", "output_stride": output_stride or settings.backbone.output_stride}
    backbone, _ = build_backbone(settings.backbone.model_copy(update=changes))
    model = Classifier(backbone, num_classes, 0, dropout=settings.dropout)
    with folder.fetch("model.pt") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = {key: value for key, value in state.items() if not key.startswith("sub_head")}
    model.load_state_dict(state)
    return model.eval()
