"""Cut the annotated masks of training images as their tiles are cut, for a yardstick that trains on tiles.

Reads:   tiles (train), manifest, the annotated masks of its images, or those of supervised.masks_folder
Writes:  supervised/masks: png/<image_id of the tile>.png (class ids), part-*.parquet (image_id, mask_uri)
Runs on: a fixed pool of Ray Data actors on CPUs, a shard at a time; in process with stream.num_actors = 0

Only with [supervised] and prepare.tiles.segmenter_sees = "tiles". An image without a mask is left out.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.storage import MissingFileError, Storage
from cluster.streams import BadRow, ShardOutput, map_shards
from cluster.tracking import ChildRun
from jobs.cam_tables import COLUMNS, read_truth
from jobs.context import StageContext, complete, stream_stats
from jobs.manifest import Manifest
from jobs.tile_images import TILE_COLUMNS, by_image
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import ImageError, encode_mask

FOLDER = "supervised/masks"
STAGE = "cut_supervised_masks"
_SCHEMA = pa.schema([schemas.MASKS.field(name) for name in ("image_id", "mask_uri")])


class MaskCutWorker:
    """One actor: cuts the masks of a shard's images; one that cannot be read, or does not fit its image, is bad."""

    def __init__(self, *, output: Storage, classes: ClassTable, masks_folder: str | None) -> None:
        self.output = output
        self.classes = classes
        self.masks_folder = None if masks_folder is None else Storage(masks_folder)

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        made: list[dict[str, Any]] = []
        bad: list[BadRow] = []
        palette = self.classes.flat_palette()
        for group in by_image(inputs["manifest"], inputs["images"]):
            row = dict(group.image)
            if self.masks_folder is not None:
                row["mask_uri"] = self.masks_folder.uri(f"{row['image_id']}.png")
            if not row["mask_uri"]:
                continue
            try:
                mask = read_truth(row, self.classes)
                if mask.shape != (row["height_px"], row["width_px"]):
                    raise ImageError(f"mask of {mask.shape} px, its image has {row['height_px']} x {row['width_px']}")
            except (ImageError, MissingFileError) as error:
                bad.append(BadRow(row["image_id"], row["mask_uri"], " ".join(str(error).split())))
                continue
            for tile in group.tiles.to_pylist():
                y, x, name = tile["y_px"], tile["x_px"], f"png/{tile['image_id']}.png"
                part = mask[y : y + tile["height_px"], x : x + tile["width_px"]]
                self.output.write_bytes(name, encode_mask(part, palette))
                made.append({"image_id": tile["image_id"], "mask_uri": self.output.uri(name)})
        return ShardOutput(pa.Table.from_pylist(made, _SCHEMA), bad=bad, stats={}, num_rows=len(made))


def run(context: StageContext, manifest: Manifest, tiles: Manifest) -> Artifact:
    """Cut, or skip what is cut."""
    settings = context.experiment.supervised
    assert settings is not None

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        with context.progress.stage("cut full masks", total=tiles.num_rows("train"), unit="tiles") as bar:
            summaries = map_shards(
                MaskCutWorker,
                {"output": artifact.folder, "classes": manifest.classes, "masks_folder": settings.masks_folder},
                inputs={"manifest": tiles.folder, "images": manifest.folder},
                columns={"manifest": [*COLUMNS, *TILE_COLUMNS], "images": COLUMNS},
                shards=tiles.shard_names("train"),
                output=artifact.folder,
                settings=context.experiment.stream.model_copy(update={"gpus_per_actor": 0.0}),
                bar=bar,
                stage=STAGE,
            )
        return stream_stats(summaries)

    return complete(
        context,
        name=FOLDER,
        stage=STAGE,
        inputs={
            "supervised": settings.model_dump(mode="json"),
            "manifest": manifest.fingerprint,
            "tiles": tiles.fingerprint,
        },
        work=work,
    )
