"""Cut every image into tiles, with tags a tile: what is learned from tags sees tiles, masks are of whole images again.

Reads:   manifest, its images, and its masks or a table where tags come from them
Writes:  tiles: png/<image_id>/*.png, part-*.parquet (schema MANIFEST with parent_id, x_px, y_px), classes.json,
         shards.json. A shard holds the tiles of the manifest's shard of the same name, image after image, row by row
         from the top: so the tiles of an image never lie in two shards
Runs on: a fixed pool of Ray Data actors, a shard at a time; in process with stream.num_actors = 0

Only with prepare.tiles. One image a time is in memory, at most 16 bytes a pixel here and in every later stage.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from cluster.artifacts import Artifact, fingerprint
from cluster.storage import MissingFileError, Storage, read_uri
from cluster.streams import BadRow, ShardOutput, ShardSummary, map_shards
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, stream_stats
from jobs.importers.problems import format_problems
from jobs.importers.rows import TRAIN
from jobs.importers.tile_tags import read_tile_tags, write_by_shard
from jobs.manifest import Manifest, ShardEntry, open_manifest, write_index
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import MAX_PIXELS, ImageError, decode_image, decode_mask
from subcat_core.settings import Settings
from subcat_core.tiles import encode_tile, tile_grid, tile_labels

if TYPE_CHECKING:
    from jobs.config import Experiment

FOLDER = "tiles"
STAGE = "cut_tiles"
_GIVEN = "given"
_IMAGE_COLUMNS = ["image_id", "uri", "height_px", "width_px", "split", "labels", "mask_uri"]
_THREADS = 4
_MAX_SHOWN = 20


class TileSettings(Settings):
    """Tiles of large images, and where their tags come from: the image, or tags_path, or tags_from_masks_frac."""

    tile_px: int = Field(ge=8)
    """Side of a tile; an image that is smaller on one side has tiles of its own size there."""
    stride_px: int = Field(ge=1)
    """Steps between tiles; a last row and column lie flush with the border. Half a tile's side gives four tiles for
    most pixels, and so four times the bytes of the image."""
    tags_path: str | None = None
    """CSV or Parquet table of tags by tile: parent_id, x_px, y_px, labels. Tiles it lacks have the image's tags."""
    tags_from_masks_frac: float | None = Field(default=None, ge=0, lt=1)
    """Take a tile's tags from the ANNOTATED MASK: every class that covers more than this share of it (0.05 in the
    literature). That is supervision by masks, not by tags: its scores do not compare with those of image tags."""
    segmenter_sees: Literal["images", "tiles"] = "images"
    """What the segmenter trains on: crops of whole images and their stitched pseudo masks, or tiles and theirs, which
    images too large to decode for every crop need."""
    max_image_px: int = Field(default=500_000_000, ge=1)
    """Pixels of the largest image, height times width; an actor takes about 16 bytes for each."""

    @model_validator(mode="after")
    def _fits(self) -> TileSettings:
        if self.stride_px > self.tile_px:
            raise ValueError(
                f"stride_px = {self.stride_px} is longer than tile_px = {self.tile_px} and leaves gaps; "
                f"use at most {self.tile_px}"
            )
        if self.tags_path is not None and self.tags_from_masks_frac is not None:
            raise ValueError("tags_path and tags_from_masks_frac are both given; tags come from one of them")
        return self

    @property
    def needs_image_tags(self) -> bool:
        """Whether an image without a tag would leave its tiles without one."""
        return self.tags_path is None and self.tags_from_masks_frac is None

    def protocol(self) -> dict[str, str]:
        """What must be said beside every score of a run on tiles."""
        tags = "those of the whole image"
        if self.tags_path is not None:
            tags = "given by tile; the image's where a tile has none"
        elif self.tags_from_masks_frac is not None:
            tags = (
                f"from the annotated masks: every class that covers more than {self.tags_from_masks_frac:g} of a tile. "
                "Supervision by masks, not comparable with image tags"
            )
        tiles = f"{self.tile_px} px at stride {self.stride_px} px; averaged where they overlap, scored on whole images"
        return {"tiles": tiles, "tile_tags": tags}


