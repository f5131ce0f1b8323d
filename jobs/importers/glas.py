"""Imports GlaS (Warwick-QU gland segmentation, 2015): PATH/images/<set>_<n>.<suffix>, PATH/masks/<set>_<n>.png.

Two classes, "not gland" and "gland", and no background: every pixel belongs to one of them. Every image shows both, so
the tags of an image say nothing; the protocol of the literature tags tiles, from the masks
(`prepare.tiles.tags_from_masks_frac`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field, field_validator

from cluster.storage import Storage
from jobs.importers import problems
from jobs.importers.problems import Problem, ProblemLog
from jobs.importers.rows import IMAGE_SUFFIXES, BadSource, ImportRow, ImportSource
from subcat_core.classes import ClassTable
from subcat_core.settings import Settings

GLAS_CLASSES = ("not gland", "gland")
_NOT_GLAND, _GLAND = 1, 2
_NAME = re.compile(r"(.+)_(\d+)")


class GlasSource(Settings):
    """GlaS. Stored mask values: 0 is not gland, any other value (255, or the number of a gland) is gland."""

    kind: Literal["glas"] = "glas"
    """Names this layout: GlaS."""
    path: str = Field(min_length=1)
    """The folder that holds images and masks, or its s3:// prefix."""
    splits: dict[str, tuple[str, ...]] = Field(default={"train": ("train",), "val": ("testA", "testB")})
    """Split -> its sets, as names of images begin: train_1 is of set train. Images of other sets are left out."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names."""
        return GLAS_CLASSES

    @property
    def has_background(self) -> bool:
        """Of the classes: every pixel is gland or not gland."""
        return False

    @field_validator("splits")
    @classmethod
    def _once(cls, splits: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        names = [name for sets in splits.values() for name in sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands in two splits; a set belongs to one")
        return splits


def open_glas(settings: GlasSource) -> ImportSource:
    """List the images. Raises BadSource where there are none."""
    root = Storage(settings.path)
    images = [name for name in root.list_names("images") if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise BadSource(Problem(problems.MISSING_FILE, "no images here", root.uri("images")))
    masks = root.list_names("masks")
    split_of = {name: split for split, sets in settings.splits.items() for name in sets}
    listed = sorted((_key(name), name) for name in images)

    def rows(log: ProblemLog) -> Iterator[ImportRow]:
        for (image_set, _, image_id), name in listed:
            if image_set not in split_of:
                log.note("images of sets that no split names (left out)")
                continue
            mask = root.uri(f"masks/{image_id}.png")  # a missing one is told by prepare, as for any layout
            uri = root.uri(f"images/{name}")
            yield ImportRow(image_id, uri, split_of[image_set], (0, 1), mask, uri, None)

    listing = hashlib.sha256("\n".join([*images, *masks]).encode()).hexdigest()
    values = {0: _NOT_GLAND} | dict.fromkeys(range(1, 256), _GLAND)
    classes = ClassTable(GLAS_CLASSES, values, settings.has_background)
    return ImportSource(classes, tuple(settings.splits), {root.uri(): listing}, rows, root.uri())


def _key(name: str) -> tuple[str, int, str]:
    """(set, number, image_id) of a file name: train_2 stands before train_10."""
    image_id = PurePosixPath(name).stem
    found = _NAME.fullmatch(image_id)
    return (found[1], int(found[2]), image_id) if found else (image_id, 0, image_id)
