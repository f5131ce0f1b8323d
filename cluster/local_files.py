"""The local half of `cluster/storage.py`: atomic files of this machine, and the errors of both halves."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_COPY_BYTES = 2**22


class StorageError(OSError):
    """What failed at which URI, and what to do about it, in one line."""


class MissingFileError(StorageError, FileNotFoundError):
    """There is nothing at the URI."""


class LocalFiles:
    """Files of this machine, or of a file system that every node mounts; all paths are absolute."""

    def read(self, path: str) -> bytes:
        with _clear_errors("read", path):
            return Path(path).read_bytes()

    def write_bytes(self, path: str, data: bytes) -> None:
        """By a temporary file in the same folder, then a rename: readers see the old file or the whole new one."""
        self._write(path, io.BytesIO(data))

    def write_file(self, path: str, local: Path) -> None:
        """As write_bytes, with what a file holds."""
        with local.open("rb") as source:
            self._write(path, source)

    def _write(self, path: str, source: BinaryIO) -> None:
        target = Path(path)
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        with _clear_errors("write", path):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_all(temporary, source)
                temporary.replace(target)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def fetch(self, path: str) -> Iterator[Path]:
        self.size(path)
        yield Path(path)

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def size(self, path: str) -> int:
        with _clear_errors("read", path):
            return Path(path).stat().st_size

    def delete(self, path: str) -> None:
        with _clear_errors("delete", path):
            Path(path).unlink(missing_ok=True)

    def delete_tree(self, path: str) -> None:
        with _clear_errors("delete", path), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)

    def list_names(self, path: str) -> list[str]:
        with _clear_errors("list", path), contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_file() and not is_temporary(e.name))
        return []

    def list_folders(self, path: str) -> list[str]:
        folder = Path(path)
        with _clear_errors("list", path):
            if folder.is_dir():
                return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        return []


def is_temporary(name: str) -> bool:
    """Whether a file name is one of a write that has not ended, or never will."""
    return name.startswith(".") and name.endswith(".tmp")


def _write_all(path: Path, source: BinaryIO) -> None:
    with path.open("xb") as stream:
        shutil.copyfileobj(source, stream, _COPY_BYTES)
        stream.flush()
        os.fsync(stream.fileno())


_REASONS = {
    errno.ENOSPC: "the disk is full; free space or choose another output folder",
    errno.EDQUOT: "the disk quota is used up; free space or choose another output folder",
    errno.EACCES: "permission denied; check the owner of the folder or choose another one",
    errno.EPERM: "the operation is not permitted; check the owner of the folder or choose another one",
    errno.EROFS: "the file system is read-only; choose another output folder",
    errno.ENOTDIR: "a file stands where a folder is needed; move it or choose another output folder",
    errno.EEXIST: "a file stands where a folder is needed; move it or choose another output folder",
    errno.EISDIR: "this is a folder, and a file is needed; check the path",
}


@contextlib.contextmanager
def _clear_errors(action: str, path: str) -> Iterator[None]:
    """Turn an OSError into a StorageError of one line: path, what failed, remedy."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if action == "write":
            raise StorageError(f"{path}: cannot write: the folder cannot be made; choose another one") from error
        raise MissingFileError(f"{path}: cannot {action}: no such file; check the path") from error
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(f"{path}: cannot {action}: {reason}") from error