class CutWorker:
    """One actor: cuts the images of a shard; an image that cannot be cut is bad as a whole.

    stats: class_counts (C) tiles of each class, digest of the rows.
    """

    def __init__(self, *, output: Storage, classes: ClassTable, settings: TileSettings) -> None:
        self.output = output
        self.classes = classes
        self.settings = settings

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        given: dict[str, dict[tuple[int, int], list[int]]] = {}
        for row in inputs["given"].to_pylist() if "given" in inputs else []:
            given.setdefault(row["parent_id"], {})[row["y_px"], row["x_px"]] = row["labels"]
        tiles: list[dict[str, Any]] = []
        bad: list[BadRow] = []
        for row in inputs["manifest"].to_pylist():
            try:
                tiles += self._cut(row, given.get(row["image_id"], {}))
            except (ImageError, MissingFileError) as error:
                bad.append(BadRow(row["image_id"], row["uri"], " ".join(str(error).split())))
        labels = [index for tile in tiles for index in tile["labels"]]
        stats = {
            "class_counts": np.bincount(np.asarray(labels, np.int64), minlength=self.classes.num_classes).tolist(),
            "digest": hashlib.sha256(json.dumps(tiles).encode()).hexdigest(),
        }
        return ShardOutput(pa.Table.from_pylist(tiles, schemas.MANIFEST), bad=bad, stats=stats, num_rows=len(tiles))

    def _cut(self, row: dict[str, Any], given: dict[tuple[int, int], list[int]]) -> list[dict[str, Any]]:
        """Write the tiles of an image; returns their manifest rows. Raises ImageError where it cannot be cut."""
        settings = self.settings
        image = decode_image(read_uri(row["uri"]), settings.max_image_px)
        mask = self._mask(row, image.shape[:2])
        rows = []
        for y, x in tile_grid(image.shape[0], image.shape[1], settings.tile_px, settings.stride_px):
            part = np.s_[y : y + settings.tile_px, x : x + settings.tile_px]
            labels = given.get((y, x), row["labels"] or [])
            if mask is not None:
                labels = tile_labels(mask[part], self.classes.num_classes, settings.tags_from_masks_frac or 0.0)
            height, width = image[part].shape[:2]
            rows.append(
                {
                    "image_id": f"{row['image_id']}.y{y}.x{x}",
                    "uri": self.output.uri(f"png/{row['image_id']}/y{y}.x{x}.png"),
                    "height_px": height,
                    "width_px": width,
                    "split": row["split"],
                    "labels": labels,
                    "parent_id": row["image_id"],
                    "x_px": x,
                    "y_px": y,
                }
            )

        def write(tile: dict[str, Any]) -> None:
            y, x = tile["y_px"], tile["x_px"]
            pixels = image[y : y + settings.tile_px, x : x + settings.tile_px]
            self.output.write_bytes(tile["uri"], encode_tile(pixels))

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="tiles") as pool:
            list(pool.map(write, rows))
        return rows

    def _mask(self, row: dict[str, Any], size: tuple[int, ...]) -> np.ndarray | None:
        """The annotated mask where tags come from it. ImageError where a training image has none."""
        if self.settings.tags_from_masks_frac is None:
            return None
        if not row["mask_uri"]:
            if row["split"] == TRAIN:
                raise ImageError("no mask, and prepare.tiles.tags_from_masks_frac takes the tags of tiles from masks")
            return None
        mask = decode_mask(read_uri(row["mask_uri"]), self.classes.mask_lut(), self.settings.max_image_px)
        if mask.shape != size:
            raise ImageError(f"its mask has {mask.shape[0]} x {mask.shape[1]} px, the image {size[0]} x {size[1]}")
        return mask


