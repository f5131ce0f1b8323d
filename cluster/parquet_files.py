"""Reads Parquet files, or a few of their columns by byte ranges, and words what is wrong with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.local_files import StorageError

_FOOTER_BYTES = 2**16  # asked for at once: a footer is smaller


def read_columns(path: str, source: Any, wanted: list[str] | None) -> pa.Table:
    """source: what pyarrow opens; path: for messages. StorageError where a column is not there.

    Pages that have a checksum are held against it.
    """
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        missing = [column for column in wanted or [] if column not in file.schema_arrow.names]
        if missing:
            raise StorageError(
                f"{path}: no column {', '.join(missing)}; the file has {', '.join(file.schema_arrow.names)}"
            )
        return file.read(columns=wanted)


def read_remote_columns(filesystem: Any, path: str, wanted: list[str]) -> pa.Table:
    """The footer, and then the byte ranges of these columns alone; filesystem: of fsspec.

    StorageError for what is wrong with the file; errors of the filesystem come out as they are.
    """
    from fsspec.parquet import open_parquet_file

    with (
        _broken_files_told(path),
        open_parquet_file(
            path, fs=filesystem, engine="pyarrow", columns=wanted, footer_sample_size=_FOOTER_BYTES
        ) as stream,
    ):
        return read_columns(path, stream, wanted)


def read_footer(source: Any) -> tuple[int, pa.Schema]:
    """(number of rows, schema)."""
    with pq.ParquetFile(source) as file:
        return file.metadata.num_rows, file.schema_arrow


def read_remote_footer(filesystem: Any, path: str) -> tuple[int, pa.Schema]:
    """As read_footer; filesystem: of fsspec; errors as read_remote_columns."""
    with _broken_files_told(path), filesystem.open(path, "rb", block_size=_FOOTER_BYTES) as stream:
        return read_footer(stream)


@contextlib.contextmanager
def _broken_files_told(path: str) -> Iterator[None]:
    """StorageError for errors of pyarrow: another request would not help, as it may for one of the filesystem.

    pyarrow raises a plain OSError without an errno for a file that is damaged; those of requests have one, or a class.
    """
    try:
        yield
    except pa.ArrowException as error:
        raise broken_table(path, error) from error
    except OSError as error:
        if type(error) is OSError and error.errno is None:
            raise broken_table(path, error) from error
        raise


def write_table(table: pa.Table) -> pa.Buffer:
    """A Parquet file, zstd-compressed, with a checksum of each page."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def broken_table(path: str, error: Exception) -> StorageError:
    """What to raise for an error of pyarrow."""
    reason = str(error).splitlines()[0]
    return StorageError(
        f"{path}: truncated, not Parquet or of other types ({reason}); delete it and run the stage again"
    )
