"""Reads tags that are given tile by tile: a table with parent_id, x_px, y_px and labels, a row a tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa

from cluster.storage import Storage
from jobs.importers import problems
from jobs.importers.problems import ProblemLog, format_problems
from jobs.importers.table import split_names
from jobs.importers.table_file import TableFile
from jobs.manifest import Manifest
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.tiles import tile_grid

COLUMNS = ["parent_id", "x_px", "y_px", "labels"]
_SCHEMA = pa.schema([schemas.MANIFEST.field(name) for name in COLUMNS])
_MAX_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class GivenTags:
    """Tags of tiles by image: parent_id -> (y, x) -> (class_index, ascending; row of the table). sha256: of the table.

    All of it is in memory on the driver, some hundred bytes a tile.
    """

    uri: str
    sha256: str
    by_image: dict[str, dict[tuple[int, int], tuple[list[int], int]]]


def read_tile_tags(path: str, classes: ClassTable) -> GivenTags:
    """Read the whole table. labels: names separated by ; or |, or a list; empty says that the tile shows none.

    Raises ValueError with every problem at once: unknown classes, places that are no whole numbers, tiles given twice.
    """
    table = TableFile(path)
    table.require(COLUMNS, "tags of tiles: the image_id of the image, the tile's left and upper edge, its tags")
    index_of = {name: index for index, name in enumerate(classes.names)}
    log = ProblemLog()
    by_image: dict[str, dict[tuple[int, int], tuple[list[int], int]]] = {}
    for number, cells in table.rows(log):
        parent_id = str(cells["parent_id"])
        place = _whole(cells["y_px"]), _whole(cells["x_px"])
        names = split_names(cells["labels"])
        unknown = [name for name in names if name not in index_of]
        if place[0] is None or place[1] is None:
            message = f"x_px = {cells['x_px']!r}, y_px = {cells['y_px']!r}: not whole numbers of pixels"
            log.add(problems.BAD_TABLE, message, table.uri, number, parent_id)
        elif unknown:
            message = f"{unknown[0]!r} is not in the class table ({', '.join(classes.names)})"
            log.add(problems.UNKNOWN_CLASS, message, table.uri, number, parent_id)
        elif (place[0], place[1]) in by_image.setdefault(parent_id, {}):
            message = f"the tile at x_px = {place[1]}, y_px = {place[0]} of {parent_id} is given twice"
            log.add(problems.BAD_TABLE, message, table.uri, number, parent_id)
        else:
            by_image[parent_id][place[0], place[1]] = (sorted({index_of[name] for name in names}), number)
    if log.has_errors:
        raise ValueError(f"{table.uri}: {format_problems(log.problems(), max_shown=_MAX_SHOWN)}")
    return GivenTags(table.uri, table.sha256, by_image)


def write_by_shard(given: GivenTags, manifest: Manifest, folder: Storage, tile_px: int, stride_px: int) -> ProblemLog:
    """Write part-*.parquet with the tags of the tiles of each shard of a manifest; tells of those that name no tile."""
    log = ProblemLog()
    left = dict(given.by_image)
    for shard in manifest.shards:
        tagged: list[dict[str, Any]] = []
        images = manifest.folder.read_table(f"{shard.name}.parquet", ["image_id", "height_px", "width_px"])
        for image in images.to_pylist():
            image_id = image["image_id"]
            places = set(tile_grid(image["height_px"], image["width_px"], tile_px, stride_px))
            for (y, x), (labels, number) in left.pop(image_id, {}).items():
                tagged.append({"parent_id": image_id, "x_px": x, "y_px": y, "labels": labels})
                if (y, x) not in places:
                    message = f"no tile of {image_id} begins at x_px = {x}, y_px = {y}"
                    log.add(problems.BAD_TABLE, message, given.uri, number, image_id)
        folder.write_table(f"{shard.name}.parquet", pa.Table.from_pylist(tagged, _SCHEMA))
    for parent_id, tags in left.items():
        number = min(number for _, number in tags.values())
        log.add(problems.BAD_TABLE, f"the manifest has no image {parent_id!r}", given.uri, number, parent_id)
    return log


def _whole(value: Any) -> int | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() and number >= 0 else None
