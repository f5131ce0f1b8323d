"""Write the pooled feature of every training image, or of each of its classes, once.

Reads:   manifest (train), classifier of the same round
Writes:  rounds/RR/features: part-*.parquet of image_id, labels, feature (D,)
Runs on: a fixed pool of Ray Data actors, a shard at a time; in process with stream.num_actors = 0
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.storage import Storage
from cluster.streams import BadRow, ShardOutput, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, round_folder, stream_stats
from jobs.manifest import Manifest
from jobs.train_classifier import ClassifierSettings, load_classifier
from subcat_core import schemas
from subcat_core.images import MAX_ASPECT, resize
from subcat_core.settings import Settings
from subcat_core.views import passes, view_sizes

LABELLED = ["image_id", "uri", "labels"]

_WAITING_BATCHES = 4  # images that wait for others of their size, in batches


class FeatureSettings(Settings):
    """What is stored for clustering."""

    pool: Literal["image", "region"] = "image"
    """`image`: one feature an image, the mean over its whole map (the paper). `region`: one for each tagged class, the
    mean over the cells where the class's own map is confident, weighted by that map (region_features.py)."""
    region_threshold: float = Field(default=0.4, ge=0, lt=1)
    """With `region`: a cell belongs where the class's map exceeds this share of its maximum."""
    dtype: Literal["float16", "float32"] = "float16"
    """How features are stored: float16 takes half the space, and clustering adds up in float64 either way."""
    base_px: int | None = Field(default=None, ge=16)
    """Short side the images are brought to; None keeps their own size (the paper's way)."""
    max_px: int | None = Field(default=1024, ge=16)
    """Long side, after base_px, is brought down to this; bounds time and memory for large pictures."""
    batch_size: int = Field(default=16, ge=1)
    """Images of equal size that go through the network together, at most."""
    pass_px: int = Field(default=2_000_000, ge=1)
    """Pixels in one forward pass: bounds memory; a GPU takes ten times as many."""


