"""Read and decode images a few ahead of their use; what cannot be read comes back as a BadRow."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.storage import MissingFileError, read_uri
from subcat_core.images import MAX_PIXELS, ImageError, decode_image


@dataclasses.dataclass(frozen=True)
class BadRow:
    """An image that could not be used, and why."""

    image_id: str
    uri: str
    reason: str


def iter_images(rows: pa.Table, num_threads: int = 4) -> Iterator[tuple[dict[str, Any], np.ndarray | BadRow]]:
    """Read and decode the images of a table with image_id and uri, in its order.

    Yields (row, image (H, W, 3) uint8 RGB), or (row, BadRow) where there is no file, or none that can be decoded
    (`read_image`). A small pool of threads works ahead by at most 2 * num_threads images, so memory does not grow with
    the table. Raises StorageError where the storage itself fails: that says nothing of the image.
    """
    waiting: collections.deque[tuple[dict[str, Any], Future]] = collections.deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="images")
    try:
        for batch in rows.to_batches(max_chunksize=256):
            for row in batch.to_pylist():
                waiting.append((row, pool.submit(read_image, row)))
                if len(waiting) >= 2 * num_threads:
                    row, future = waiting.popleft()
                    yield row, future.result()
        while waiting:
            row, future = waiting.popleft()
            yield row, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_image(row: dict[str, Any], usual_max: int = MAX_PIXELS) -> np.ndarray | BadRow:
    """The image of a row, or why it is bad; of at most usual_max pixels, but see `max_pixels`."""
    try:
        return decode_image(read_uri(row["uri"]), max_pixels(row, usual_max))
    except (MissingFileError, ImageError) as error:
        return BadRow(row["image_id"], row["uri"], " ".join(str(error).split()))


def max_pixels(row: dict[str, Any], usual_max: int = MAX_PIXELS) -> int:
    """Pixels that an image or mask of a row may have: usual_max, or more where the row's height_px and width_px say
    so, for then `prepare` has let it pass.
    """
    return max(usual_max, (row.get("height_px") or 0) * (row.get("width_px") or 0))
