"""Imports the VOC layout: JPEGImages, SegmentationClass, lists in ImageSets, tags from a CSV or from Annotations."""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field, model_validator

from cluster.storage import MissingFileError, Storage, StorageError
from jobs.importers import problems
from jobs.importers.problems import Problem, ProblemLog
from jobs.importers.rows import TRAIN, BadSource, ImportRow, ImportSource
from jobs.importers.table_file import TableFile
from subcat_core.classes import BACKGROUND, IGNORE, ClassTable
from subcat_core.settings import Settings

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
_BATCH = 256
_THREADS = 8


class VocSource(Settings):
    """A data set in VOC layout, with all classes or a subset.

    Pixels of classes that are left out count as IGNORE; images with none of the classes are dropped and counted.
    """

    kind: Literal["voc"] = "voc"
    """Names this layout: the VOC layout."""
    path: str = Field(min_length=1)
    """The folder that holds JPEGImages, or its s3:// prefix."""
    classes: tuple[str, ...] = VOC_CLASSES
    """Parent classes in order, all of them out of all_classes."""
    all_classes: tuple[str, ...] = VOC_CLASSES
    """Names by stored mask value, from 1 on."""
    splits: dict[str, str] = Field(default={"train": "train", "val": "val"})
    """Split -> list: the name of a file in lists_folder without .txt, or a path below `path` with it."""
    mask_lists: dict[str, str] = Field(default={"train": "train", "val": "val"})
    """Split -> list of its images that have a mask to score on; a split that is not named has none."""
    labels: str | None = None
    """CSV below `path` with image_id and a 0/1 column a class; null takes labels.csv, and Annotations without it."""
    lists_folder: str = "ImageSets/Segmentation"
    """Folder of the lists, below `path`."""
    images_folder: str = "JPEGImages"
    """Folder of the images, below `path`."""
    image_suffix: str = ".jpg"
    """What follows the image_id in an image's file name."""
    masks_folder: str = "SegmentationClass"
    """Folder of the masks, below `path`, as <image_id>.png."""

    @model_validator(mode="after")
    def _fits(self) -> VocSource:
        unknown = [name for name in self.classes if name not in self.all_classes]
        if unknown:
            raise ValueError(f"classes {', '.join(unknown)} are not in all_classes ({', '.join(self.all_classes)})")
        extra = [split for split in self.mask_lists if split not in self.splits]
        if extra and "mask_lists" in self.model_fields_set:
            raise ValueError(f"mask_lists names {', '.join(extra)}, but the splits are {', '.join(self.splits)}")
        return self


