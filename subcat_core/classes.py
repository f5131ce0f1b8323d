"""The class table: names, colours, and the one place where class_index and class_id are converted."""

from __future__ import annotations

import colorsys
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BACKGROUND = 0
IGNORE = 255
MAX_CLASSES = 254


def _colours(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Background black, then well separated hues: the golden angle keeps neighbours apart for any C."""
    colours = [(0, 0, 0)]
    for index in range(num_classes):
        rgb = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.65 + 0.3 * (index % 2), 0.95 - 0.2 * (index % 3))
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colours)


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The C parent classes of a data set, in the order of their class_index.

    names: C unique names. mask_values: what a stored ground-truth value means, as stored value -> class_id
    (0 background, 1..C, or 255 ignore); None when masks hold class ids already. has_background: whether a pixel may
    belong to none of the classes; without, no background score competes with them, and nothing is called background.
    """

    names: tuple[str, ...]
    mask_values: Mapping[int, int] | None = None
    has_background: bool = True

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("class table: no classes; give at least one class name")
        if len(set(self.names)) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"class table: names appear twice: {', '.join(twice)}; class names must be unique")
        if len(self.names) > MAX_CLASSES:
            raise ValueError(
                f"class table: {len(self.names)} classes, but an 8-bit mask holds at most {MAX_CLASSES} "
                "beside background (0) and ignore (255); merge or drop classes"
            )
        for stored, class_id in (self.mask_values or {}).items():
            if not 0 <= stored <= 255 or not (0 <= class_id <= len(self.names) or class_id == IGNORE):
                raise ValueError(
                    f"class table: mask value {stored} -> {class_id}; stored values are 0..255 and class ids "
                    f"0..{len(self.names)} or {IGNORE}"
                )

    @property
    def num_classes(self) -> int:
        """C, background not counted."""
        return len(self.names)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """(C + 1) RGB colours by class_id, background first."""
        return _colours(self.num_classes)

    def flat_palette(self) -> bytes:
        """768 bytes for an indexed PNG; IGNORE is a pale grey."""
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes + 1] = self.palette
        table[IGNORE] = (224, 224, 224)
        return table.tobytes()

    def index_of(self, name: str) -> int:
        """class_index of a name; ValueError names the classes there are."""
        try:
            return self.names.index(name)
        except ValueError:
            raise ValueError(f"unknown class {name!r}; the class table has: {', '.join(self.names)}") from None

    def mask_lut(self) -> np.ndarray:
        """(256,) int16: stored mask value -> class_id (0..C or 255), or -1 where the value is not in the table."""
        lut = np.full(256, -1, np.int16)
        if self.mask_values is None:
            lut[: self.num_classes + 1] = np.arange(self.num_classes + 1)
            lut[IGNORE] = IGNORE
        else:
            for stored, class_id in self.mask_values.items():
                lut[stored] = class_id
        return lut

    def to_json(self) -> str:
        values = None if self.mask_values is None else {str(k): v for k, v in sorted(self.mask_values.items())}
        table = {"names": list(self.names), "mask_values": values, "has_background": self.has_background}
        return json.dumps(table, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> ClassTable:
        data: dict[str, Any] = json.loads(text)
        values = data.get("mask_values")
        stored = None if values is None else {int(k): v for k, v in values.items()}
        return cls(tuple(data["names"]), stored, data.get("has_background", True))


def to_class_ids(class_indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """class_index 0..C-1 -> class_id 1..C (uint8)."""
    return (np.asarray(class_indices, np.int64) + 1).astype(np.uint8)


def multi_hot(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """(C,) float32 of 0 and 1 from a list of class_index."""
    target = np.zeros(num_classes, np.float32)
    target[np.asarray(labels, np.int64)] = 1.0
    return target
