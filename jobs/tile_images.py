"""Tiles back to images: maps of tiles are put together to maps of their images, a band of rows at a time.

Tables of tiles hold the tiles of an image together, row by row from the top, as `cut_tiles` writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.image_reading import BadRow
from cluster.storage import MissingFileError
from subcat_core.images import ImageError
from subcat_core.metrics import ThresholdSweep
from subcat_core.tiles import Band, Stitcher

TILE_COLUMNS = ["parent_id", "x_px", "y_px"]


def is_of_scored_image(tiles: pa.Table, images: pa.Table) -> pa.ChunkedArray:
    """Whether a tile's image has ground truth, a bool a tile."""
    known = images.filter(images["mask_uri"].is_valid())["image_id"].combine_chunks()
    return pc.is_in(tiles["parent_id"], value_set=known)


def classes_by_image(tiles: pa.Table) -> dict[str, list[int]]:
    """parent_id -> class_index, ascending, of all tags of its tiles."""
    found: dict[str, set[int]] = {}
    for parent_id, labels in zip(tiles["parent_id"].to_pylist(), tiles["labels"].to_pylist(), strict=True):
        found.setdefault(parent_id, set()).update(labels or [])
    return {parent_id: sorted(labels) for parent_id, labels in found.items()}


def spread_channels(maps: np.ndarray, of: Sequence[int], into: Sequence[int]) -> np.ndarray:
    """(n, h, w) maps of the classes `of` -> (m, h, w) of the classes `into`, zero for those a tile does not have."""
    row_of = {value: row for row, value in enumerate(into)}
    result = np.zeros((len(into), *maps.shape[1:]), np.float32)
    result[[row_of[value] for value in of]] = maps
    return result


class TileScorer:
    """Scores maps of tiles on whole images: every pixel once, by the mean over the tiles that cover it.

    A class that a tile is not tagged with counts there as 0. Images without ground truth or without any tag are passed
    over; so are those of which a tile is missing (`drop`), and one whose ground truth cannot be read is told in `bad`.
    Holds one image's ground truth and one row of tiles.
    """

    def __init__(
        self,
        tiles: pa.Table,
        images: pa.Table,
        read_truth: Callable[[dict[str, Any]], np.ndarray],
        sweeps: Mapping[str, ThresholdSweep],
    ) -> None:
        """sweeps: name -> what the images' counts are added to, once an image is whole."""
        self.num_scored = 0
        self.bad: list[BadRow] = []
        self._images = {row["image_id"]: row for row in images.to_pylist()}
        self._classes = classes_by_image(tiles)
        self._read_truth = read_truth
        self._totals = dict(sweeps)
        self._dropped: set[str] = set()
        self._open: _OpenImage | None = None

    def add(self, row: dict[str, Any], class_indices: Sequence[int], maps: Mapping[str, np.ndarray]) -> None:
        """A tile's manifest row, its n classes, and (n, h, w) maps at its own size under each sweep's name."""
        parent_id = row["parent_id"]
        if parent_id in self._dropped:
            return
        if self._open is None or self._open.parent_id != parent_id:
            self.finish()
            self._open = self._begin(parent_id)
        if self._open is not None:
            self._open.add(row["y_px"], row["x_px"], class_indices, maps)

    def drop(self, parent_id: str) -> None:
        """Leave an image out: one of its tiles could not be read."""
        self._dropped.add(parent_id)

    def finish(self) -> None:
        """Count the image whose tiles were added last."""
        current, self._open = self._open, None
        if current is None or current.parent_id in self._dropped:
            return
        current.finish()
        for name, total in self._totals.items():
            total.merge(current.sweeps[name])
        self.num_scored += 1

    def _begin(self, parent_id: str) -> _OpenImage | None:
        row, classes = self._images.get(parent_id), self._classes[parent_id]
        if row is None or not row["mask_uri"] or not classes or parent_id in self._dropped:
            return None
        try:
            truth = self._read_truth(row)
            if truth.shape != (row["height_px"], row["width_px"]):
                raise ImageError(f"mask of {truth.shape} px, its image has {row['height_px']} x {row['width_px']}")
        except (ImageError, MissingFileError) as error:
            self.bad.append(BadRow(parent_id, row["mask_uri"], " ".join(str(error).split())))
            self._dropped.add(parent_id)  # its other tiles need not try
            return None
        sweeps = {name: ThresholdSweep(total.num_classes, total.thresholds) for name, total in self._totals.items()}
        return _OpenImage(parent_id, classes, truth, sweeps)


class _OpenImage:
    """The image whose tiles are coming in."""

    def __init__(
        self, parent_id: str, classes: list[int], truth: np.ndarray, sweeps: dict[str, ThresholdSweep]
    ) -> None:
        self.parent_id, self.sweeps = parent_id, sweeps
        self._classes, self._truth = classes, truth
        self._stitchers = {name: Stitcher(len(classes), *truth.shape) for name in sweeps}

    def add(self, y_px: int, x_px: int, of: Sequence[int], maps: Mapping[str, np.ndarray]) -> None:
        for name, stitcher in self._stitchers.items():
            self._count(name, stitcher.add(y_px, x_px, spread_channels(maps[name], of, self._classes)))

    def finish(self) -> None:
        for name, stitcher in self._stitchers.items():
            self._count(name, stitcher.finish())

    def _count(self, name: str, band: Band | None) -> None:
        if band is not None:
            self.sweeps[name].update(band.maps, self._classes, self._truth[band.rows])


@dataclasses.dataclass(frozen=True)
class ImageTiles:
    """One image and the rows of its tiles."""

    image: dict[str, Any]
    tiles: pa.Table


def by_image(tiles: pa.Table, images: pa.Table) -> Iterator[ImageTiles]:
    """Images that have tiles, in the order of their tiles, each with its tiles."""
    rows = {row["image_id"]: row for row in images.to_pylist()}
    parents = tiles["parent_id"].to_pylist()
    start = 0
    for end in range(1, len(parents) + 1):
        if end == len(parents) or parents[end] != parents[start]:
            if parents[start] in rows:
                yield ImageTiles(rows[parents[start]], tiles.slice(start, end - start))
            start = end
