"""Masks from the trained segmenter; no tags are given to it.

Reads:   manifest (the splits asked for), or any folder, file or table of images; segmenter
Writes:  predictions: png/<image_id>.png (indexed, with palette), part-*.parquet (schema MASKS)
Runs on: a fixed pool of Ray Data actors, a shard at a time; in process with stream.num_actors = 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator

from cluster.artifacts import Artifact, fingerprint
from cluster.image_reading import read_image
from cluster.progress import Progress
from cluster.storage import Storage
from cluster.streams import BadRow, ShardOutput, StreamSettings, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, stream_stats
from jobs.manifest import Manifest
from jobs.quarantine import keep_bad
from jobs.train_segmenter import load_segmenter
from subcat_core import schemas
from subcat_core.classes import BACKGROUND
from subcat_core.crf import CrfSettings
from subcat_core.images import encode_mask
from subcat_core.segmenter import predict_mask
from subcat_core.settings import Settings
from subcat_core.windows import predict_windows

_MAX_WINDOWED_PIXELS = 2**30  # of an image that is looked at through windows; takes 16 bytes a pixel


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
    size where training drew factors of it. Masks come back at the image's own size. With windows: the short side that
    a window is brought to."""
    window_px: int | None = Field(default=None, ge=16)
    """Look at an image through windows of this side, in its own pixels, and average class probabilities where they
    overlap; bounds memory for large images, which are then read one at a time. None: the whole image at once."""
    window_stride_px: int | None = Field(default=None, ge=1)
    """Steps between windows; None: half a window."""
    crf: CrfSettings | None = None
    """Dense CRF on the probabilities, with windows on those of each; none: the network alone decides. The model in
    MLflow never has one."""

    @model_validator(mode="after")
    def _windows_fit(self) -> PredictSettings:
        if self.window_stride_px is not None and (self.window_px is None or self.window_stride_px > self.window_px):
            raise ValueError(
                f"window_stride_px = {self.window_stride_px} with window_px = {self.window_px}: windows would leave "
                "gaps; give window_px, and a stride that is no longer"
            )
        return self

    def windows_text(self) -> str:
        """For the protocol."""
        if self.window_px is None:
            return "no: the whole image at once"
        return f"{self.window_px} px at stride {self.stride_px} px, probabilities averaged"

    def views(self) -> dict[str, Any]:
        """What decides how one image is looked at, plain, for fingerprints."""
        # Younger than runs that are there: without windows they count for nothing.
        without_windows = {"window_px", "window_stride_px"} if self.window_px is None else set()
        return self.model_dump(mode="json", exclude={"splits", "crf"} | without_windows)

    @property
    def stride_px(self) -> int:
        """Steps between windows."""
        return self.window_stride_px or max(1, (self.window_px or 0) // 2)


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
        for row, image in self.images(inputs["manifest"]):
            if isinstance(image, BadRow):
                bad.append(image)
                continue
            mask, confidence = self.predict(image)
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

    def images(self, table: pa.Table) -> Iterator[tuple[dict[str, Any], np.ndarray | BadRow]]:
        """Read ahead, or with windows one by one: then images may be large."""
        if self.settings.window_px is None:
            return iter_images(table)
        return ((row, read_image(row, _MAX_WINDOWED_PIXELS)) for row in table.to_pylist())

    def predict(
        self, image: np.ndarray, allowed_class_ids: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask and confidence, both (H, W). allowed_class_ids: tags, beside which only background may win."""
        settings = self.settings
        options: dict[str, Any] = {
            "scales": settings.scales,
            "merge": settings.merge,
            "flip": settings.flip,
            "base_px": self.base_px,
            "background": self.classes.has_background,
            "crf": settings.crf,
            "device": self.device,
            "allowed_class_ids": allowed_class_ids,
        }
        if settings.window_px is None:
            return predict_mask(self.model, image, **options)
        windows = {"window_px": settings.window_px, "stride_px": settings.stride_px}
        return predict_windows(self.model, image, self.classes.num_classes, **windows, **options)


def run(
    context: StageContext,
    manifest: Manifest,
    segmenter: Artifact,
    *,
    name: str = "predictions",
    stage: str = "predict",
    round_index: int | None = None,
) -> Artifact:
    """Predict the splits of the run that the manifest has. name: the folder to write. round_index: of self-training."""
    settings = context.experiment.predict
    shards = sorted({name for split in settings.splits for name in manifest.shard_names(split)})

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        total = manifest.num_rows_in(shards)
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
        round_index=round_index,
        inputs={
            "settings": {**settings.views(), **settings.model_dump(mode="json", include={"splits", "crf"})},
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
    """Masks for any images, with no manifest and no tags. rows: image_id and uri. Returns the stats of the marker.

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
    stats = keep_bad(output, "predict", stream_stats(summaries))
    artifact.commit(stats)
    return stats
