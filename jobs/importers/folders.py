"""Imports a folder per class: PATH/<class>/<image>, or PATH/<split>/<class>/<image>; one tag an image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field

from cluster.storage import Storage
from jobs.importers import problems
from jobs.importers.problems import Problem, ProblemLog
from jobs.importers.rows import (
    IMAGE_SUFFIXES,
    BadSource,
    ImportRow,
    ImportSource,
    derived_id,
    hashed_split,
    mask_values_of,
)
from subcat_core.classes import ClassTable
from subcat_core.settings import Settings


class FolderSource(Settings):
    """A folder per class. image_id is the relative path with '.' for '/': cat/001.jpg -> cat.001."""

    kind: Literal["folders"] = "folders"
    """Names this layout: a folder per class."""
    path: str = Field(min_length=1)
    """The folder, or an s3:// prefix."""
    classes: tuple[str, ...] | None = None
    """Parent classes in order; null takes every folder, sorted."""
    splits: tuple[str, ...] = ()
    """Names of split folders above the class folders; none: every image is of split train (see val_frac)."""
    val_frac: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images that goes to split val where there are no split folders; chosen by a hash of image_id."""
    masks_path: str | None = None
    """Folder with the same tree that holds masks as .png; an image without a file there has no mask."""
    mask_values: dict[str, tuple[int, ...]] | None = None
    """Stored mask values by meaning, such as {background = [0], ignore = [255], gland = [128]}; null: class ids."""


def open_folders(settings: FolderSource) -> ImportSource:
    """List the class folders. Raises BadSource where there are none."""
    root = Storage(settings.path)
    tops = settings.splits or ("",)
    found = {top: [name for name in root.list_folders(top) if not name.startswith(".")] for top in tops}
    names = settings.classes or tuple(sorted({name for folders in found.values() for name in folders}))
    if not names:
        raise BadSource(Problem(problems.MISSING_FILE, "no class folders here", root.uri()))
    classes = ClassTable(names, mask_values_of(names, settings.mask_values))

    def rows(log: ProblemLog) -> Iterator[ImportRow]:
        for top, folders in found.items():
            for name in folders:
                if name not in names:
                    message = f"folder {name!r} is not in the class table ({', '.join(names)})"
                    log.add(problems.UNKNOWN_CLASS, message, root.uri(_join(top, name)))
            for index, name in enumerate(names):
                if name in folders:
                    yield from _class_rows(settings, root, top, name, index, log)

    return ImportSource(classes, settings.splits, {root.uri(): _listing_hash(root, found)}, rows, root.uri())


def _class_rows(
    settings: FolderSource, root: Storage, top: str, name: str, index: int, log: ProblemLog
) -> Iterator[ImportRow]:
    """Rows of one class folder; its names, and those of its masks, are in memory."""
    folder = _join(top, name)
    masks = Storage(settings.masks_path) if settings.masks_path else None
    mask_names = set(masks.list_names(folder)) if masks else set()
    for file in root.list_names(folder):
        if not file.lower().endswith(IMAGE_SUFFIXES):
            log.note("files that are no images by their suffix")
            continue
        relative = f"{folder}/{file}"
        image_id = derived_id(relative)
        mask = f"{PurePosixPath(file).stem}.png"
        mask_uri = masks.uri(f"{folder}/{mask}") if masks and mask in mask_names else None
        split = top or hashed_split(image_id, settings.val_frac)
        yield ImportRow(image_id, root.uri(relative), split, (index,), mask_uri, root.uri(relative), None)


def _listing_hash(root: Storage, found: dict[str, list[str]]) -> str:
    """sha256 over all file names: a new or a renamed image is another input."""
    digest = hashlib.sha256()
    for top, folders in found.items():
        for name in folders:
            for file in root.list_names(_join(top, name)):
                digest.update(f"{_join(top, name)}/{file}\n".encode())
    return digest.hexdigest()


def _join(top: str, name: str) -> str:
    return f"{top}/{name}" if top else name
