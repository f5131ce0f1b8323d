"""Make the manifest: import what the data set's own layout says, then read every image and mask once.

Reads:   prepare.source: a VOC layout, COCO's JSON, GlaS, a folder per class, a CSV or Parquet table; images and masks
Writes:  manifest: part-*.parquet (schema MANIFEST, one split each), classes.json, shards.json, quarantine.parquet;
         masks/<image_id>.png where the source has outlines (COCO) and no mask files
Runs on: the driver for the import; a fixed pool of Ray Data actors for the images, a shard at a time; in process with
         stream.num_actors = 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Artifact, ArtifactMismatch, fingerprint
from cluster.progress import StageBar
from cluster.storage import Storage
from cluster.streams import ShardSummary, map_shards
from cluster.tracking import ChildRun
from jobs.check_images import CheckWorker
from jobs.context import StageContext, complete, stream_stats
from jobs.cut_tiles import TileSettings
from jobs.importers import ImportSource, Source, open_source
from jobs.importers.problems import ProblemLog, format_problems
from jobs.importers.rows import ImportRow, RowCounts, check_counts, checked_rows
from jobs.manifest import FOLDER, MARKER, ShardEntry, write_index, write_shards
from subcat_core import schemas
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
            imported = import_rows(source, raw, settings, bar)
        shards = [ShardEntry(**entry) for entry in imported["shards"]]
        tally = Tally(source, shards)
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
                fold=tally.add,
            )
        stats = write_results(artifact.folder, tally)
        for line in stats["warnings"]:
            context.progress.note(f"warning: {line}")
        artifact.folder.delete_tree(RAW)
        return {
            **stream_stats(summaries),
            **stats,
            "left_out": imported["notes"],
            "fingerprint": fingerprint([artifact.fingerprint, [tally.digests[shard.name] for shard in shards]]),
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


def import_rows(source: ImportSource, raw: Storage, settings: PrepareSettings, bar: StageBar) -> dict[str, Any]:
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


class Tally:
    """Counts and digests of the shards, taken from their summaries as they come, in any order."""

    def __init__(self, source: ImportSource, shards: list[ShardEntry]) -> None:
        self.source = source
        self.shards = shards
        self.counts = RowCounts(source.classes)
        self.digests: dict[str, str] = {}
        self.kept: dict[str, ShardEntry] = {}
        self._split_of = {shard.name: shard.split for shard in shards}

    def add(self, summary: ShardSummary) -> None:
        self.digests[summary.name] = summary.stats["digest"]
        if summary.num_rows:
            split, num_masks = self._split_of[summary.name], summary.stats["num_masks"]
            self.kept[summary.name] = ShardEntry(summary.name, split, summary.num_rows, num_masks)
            self.counts.add_many(split, summary.num_rows, num_masks, summary.stats["class_counts"])


def write_results(folder: Storage, tally: Tally) -> dict[str, Any]:
    """Write the index; returns {"splits": images, masks and images of each class, "warnings": [...]}.

    Raises ValueError where quarantine has emptied a split.
    """
    source, log = tally.source, ProblemLog()
    check_counts([shard.split for shard in tally.shards], tally.counts, log, source.file)
    if log.has_errors:
        raise ValueError(f"{source.file}: after quarantine: {format_problems(log.problems(), max_shown=_MAX_SHOWN)}")
    write_index(folder, source.classes, [tally.kept[shard.name] for shard in tally.shards if shard.name in tally.kept])
    splits = tally.counts.to_json()
    splits = {split: splits[split] for split in dict.fromkeys(shard.split for shard in tally.shards)}
    return {"splits": splits, "warnings": [str(problem) for problem in log.problems()]}
