"""Lists images to predict: a folder, one image, a table, or a manifest; no tags are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.storage import Storage
from jobs.importers.problems import ProblemLog, format_problems
from jobs.importers.rows import IMAGE_SUFFIXES, derived_id, hashed_id, is_legal_id, parent_uri, resolve_uri
from jobs.importers.table import IMAGE_COLUMNS
from jobs.importers.table_file import TABLE_SUFFIXES, TableFile
from jobs.manifest import FOLDER, MARKER, open_manifest


def list_images(location: str) -> list[dict[str, Any]]:
    """Rows of image_id and uri of all images at a path or s3:// URI; folders are walked.

    A name that gives an image_id twice gets a hash of its path. Raises ValueError where there is no image.
    """
    storage = Storage(location)
    seen: set[str] = set()
    rows = []
    for image_id, relative, uri in _found(storage):
        if image_id in seen or not is_legal_id(image_id):
            image_id = hashed_id(relative)
        if image_id in seen:
            raise ValueError(f"{location}: image {relative!r} is listed twice; every image_id may stand once")
        seen.add(image_id)
        rows.append({"image_id": image_id, "uri": uri})
    if not rows:
        raise ValueError(
            f"{location}: no images found; give a folder of images ({', '.join(IMAGE_SUFFIXES[:4])}, ...), one image, "
            "a table with a column image or uri, or the output of a run"
        )
    return rows


def _found(storage: Storage) -> Iterator[tuple[str, str, str]]:
    """(image_id, relative path, uri) of each image."""
    name = storage.root.rsplit("/", 1)[-1]
    if name.lower().endswith(TABLE_SUFFIXES):
        yield from _from_table(storage.root)
    elif name.lower().endswith(IMAGE_SUFFIXES):
        storage.size("")  # a missing file is told at once
        yield derived_id(name), name, storage.root
    elif storage.exists(MARKER) or storage.exists(f"{FOLDER}/{MARKER}"):
        for row in open_manifest(storage).rows(None, columns=["image_id", "uri"]).to_pylist():
            yield row["image_id"], row["image_id"], row["uri"]
    else:
        for relative in _walk(storage, ""):
            yield derived_id(relative), relative, storage.uri(relative)


def _walk(storage: Storage, folder: str) -> Iterator[str]:
    for name in storage.list_names(folder):
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
            yield f"{folder}{name}"
    for name in storage.list_folders(folder.rstrip("/")):
        if not name.startswith("."):
            yield from _walk(storage, f"{folder}{name}/")


def _from_table(path: str) -> Iterator[tuple[str, str, str]]:
    table = TableFile(path)
    columns = [name for name in IMAGE_COLUMNS if name in table.columns]
    if not columns:
        table.require(["image"], "the column of paths or URIs, also called uri")
    log = ProblemLog()
    for _, cells in table.rows(log):
        image = str(cells[columns[0]])
        image_id = cells.get("image_id") or derived_id(image.rsplit("/", 1)[-1])
        yield str(image_id), image, resolve_uri(parent_uri(table.uri), image)
    if log.has_errors:
        raise ValueError(format_problems(log.problems(), max_shown=10))
