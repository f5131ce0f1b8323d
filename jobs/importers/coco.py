"""Imports COCO: tags from an instances JSON a split; masks, for scoring alone, are drawn from it when images are read.

The file is read whole, once to open it and once for its rows: the categories stand last in it. See coco_json.py for
what that takes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.storage import Storage
from jobs.importers import problems
from jobs.importers.coco_json import CocoAnnotation, CocoFile, CocoImage, Keep, read_coco
from jobs.importers.coco_masks import Drawing, Instance, segmentation_problem
from jobs.importers.problems import Problem, ProblemLog
from jobs.importers.rows import TRAIN, BadSource, ImportRow, ImportSource, derived_id
from subcat_core.classes import IGNORE, ClassTable, to_class_ids
from subcat_core.settings import Settings

_PREFIX, _SUFFIX = "instances_", ".json"


class CocoSource(Settings):
    """A data set in COCO's layout, 2014 or 2017, with all classes or a subset.

    A tag is any annotation of the image, crowds too. Pixels of classes that are left out count as IGNORE.
    """

    kind: Literal["coco"] = "coco"
    """Names this layout: COCO's instances JSON."""
    path: str = Field(min_length=1)
    """The folder that holds the JSON files and the folders of images, or its s3:// prefix."""
    splits: dict[str, str] = Field(
        default={"train": "annotations/instances_train2014.json", "val": "annotations/instances_val2014.json"},
        min_length=1,
    )
    """Split -> instances JSON, below `path`."""
    images: dict[str, str] | None = None
    """Split -> folder of its images, below `path`; null: instances_train2014.json has train2014."""
    classes: tuple[str, ...] | None = None
    """Parent classes in order; null takes all categories of the file, by rising category id."""
    mask_splits: tuple[str, ...] = ("val",)
    """Splits whose masks are drawn and scored. With train among them, every round scores maps of all its images."""
    empty_images: Literal["background", "drop"] = "background"
    """Images without an instance outside split train. background: kept without a tag, and scored as all background.
    drop: left out, as in the lists of published work (40,137 of the 40,504 images of val2014). Split train always
    leaves them out."""
    crowd: Literal["class", "ignore"] = "class"
    """Pixels of crowd regions. class: as any object (so coco2voc draws the masks that published work scores on).
    ignore: IGNORE, under all objects."""
    outside_px: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Points of polygons may lie so far outside the image and are cut off at its border; further out is an error."""

    @model_validator(mode="after")
    def _fits(self) -> CocoSource:
        named = list(self.images or ())
        named += self.mask_splits if "mask_splits" in self.model_fields_set else ()
        extra = [split for split in named if split not in self.splits]
        if extra:
            raise ValueError(
                f"images or mask_splits name {', '.join(extra)}, but the splits are {', '.join(self.splits)}"
            )
        for split, name in self.splits.items():
            file = PurePosixPath(name).name
            if split not in (self.images or ()) and not (file.startswith(_PREFIX) and file.endswith(_SUFFIX)):
                raise ValueError(f"splits.{split} = {name!r}: not instances_NAME.json; give images.{split}, a folder")
        return self

    def images_folder(self, split: str) -> str:
        """Folder of a split's images, below `path`."""
        if self.images and split in self.images:
            return self.images[split]
        return PurePosixPath(self.splits[split]).name.removeprefix(_PREFIX).removesuffix(_SUFFIX)


def open_coco(settings: CocoSource) -> ImportSource:
    """Hash the files and read their categories; each is read again, alone, when its rows are asked for.

    Raises BadSource: a file that is missing or not COCO's, categories that differ between files, unknown classes.
    """
    root = Storage(settings.path)
    fingerprints: dict[str, str] = {}
    categories: dict[int, str] | None = None
    for name in dict.fromkeys(settings.splits.values()):
        file = read_coco(root, name, "categories")
        if categories is not None and file.categories != categories:
            message = f"its categories differ from those of {next(iter(fingerprints))}"
            raise BadSource(Problem(problems.BAD_JSON, message, file.uri))
        categories = file.categories
        fingerprints[file.uri] = file.sha256
    assert categories is not None  # there is at least one split
    names = settings.classes or tuple(categories.values())
    unknown = [name for name in names if name not in categories.values()]
    if unknown:
        message = f"classes {', '.join(unknown)} are no categories; there are {', '.join(categories.values())}"
        raise BadSource(Problem(problems.UNKNOWN_CATEGORY, message, next(iter(fingerprints))))
    classes = ClassTable(names)

    def rows(log: ProblemLog) -> Iterator[ImportRow]:
        for split, name in settings.splits.items():
            has_masks = split in settings.mask_splits
            keep: Keep = "segmentations" if has_masks else "tags"
            yield from _SplitRows(settings, root, split, read_coco(root, name, keep), classes, has_masks, log)

    return ImportSource(classes, tuple(settings.splits), fingerprints, rows, root.uri())


