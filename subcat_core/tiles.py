"""Large images in tiles: where tiles lie, which classes a tile shows, and how maps of tiles become one map again."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from subcat_core.classes import MAX_CLASSES


def tile_starts(length_px: int, tile_px: int, stride_px: int) -> list[int]:
    """Where tiles begin along a side of length_px: every stride_px, and a last one flush with the end.

    A side that is no longer than a tile has one tile, at 0, as long as the side. Raises ValueError for a stride that
    is longer than a tile, which would leave gaps.
    """
    if length_px < 1 or not 1 <= stride_px <= tile_px:
        raise ValueError(
            f"tiles of {tile_px} px at stride {stride_px} px along {length_px} px; expected a stride of 1 to "
            f"{tile_px} px and at least one pixel: a longer stride would leave gaps"
        )
    last = max(0, length_px - tile_px)
    starts = list(range(0, last + 1, stride_px))
    return starts if starts[-1] == last else [*starts, last]


def tile_grid(height_px: int, width_px: int, tile_px: int, stride_px: int) -> list[tuple[int, int]]:
    """(y, x) of every tile's upper left pixel, row by row from the top: 117 tiles for 522 x 775 px at 112 and 56."""
    columns = tile_starts(width_px, tile_px, stride_px)
    return [(y, x) for y in tile_starts(height_px, tile_px, stride_px) for x in columns]


def tile_labels(mask: np.ndarray, num_classes: int, min_frac: float) -> list[int]:
    """class_index, ascending, of the classes that cover more than min_frac of a tile's pixels.

    mask: (h, w) uint8 class ids. Pixels of background and of IGNORE count as pixels of the tile and give no class.
    """
    if mask.dtype != np.uint8 or not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"tile labels: got a mask of {mask.dtype} and {num_classes} classes; expected uint8, 1..254")
    counts = np.bincount(mask.ravel(), minlength=num_classes + 1)[1 : num_classes + 1]
    return [int(index) for index in np.flatnonzero(counts > min_frac * mask.size)]


def encode_tile(image: np.ndarray) -> bytes:
    """Lossless PNG of (h, w, 3) uint8, written fast: a tile is read many times and kept for one run."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Band:
    """Finished rows of an image: maps (n, rows, W) float32, from row `top_px` on."""

    top_px: int
    maps: np.ndarray

    @property
    def rows(self) -> slice:
        """The rows of the image that the band holds."""
        return slice(self.top_px, self.top_px + self.maps.shape[1])


class Stitcher:
    """Puts maps of overlapping tiles together: every pixel is the mean over the tiles that cover it.

    Tiles come row by row, as `tile_grid` lists them. Rows that no later tile can reach are handed out at once, so it
    holds n maps of one tile's height and the image's width in float32, however high the image is.
    """

    def __init__(self, num_maps: int, height_px: int, width_px: int) -> None:
        self.height_px = height_px
        self._top_px = 0  # the first row that is still held
        self._sums = np.zeros((num_maps, 0, width_px), np.float32)
        self._counts = np.zeros((0, width_px), np.int32)

    def add(self, y_px: int, x_px: int, maps: np.ndarray) -> Band | None:
        """Take a tile's maps (n, h, w); returns the rows above it, which are finished now, or None.

        Raises ValueError for a tile that leaves the image, lies above an earlier one or leaves pixels out.
        """
        num_maps, _, width_px = self._sums.shape
        if maps.ndim != 3 or len(maps) != num_maps:
            raise ValueError(f"tile at y = {y_px}, x = {x_px}: got maps of {maps.shape}, expected ({num_maps}, h, w)")
        bottom_px, right_px = y_px + maps.shape[1], x_px + maps.shape[2]
        if y_px < 0 or x_px < 0 or bottom_px > self.height_px or right_px > width_px:
            raise ValueError(
                f"tile of {maps.shape[1]} x {maps.shape[2]} px at y = {y_px}, x = {x_px} leaves the image of "
                f"{self.height_px} x {width_px} px"
            )
        if y_px < self._top_px:
            raise ValueError(f"tile at y = {y_px} after rows above {self._top_px} were finished; give tiles row by row")
        band = self._take(y_px) if y_px > self._top_px else None
        missing = bottom_px - self._top_px - len(self._counts)
        if missing > 0:
            self._sums = np.concatenate([self._sums, np.zeros((num_maps, missing, width_px), np.float32)], axis=1)
            self._counts = np.concatenate([self._counts, np.zeros((missing, width_px), np.int32)])
        rows = slice(y_px - self._top_px, bottom_px - self._top_px)
        self._sums[:, rows, x_px:right_px] += maps
        self._counts[rows, x_px:right_px] += 1
        return band

    def finish(self) -> Band:
        """The rows that are left, after the last tile. Raises ValueError where tiles are missing."""
        return self._take(self.height_px)

    def _take(self, end_px: int) -> Band:
        """Hand out the rows above end_px."""
        num_rows = end_px - self._top_px
        sums, counts = self._sums[:, :num_rows], self._counts[:num_rows]
        if len(counts) < num_rows or (counts == 0).any():
            row = self._top_px + (int(np.argmin(counts.min(axis=1))) if (counts == 0).any() else len(counts))
            raise ValueError(f"row {row} of the image has pixels that no tile covers; a tile is missing")
        band = Band(self._top_px, sums / counts.astype(np.float32))
        self._sums, self._counts = self._sums[:, num_rows:], self._counts[num_rows:]
        self._top_px = end_px
        return band


def stitch(
    tiles: Iterable[tuple[int, int, np.ndarray]], num_maps: int, height_px: int, width_px: int
) -> Iterator[Band]:
    """Bands of an image from the top to the bottom, from (y, x, maps (n, h, w)) of all its tiles, row by row."""
    stitcher = Stitcher(num_maps, height_px, width_px)
    for y_px, x_px, maps in tiles:
        band = stitcher.add(y_px, x_px, maps)
        if band is not None:
            yield band
    yield stitcher.finish()
