"""Make the manifest: import what the data set's own layout says, then read every image and mask once.

Reads:   prepare.source: a VOC layout, COCO's JSON, GlaS, a folder per class, a CSV or Parquet table; images and masks
Writes:  manifest: part-*.parquet (schema MANIFEST, one split each), classes.json, shards.json, quarantine.parquet;
         masks/<image_id>.png where the source has outlines (COCO) and no mask files
Runs on: the driver for the import; a fixed pool of Ray Data actors for the images, a shard at a time; in process with
         stream.num_actors = 0
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Artifact, ArtifactMismatch, fingerprint
from cluster.progress import StageBar
from cluster.storage import MissingFileError, Storage, read_uri
from cluster.streams import BadRow, ShardOutput, ShardSummary, map_shards
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, stream_stats
from jobs.cut_tiles import TileSettings
from jobs.importers import ImportSource, Source, open_source, problems
from jobs.importers.coco_masks import Drawing
from jobs.importers.problems import Problem, ProblemLog, format_problems
from jobs.importers.rows import ImportRow, RowCounts, check_counts, checked_rows
from jobs.manifest import FOLDER, MARKER, QUARANTINE, ShardEntry, write_index, write_shards
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import (
    MAX_PIXELS,
    ImageError,
    MaskValueError,
    decode_image,
    decode_mask,
    encode_mask,
    read_size,
)
from subcat_core.settings import Settings

RAW = "raw"
MASKS = "masks"
# What the import knows of a row. Not kept in the manifest: the place it is listed at, for `validate`, and what its mask
# is drawn from.
RAW_SCHEMA = pa.schema(
    [*schemas.MANIFEST, pa.field("file", pa.string()), pa.field("row", pa.int64()), pa.field("drawing", pa.string())]
)
_IMPORTED = "imported.json"
_MAX_SHOWN = 20
_THREADS = 4

CheckMode = Literal["full", "header", "exists"]


class PrepareSettings(Settings):
    """Where images and tags come from, and how they are checked."""

    source: Source
    rows_per_shard: int = Field(default=64, ge=1, le=100_000)
    """Images in one shard: what an actor does at once, and what is done again after a crash."""
    decode: Literal["full", "header"] = "full"
    """full decodes every image and mask; header reads sizes alone, and leaves broken pixels to later stages."""
    max_bad_frac: float = Field(default=0.02, ge=0, le=1)
    """Share of the images that may go to quarantine before the stage fails."""
    tiles: TileSettings | None = None
    """Cut images into tiles, which learn from tags in their place; none: whole images."""

    @property
    def needs_tags(self) -> bool:
        """Whether every training image must have a tag; not where its tiles have tags of their own."""
        return self.tiles is None or self.tiles.needs_image_tags

    @property
    def segmenter_sees_tiles(self) -> bool:
        """Whether the segmenter trains on tiles in place of whole images."""
        return self.tiles is not None and self.tiles.segmenter_sees == "tiles"

    def protocol(self) -> dict[str, str]:
        """What must be said of the tiles beside every score."""
        return {} if self.tiles is None else self.tiles.protocol()

    def check_options(self) -> dict[str, int]:
        """Of CheckWorker: images that will be cut may be large, and are then checked one at a time."""
        return {} if self.tiles is None else {"max_pixels": self.tiles.max_image_px, "num_threads": 1}


class CheckWorker:
    """One actor: reads the images and masks of a shard, fills in their sizes, and tells which are bad and why.

    mode: "exists" asks only whether the files are there. masks: where masks drawn from outlines go; None draws none.
    Its table has schemas.MANIFEST, good rows only; reasons start with the rule; stats: class_counts (C), num_masks,
    digest of the rows, and places (file, row) of the bad ones.
    """

    def __init__(
        self,
        *,
        classes: ClassTable,
        mode: CheckMode,
        masks: Storage | None = None,
        max_pixels: int = MAX_PIXELS,
        num_threads: int = _THREADS,
    ) -> None:
        self.num_classes = classes.num_classes
        self.lut = classes.mask_lut()
        self.palette = classes.flat_palette()
        self.mode = mode
        self.masks = masks
        self.max_pixels = max_pixels
        self.num_threads = num_threads

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        rows = inputs["raw"].to_pylist()
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="check") as pool:
            sizes = list(pool.map(self._size_or_problem, rows))
        kept, bad, places = [], [], []
        for row, size in zip(rows, sizes, strict=True):
            if isinstance(size, Problem):
                bad.append(BadRow(row["image_id"], row["uri"], f"{size.rule}: {size.message}"))
                places.append([row["file"], row["row"]])
            else:
                kept.append({**row, "height_px": size[0], "width_px": size[1]})
        labels = [index for row in kept for index in row["labels"]]
        table = pa.Table.from_pylist(kept, schemas.MANIFEST)
        stats = {
            "class_counts": np.bincount(np.asarray(labels, np.int64), minlength=self.num_classes).tolist(),
            "num_masks": table.num_rows - table["mask_uri"].null_count,
            "digest": hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest(),
            "places": places,
        }
        return ShardOutput(table, bad=bad, stats=stats, num_rows=table.num_rows)

    def _size_or_problem(self, row: dict[str, Any]) -> tuple[int | None, int | None] | Problem:
        """(height, width) of the image, or the first thing that is wrong with its files; draws its mask.

        StorageError where the storage itself fails: that says nothing of the image.
        """
        if self.mode == "exists":
            for uri in filter(None, (row["uri"], row["mask_uri"])):
                if not Storage(uri).exists(""):
                    return Problem(problems.MISSING_FILE, f"{uri}: no such file")
            return None, None
        try:
            data = read_uri(row["uri"])
            header = self.mode == "header"
            size = read_size(data, self.max_pixels) if header else decode_image(data, self.max_pixels).shape[:2]
        except MissingFileError as error:
            return Problem(problems.MISSING_FILE, str(error))
        except ImageError as error:
            return Problem(problems.BAD_IMAGE, f"{row['uri']}: {error}")
        problem = self._mask_problem(row["mask_uri"], size) if row["mask_uri"] else None
        if row.get("drawing"):
            problem = self._draw_mask(row, size)
        return problem or (size[0], size[1])

    def _draw_mask(self, row: dict[str, Any], size: tuple[int, ...]) -> Problem | None:
        """Fills in mask_uri. A shard that is done again writes the same files again."""
        drawing = Drawing.from_json(row["drawing"])
        if (drawing.height, drawing.width) != tuple(size):
            listed = f"{row['file']} says {drawing.height} x {drawing.width} px"
            return Problem(problems.MASK_SIZE, f"{row['uri']}: {listed}, the image has {size[0]} x {size[1]}")
        if self.masks is not None:
            name = f"{row['image_id']}.png"
            self.masks.write_bytes(name, encode_mask(drawing.render(), self.palette))
            row["mask_uri"] = self.masks.uri(name)
        return None

    def _mask_problem(self, uri: str, size: tuple[int, ...]) -> Problem | None:
        try:
            data = read_uri(uri)
            mask_size = read_size(data, self.max_pixels)
            if mask_size != tuple(size):
                message = f"{uri}: the mask has {mask_size[0]} x {mask_size[1]} px, its image {size[0]} x {size[1]}"
                return Problem(problems.MASK_SIZE, message)
            if self.mode == "full":
                decode_mask(data, self.lut, self.max_pixels)
        except MissingFileError as error:
            return Problem(problems.MISSING_FILE, str(error))
        except MaskValueError as error:
            return Problem(problems.MASK_VALUES, f"{uri}: {error}")
        except ImageError as error:
            return Problem(problems.BAD_MASK, f"{uri}: {error}")
        return None


def run(context: StageContext) -> Artifact:
    """Import and check; a finished manifest of the same settings and lists is left as it is.

    Raises ValueError with every problem of the lists at once, and where too many images are bad.
    """
    settings = context.experiment.prepare
    source = open_source(settings.source)
    inputs: dict[str, Any] = {
        "settings": settings.model_dump(mode="json", exclude={"max_bad_frac", "tiles"}),
        "lists": dict(source.fingerprints),
    }
    if inputs["settings"]["source"].get("has_background"):  # younger than manifests that are there
        del inputs["settings"]["source"]["has_background"]
    if settings.tiles is not None:  # what else they say is of cut_tiles
        inputs["settings"] |= {"max_image_px": settings.tiles.max_image_px, "needs_tags": settings.needs_tags}
    _forget_unfinished(context.storage, inputs)

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        raw = artifact.folder.child(RAW)
        with context.progress.stage("import", unit="rows") as bar:
            imported = _import(source, raw, settings, bar)
        shards = [ShardEntry(**entry) for entry in imported["shards"]]
        with context.progress.stage("prepare", total=sum(shard.num_rows for shard in shards), unit="images") as bar:
            summaries = map_shards(
                CheckWorker,
                {
                    "classes": source.classes,
                    "mode": settings.decode,
                    "masks": artifact.folder.child(MASKS),
                    **settings.check_options(),
                },
                inputs={"raw": raw},
                shards=[shard.name for shard in shards],
                output=artifact.folder,
                settings=context.experiment.stream.model_copy(
                    update={"max_bad_frac": settings.max_bad_frac, "gpus_per_actor": 0.0}
                ),
                bar=bar,
                stage="prepare",
            )
        stats = _finish(artifact.folder, source, shards, summaries)
        for line in stats["warnings"]:
            context.progress.note(f"warning: {line}")
        artifact.folder.delete_tree(RAW)
        return {
            **stream_stats(summaries),
            **stats,
            "left_out": imported["notes"],
            "fingerprint": fingerprint([artifact.fingerprint, [summary.stats["digest"] for summary in summaries]]),
        }

    return complete(
        context,
        name=FOLDER,
        stage="prepare",
        inputs=inputs,
        work=work,
    )


def _forget_unfinished(storage: Storage, inputs: dict[str, Any]) -> None:
    """Delete a half-done import of other lists or settings: nothing was made from it, and the remedy for a bad list is
    to mend it and to call again."""
    artifact = Artifact(storage, FOLDER, {"stage": "prepare", **inputs})
    try:
        artifact.is_complete()
    except ArtifactMismatch:
        if artifact.folder.exists(MARKER):
            raise
        storage.delete_tree(FOLDER)


def to_raw(rows: Iterable[ImportRow], bar: StageBar | None = None) -> Iterator[dict[str, Any]]:
    """Rows of RAW_SCHEMA from what an importer yields."""
    for row in rows:
        yield {
            **{field.name: getattr(row, field.name) for field in dataclasses.fields(row)},
            "labels": list(row.labels),
        }
        if bar is not None:
            bar.advance()


def _import(source: ImportSource, raw: Storage, settings: PrepareSettings, bar: StageBar) -> dict[str, Any]:
    """Write the raw shards, or find them whole: {"shards": [...], "notes": {...}}."""
    if raw.exists(_IMPORTED):
        imported: dict[str, Any] = raw.read_json(_IMPORTED)
        bar.skip(sum(entry["num_rows"] for entry in imported["shards"]))
        return imported
    log, counts = ProblemLog(), RowCounts(source.classes)
    rows = to_raw(checked_rows(source, log, counts, needs_tags=settings.needs_tags), bar)
    entries = write_shards(raw, rows, settings.rows_per_shard, RAW_SCHEMA)
    if log.has_errors:
        raise ValueError(f"{source.file}: {format_problems(log.problems(), max_shown=_MAX_SHOWN)}")
    imported = {"shards": [dataclasses.asdict(entry) for entry in entries], "notes": log.notes}
    raw.write_json(_IMPORTED, imported)
    return imported


def _finish(
    folder: Storage, source: ImportSource, shards: list[ShardEntry], summaries: list[ShardSummary]
) -> dict[str, Any]:
    """Write quarantine and index; returns {"splits": images, masks and images of each class, "warnings": [...]}.

    Raises ValueError where quarantine has emptied a split.
    """
    counts, kept, bad = RowCounts(source.classes), [], []
    for shard, summary in zip(shards, summaries, strict=True):
        bad += [{**dataclasses.asdict(row), "stage": "prepare"} for row in summary.bad]
        if summary.num_rows:
            num_masks = summary.stats["num_masks"]
            kept.append(ShardEntry(shard.name, shard.split, summary.num_rows, num_masks))
            counts.add_many(shard.split, summary.num_rows, num_masks, summary.stats["class_counts"])
    log = ProblemLog()
    check_counts([shard.split for shard in shards], counts, log, source.file)
    if log.has_errors:
        raise ValueError(f"{source.file}: after quarantine: {format_problems(log.problems(), max_shown=_MAX_SHOWN)}")
    folder.write_table(QUARANTINE, pa.Table.from_pylist(bad, schemas.QUARANTINE))
    write_index(folder, source.classes, kept)
    return {"splits": counts.to_json(), "warnings": [str(problem) for problem in log.problems()]}
