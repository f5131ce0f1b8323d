"""Draws the class-id mask of an image from COCO's polygons and run-length codes, and tells what is wrong with them.

Formats: the COCO data format (segmentation as a list of polygons, or as {"size", "counts"}); the run-length string is
that of pycocotools (maskApi), without which this works. Legend: H W pixels of the image.
"""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from jobs.importers import problems
from subcat_core.classes import BACKGROUND

_FINE = 5  # sub-pixels a side that polygons are drawn with; the middle one decides (pycocotools: 5 as well)
_STRIP_VALUES = 2**24  # sub-pixels drawn at once, so that large images take 16 MB
_NUM_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Instance:
    """One object. segmentation: polygons [[x, y, x, y, ...], ...] in px, or {"size": [H, W], "counts": ...}.

    area: px, for the order of drawing; None counts the pixels. below: it lies under everything else.
    """

    class_id: int
    segmentation: Any
    area: float | None = None
    below: bool = False


@dataclasses.dataclass(frozen=True)
class Drawing:
    """All objects of one image of (height, width) px, as the list file has them."""

    height: int
    width: int
    instances: tuple[Instance, ...]

    def render(self) -> np.ndarray:
        """(H, W) uint8 class ids, BACKGROUND where nothing is drawn.

        Smaller objects lie over larger ones, and of two of one area the first. That is the order of coco2voc, with
        which masks of COCO are made for weakly supervised segmentation: a cup stays visible on its table.
        """
        mask = np.full((self.height, self.width), BACKGROUND, np.uint8)
        drawn = []
        for position, instance in enumerate(self.instances):
            top, left, inside = draw(instance.segmentation, self.height, self.width)
            area = float(inside.sum()) if instance.area is None else instance.area
            drawn.append((not instance.below, -area, -position, top, left, inside, instance.class_id))
        for *_, top, left, inside, class_id in sorted(drawn, key=lambda item: item[:3]):
            mask[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = class_id
        return mask

    def to_json(self) -> str:
        instances = [[i.class_id, _plain(i.segmentation), i.area, i.below] for i in self.instances]
        return json.dumps([self.height, self.width, instances], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Drawing:
        height, width, instances = json.loads(text)
        return cls(height, width, tuple(Instance(*values) for values in instances))


def draw(segmentation: Any, height: int, width: int) -> tuple[int, int, np.ndarray]:
    """(top, left, inside): a bool array, True on the object, that lies at (top, left) of the image."""
    if isinstance(segmentation, dict):
        return 0, 0, decode_rle(segmentation["counts"], height, width)
    return draw_polygons(segmentation, height, width)


def draw_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> tuple[int, int, np.ndarray]:
    """The union of polygons [x, y, x, y, ...] in px: a pixel belongs to it where its centre does.

    Pixel (row y, column x) covers x..x+1 and y..y+1. What is outside the image is cut off; polygons of fewer than three
    points are not drawn. Borders are exact to a fifth of a pixel.
    """
    shapes = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons if len(polygon) >= 6]
    if not shapes:
        return 0, 0, np.zeros((0, 0), bool)
    points = np.concatenate(shapes)
    left, top = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int)
    inside = np.zeros((bottom - top, right - left), bool)
    num_rows = max(1, _STRIP_VALUES // (_FINE**2 * max(1, right - left)))
    for start in range(0, inside.shape[0] if right > left else 0, num_rows):
        strip = inside[start : start + num_rows]
        fine = Image.new("L", (_FINE * strip.shape[1], _FINE * strip.shape[0]))
        pen = ImageDraw.Draw(fine)
        for shape in shapes:  # Pillow's points stand for centres of pixels
            fine_points = np.rint((shape - (left, top + start)) * _FINE - 0.5).astype(int)
            pen.polygon(fine_points.ravel().tolist(), fill=1)
        strip[:] = np.asarray(fine)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE]
    return int(top), int(left), inside


def decode_rle(counts: Sequence[int] | str, height: int, width: int) -> np.ndarray:
    """(H, W) bool from runs of 0 and 1 in turn, 0 first, down the columns from left to right.

    counts: the lengths of the runs, or COCO's string of them. Raises ValueError where they are no H * W pixels.
    """
    runs = decode_counts(counts) if isinstance(counts, str) else list(counts)
    if any(not isinstance(run, int) or run < 0 for run in runs):
        raise ValueError("the run lengths are not all whole numbers of 0 or more")
    if sum(runs) != height * width:
        raise ValueError(
            f"the run lengths add up to {sum(runs)} px, the image has {height} x {width} = {height * width}"
        )
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return values.reshape(width, height).T


def decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's string: five bits a character, low ones first; from the fourth run on it is the
    difference to the run two before. Raises ValueError for another string.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {character!r} is not in a run-length string")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more characters follow
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("the run-length string ends in the middle of a number")
    return counts


def segmentation_problem(segmentation: Any, height: int, width: int, outside_px: float) -> tuple[str, str] | None:
    """(rule, message) of what is wrong with a segmentation, or None. outside_px: how far points may lie outside."""
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        return problems.BAD_ANNOTATION, "its segmentation is neither a list of polygons nor a run-length code"
    for polygon in segmentation:
        if not isinstance(polygon, array) or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
            return problems.BAD_ANNOTATION, "a polygon is not a list of x, y, x, y, ... in px"
        outside = [
            (x, y)
            for x, y in zip(polygon[::2], polygon[1::2], strict=True)
            if not (-outside_px <= x <= width + outside_px and -outside_px <= y <= height + outside_px)
        ]
        if outside:
            shown = ", ".join(f"({x:g}, {y:g})" for x, y in outside[:_NUM_SHOWN])
            message = f"{len(outside)} points lie more than {outside_px:g} px outside {width} x {height} px: {shown}"
            return problems.OUTSIDE_IMAGE, message
    return None


def _rle_problem(rle: dict[str, Any], height: int, width: int) -> tuple[str, str] | None:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(counts, list | str) or not isinstance(size, list):
        return problems.BAD_ANNOTATION, "a run-length code has size [height, width] and counts, a list or a string"
    if size != [height, width]:
        return (
            problems.MASK_SIZE,
            f"its run-length code is of {size} px (height, width), the image of {[height, width]}",
        )
    try:
        decode_rle(counts, height, width)
    except ValueError as error:
        return problems.BAD_ANNOTATION, str(error)
    return None


def _plain(segmentation: Any) -> Any:
    """For JSON: arrays as lists."""
    if isinstance(segmentation, dict):
        return {"size": segmentation["size"], "counts": segmentation["counts"]}
    return [list(polygon) for polygon in segmentation]
