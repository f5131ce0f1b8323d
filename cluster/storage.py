"""One object for local folders and s3:// prefixes: atomic writes, clear errors, bounded retries around S3."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from cluster.local_files import LocalFiles, MissingFileError, StorageError
from cluster.parquet_files import (
    broken_table,
    read_columns,
    read_footer,
    read_remote_columns,
    read_remote_footer,
    write_table,
)
from cluster.s3_requests import S3_SCHEME, call_s3

__all__ = ["MissingFileError", "Storage", "StorageError", "read_uri"]

_PART_BYTES = 50 * 2**20  # of an upload: what has two or more of them goes in parts
_READ_TIMEOUT_S = 60.0  # without a byte from the server


class _S3Objects:
    """Objects of an S3 server, through s3fs; endpoint, region, profile and keys as every AWS tool reads them."""

    def read(self, path: str) -> bytes:
        return call_s3(_s3_filesystem(), "read", path, lambda fs: fs.cat_file(path))

    def write_bytes(self, path: str, data: bytes) -> None:
        call_s3(_s3_filesystem(), "write", path, lambda fs: fs.pipe_file(path, data, chunksize=_PART_BYTES))

    def write_file(self, path: str, local: Path) -> None:
        call_s3(_s3_filesystem(), "write", path, lambda fs: fs.put_file(str(local), path, chunksize=_PART_BYTES))

    @contextlib.contextmanager
    def fetch(self, path: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="subcat-") as folder:
            local = Path(folder) / PurePosixPath(path).name
            call_s3(_s3_filesystem(), "read", path, lambda fs: fs.get_file(path, str(local)))
            yield local

    def exists(self, path: str) -> bool:
        return bool(call_s3(_s3_filesystem(), "look up", path, lambda fs: fs.exists(path), check_bucket=True))

    def size(self, path: str) -> int:
        return int(call_s3(_s3_filesystem(), "read", path, lambda fs: fs.info(path, refresh=True))["size"])

    def delete(self, path: str) -> None:
        with contextlib.suppress(MissingFileError):
            call_s3(_s3_filesystem(), "delete", path, lambda fs: fs.rm_file(path))

    def delete_tree(self, path: str) -> None:
        with contextlib.suppress(MissingFileError):
            call_s3(_s3_filesystem(), "delete", path, lambda fs: fs.rm(path, recursive=True))

    def list_names(self, path: str) -> list[str]:
        try:
            entries = call_s3(
                _s3_filesystem(), "list", path, lambda fs: fs.ls(path, detail=True, refresh=True), check_bucket=True
            )
        except MissingFileError:
            return []
        return sorted(PurePosixPath(e["name"]).name for e in entries if e["type"] == "file" and e["size"] is not None)

    def list_folders(self, path: str) -> list[str]:
        try:
            entries = call_s3(
                _s3_filesystem(), "list", path, lambda fs: fs.ls(path, detail=True, refresh=True), check_bucket=True
            )
        except MissingFileError:
            return []
        return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory")


@dataclasses.dataclass(frozen=True)
class Storage:
    """A folder or an s3:// prefix; a few bytes when pickled, since every process opens its own client.

    root: a path, file:// or s3://bucket/prefix. In every method `name` is relative to the root
    ("manifest/marker.json"), or an absolute path or URI of its own. All methods raise StorageError with the URI, the
    cause and a remedy.
    """

    root: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", _absolute(os.fspath(self.root)))

    @property
    def is_local(self) -> bool:
        return not self.root.startswith(S3_SCHEME)

    def uri(self, name: str = "") -> str:
        """The absolute path or s3:// URI of a name."""
        if name.startswith("/") or "://" in name:
            return _absolute(name)
        parts = PurePosixPath(name).parts
        if ".." in parts:
            raise ValueError(f"storage name {name!r} leaves its root {self.root}; give a name below the root")
        return "/".join([self.root.rstrip("/"), *parts])

    def child(self, name: str) -> Storage:
        return Storage(self.uri(name))

    def read_bytes(self, name: str) -> bytes:
        """The whole file; MissingFileError (a FileNotFoundError too) where there is none."""
        backend, path = self._at(name)
        return backend.read(path)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Atomic: a reader, or a run after a crash, sees the old content or all of the new."""
        backend, path = self._at(name)
        backend.write_bytes(path, data)

    def write_file(self, name: str, local: Path) -> None:
        """As write_bytes, from a file of this machine: what is too large for memory goes in parts."""
        backend, path = self._at(name)
        backend.write_file(path, local)

    def exists(self, name: str) -> bool:
        """Whether a file, or a folder with something in it, is there now (nothing is cached)."""
        backend, path = self._at(name)
        return backend.exists(path)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        backend, path = self._at(name)
        return backend.size(path)

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens where there is none."""
        backend, path = self._at(name)
        backend.delete(path)

    def delete_tree(self, name: str) -> None:
        """Delete a folder below the root with all in it; nothing happens where there is none."""
        if self.uri(name) == self.root:
            raise ValueError(f"refusing to delete the storage root {self.root}; name a folder below it")
        backend, path = self._at(name)
        backend.delete_tree(path)

    def list_names(self, folder: str = "") -> list[str]:
        """Sorted names of the files directly in a folder; empty where there is no such folder."""
        backend, path = self._at(folder)
        return backend.list_names(path)

    def list_folders(self, folder: str = "") -> list[str]:
        """Sorted names of the folders directly in a folder; empty where there is no such folder."""
        backend, path = self._at(folder)
        return backend.list_folders(path)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise StorageError(f"{self.uri(name)}: not JSON ({error}); delete the file and run again") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())

    def read_table(self, name: str, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
        """A Parquet file as a table.

        columns: only these, in this order; from S3, only their bytes are read. schema: only its columns, cast to its
        types. StorageError names the file where it is truncated or no Parquet, where a column is not there, or where a
        type does not fit.
        """
        wanted = list(schema.names) if schema is not None else columns
        backend, path = self._at(name)
        if self.is_local:
            backend.size(path)  # a missing file is told apart from a broken one
        try:
            if not path.startswith(S3_SCHEME):
                table = read_columns(path, path, wanted)
            elif wanted is None:
                table = read_columns(path, pa.BufferReader(backend.read(path)), None)
            else:
                table = call_s3(_s3_filesystem(), "read", path, lambda fs: read_remote_columns(fs, path, wanted))
            table = table if wanted is None else table.select(wanted)
            return table if schema is None else table.cast(schema)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise broken_table(path, error) from error

    def read_footer(self, name: str) -> tuple[int, pa.Schema]:
        """(number of rows, schema) of a Parquet file, without reading its rows; errors as `read_table`."""
        backend, path = self._at(name)
        try:
            if path.startswith(S3_SCHEME):
                return call_s3(_s3_filesystem(), "read", path, lambda fs: read_remote_footer(fs, path))
            backend.size(path)
            return read_footer(path)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise broken_table(path, error) from error

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one Parquet file, zstd-compressed and with checksums, atomically."""
        self.write_bytes(name, write_table(table).to_pybytes())

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """A local file with the content, for libraries that want one: the file itself, or a passing copy."""
        backend, path = self._at(name)
        with backend.fetch(path) as local:
            yield local

    def check_writable(self) -> None:
        """Write and delete a small file, so that a run fails at its start and not at its first output."""
        probe = f".subcat-{uuid.uuid4().hex}.tmp"
        self.write_bytes(probe, b"subcat")
        self.delete(probe)

    def _at(self, name: str) -> tuple[Any, str]:
        uri = self.uri(name)
        return (_S3Objects() if uri.startswith(S3_SCHEME) else LocalFiles()), uri


def read_uri(uri: str) -> bytes:
    """The bytes at an absolute path, file:// or s3:// URI; StorageError where they cannot be read."""
    if "://" not in uri and not uri.startswith("/"):
        raise ValueError(f"uri {uri!r} is relative; give an absolute path, file:// or s3://")
    return Storage(uri).read_bytes("")


def _absolute(location: str) -> str:
    if location.startswith(S3_SCHEME):
        bucket = location.removeprefix(S3_SCHEME).split("/", 1)[0]
        if not bucket:
            raise ValueError(f"storage {location!r} names no bucket; give s3://bucket/prefix")
        return location.rstrip("/")
    if location.startswith("file://"):
        location = unquote(location.removeprefix("file://"))
    if "://" in location or not location:
        raise ValueError(f"storage {location!r} is of no known kind; give a path, file:// or s3://bucket/prefix")
    return os.path.normpath(Path(location).expanduser().absolute())


def _s3_filesystem() -> Any:
    """The s3fs client of this process; fsspec keeps one for each set of arguments and process id."""
    import s3fs

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    config: dict[str, Any] = {
        "connect_timeout": 10,
        "read_timeout": _READ_TIMEOUT_S,
        "retries": {"total_max_attempts": 1},
    }
    if not os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION"):
        # Some S3-compatible servers send the checksum of the whole object with a part of it (rclone does).
        config["response_checksum_validation"] = "when_required"
    filesystem = s3fs.S3FileSystem(
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs=config,
        use_listings_cache=False,
    )
    filesystem.retries = 1  # call_s3 retries, and says so
    return filesystem