class FeatureWorker:
    """One actor: holds the network, turns a manifest shard into a feature shard."""

    def __init__(
        self,
        *,
        classifier: Storage,
        classifier_settings: ClassifierSettings,
        num_classes: int,
        settings: FeatureSettings,
    ) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = (
            load_classifier(classifier, classifier_settings, num_classes)
            .to(self.device)
            .to(memory_format=torch.channels_last)
        )

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        rows: list[dict[str, Any]] = []
        features: list[np.ndarray] = []  # (rows of the image, D) each
        bad: list[BadRow] = []
        for batch in self._batches(inputs["manifest"], bad):
            rows += [row for row, _ in batch]
            images = [image for _, image in batch]
            if self.settings.pool == "region":
                features += self._extract_regions(images, [row["labels"] or [] for row, _ in batch])
            else:
                features += list(self._extract(images)[:, None])
        features = [feature.astype(self.settings.dtype) for feature in features]
        finite = [bool(np.isfinite(feature).all()) for feature in features]
        bad += [
            BadRow(row["image_id"], row["uri"], f"feature is not finite in {self.settings.dtype}")
            for row, good in zip(rows, finite, strict=True)
            if not good
        ]
        kept = [(row, feature) for row, feature, good in zip(rows, features, finite, strict=True) if good]
        return ShardOutput(table=self._table(kept), bad=bad, stats={}, num_rows=len(kept))

    def _table(self, kept: list[tuple[dict[str, Any], np.ndarray]]) -> pa.Table:
        """Manifest rows with their features, as schemas.features."""
        ids: list[str] = []
        labels: list[list[int]] = []
        for row, feature in kept:
            by_class = self.settings.pool == "region" and row["labels"]
            ids += [row["image_id"]] * len(feature)
            labels += [[class_index] for class_index in row["labels"]] if by_class else [row["labels"]]
        empty = np.zeros((0, self.model.num_features), self.settings.dtype)
        values = np.concatenate([empty, *(feature for _, feature in kept)])
        schema = schemas.features(self.model.num_features, self.settings.dtype)
        return pa.Table.from_arrays(
            [
                pa.array(ids, pa.string()),
                pa.array(labels, schemas.LABELS),
                pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=schema.field("feature").type),
            ],
            schema=schema,
        )

    def _batches(self, table: pa.Table, bad: list[BadRow]) -> Iterator[list[tuple[dict[str, Any], np.ndarray]]]:
        """Images of equal size, up to batch_size together.

        Where many sizes come, the largest group goes before it is full, so memory does not grow with the shard.
        """
        waiting: dict[tuple[int, ...], list[tuple[dict[str, Any], np.ndarray]]] = {}
        num_waiting = 0
        for row, image in iter_images(table):
            if isinstance(image, BadRow):
                bad.append(image)
                continue
            image = self._resized(image)
            group = waiting.setdefault(image.shape, [])
            group.append((row, image))
            num_waiting += 1
            if len(group) == self.settings.batch_size or num_waiting == _WAITING_BATCHES * self.settings.batch_size:
                largest = max(waiting, key=lambda shape: len(waiting[shape]))
                num_waiting -= len(waiting[largest])
                yield waiting.pop(largest)
        yield from waiting.values()

    def _resized(self, image: np.ndarray) -> np.ndarray:
        base_px, max_px = self.settings.base_px, self.settings.max_px
        if base_px is not None:  # strips stay small, as in training
            longest_px = round(MAX_ASPECT * base_px)
            max_px = longest_px if max_px is None else min(max_px, longest_px)
        [(height, width)] = view_sizes(image.shape[0], image.shape[1], (1.0,), base_px, max_px)
        return resize(image, height, width)

    @torch.inference_mode()
    def _extract(self, images: list[np.ndarray]) -> np.ndarray:
        """(N, D) float32 of images of one size."""
        return np.concatenate([self.model.extract(part).float().cpu().numpy() for _, part in self._passes(images)])

    @torch.inference_mode()
    def _extract_regions(self, images: list[np.ndarray], labels: list[list[int]]) -> list[np.ndarray]:
        """For each image of one size (n, D) float32 of its n classes; (1, D) of the whole image where it has no tag."""
        found: list[np.ndarray] = []
        for place, part in self._passes(images):
            regions = self.model.extract_regions(part, labels[place], self.settings.region_threshold)
            found += [region.cpu().numpy() for region in regions]
        return found

    def _passes(self, images: list[np.ndarray]) -> Iterator[tuple[slice, torch.Tensor]]:
        """(places, (n, 3, H, W) uint8 on the device): images of one size that go through together."""
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        pass_px = self.settings.pass_px * (10 if self.device.type == "cuda" else 1)
        for part in passes(len(images), images[0].shape[0] * images[0].shape[1], pass_px):
            yield part, batch[part].to(self.device)


def _without_effect(settings: FeatureSettings) -> set[str]:
    """Settings that change no feature; the default pool neither, so that features made before it was a setting stay."""
    unused = {"pool", "region_threshold"} if settings.pool == "image" else set()
    return {"batch_size", "pass_px"} | unused


def run(context: StageContext, manifest: Manifest, round_index: int, classifier: Artifact) -> Artifact:
    """Features of the train split with the classifier of this round."""
    experiment = context.experiment
    settings = experiment.features
    shards = manifest.shard_names("train")

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        with context.progress.stage(
            f"extract features, round {round_index}", total=manifest.num_rows("train"), unit="images"
        ) as bar:
            summaries = map_shards(
                FeatureWorker,
                {
                    "classifier": classifier.folder,
                    "classifier_settings": experiment.classifier,
                    "num_classes": manifest.classes.num_classes,
                    "settings": settings,
                },
                inputs={"manifest": manifest.folder},
                columns={"manifest": LABELLED},
                shards=shards,
                output=artifact.folder,
                settings=experiment.stream,
                bar=bar,
                stage="extract_features",
            )
        return stream_stats(summaries)

    return complete(
        context,
        name=round_folder(round_index, "features"),
        stage="extract_features",
        round_index=round_index,
        inputs={
            "settings": settings.model_dump(mode="json", exclude=_without_effect(settings)),
            "manifest": manifest.fingerprint,
            "classifier": classifier.output_fingerprint,
        },
        work=work,
    )