def run(context: StageContext, manifest: Manifest) -> Manifest:
    """Cut, or skip what is cut; returns the manifest of tiles.

    Raises ValueError where the table of tags does not fit the tiles, with every problem at once.
    """
    settings = context.experiment.prepare.tiles
    assert settings is not None, "the pipeline cuts tiles only where they are set"
    _check_large(context.experiment, manifest)
    given = None if settings.tags_path is None else read_tile_tags(settings.tags_path, manifest.classes)

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        inputs = {"manifest": manifest.folder}
        if given is not None:
            inputs["given"] = artifact.folder.child(_GIVEN)
            problem_log = write_by_shard(given, manifest, inputs["given"], settings.tile_px, settings.stride_px)
            if problem_log.has_errors:
                context.storage.delete_tree(FOLDER)  # a mended table is another input, and nothing is cut yet
                raise ValueError(f"{given.uri}: {format_problems(problem_log.problems(), max_shown=_MAX_SHOWN)}")
        with context.progress.stage("cut tiles", total=manifest.num_rows(), unit="images") as bar:
            summaries = map_shards(
                CutWorker,
                {"output": artifact.folder, "classes": manifest.classes, "settings": settings},
                inputs=inputs,
                columns={"manifest": _IMAGE_COLUMNS},
                shards=manifest.shard_names(),
                output=artifact.folder,
                settings=context.experiment.stream.model_copy(update={"gpus_per_actor": 0.0}),
                bar=bar,
                stage=STAGE,
            )
        artifact.folder.delete_tree(_GIVEN)
        stats = _finish(artifact.folder, manifest, summaries)
        for line in stats["warnings"]:
            context.progress.note(f"warning: {line}")
        digests = [summary.stats["digest"] for summary in summaries]
        return {**stream_stats(summaries), **stats, "fingerprint": fingerprint([artifact.fingerprint, digests])}

    complete(
        context,
        name=FOLDER,
        stage=STAGE,
        inputs={
            "settings": settings.model_dump(mode="json", exclude={"segmenter_sees", "max_image_px"}),
            "tags": None if given is None else given.sha256,
            "manifest": manifest.fingerprint,
        },
        work=work,
    )
    return open_tiles(context.storage)


def open_tiles(storage: Storage) -> Manifest:
    """The manifest of tiles of a run's output. Raises ValueError where none was made."""
    return open_manifest(storage.child(FOLDER), stage=STAGE)


def has_tiles(storage: Storage) -> bool:
    """Whether the run of this output has cut tiles."""
    return storage.exists(f"{FOLDER}/marker.json")


def _check_large(experiment: Experiment, manifest: Manifest) -> None:
    """ValueError for images that a later stage would have to decode whole and could not, before hours of training."""
    columns = ["image_id", "split", "height_px", "width_px"]
    for rows in (rows for split in manifest.splits for rows in manifest.joined(split, columns)):
        pixels = pc.multiply(rows["height_px"].cast(pa.int64()), rows["width_px"].cast(pa.int64()))
        _check_sizes(experiment, rows.filter(pc.greater(pixels, MAX_PIXELS)).to_pylist())


def _check_sizes(experiment: Experiment, large: list[dict[str, Any]]) -> None:
    for row in large:
        size = f"{row['image_id']} has {row['height_px']} x {row['width_px']} px, more than {MAX_PIXELS} pixels"
        if row["split"] == TRAIN and not experiment.prepare.segmenter_sees_tiles:
            raise ValueError(f'{size}: too large to train the segmenter; prepare.tiles.segmenter_sees = "tiles"')
        if row["split"] in experiment.predict.splits and experiment.predict.window_px is None:
            raise ValueError(f"{size}: too large to predict at once; set predict.window_px")


def _finish(folder: Storage, manifest: Manifest, summaries: list[ShardSummary]) -> dict[str, Any]:
    """Write the index; returns {"splits": tiles of each split and class, "warnings": [...]}.

    Raises ValueError where the train split has no tile.
    """
    split_of = {shard.name: shard.split for shard in manifest.shards}
    kept, counts = [], {split: np.zeros(manifest.classes.num_classes, np.int64) for split in manifest.splits}
    for summary in summaries:
        if summary.num_rows:
            split = split_of[summary.name]
            kept.append(ShardEntry(summary.name, split, summary.num_rows, 0))
            counts[split] += summary.stats["class_counts"]
    if not any(shard.split == TRAIN for shard in kept):
        raise ValueError(f"{folder.uri()}: split {TRAIN!r} has no tile; every image of it was bad")
    write_index(folder, manifest.classes, kept)
    splits = {
        split: {
            "tiles": sum(shard.num_rows for shard in kept if shard.split == split),
            "classes": dict(zip(manifest.classes.names, values.tolist(), strict=True)),
        }
        for split, values in counts.items()
    }
    missing = [name for name, number in zip(manifest.classes.names, counts[TRAIN], strict=True) if not number]
    return {"splits": splits, "warnings": [f"no tile of split {TRAIN} shows class {name!r}" for name in missing]}
