"""Validate a data set before a run: every problem of its lists and files at once, with file, row, rule and remedy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from cluster.progress import Progress
from cluster.runtime import check_shared_storage
from cluster.storage import Storage
from cluster.streams import ShardSummary, StreamSettings, map_shards
from jobs.check_images import CheckMode, CheckWorker
from jobs.importers import ImportSource, TableSource, open_source, problems
from jobs.importers.problems import Problem, ProblemLog, format_problems
from jobs.importers.rows import BadSource, ImportRow, RowCounts, checked_rows
from jobs.importers.table_file import TABLE_SUFFIXES
from jobs.manifest import Manifest, open_manifest, write_shards
from jobs.prepare import RAW_SCHEMA, PrepareSettings, to_raw

__all__ = ["Problem", "format_problems", "validate"]

_ROWS_PER_SHARD = 256
_EXISTS_THREADS = 32  # that ask a storage whether files are there: they only wait


def validate(
    source: PrepareSettings | str,
    *,
    decode: bool = False,
    stream: StreamSettings | None = None,
    progress: Progress | None = None,
    scratch: Storage | None = None,
    shared_folder: bool = False,
) -> list[Problem]:
    """Every problem of a data set; an empty list says that it may be prepared.

    source: the settings of `prepare`, a CSV or Parquet table, or the output of a run (its manifest). decode: read and
    decode every image and mask; otherwise files need only be there. Where it decodes or has a scratch folder, the work
    is spread as `stream` says (Ray must run where that has actors), otherwise it is done in this process. scratch: an
    empty folder for passing files; a temporary one where None. A cluster of several nodes needs one on s3://, or
    shared_folder: every node mounts it. At most a thousand problems of a kind are named, and all counted. Raises
    ValueError where `source` is neither a table nor holds a manifest, and where scratch is not empty.
    """
    try:
        opened = _open(source)
    except BadSource as error:
        return [error.problem]
    settings = source if isinstance(source, PrepareSettings) else None
    stream = stream or StreamSettings(num_actors=0)
    stream = stream.model_copy(
        update={
            "max_bad_frac": 1.0,
            "gpus_per_actor": 0.0,
            **({} if decode or scratch is not None else {"num_actors": 0}),
        }
    )
    mode: CheckMode = "full" if decode else "exists"
    if stream.num_actors:
        check_shared_storage(scratch or Storage(tempfile.gettempdir()), shared_folder and scratch is not None)
    if scratch is not None:
        if scratch.exists("raw/part-00000.parquet"):
            raise ValueError(f"{scratch.root}: not empty (it has raw/part-00000.parquet); name an empty scratch folder")
        return _validate(opened, settings, scratch, mode, stream, progress or Progress())
    with tempfile.TemporaryDirectory(prefix="subcat-validate-") as folder:
        return _validate(opened, settings, Storage(folder), mode, stream, progress or Progress())


def _open(source: PrepareSettings | str) -> ImportSource:
    if isinstance(source, PrepareSettings):
        return open_source(source.source)
    if source.endswith(TABLE_SUFFIXES):
        return open_source(TableSource(path=source))
    return _manifest_source(open_manifest(Storage(source)))


def _validate(
    source: ImportSource,
    settings: PrepareSettings | None,
    scratch: Storage,
    mode: CheckMode,
    stream: StreamSettings,
    progress: Progress,
) -> list[Problem]:
    """Lists first, then files: problems in this order."""
    needs_tags = settings is None or settings.needs_tags
    log = ProblemLog()
    with progress.stage("read lists", unit="rows") as bar:
        rows = to_raw(checked_rows(source, log, RowCounts(source.classes), needs_tags=needs_tags), bar)
        shards = write_shards(scratch.child("raw"), rows, _ROWS_PER_SHARD, RAW_SCHEMA)
    num_listed = len(log.kept)

    def fold(summary: ShardSummary) -> None:
        for bad, (file, row) in zip(summary.bad, summary.stats["places"], strict=True):
            rule, _, message = bad.reason.partition(": ")
            log.add(rule, message, file, row, bad.image_id)
        summary.bad.clear()  # the log has them, as many as it keeps; the driver's memory must not grow with them

    options = dict(settings.check_options()) if settings else {}
    if mode == "exists":
        options["num_threads"] = _EXISTS_THREADS
    with progress.stage("check files", total=sum(shard.num_rows for shard in shards), unit="images") as bar:
        map_shards(
            CheckWorker,
            {"classes": source.classes, "mode": mode, **options},
            inputs={"raw": scratch.child("raw")},
            shards=[shard.name for shard in shards],
            output=scratch.child("checked"),
            settings=stream,
            bar=bar,
            stage="validate",
            fold=fold,
        )
    # Shards come in any order.
    log.kept[num_listed:] = sorted(log.kept[num_listed:], key=lambda found: (found.file, found.row or 0))
    return log.problems()


def _manifest_source(manifest: Manifest) -> ImportSource:
    """A manifest as something to import, so that it is checked by the same rules."""

    def rows(log: ProblemLog) -> Iterator[ImportRow]:
        for shard in manifest.shards:
            file = manifest.folder.uri(f"{shard.name}.parquet")
            table = manifest.folder.read_table(f"{shard.name}.parquet")
            for number, row in enumerate(table.to_pylist(), 1):
                labels = tuple(row["labels"] or ())
                unknown = [index for index in labels if not 0 <= index < manifest.classes.num_classes]
                if unknown:
                    message = (
                        f"class_index {unknown} of {row['image_id']} is not in 0..{manifest.classes.num_classes - 1}"
                    )
                    log.add(problems.UNKNOWN_CLASS, message, file, number, row["image_id"])
                    continue
                yield ImportRow(row["image_id"], row["uri"], row["split"], labels, row["mask_uri"], file, number)

    return ImportSource(manifest.classes, (), {}, rows, manifest.folder.uri())
