"""The worker that reads the images and masks of a shard, for `prepare` and `validate`: sizes, and what is wrong."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cluster.storage import MissingFileError, Storage, read_uri
from cluster.streams import BadRow, ShardOutput
from jobs.importers import problems
from jobs.importers.coco_masks import Drawing
from jobs.importers.problems import Problem
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import (
    MAX_PIXELS,
    ImageError,
    MaskValueError,
    decode_image,
    decode_mask,
    encode_mask,
    read_size,
)

_THREADS = 4

CheckMode = Literal["full", "header", "exists"]


class CheckWorker:
    """One actor: reads the images and masks of a shard, fills in their sizes, and tells which are bad and why.

    mode: "exists" asks only whether the files are there. masks: where masks drawn from outlines go; None draws none.
    Its table has schemas.MANIFEST, good rows only; reasons start with the rule; stats: class_counts (C), num_masks,
    digest of the rows, and places (file, row) of the bad ones.
    """

    def __init__(
        self,
        *,
        classes: ClassTable,
        mode: CheckMode,
        masks: Storage | None = None,
        max_pixels: int = MAX_PIXELS,
        num_threads: int = _THREADS,
    ) -> None:
        self.num_classes = classes.num_classes
        self.lut = classes.mask_lut()
        self.palette = classes.flat_palette()
        self.mode = mode
        self.masks = masks
        self.max_pixels = max_pixels
        self.num_threads = num_threads

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        rows = inputs["raw"].to_pylist()
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="check") as pool:
            sizes = list(pool.map(self._size_or_problem, rows))
        kept, bad, places = [], [], []
        for row, size in zip(rows, sizes, strict=True):
            if isinstance(size, Problem):
                bad.append(BadRow(row["image_id"], row["uri"], f"{size.rule}: {size.message}"))
                places.append([row["file"], row["row"]])
            else:
                kept.append({**row, "height_px": size[0], "width_px": size[1]})
        labels = [index for row in kept for index in row["labels"]]
        table = pa.Table.from_pylist(kept, schemas.MANIFEST)
        stats = {
            "class_counts": np.bincount(np.asarray(labels, np.int64), minlength=self.num_classes).tolist(),
            "num_masks": table.num_rows - table["mask_uri"].null_count,
            "digest": hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest(),
            "places": places,
        }
        return ShardOutput(table, bad=bad, stats=stats, num_rows=table.num_rows)

    def _size_or_problem(self, row: dict[str, Any]) -> tuple[int | None, int | None] | Problem:
        """(height, width) of the image, or the first thing that is wrong with its files; draws its mask.

        StorageError where the storage itself fails: that says nothing of the image.
        """
        if self.mode == "exists":
            for uri in filter(None, (row["uri"], row["mask_uri"])):
                if not Storage(uri).exists(""):
                    return Problem(problems.MISSING_FILE, f"{uri}: no such file")
            return None, None
        try:
            data = read_uri(row["uri"])
            header = self.mode == "header"
            size = read_size(data, self.max_pixels) if header else decode_image(data, self.max_pixels).shape[:2]
        except MissingFileError as error:
            return Problem(problems.MISSING_FILE, str(error))
        except ImageError as error:
            return Problem(problems.BAD_IMAGE, f"{row['uri']}: {error}")
        problem = self._mask_problem(row["mask_uri"], size) if row["mask_uri"] else None
        if row.get("drawing"):
            problem = self._draw_mask(row, size)
        return problem or (size[0], size[1])

    def _draw_mask(self, row: dict[str, Any], size: tuple[int, ...]) -> Problem | None:
        """Fills in mask_uri. A shard that is done again writes the same files again."""
        drawing = Drawing.from_json(row["drawing"])
        if (drawing.height, drawing.width) != tuple(size):
            listed = f"{row['file']} says {drawing.height} x {drawing.width} px"
            return Problem(problems.MASK_SIZE, f"{row['uri']}: {listed}, the image has {size[0]} x {size[1]}")
        if self.masks is not None:
            name = f"{row['image_id']}.png"
            self.masks.write_bytes(name, encode_mask(drawing.render(), self.palette))
            row["mask_uri"] = self.masks.uri(name)
        return None

    def _mask_problem(self, uri: str, size: tuple[int, ...]) -> Problem | None:
        try:
            data = read_uri(uri)
            mask_size = read_size(data, self.max_pixels)
            if mask_size != tuple(size):
                message = f"{uri}: the mask has {mask_size[0]} x {mask_size[1]} px, its image {size[0]} x {size[1]}"
                return Problem(problems.MASK_SIZE, message)
            if self.mode == "full":
                decode_mask(data, self.lut, self.max_pixels)
        except MissingFileError as error:
            return Problem(problems.MISSING_FILE, str(error))
        except MaskValueError as error:
            return Problem(problems.MASK_VALUES, f"{uri}: {error}")
        except ImageError as error:
            return Problem(problems.BAD_MASK, f"{uri}: {error}")
        return None
