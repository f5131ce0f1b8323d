"""The embedded data set of `subcat demo`: drawn from a seed, the same bytes every time, with exact masks.

Six parent classes (bear, duck, fox, frog, owl, rabbit), told apart by a small head alone. Bodies are large and plain:
six looks (shape and colour), each worn by three classes, and three looks a class. So a plain CAM has reason to stop at
the head, and a class has three sub-categories to be found by its bodies. Each class has a home (the duck water, the
fox snow, ...), where 70 % of its pictures are taken, so backgrounds occur together with classes. A third of the
pictures hold two or three classes.

It shows that the whole way works, from tags to masks, and how CAMs, sub-categories and pseudo masks look. It cannot
show how well the method does on photographs: there is no clutter, blur, occlusion by other things or variety of view,
every mask is exact, and looks are as many and as separate as they were drawn. Numbers on it compare with nothing but
other runs on it.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from pathlib import Path

import numpy as np

from jobs.demo_creatures import LOOKS, REACH, draw_creature, draw_place
from jobs.demo_shapes import Pen
from subcat_core.classes import ClassTable

CLASSES = ("bear", "duck", "fox", "frog", "owl", "rabbit")
HOMES = ("rocks", "water", "snow", "marsh", "night", "meadow")
HOME_FRAC = 0.7
NUM_TRAIN = 360
NUM_VAL = 90
HEIGHT_PX = 128
WIDTHS_PX = (128, 160, 224)
"""By the number of creatures."""
_VERSION = 1
_COMPLETE = "dataset.json"
_MAX_STORED = 65535


@dataclasses.dataclass(frozen=True)
class DemoImage:
    """What one picture holds. creatures: (class_index, look), back to front; place: name of the background."""

    image_id: str
    split: str
    place: str
    creatures: tuple[tuple[int, int], ...]

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(sorted({class_index for class_index, _ in self.creatures}))


def looks_of(class_index: int) -> tuple[int, int, int]:
    """The three looks of a class; each look has three classes."""
    return (class_index, (class_index + 1) % len(LOOKS), (class_index + 3) % len(LOOKS))


def plan_demo_dataset(rng_seed: int = 0, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> list[DemoImage]:
    """What each picture holds: classes in turn, looks in turn, so that every one occurs equally often."""
    rng = np.random.default_rng([rng_seed, 0])
    images = []
    for index in range(num_train + num_val):
        first = index % len(CLASSES)
        num_creatures = 1 if index // len(CLASSES) % 3 else int(rng.integers(2, 4))
        others = [int(other) for other in rng.permutation(len(CLASSES)) if other != first][: num_creatures - 1]
        looks = [looks_of(first)[index // len(CLASSES) // 3 % 3]]
        looks += [looks_of(other)[int(rng.integers(3))] for other in others]
        at_home = rng.random() < HOME_FRAC
        place = HOMES[first] if at_home else HOMES[int(rng.integers(len(HOMES)))]
        creatures = tuple(zip([first, *others], looks, strict=True))
        split = "train" if index < num_train else "val"
        images.append(DemoImage(f"demo-{index:04d}", split, place, creatures))
    return images


def draw_demo_image(plan: DemoImage, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """image (H, W, 3) uint8 RGB, mask (H, W) uint8 class ids. H is HEIGHT_PX, W of WIDTHS_PX."""
    num_creatures = len(plan.creatures)
    width = WIDTHS_PX[num_creatures - 1]
    canvas = draw_place(plan.place, rng, HEIGHT_PX, width)
    mask = np.zeros((HEIGHT_PX, width), np.uint8)
    slots = rng.permutation(num_creatures)
    for (class_index, look), slot in zip(plan.creatures, slots, strict=True):
        unit_px = float(rng.uniform(0.92, 1.22) if num_creatures == 1 else rng.uniform(0.7, 0.86))
        centre_x = (int(slot) + 0.5) * width / num_creatures + float(rng.uniform(-7, 7))
        reach_px = min(REACH[LOOKS[look][0]] * unit_px, width / 2)  # heads stay in the picture
        centre_x = min(max(centre_x, reach_px), width - reach_px)
        centre_y = HEIGHT_PX * 0.6 + float(rng.uniform(-6, 10))
        shadow = Pen.on(canvas, (centre_x, centre_y), unit_px)
        shadow.ellipse(0, 36, 34, 5, (canvas.mean() * 0.6,) * 3)
        pen = Pen.on(canvas, (centre_x, centre_y), unit_px, float(rng.uniform(-9, 9)), bool(rng.random() < 0.5))
        draw_creature(pen, CLASSES[class_index], look)
        mask[pen.covered] = class_index + 1
    canvas += rng.uniform(-4.0, 4.0, canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), mask


def write_demo_dataset(folder: Path, rng_seed: int = 0, *, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> Path:
    """Write images/, masks/ and labels.csv (for the table importer); returns the path of labels.csv.

    Nothing is done where the same data set is whole already. PNG files are stored, not compressed, so that their bytes
    do not depend on the version of a compressor.
    """
    wanted = {"version": _VERSION, "rng_seed": rng_seed, "num_train": num_train, "num_val": num_val}
    complete, table = folder / _COMPLETE, folder / "labels.csv"
    if complete.exists() and table.exists() and json.loads(complete.read_text()) == wanted:
        return table
    complete.unlink(missing_ok=True)
    palette = ClassTable(CLASSES).flat_palette()
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = ["image_id,image,labels,split,mask"]
    for index, plan in enumerate(plan_demo_dataset(rng_seed, num_train, num_val)):
        image, mask = draw_demo_image(plan, np.random.default_rng([rng_seed, 1, index]))
        files = f"images/{plan.image_id}.png", f"masks/{plan.image_id}.png"
        (folder / files[0]).write_bytes(stored_png(image))
        (folder / files[1]).write_bytes(stored_png(mask, palette))
        names = ";".join(CLASSES[class_index] for class_index in plan.labels)
        lines.append(f"{plan.image_id},{files[0]},{names},{plan.split},{files[1]}")
    table.write_text("\n".join(lines) + "\n")
    complete.write_text(json.dumps(wanted))
    return table


def stored_png(pixels: np.ndarray, palette: bytes | None = None) -> bytes:
    """PNG of (H, W, 3) uint8 RGB, or of (H, W) uint8 indices with a palette (768 bytes), without compression.

    The zlib stream has stored blocks only (RFC 1951, section 3.2.4), so the bytes follow from the pixels alone.
    """
    height, width = pixels.shape[:2]
    rows = np.zeros((height, pixels[0].size + 1), np.uint8)  # the first byte of a row: filter 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    blocks = [raw[start : start + _MAX_STORED] for start in range(0, len(raw), _MAX_STORED)]
    stream = b"\x78\x01" + b"".join(
        struct.pack("<BHH", index == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for index, block in enumerate(blocks)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if palette is None else 3, 0, 0, 0)
    parts = [(b"IHDR", header), *([] if palette is None else [(b"PLTE", palette)])]
    parts += [(b"IDAT", stream + struct.pack(">I", zlib.adler32(raw))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
