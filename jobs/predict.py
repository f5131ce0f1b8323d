"""Masks from the trained segmenter; no tags are given to it.

Reads:   manifest (the splits asked for), or any folder, file or table of images; segmenter
Writes:  predictions: png/<image_id>.png (indexed, with palette), part-*.parquet (schema MASKS)
Runs on: a fixed pool of Ray Data actors, a shard at a time; in process with stream.num_actors = 0
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from cluster.artifacts import Artifact, fingerprint
from cluster.progress import Progress
from cluster.storage import Storage
from cluster.streams import BadRow, ShardOutput, StreamSettings, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, stream_stats
from jobs.manifest import Manifest
from jobs.train_segmenter import load_segmenter
from subcat_core import schemas
from subcat_core.classes import BACKGROUND
from subcat_core.crf import CrfSettings
from subcat_core.images import encode_mask
from subcat_core.segmenter import predict_mask
from subcat_core.settings import Settings


class PredictSettings(Settings):
    """How the segmenter is applied."""

    splits: tuple[str, ...] = ("val",)
    """Splits of the manifest that `run` predicts and evaluates; those it does not have are left out."""
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0,), min_length=1)
    """Sizes that the image is looked at, as factors. Each costs a pass."""
    merge: Literal["mean", "max"] = "mean"
    """mean: class probabilities are averaged over scales and mirrored images. max: the largest logit counts, at the
    size of the first scale's logits (deeplab-pytorch: scales 1, 0.5, 0.75, without flip)."""
    flip: bool = True
    """Look at each scale mirrored as well: twice the time."""
    base_px: int | None = Field(default=None, ge=16)
    """Short side the images are brought to before scaling; None: the middle of the training sizes, or the image's own
    size where training drew factors of it. Masks come back at the image's own size."""
    crf: CrfSettings | None = None
    """Dense CRF on the probabilities; none: the network alone decides. The model in MLflow never has one."""


class PredictWorker:
    """One actor: holds the segmenter, turns rows of images into PNG files and their index."""

    def __init__(self, *, segmenter: Storage, output: Storage, settings: PredictSettings) -> None:
        self.output = output
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, self.classes, trained_px = load_segmenter(segmenter)
        self.base_px = settings.base_px or trained_px
        self.model = model.to(self.device).to(memory_format=torch.channels_last)

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        bad: list[BadRow] = []
        made: list[dict[str, Any]] = []
        for row, image in iter_images(inputs["manifest"]):
            if isinstance(image, BadRow):
                bad.append(image)
                continue
            mask, confidence = predict_mask(
                self.model,
                image,
                scales=self.settings.scales,
                merge=self.settings.merge,
                flip=self.settings.flip,
                base_px=self.base_px,
                crf=self.settings.crf,
                device=self.device,
            )
            name = f"png/{row['image_id']}.png"
            self.output.write_bytes(name, encode_mask(mask, self.classes.flat_palette()))
            present = np.unique(mask)
            made.append(
                {
                    "image_id": row["image_id"],
                    "mask_uri": self.output.uri(name),
                    "class_ids": [int(value) for value in present if value != BACKGROUND],
                    "coverage_frac": float((mask != BACKGROUND).mean()),
                    "ignore_frac": 0.0,
                    "confidence": float(confidence.mean()),
                }
            )
        return ShardOutput(pa.Table.from_pylist(made, schemas.MASKS), bad=bad, stats={}, num_rows=len(made))


def run(
    context: StageContext,
    manifest: Manifest,
    segmenter: Artifact,
    *,
    name: str = "predictions",
    stage: str = "predict",
) -> Artifact:
    """Predict the splits of the run that the manifest has. name: the folder to write."""
    settings = context.experiment.predict
    shards = sorted({name for split in settings.splits for name in manifest.shard_names(split)})

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        total = sum(shard.num_rows for shard in manifest.shards if shard.name in shards)
        with context.progress.stage(stage.replace("_", " "), total=total, unit="images") as bar:
            summaries = map_shards(
                PredictWorker,
                {"segmenter": segmenter.folder, "output": artifact.folder, "settings": settings},
                inputs={"manifest": manifest.folder},
                columns={"manifest": ["image_id", "uri"]},
                shards=shards,
                output=artifact.folder,
                settings=context.experiment.stream,
                bar=bar,
                stage=stage,
            )
        return stream_stats(summaries)

    return complete(
        context,
        name=name,
        stage=stage,
        inputs={
            "settings": settings.model_dump(mode="json"),
            "manifest": manifest.fingerprint,
            "segmenter": segmenter.output_fingerprint,
        },
        work=work,
    )


def predict_images(
    progress: Progress,
    *,
    segmenter: Storage,
    rows: list[dict[str, Any]],
    output: Storage,
    settings: PredictSettings,
    stream: StreamSettings,
    rows_per_shard: int = 256,
) -> dict[str, Any]:
    """Masks for any images, with no manifest and no tags. rows: image_id and uri. Returns the stream's stats.

    The same images, model and settings go on where an earlier call stopped; ArtifactMismatch where the output folder
    holds masks of others.
    """
    marker = segmenter.read_json("marker.json") if segmenter.exists("marker.json") else {}
    inputs = {
        "stage": "predict_images",
        "settings": settings.model_dump(mode="json", exclude={"splits"}),
        "segmenter": marker.get("output", segmenter.uri()),
        "images": fingerprint([[row["image_id"], row["uri"]] for row in rows]),
    }
    artifact = Artifact(output, "", inputs)
    if artifact.is_complete():
        return artifact.stats()
    artifact.begin()
    for shard, start in enumerate(range(0, len(rows), rows_per_shard)):
        table = pa.Table.from_pylist(rows[start : start + rows_per_shard])
        output.write_table(f"images/part-{shard:05d}.parquet", table)
    num_shards = -(-len(rows) // rows_per_shard)
    with progress.stage("predict", total=len(rows), unit="images") as bar:
        summaries = map_shards(
            PredictWorker,
            {"segmenter": segmenter, "output": output, "settings": settings},
            inputs={"manifest": output.child("images")},
            shards=[f"part-{shard:05d}" for shard in range(num_shards)],
            output=output,
            settings=stream,
            bar=bar,
            stage="predict",
        )
    stats = stream_stats(summaries)
    artifact.commit(stats)
    return stats
