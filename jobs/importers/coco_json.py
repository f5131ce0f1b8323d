"""Reads COCO's instances JSON into images, annotations and categories, keeping no field that is not needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from typing import Any, Literal

from cluster.storage import MissingFileError, Storage
from jobs.importers import problems
from jobs.importers.problems import Problem
from jobs.importers.rows import BadSource

Keep = Literal["categories", "tags", "segmentations"]


@dataclasses.dataclass(frozen=True, slots=True)
class CocoImage:
    """As the file has it: nothing is checked yet."""

    id: Any
    file_name: Any
    height: Any
    width: Any


@dataclasses.dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """As the file has it, polygons as arrays of float64; segmentation is None unless it was asked for."""

    id: Any
    image_id: Any
    category_id: Any
    is_crowd: bool
    area: Any
    segmentation: Any


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """images, annotations: in the file's order; entries that are none stay as they are, for the caller to tell.

    categories: category id -> name, by rising id. uri, sha256: of the file.
    """

    uri: str
    sha256: str
    images: list[Any]
    annotations: list[Any]
    categories: dict[int, str]


def read_coco(root: Storage, name: str, keep: Keep) -> CocoFile:
    """Read a file below `root`. Raises BadSource where it is missing or no COCO file.

    keep: "categories" drops images and annotations as they are parsed, "tags" only the segmentations. Memory at its
    peak, in sizes of the file: 2, 2.4 with "tags", 3.4 with "segmentations" (measured; train2014's file has 330 MB).
    """
    uri = root.uri(name)
    try:
        data = root.read_bytes(name)
    except MissingFileError as error:
        raise BadSource(Problem(problems.MISSING_FILE, "no such file", uri)) from error
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        parsed = json.loads(data, object_hook=lambda entry: _slim(entry, keep))
    except ValueError as error:
        raise BadSource(Problem(problems.BAD_JSON, f"no JSON, or cut off ({error})", uri)) from error
    lists = parsed if isinstance(parsed, dict) else {}
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(lists.get(key), list)]
    if missing:
        raise BadSource(Problem(problems.BAD_JSON, f"no list {', '.join(missing)} in it", uri))
    return CocoFile(uri, sha256, lists["images"], lists["annotations"], _categories(lists["categories"], uri))


def _slim(entry: dict[str, Any], keep: Keep) -> Any:
    """Called by the parser for every JSON object, innermost first."""
    if "file_name" in entry:
        if keep == "categories":
            return None
        return CocoImage(entry.get("id"), entry["file_name"], entry.get("height"), entry.get("width"))
    if "category_id" in entry:
        if keep == "categories":
            return None
        segmentation = _compact(entry.get("segmentation")) if keep == "segmentations" else None
        crowd = bool(entry.get("iscrowd"))
        return CocoAnnotation(
            entry.get("id"), entry.get("image_id"), entry["category_id"], crowd, entry.get("area"), segmentation
        )
    return entry


def _compact(segmentation: Any) -> Any:
    """Polygons as arrays, a quarter of the memory; what is no polygon stays, to be told."""
    if not isinstance(segmentation, list):
        return segmentation
    try:
        return [array("d", polygon) for polygon in segmentation]
    except (TypeError, OverflowError):
        return segmentation


def _categories(entries: list[Any], uri: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        category_id, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(category_id, int) or not isinstance(name, str) or not name:
            raise BadSource(Problem(problems.BAD_JSON, f"category {entry!r} has no whole id and name", uri))
        if category_id in names or name in names.values():
            raise BadSource(Problem(problems.BAD_JSON, f"category {category_id} ({name!r}) appears again", uri))
        names[category_id] = name
    if not names:
        raise BadSource(Problem(problems.BAD_JSON, "the list categories is empty", uri))
    return dict(sorted(names.items()))