def open_voc(settings: VocSource) -> ImportSource:
    """Read the lists. Raises BadSource where a list or the tags are missing."""
    root = Storage(settings.path)
    mask_lists = {split: name for split, name in settings.mask_lists.items() if split in settings.splits}
    files = {name: _list_name(settings, name) for name in [*settings.splits.values(), *mask_lists.values()]}
    contents = {name: _read(root, file) for name, file in files.items()}
    fingerprints = {root.uri(files[name]): hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    lists = {name: parse_list(data) for name, data in contents.items()}
    table = _label_table(settings, root)
    if table is not None:
        fingerprints[table.uri] = table.sha256
    masked = {split: {image_id for _, image_id in lists[name]} for split, name in mask_lists.items()}

    def rows(log: ProblemLog) -> Iterator[ImportRow]:
        wanted = {image_id for name in settings.splits.values() for _, image_id in lists[name]}
        tags = _tags_of_table(settings, table, wanted, log) if table is not None else None
        for split, name in settings.splits.items():
            listed = ((row, image_id) for row, image_id in lists[name])
            for row, image_id, found in _with_tags(settings, root, listed, tags):
                file = root.uri(files[name])
                untagged = isinstance(found, str)
                if untagged and split == TRAIN:
                    log.add(problems.NO_TAG, str(found), file, row, image_id)
                    continue
                labels = () if untagged else _labels(settings, found, file, row, image_id, log)
                if not labels and not untagged:
                    log.note("images with none of the classes (left out)")
                    continue
                image = root.uri(f"{settings.images_folder}/{image_id}{settings.image_suffix}")
                mask = root.uri(f"{settings.masks_folder}/{image_id}.png")
                has_mask = image_id in masked.get(split, ())
                yield ImportRow(image_id, image, split, labels, mask if has_mask else None, file, row)

    return ImportSource(_class_table(settings), tuple(settings.splits), fingerprints, rows, root.uri())


def _class_table(settings: VocSource) -> ClassTable:
    """Stored values of the classes -> class ids; those of other classes -> IGNORE."""
    ids = {name: index + 1 for index, name in enumerate(settings.classes)}
    values = {index + 1: ids.get(name, IGNORE) for index, name in enumerate(settings.all_classes)}
    return ClassTable(settings.classes, {BACKGROUND: BACKGROUND, IGNORE: IGNORE} | values)


def _list_name(settings: VocSource, name: str) -> str:
    return name if name.endswith(".txt") else f"{settings.lists_folder}/{name}.txt"


def _read(root: Storage, name: str) -> bytes:
    try:
        return root.read_bytes(name)
    except MissingFileError as error:
        raise BadSource(Problem(problems.MISSING_FILE, "no such list", root.uri(name))) from error


def parse_list(data: bytes) -> list[tuple[int, str]]:
    """(line, image_id) of each line: the first word, as ImageSets/Main has more, without folder and suffix."""
    lines = enumerate(data.decode("utf-8-sig", "replace").splitlines(), 1)
    words = ((number, line.split()[0]) for number, line in lines if line.strip())
    return [(number, PurePosixPath(word).stem if "/" in word else word) for number, word in words]


def _label_table(settings: VocSource, root: Storage) -> TableFile | None:
    name = settings.labels or "labels.csv"
    if settings.labels is None and not root.exists(name):
        return None
    table = TableFile(root.uri(name))
    table.require(["image_id", *settings.classes], "tags in VOC layout: image_id and a 0/1 column a class")
    return table


def _tags_of_table(
    settings: VocSource, table: TableFile, wanted: set[str], log: ProblemLog
) -> dict[str, tuple[str, ...]]:
    """image_id -> names of its tags, for the listed images; other columns than all_classes are not read."""
    names = [name for name in settings.all_classes if name in table.columns]
    tags: dict[str, tuple[str, ...]] = {}
    for number, cells in table.rows(log):
        image_id = str(cells["image_id"])
        if image_id not in wanted:
            continue
        values = {name: str(cells[name]).strip() for name in names}
        wrong = [f"{name} = {value!r}" for name, value in values.items() if value not in ("0", "1")]
        if wrong:
            log.add(problems.BAD_TAG, f"{', '.join(wrong[:3])}: neither 0 nor 1", table.uri, number, image_id)
        tags[image_id] = tuple(name for name, value in values.items() if value == "1")
    return tags


def _with_tags(
    settings: VocSource, root: Storage, listed: Iterable[tuple[int, str]], tags: dict[str, tuple[str, ...]] | None
) -> Iterator[tuple[int, str, tuple[str, ...] | str]]:
    """(line, image_id, names or what is wrong); Annotations are read ahead by a few threads."""
    if tags is not None:
        for row, image_id in listed:
            yield row, image_id, tags.get(image_id, f"{image_id} has no row in the table of tags")
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        batch: list[tuple[int, str]] = []
        for item in [*listed, None]:
            if item is not None:
                batch.append(item)
            if len(batch) == _BATCH or item is None:
                found = pool.map(lambda entry: _tags_of_annotation(root, entry[1]), batch)
                yield from ((row, image_id, names) for (row, image_id), names in zip(batch, found, strict=True))
                batch = []


def _tags_of_annotation(root: Storage, image_id: str) -> tuple[str, ...] | str:
    """Names of all objects, difficult ones too (as PSA's cls_labels have it); a text says what is wrong."""
    name = f"Annotations/{image_id}.xml"
    try:
        objects = ElementTree.fromstring(root.read_bytes(name)).iter("object")
    except (StorageError, ElementTree.ParseError) as error:
        return f"{image_id}: its tags cannot be read ({error})"
    return tuple(dict.fromkeys((item.findtext("name") or "").strip() for item in objects))


def _labels(
    settings: VocSource, names: Iterable[str], file: str, row: int, image_id: str, log: ProblemLog
) -> tuple[int, ...]:
    for name in names:
        if name not in settings.all_classes:
            message = f"{name!r} of {image_id} is not in all_classes"
            log.add(problems.UNKNOWN_CLASS, message, file, row, image_id)
    return tuple(sorted(settings.classes.index(name) for name in names if name in settings.classes))
