"""Finds every image_id that a source lists twice: exact, in one pass, with memory that does not grow with the rows."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.importers import problems
from jobs.importers.problems import ProblemLog

if TYPE_CHECKING:
    from jobs.importers.rows import ImportRow

_NUM_BUCKETS = 256
_BUFFERED = 2**18  # ids in memory before they go to disk
_MAX_NAMED = 10_000  # rows whose ids are read again; more of them are counted by their hashes

_PAIR = np.dtype([("hash", "<u8"), ("ordinal", "<i8")])


class IdRegister:
    """Remembers 16 bytes of each image_id, on disk beyond the first 262,144; close it to remove them.

    The ids themselves are not kept. Where two hashes are equal, the source is read again for the rows that have them.
    """

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._num_spilled = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, image_id: str) -> None:
        """The next row's; rows are counted from 0 in the order of these calls."""
        self._hashes.append(int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little"))
        if len(self._hashes) == _BUFFERED:
            self._spill()

    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """(repeats, firsts): row numbers whose hash has come before, ascending, and for each the row of the first."""
        parts = [np.zeros((2, 0), np.int64)]
        for pairs in self._buckets():
            order = np.lexsort((pairs["ordinal"], pairs["hash"]))
            hashes, ordinals = pairs["hash"][order], pairs["ordinal"][order]
            is_new = np.ones(len(hashes), bool)
            is_new[1:] = hashes[1:] != hashes[:-1]
            first = np.maximum.accumulate(np.where(is_new, np.arange(len(hashes)), 0))
            parts.append(np.stack([ordinals[~is_new], ordinals[first[~is_new]]]))
        repeats, firsts = np.concatenate(parts, axis=1)
        order = np.argsort(repeats)
        return repeats[order], firsts[order]

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _pairs(self) -> np.ndarray:
        pairs = np.empty(len(self._hashes), _PAIR)
        pairs["hash"] = np.frombuffer(self._hashes, np.uint64)
        pairs["ordinal"] = np.arange(self._num_spilled, self._num_spilled + len(pairs))
        return pairs

    def _spill(self) -> None:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="subcat-ids-")
        pairs = self._pairs()
        buckets = (pairs["hash"] % _NUM_BUCKETS).astype(np.int64)
        pairs = pairs[np.argsort(buckets, kind="stable")]
        ends = np.cumsum(np.bincount(buckets, minlength=_NUM_BUCKETS))
        for bucket, part in enumerate(np.split(pairs, ends[:-1])):
            with self._file(bucket).open("ab") as stream:
                stream.write(part.tobytes())
        self._num_spilled += len(pairs)
        self._hashes = array("Q")

    def _buckets(self) -> Iterator[np.ndarray]:
        if self._folder is None:
            yield self._pairs()
            return
        self._spill()
        for bucket in range(_NUM_BUCKETS):
            yield np.fromfile(self._file(bucket), _PAIR)

    def _file(self, bucket: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{bucket:03d}"


def tell_duplicates(register: IdRegister, rows: Iterable[ImportRow], log: ProblemLog) -> None:
    """Tell the log of each row whose image_id has come before, with the first row.

    rows: those that were added, again, in the same order; read only where there may be a duplicate.
    """
    repeats, firsts = register.repeated()
    if not len(repeats):
        return
    wanted = iter(np.union1d(repeats[:_MAX_NAMED], firsts[:_MAX_NAMED]).tolist())
    ordinal = next(wanted)
    first_rows: dict[str, ImportRow] = {}
    for number, row in enumerate(rows):
        if number < ordinal:
            continue
        first = first_rows.setdefault(row.image_id, row)
        if first is not row:
            message = f"image_id {row.image_id!r} appears again{_place(first, row)}"
            log.add(problems.DUPLICATE_ID, message, row.file, row.row, row.image_id)
        ordinal = next(wanted, -1)
        if ordinal < 0:
            break
    if len(repeats) > _MAX_NAMED:
        log.counts[problems.DUPLICATE_ID] += len(repeats) - _MAX_NAMED


def _place(first: ImportRow, row: ImportRow) -> str:
    """Where the first of two rows is listed, as far as the message of the second does not say it."""
    if first.row is None:
        return f" (first as {first.file})" if first.file != row.file else ""
    return f" (first in row {first.row})" if first.file == row.file else f" (first in {first.file}:{first.row})"
