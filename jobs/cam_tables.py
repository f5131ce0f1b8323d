"""What stages read of a manifest row and of a CAM table: the columns, the ground truth, the maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.image_reading import max_pixels
from cluster.storage import read_uri
from subcat_core.classes import ClassTable
from subcat_core.images import decode_mask

COLUMNS = ["image_id", "uri", "height_px", "width_px", "labels", "mask_uri"]
"""Of the manifest, as stages that look at images and at their ground truth read it."""


def read_truth(row: dict[str, Any], classes: ClassTable) -> np.ndarray:
    """(H, W) uint8 class ids of a manifest row's ground truth. Raises ImageError or StorageError."""
    return decode_mask(read_uri(row["mask_uri"]), classes.mask_lut(), max_pixels(row))


def read_cams(table: pa.Table) -> dict[str, tuple[list[int], np.ndarray]]:
    """image_id -> (class_indices, maps (n, h, w) float16) of a CAM table; the maps are views, not copies."""
    column = table["cam"].combine_chunks()
    values, ends = column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())
    cams = {}
    for row, end in zip(table.drop_columns(["cam"]).to_pylist(), ends, strict=True):
        shape = (len(row["class_indices"]), row["cam_height"], row["cam_width"])
        cams[row["image_id"]] = (row["class_indices"], values[end - math.prod(shape) : end].reshape(shape))
    return cams