class _SplitRows:
    """The rows of one split, in the order of its list of images."""

    def __init__(
        self,
        settings: CocoSource,
        root: Storage,
        split: str,
        file: CocoFile,
        classes: ClassTable,
        has_masks: bool,
        log: ProblemLog,
    ) -> None:
        self.settings, self.root, self.split, self.file = settings, root, split, file
        self.class_indices = {
            category_id: classes.index_of(name) if name in classes.names else None
            for category_id, name in file.categories.items()
        }
        self.has_masks, self.log = has_masks, log

    def __iter__(self) -> Iterator[ImportRow]:
        images: dict[Any, CocoImage] = {}
        for image in self.file.images:
            if self._is_sound(image, images):
                images[image.id] = image
        annotations: dict[Any, list[CocoAnnotation]] = collections.defaultdict(list)
        for annotation in self.file.annotations:
            if self._is_known(annotation, images):
                annotations[annotation.image_id].append(annotation)
        for image in images.values():
            row = self._row(image, annotations.pop(image.id, []))
            if row is not None:
                yield row

    def _row(self, image: CocoImage, annotations: list[CocoAnnotation]) -> ImportRow | None:
        found = {self.class_indices[annotation.category_id] for annotation in annotations}
        labels = tuple(sorted(index for index in found if index is not None))
        if not labels:
            kept = self.split != TRAIN and self.settings.empty_images == "background"
            fate = "kept as background" if kept else "left out"
            self.log.note(f"images of split {self.split} without an instance of the classes ({fate})")
            if not kept:
                return None
        uri = self.root.uri(f"{self.settings.images_folder(self.split)}/{image.file_name}")
        drawing = None
        if self.has_masks:
            instances = [self._instance(image, annotation) for annotation in annotations]
            drawing = Drawing(image.height, image.width, tuple(filter(None, instances))).to_json()
        image_id = derived_id(image.file_name)
        return ImportRow(image_id, uri, self.split, labels, None, self.file.uri, None, drawing)

    def _instance(self, image: CocoImage, annotation: CocoAnnotation) -> Instance | None:
        problem = segmentation_problem(annotation.segmentation, image.height, image.width, self.settings.outside_px)
        if problem is not None:
            rule, message = problem
            self._tell(rule, f"annotation {annotation.id} of {image.file_name}: {message}", annotation.id)
            return None
        class_index = self.class_indices[annotation.category_id]
        ignored_crowd = annotation.is_crowd and self.settings.crowd == "ignore"
        class_id = IGNORE if class_index is None or ignored_crowd else int(to_class_ids([class_index])[0])
        area = annotation.area if isinstance(annotation.area, int | float) and annotation.area > 0 else None
        for _ in filter(lambda polygon: len(polygon) < 6, _polygons(annotation)):
            self.log.note("polygons of fewer than three points (not drawn)")
        return Instance(class_id, annotation.segmentation, area, below=ignored_crowd)

    def _is_sound(self, image: Any, seen: dict[Any, CocoImage]) -> bool:
        if not isinstance(image, CocoImage) or not isinstance(image.id, int | str):
            self._tell(problems.BAD_JSON, f"an entry of images has no id or file_name: {str(image)[:100]}")
        elif not isinstance(image.file_name, str) or not image.file_name:
            self._tell(problems.BAD_JSON, f"image {image.id}: its file_name is {image.file_name!r}")
        elif self.has_masks and not all(isinstance(px, int) and px > 0 for px in (image.height, image.width)):
            size = f"{image.height!r} and {image.width!r}"
            self._tell(problems.BAD_JSON, f"image {image.id}: its height and width are {size}, not px; masks need them")
        elif image.id in seen:
            self._tell(problems.DUPLICATE_ID, f"image id {image.id} appears again, as {image.file_name}")
        else:
            return True
        return False

    def _is_known(self, annotation: Any, images: dict[Any, CocoImage]) -> bool:
        if not isinstance(annotation, CocoAnnotation):
            self._tell(problems.BAD_ANNOTATION, f"an annotation has no category_id: {str(annotation)[:100]}")
        elif not isinstance(annotation.category_id, int) or annotation.category_id not in self.class_indices:
            message = f"annotation {annotation.id}: category {annotation.category_id!r} is not in categories"
            self._tell(problems.UNKNOWN_CATEGORY, message, annotation.id)
        elif not isinstance(annotation.image_id, int | str) or annotation.image_id not in images:
            message = f"annotation {annotation.id}: image {annotation.image_id!r} is not in images"
            self._tell(problems.UNKNOWN_IMAGE, message, annotation.id)
        else:
            return True
        return False

    def _tell(self, rule: str, message: str, annotation_id: Any = None) -> None:
        row = annotation_id if isinstance(annotation_id, int) else None
        self.log.add(rule, message, self.file.uri, row)


def _polygons(annotation: CocoAnnotation) -> list[Any]:
    return annotation.segmentation if isinstance(annotation.segmentation, list) else []
