"""CSV, TSV and Parquet files as a stream of rows, with the row's number and clear errors for broken files."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage, StorageError
from jobs.importers import problems
from jobs.importers.problems import Problem, ProblemLog
from jobs.importers.rows import BadSource

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_BATCH_ROWS = 4096
_HASH_BYTES = 1 << 20


class TableFile:
    """A table at a path or s3:// URI. columns: its column names. sha256: of its bytes. Raises BadSource."""

    def __init__(self, path: str) -> None:
        self.storage = Storage(path)
        self.uri = self.storage.root
        self.is_parquet = self.uri.endswith(".parquet")
        if not self.uri.endswith(TABLE_SUFFIXES):
            raise self._bad(f"a table's name ends in {', '.join(TABLE_SUFFIXES)}")
        try:
            with self.storage.fetch("") as local:
                self.sha256 = _sha256(local)
                self.columns = self._read_columns(local)
        except StorageError as error:
            raise BadSource(Problem(problems.MISSING_FILE, str(error))) from error
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise self._bad(f"columns appear twice: {', '.join(twice)}")

    def rows(self, log: ProblemLog) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, column -> value), streaming; values of a CSV are str. row: line of a CSV (1 is its header), or row of
        a Parquet file from 1. Broken rows are told to the log and left out; so is the rest of a broken file.
        """
        with self.storage.fetch("") as local:
            yield from self._parquet_rows(local, log) if self.is_parquet else self._csv_rows(local, log)

    def require(self, names: list[str], what: str) -> None:
        """Raises BadSource unless all columns are there."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            shown = ", ".join(self.columns[:20]) + (", ..." if len(self.columns) > 20 else "")
            raise self._bad(f"no column {', '.join(missing)} ({what}); the columns are: {shown or 'none'}")

    def _bad(self, message: str) -> BadSource:
        return BadSource(Problem(problems.BAD_TABLE, message, self.uri))

    def _read_columns(self, local: Path) -> list[str]:
        if self.is_parquet:
            try:
                with pq.ParquetFile(local) as file:
                    return list(file.schema_arrow.names)
            except (pa.ArrowException, OSError) as error:
                raise self._bad(f"truncated, or no Parquet file ({_first_line(error)})") from error
        try:
            with _open_text(local) as stream:
                columns = [name.strip() for name in next(self._reader(stream), [])]
        except csv.Error as error:
            raise self._bad(f"no text table ({_first_line(error)})") from error
        if not _is_utf8(columns):
            raise self._bad("its first line is not UTF-8 text")
        return columns

    def _reader(self, stream: Any) -> Any:
        return csv.reader(stream, delimiter="\t" if self.uri.endswith(".tsv") else ",")

    def _csv_rows(self, local: Path, log: ProblemLog) -> Iterator[tuple[int, dict[str, Any]]]:
        with _open_text(local) as stream:
            reader = self._reader(stream)
            try:
                next(reader, None)
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(self.columns):
                        message = f"{len(cells)} cells in a table of {len(self.columns)} columns"
                        log.add(problems.BAD_TABLE, message, self.uri, reader.line_num)
                        continue
                    if not _is_utf8(cells):
                        log.add(problems.BAD_TABLE, "this row is not UTF-8 text", self.uri, reader.line_num)
                        continue
                    yield reader.line_num, dict(zip(self.columns, (cell.strip() for cell in cells), strict=True))
            except csv.Error as error:
                message = f"cannot be read from here on ({_first_line(error)})"
                log.add(problems.BAD_TABLE, message, self.uri, reader.line_num + 1)

    def _parquet_rows(self, local: Path, log: ProblemLog) -> Iterator[tuple[int, dict[str, Any]]]:
        row = 0
        try:
            with pq.ParquetFile(local) as file:
                for batch in file.iter_batches(_BATCH_ROWS):
                    for values in batch.to_pylist():
                        row += 1
                        yield row, values
        except (pa.ArrowException, OSError) as error:
            log.add(problems.BAD_TABLE, f"cannot be read from here on ({_first_line(error)})", self.uri, row + 1)


def _open_text(path: Path) -> TextIO:
    """UTF-8, with other bytes kept as lone surrogates, so that the row they are in can be named."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _is_utf8(cells: list[str]) -> bool:
    text = "".join(cells)
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_HASH_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
