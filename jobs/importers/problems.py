"""What can be wrong with a data set: a Problem each, with file, row, rule and remedy; all of them are collected."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

BAD_TABLE = "bad table"
EMPTY_SPLIT = "empty split"
UNKNOWN_CLASS = "unknown class"
BAD_TAG = "bad tag value"
NO_TAG = "image without a tag"
DUPLICATE_ID = "duplicate image_id"
ILLEGAL_ID = "illegal image_id"
MISSING_FILE = "missing file"
BAD_IMAGE = "undecodable image"
BAD_MASK = "undecodable mask"
MASK_SIZE = "mask of another size"
MASK_VALUES = "mask values"
EMPTY_CLASS = "class without images"
BAD_JSON = "bad JSON"
BAD_ANNOTATION = "bad annotation"
UNKNOWN_CATEGORY = "unknown category"
UNKNOWN_IMAGE = "annotation of an unknown image"
OUTSIDE_IMAGE = "polygon outside the image"

REMEDIES = {
    BAD_TABLE: "repair the file, or name its columns in prepare.source",
    EMPTY_SPLIT: "give the split images, or take it out of the settings",
    UNKNOWN_CLASS: "correct the tag, or add the class to prepare.source.classes",
    BAD_TAG: "write 0 or 1, and list the class columns in prepare.source.classes if others stand beside them",
    NO_TAG: "tag the image, take it out, or move it to another split: training needs at least one tag",
    DUPLICATE_ID: "every image_id may stand once over all splits; remove one, or give them a column image_id",
    ILLEGAL_ID: "use only letters, digits, '.', '_' and '-' in image_id: masks are written under this name",
    MISSING_FILE: "restore the file, or take its row out",
    BAD_IMAGE: "save the image again, or take its row out",
    BAD_MASK: "save the mask as an indexed or 8-bit grey PNG, or take its row out",
    MASK_SIZE: "a mask has the size of its image after EXIF rotation; make it anew",
    MASK_VALUES: "save class ids, not colours, or describe the stored values in prepare.source",
    BAD_JSON: "give COCO's instances JSON, with lists images, annotations and categories; make it anew if it is cut",
    BAD_ANNOTATION: "correct the annotation in the JSON file, or take it out",
    UNKNOWN_CATEGORY: "correct the category, or add it to `categories` of the JSON file",
    UNKNOWN_IMAGE: "add the image to `images` of the JSON file, or take the annotation out",
    OUTSIDE_IMAGE: "correct the points, or raise prepare.source.outside_px: what is beyond the border is cut off",
    EMPTY_CLASS: "take the class out of prepare.source.classes, or tag some training images with it",
}

_WARNINGS = frozenset({EMPTY_CLASS})
_MAX_KEPT = 1000


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    row: line of a text file or row of a Parquet file, from 1, or the annotation's id in a COCO file; None for the whole
    file. number: how many it stands for, where more were found than are named.
    """

    rule: str
    message: str
    file: str = ""
    row: int | None = None
    image_id: str | None = None
    number: int = 1

    @property
    def is_error(self) -> bool:
        """Warnings let `prepare` go on."""
        return self.rule not in _WARNINGS

    @property
    def remedy(self) -> str:
        return REMEDIES[self.rule]

    @property
    def place(self) -> str:
        """'labels.csv:17', or the file alone."""
        return self.file if self.row is None else f"{self.file}:{self.row}"

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class ProblemLog:
    """Collects problems: all are counted, the first thousand of each rule are kept, so memory is bounded."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.notes: dict[str, int] = {}

    def add(self, rule: str, message: str, file: str = "", row: int | None = None, image_id: str | None = None) -> None:
        self.counts[rule] += 1
        if self.counts[rule] <= _MAX_KEPT:
            self.kept.append(Problem(rule, message, file, row, image_id))

    def note(self, what: str) -> None:
        """Count something that is no problem but must be told, such as images that the classes asked for leave out."""
        self.notes[what] = self.notes.get(what, 0) + 1

    def problems(self) -> list[Problem]:
        """What was kept, and for each rule with more of them a last one that says how many."""
        rests = [
            Problem(rule, f"and {count - _MAX_KEPT} more of this kind", number=count - _MAX_KEPT)
            for rule, count in self.counts.items()
            if count > _MAX_KEPT
        ]
        return self.kept + rests

    @property
    def has_errors(self) -> bool:
        return any(rule not in _WARNINGS for rule in self.counts)


def format_problems(problems: Iterable[Problem], max_shown: int | None = None) -> str:
    """All problems as text: grouped by rule, counted, with place and remedy; "no problems" when there are none.

    max_shown: at most so many of each rule (None: all).
    """
    groups: dict[str, list[Problem]] = {rule: [] for rule in REMEDIES}
    for problem in problems:
        groups[problem.rule].append(problem)
    lines = []
    totals = {True: 0, False: 0}  # errors, warnings
    for rule, members in groups.items():
        if not members:
            continue
        total = sum(problem.number for problem in members)
        totals[members[0].is_error] += total
        lines.append(f"{rule} ({'error' if members[0].is_error else 'warning'}, {total}): {REMEDIES[rule]}")
        shown = members if max_shown is None else members[:max_shown]
        lines += [f"  {problem}" for problem in shown]
        if len(shown) < len(members):
            left = total - sum(problem.number for problem in shown)
            lines.append(f"  and {left} more; `subcat validate` lists {'all' if total <= _MAX_KEPT else 'a thousand'}")
    if not lines:
        return "no problems"
    return "\n".join([_counted(totals[True], "error") + ", " + _counted(totals[False], "warning"), *lines])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
