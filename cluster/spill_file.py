"""The one file of a process that holds the feature rows for which k-means has no memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable

import numpy as np

from cluster.local_files import StorageError

_ALIGNMENT_BYTES = 64


class SpillFile:
    """A nameless file in the temporary folder, mapped once; it ends with the process.

    capacity_bytes: of all arrays, each rounded up by `slot_bytes`; the disk is filled as arrays come.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._end = 0
        self._descriptor = -1
        self._mapped: mmap.mmap | None = None

    def slot(self, num_bytes: int) -> Callable[[np.ndarray], np.ndarray]:
        """A place of its own for an array of at most num_bytes: a call writes one there, over the one before, and
        returns it as it lies in the file. Raises StorageError where the disk takes no more.
        """
        start = self._end
        self._end += slot_bytes(num_bytes)
        assert self._end <= self._capacity_bytes, "more was announced than the file was made for"

        def move(array: np.ndarray) -> np.ndarray:
            assert array.nbytes <= num_bytes, "an array outgrew its place"
            return self._moved(array, start) if array.nbytes else array

        return move

    def _moved(self, array: np.ndarray, start: int) -> np.ndarray:
        try:
            mapped = self._mapped = self._mapped or self._open()
            # By writes, not through the mapping: there a full disk would be a signal that ends the process.
            rest, offset = np.ascontiguousarray(array).data.cast("B"), start
            while rest:
                num_written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[num_written:], offset + num_written
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: cannot write {array.nbytes} bytes of features that k-means keeps on disk, "
                f"at byte {start}: {error.strerror or error}; set TMPDIR to a folder with {self._capacity_bytes} bytes "
                "free, raise kmeans.cache_bytes, or use more nodes"
            ) from error
        return np.frombuffer(mapped, array.dtype, array.size, start).reshape(array.shape)

    def _open(self) -> mmap.mmap:
        with tempfile.TemporaryFile(buffering=0) as file:
            file.truncate(self._capacity_bytes)
            mapped = mmap.mmap(file.fileno(), self._capacity_bytes)
            self._descriptor = os.dup(file.fileno())
        return mapped

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def slot_bytes(num_bytes: int) -> int:
    """What an array of num_bytes takes."""
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
