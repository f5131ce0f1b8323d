"""Rows of a training in an Arrow file that every rank maps into memory: what a batch costs does not grow with them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.storage import Storage

_PIECE_ROWS = 65_536


class Rows:
    """A table in pieces, for reading a few rows from anywhere in it.

    (`pa.Table.take` joins all pieces of a text column first: with a million rows it takes 80 ms for a batch of 16.)
    Pickles as its path where it is mapped from a file, which must outlive the copy.
    """

    def __init__(self, table: pa.Table, path: str | None = None) -> None:
        self.schema = table.schema
        self.num_rows = table.num_rows
        self._table, self._path = table, path
        self._pieces = table.to_batches()
        self._starts = np.cumsum([0, *(piece.num_rows for piece in self._pieces)])

    @classmethod
    def mapped(cls, path: str) -> Rows:
        """The rows of an Arrow file of this machine."""
        return cls(pa.ipc.open_file(pa.memory_map(path)).read_all(), path)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Rows.mapped, (self._path,)) if self._path is not None else (Rows, (self._table,))

    def take(self, rows: np.ndarray) -> pa.Table:
        """rows: (n,) row numbers in any order, also twice; a copy of those rows in that order."""
        pieces = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(pieces, kind="stable")
        parts = []
        for piece in np.unique(pieces):
            parts.append(self._pieces[piece].take(pa.array(rows[pieces == piece] - self._starts[piece])))
        places = np.empty(len(rows), np.int64)
        places[order] = np.arange(len(rows))
        return pa.Table.from_batches(parts, self.schema).combine_chunks().take(pa.array(places))


@dataclasses.dataclass(frozen=True)
class RowFile:
    """Rows in a file of a storage; a few bytes when pickled."""

    folder: Storage
    name: str
    num_rows: int
    column_names: tuple[str, ...]

    @contextlib.contextmanager
    def open(self) -> Iterator[Rows]:
        """Mapped into memory, from a copy on this machine where the storage is remote."""
        with self.folder.fetch(self.name) as path:
            yield Rows.mapped(str(path))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, a piece at a time."""
        with self.folder.fetch(self.name) as path, pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)

    def delete(self) -> None:
        self.folder.delete(self.name)


@contextlib.contextmanager
def open_rows(rows: pa.Table | RowFile | None) -> Iterator[Rows | None]:
    """Rows of a table or of a file; None for None."""
    if isinstance(rows, RowFile):
        with rows.open() as opened:
            yield opened
    else:
        yield None if rows is None else Rows(rows)


def write_rows(folder: Storage, name: str, tables: Iterable[pa.Table]) -> RowFile:
    """Write tables of one schema, at least one, below each other; holds at most 65,536 rows and one of the tables."""
    with tempfile.TemporaryDirectory(prefix="subcat-rows-") as scratch:
        path = Path(scratch) / "rows.arrow"
        num_rows = 0
        pieces = _pieces(tables)
        first = next(pieces)
        with pa.ipc.new_file(str(path), first.schema) as writer:
            for piece in itertools.chain([first], pieces):
                writer.write_table(piece)
                num_rows += piece.num_rows
        folder.write_file(name, path)
    return RowFile(folder, name, num_rows, tuple(first.column_names))


def _pieces(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of one chunk with about _PIECE_ROWS rows each; one without rows where there are none."""
    waiting: list[pa.Table] = []
    num_waiting = 0
    for table in tables:
        waiting.append(table)
        num_waiting += table.num_rows
        if num_waiting >= _PIECE_ROWS:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, num_waiting = [table.slice(0, 0)], 0
    assert waiting, "at least one table, for the schema"
    yield pa.concat_tables(waiting).combine_chunks()
