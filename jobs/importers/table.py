"""Imports a CSV or Parquet table: a row an image, its tags as names in one cell or as one column of 0 and 1 a class."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from jobs.importers import problems
from jobs.importers.problems import Problem, ProblemLog
from jobs.importers.rows import (
    BadSource,
    ImportRow,
    ImportSource,
    derived_id,
    hashed_split,
    mask_values_of,
    parent_uri,
    resolve_uri,
)
from jobs.importers.table_file import TableFile
from subcat_core.classes import ClassTable
from subcat_core.settings import Settings

IMAGE_COLUMNS = ("image", "uri")
_SEPARATORS = re.compile(r"[;|]")
_FLAGS = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


class TableSource(Settings):
    """A table of images. Paths in it are absolute, s3:// URIs, or relative to the table's folder."""

    kind: Literal["table"] = "table"
    """Names this layout: a CSV, TSV or Parquet table."""
    path: str = Field(min_length=1)
    """CSV, TSV or Parquet file, or its s3:// URI."""
    classes: tuple[str, ...] | None = None
    """Parent classes in order; null takes every tag of the column of names (sorted), or every further column."""
    image_column: str | None = None
    """Column of paths and URIs; null takes "image" or "uri"."""
    label_column: str = "labels"
    """Column of tags, separated by ; or |. Where there is none, each class has a column of 0 and 1."""
    split_column: str = "split"
    """Column of split names; where there is none, every image is of split train (see val_frac)."""
    mask_column: str = "mask"
    """Column of ground-truth masks, empty where there is none; the column may be missing."""
    id_column: str = "image_id"
    """Column of image ids; where there is none, the file names without suffix, which must differ."""
    val_frac: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images that goes to split val where the table has no splits; chosen by a hash of image_id."""
    mask_values: dict[str, tuple[int, ...]] | None = None
    """Stored mask values by meaning, such as {background = [0], ignore = [255], gland = [128]}; null: class ids."""
    has_background: bool = True
    """Whether a pixel may belong to none of the classes. false: every pixel has one ("tumour", "stroma", ...), and no
    background score competes with them."""


def open_table(settings: TableSource) -> ImportSource:
    """Check columns, find the classes. Raises BadSource."""
    table = TableFile(settings.path)
    image_column = _image_column(settings, table)
    if settings.label_column in table.columns:
        names = settings.classes or _find_names(table, settings.label_column)
        flag_columns: tuple[str, ...] = ()
    else:
        special = (image_column, settings.split_column, settings.mask_column, settings.id_column)
        names = settings.classes or tuple(name for name in table.columns if name not in special)
        table.require(list(names), f"no column {settings.label_column!r}, so each class needs a column of 0 and 1")
        flag_columns = names
    if not names:
        message = f"no tags: neither a column {settings.label_column!r} with names nor columns of 0 and 1"
        raise BadSource(Problem(problems.BAD_TABLE, message, table.uri))
    values = mask_values_of(tuple(names), settings.mask_values)
    classes = ClassTable(tuple(names), values, settings.has_background)

    def rows(log: ProblemLog) -> Iterator[ImportRow]:
        index_of = {name: index for index, name in enumerate(classes.names)}
        folder = parent_uri(table.uri)
        for number, cells in table.rows(log):
            row = _to_row(settings, cells, number, table.uri, folder, image_column, index_of, flag_columns, log)
            if row is not None:
                yield row

    return ImportSource(classes, (), {table.uri: table.sha256}, rows, table.uri)


def _image_column(settings: TableSource, table: TableFile) -> str:
    if settings.image_column is not None:
        table.require([settings.image_column], "image_column of the settings")
        return settings.image_column
    found = [name for name in IMAGE_COLUMNS if name in table.columns]
    if not found:
        table.require(["image"], "the column of paths or URIs, also called uri")
    return found[0]


def _find_names(table: TableFile, column: str) -> tuple[str, ...]:
    """Every tag of the column, sorted; a first pass over the table."""
    names: set[str] = set()
    for _, cells in table.rows(ProblemLog()):
        names.update(split_names(cells[column]))
    return tuple(sorted(names))


def split_names(cell: Any) -> list[str]:
    """Tags of a cell: text with separators, or a list of a Parquet file."""
    if cell is None:
        return []
    parts = [str(part) for part in cell] if isinstance(cell, list) else _SEPARATORS.split(str(cell))
    return [part.strip() for part in parts if part.strip()]


def _to_row(
    settings: TableSource,
    cells: dict[str, Any],
    number: int,
    file: str,
    folder: str,
    image_column: str,
    index_of: Mapping[str, int],
    flag_columns: tuple[str, ...],
    log: ProblemLog,
) -> ImportRow | None:
    image = str(cells[image_column] or "")
    split = str(cells.get(settings.split_column) or "")
    given_id = str(cells.get(settings.id_column) or "")
    for empty, column in ((not image, image_column), (not split, settings.split_column)):
        if empty and column in cells:
            log.add(problems.BAD_TABLE, f"column {column!r} is empty", file, number, given_id or None)
            return None
    image_id = given_id if settings.id_column in cells else _id_of(image)
    labels = (
        _flagged(cells, flag_columns, index_of, file, number, image_id, log)
        if flag_columns
        else _named(cells[settings.label_column], index_of, file, number, image_id, log)
    )
    if labels is None:
        return None
    mask = cells.get(settings.mask_column)
    try:
        uri = resolve_uri(folder, image)
        mask_uri = resolve_uri(folder, str(mask)) if mask else None
    except ValueError as error:
        log.add(problems.MISSING_FILE, str(error), file, number, image_id)
        return None
    split = split or hashed_split(image_id, settings.val_frac)
    return ImportRow(image_id, uri, split, labels, mask_uri, file, number)


def _id_of(image: str) -> str:
    """From the file's name alone: the folders of a table's paths often differ by machine."""
    return derived_id(image.rstrip("/").rsplit("/", 1)[-1])


def _named(
    cell: Any, index_of: Mapping[str, int], file: str, number: int, image_id: str, log: ProblemLog
) -> tuple[int, ...] | None:
    """Labels from names; None where all of them are unknown."""
    names = split_names(cell)
    unknown = [name for name in names if name not in index_of]
    for name in unknown:
        message = f"{name!r} of {image_id} is not in the class table ({', '.join(index_of)})"
        log.add(problems.UNKNOWN_CLASS, message, file, number, image_id)
    if unknown and len(unknown) == len(names):
        return None
    return tuple(sorted({index_of[name] for name in names if name in index_of}))


def _flagged(
    cells: dict[str, Any],
    columns: tuple[str, ...],
    index_of: Mapping[str, int],
    file: str,
    number: int,
    image_id: str,
    log: ProblemLog,
) -> tuple[int, ...] | None:
    """Labels from columns of 0 and 1; None where a cell is neither."""
    labels = []
    for name in columns:
        value = cells[name]
        flag = _FLAGS.get("" if value is None else str(value).strip().lower())
        if flag is None:
            log.add(problems.BAD_TAG, f"column {name!r}: {value!r} is neither 0 nor 1", file, number, image_id)
            return None
        if flag:
            labels.append(index_of[name])
    return tuple(sorted(labels))
