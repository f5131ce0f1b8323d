"""What an importer yields, and the checks that every layout shares: ids, duplicates, tags, empty splits and classes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from cluster.storage import Storage
from jobs.importers import problems
from jobs.importers.duplicates import IdRegister, tell_duplicates
from jobs.importers.problems import Problem, ProblemLog
from subcat_core.classes import ClassTable

TRAIN = "train"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif")
_MAX_ID_CHARS = 200  # file systems take 255, and masks add a suffix
_LEGAL = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{_MAX_ID_CHARS - 1}}}")
_ILLEGAL_PART = re.compile(r"[^A-Za-z0-9._-]+")


@dataclasses.dataclass(frozen=True, slots=True)
class ImportRow:
    """One image as a layout lists it. labels: class_index, ascending, each once. file and row: where it is listed.

    drawing: what its mask is drawn from (`coco_masks.Drawing` as JSON) where there is no file at mask_uri.
    """

    image_id: str
    uri: str
    split: str
    labels: tuple[int, ...]
    mask_uri: str | None
    file: str
    row: int | None
    drawing: str | None = None


class BadSource(ValueError):  # noqa: N818 (the name says what it is)
    """A layout that cannot be opened at all: no such folder, wrong columns, truncated; as a Problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem}; {problem.remedy}")
        self.problem = problem


@dataclasses.dataclass(frozen=True)
class ImportSource:
    """A layout that was opened. rows: reads it from the start, streaming, and tells the log what is wrong.

    splits: those that must have images. fingerprints: list or table file -> sha256 of what it says.
    """

    classes: ClassTable
    splits: tuple[str, ...]
    fingerprints: Mapping[str, str]
    rows: Callable[[ProblemLog], Iterator[ImportRow]]
    file: str


@dataclasses.dataclass
class RowCounts:
    """Images, masks and images of each class, by split."""

    classes: ClassTable
    by_split: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)

    def add(self, split: str, labels: Iterable[int], has_mask: bool) -> None:
        counter = self.by_split.setdefault(split, collections.Counter())
        counter["images"] += 1
        counter["masks"] += has_mask
        counter.update(f"class:{index}" for index in labels)

    def add_many(self, split: str, num_images: int, num_masks: int, class_counts: Iterable[int]) -> None:
        """Add what a shard has counted. class_counts: (C,) images of each class."""
        counter = self.by_split.setdefault(split, collections.Counter())
        counter.update({"images": num_images, "masks": num_masks})
        counter.update({f"class:{index}": number for index, number in enumerate(class_counts)})

    def to_json(self) -> dict[str, dict[str, Any]]:
        """{"train": {"images": 800, "masks": 437, "classes": {"cat": 120, ...}}, ...}"""
        return {
            split: {
                "images": counter["images"],
                "masks": counter["masks"],
                "classes": {name: counter[f"class:{index}"] for index, name in enumerate(self.classes.names)},
            }
            for split, counter in self.by_split.items()
        }


def checked_rows(
    source: ImportSource, log: ProblemLog, counts: RowCounts, *, needs_tags: bool = True
) -> Iterator[ImportRow]:
    """The rows of a source, telling the log what every layout must hold; bad rows are left out, counts filled.

    needs_tags: whether every training image must have one. At the end: image_ids that come twice (both rows are
    yielded), splits that must have images and have none, and classes without a training image.
    """
    register = IdRegister()
    with contextlib.closing(register):
        for row in source.rows(log):
            if not is_legal_id(row.image_id):
                log.add(problems.ILLEGAL_ID, f"image_id {row.image_id!r}", row.file, row.row, row.image_id)
                continue
            register.add(row.image_id)
            if needs_tags and row.split == TRAIN and not row.labels:
                log.add(problems.NO_TAG, f"{row.image_id} of split {TRAIN} has no tag", row.file, row.row, row.image_id)
                continue
            counts.add(row.split, row.labels, row.mask_uri is not None or row.drawing is not None)
            yield row
        again = (row for row in source.rows(ProblemLog()) if is_legal_id(row.image_id))
        tell_duplicates(register, again, log)
    check_counts(source.splits, counts, log, source.file)


def check_counts(splits: Iterable[str], counts: RowCounts, log: ProblemLog, file: str) -> None:
    """Tell the log of splits without images, the train split among them, and of classes without a training image."""
    for split in dict.fromkeys([TRAIN, *splits]):
        if not counts.by_split.get(split):
            log.add(problems.EMPTY_SPLIT, f"split {split!r} has no image", file)
    train = counts.by_split.get(TRAIN, collections.Counter())
    for index, name in enumerate(counts.classes.names):
        if train and not train[f"class:{index}"]:
            log.add(problems.EMPTY_CLASS, f"class {name!r} has no image in split {TRAIN}", file)


def is_legal_id(image_id: str) -> bool:
    """Letters, digits, '.', '_' and '-', at most 200 of them, not starting with '.': a file name everywhere."""
    return _LEGAL.fullmatch(image_id) is not None


def derived_id(relative: str) -> str:
    """A legal image_id from a file's relative path: without suffix, folders joined by '.'.

    Other characters become '_', with a hash of the path at the end so that two names stay two.
    """
    path = PurePosixPath(relative)
    name = ".".join([*path.parts[:-1], path.stem])
    return name if is_legal_id(name) else hashed_id(relative)


def hashed_id(relative: str) -> str:
    """A legal image_id that tells two paths apart by a hash, whatever their characters and length."""
    path = PurePosixPath(relative)
    name = _ILLEGAL_PART.sub("_", ".".join([*path.parts[:-1], path.stem])).strip("._-")[: _MAX_ID_CHARS - 20]
    return f"{name or 'image'}-{hashlib.sha256(relative.encode()).hexdigest()[:8]}"


def hashed_split(image_id: str, val_frac: float) -> str:
    """'val' for about val_frac of the ids, 'train' for the rest; of the id alone, so rows may come and go."""
    value = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") / 2**64
    return "val" if value < val_frac else TRAIN


def mask_values_of(names: tuple[str, ...], stored: Mapping[str, tuple[int, ...]] | None) -> dict[int, int] | None:
    """ClassTable.mask_values from settings: {"background": (0,), "ignore": (255,), "cat": (8,)}; None stays None.

    Raises ValueError for a name that is no class, and for a value that is given twice.
    """
    if stored is None:
        return None
    ids = {"background": 0, "ignore": 255} | {name: index + 1 for index, name in enumerate(names)}
    values: dict[int, int] = {}
    for name, members in stored.items():
        if name not in ids:
            raise ValueError(
                f"mask_values: {name!r} is no class; got classes {', '.join(names)}, background and ignore"
            )
        for value in members:
            if value in values:
                raise ValueError(f"mask_values: {value} is given twice; every stored value means one class")
            values[value] = ids[name]
    return values


def resolve_uri(folder: str, location: str) -> str:
    """The absolute path or s3:// URI of a location that is absolute or relative to a folder.

    Raises ValueError for URIs of other kinds.
    """
    if "://" in location or location.startswith("/"):
        return Storage(location).root
    scheme, separator, path = folder.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(path, location))


def parent_uri(uri: str) -> str:
    """The folder that an absolute path or URI is in."""
    scheme, separator, path = uri.rpartition("://")
    return scheme + separator + posixpath.dirname(path)
