"""Pseudo masks of whole images from the maps of their tiles: what `make_pseudo_masks` runs where images were cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Storage
from cluster.streams import BadRow, ShardOutput, iter_images
from jobs.cam_tables import read_cams
from jobs.tile_images import ImageTiles, by_image, classes_by_image, spread_channels
from jobs.training_masks import MaskShard, encode_confidence, tile_confidence_name, tile_mask_name
from subcat_core.cam import upsample_cam
from subcat_core.classes import BACKGROUND, ClassTable, to_class_ids
from subcat_core.images import ImageError, encode_mask
from subcat_core.pseudo_mask import PseudoMask, PseudoMaskSettings, class_probability, mask_of_probability
from subcat_core.tiles import stitch

Cams = dict[str, tuple[list[int], np.ndarray]]


class TileMaskWorker:
    """One actor: turns the CAMs of a shard of tiles into PNG files of whole images and their index.

    In each tile its tagged classes compete, with background where there is one, and the CRF sees the tile; the classes'
    probabilities are averaged where tiles overlap, and the largest one is the mask. cut: also write the mask of every
    tile, for a segmenter that trains on tiles. An image one of whose tiles cannot be used is bad as a whole.
    """

    def __init__(
        self,
        *,
        output: Storage,
        classes: ClassTable,
        settings: PseudoMaskSettings,
        cut: bool,
        write_confidence: bool = False,
    ) -> None:
        self.output = output
        self.classes = classes
        self.settings = settings
        self.cut = cut
        self.write_confidence = write_confidence

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        cams = read_cams(inputs["cams"])
        classes_of = classes_by_image(inputs["manifest"])
        shard = MaskShard(self.output, self.classes, write_confidence=self.write_confidence)
        for group in by_image(inputs["manifest"], inputs["images"]):
            row = group.image
            try:
                pseudo = self._stitched(group, cams, classes_of[row["image_id"]])
            except ImageError as error:
                shard.bad.append(BadRow(row["image_id"], row["uri"], str(error)))
                continue
            shard.write(row["image_id"], pseudo)
            if self.cut:
                self._write_tiles(group, pseudo)
            shard.score(row, {"confusion": pseudo.labels})
        return shard.result()

    def _stitched(self, group: ImageTiles, cams: Cams, classes: list[int]) -> PseudoMask:
        """The pseudo mask of an image. Raises ImageError where a tile has no CAM or cannot be read."""
        height, width = group.image["height_px"], group.image["width_px"]
        background = [BACKGROUND] if self.classes.has_background else []
        ids = np.array([*background, *to_class_ids(classes)], np.uint8)
        labels, chosen = np.zeros((height, width), np.uint8), np.zeros((height, width), np.float32)
        if len(ids):
            for band in stitch(self._probabilities(group, cams, ids), len(ids), height, width):
                labels[band.rows], chosen[band.rows] = ids[band.maps.argmax(axis=0)], band.maps.max(axis=0)
        return mask_of_probability(labels, chosen, self.settings, has_background=self.classes.has_background)

    def _probabilities(self, group: ImageTiles, cams: Cams, ids: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(y, x, (L, h, w) probabilities of the class ids) of every tile."""
        for tile, image in iter_images(group.tiles):
            if isinstance(image, BadRow):
                raise ImageError(f"its tile {image.image_id}: {image.reason}")
            if tile["image_id"] not in cams:
                raise ImageError(f"no CAM was made for its tile {tile['image_id']}; see make_cams")
            present, cam = cams[tile["image_id"]]
            found, probability = class_probability(
                cam.astype(np.float32), present, image, self.settings, has_background=self.classes.has_background
            )
            yield tile["y_px"], tile["x_px"], spread_channels(probability, found.tolist(), ids.tolist())

    def _write_tiles(self, group: ImageTiles, pseudo: PseudoMask) -> None:
        """The PNG of every tile of an image, and of its confidence where asked for."""
        for tile in group.tiles.to_pylist():
            y, x, tile_id = tile["y_px"], tile["x_px"], tile["image_id"]
            part = slice(y, y + tile["height_px"]), slice(x, x + tile["width_px"])
            self.output.write_bytes(
                tile_mask_name(tile_id), encode_mask(pseudo.mask[part], self.classes.flat_palette())
            )
            if self.write_confidence:
                self.output.write_bytes(tile_confidence_name(tile_id), encode_confidence(pseudo.chosen[part]))


def maps_of_image(tiles: pa.Table, cams: pa.Table) -> tuple[list[int], np.ndarray] | None:
    """One image's CAMs from those of its tiles: class indices, (n, H, W) float32; None where a tile has none.

    tiles: the manifest rows of all its tiles. cams: the CAM table of their shard. Holds the maps at the image's size.
    """
    of_tile = read_cams(cams.filter(pc.is_in(cams["image_id"], value_set=tiles["image_id"].combine_chunks())))
    if not tiles.num_rows or len(of_tile) < tiles.num_rows:
        return None
    rows = tiles.to_pylist()
    classes = sorted({index for row in rows for index in row["labels"] or []})
    height, width = (
        max(row[at] + row[side] for row in rows) for at, side in (("y_px", "height_px"), ("x_px", "width_px"))
    )

    def maps() -> Iterator[tuple[int, int, np.ndarray]]:
        for row in rows:
            present, cam = of_tile[row["image_id"]]
            cam = upsample_cam(cam.astype(np.float32), row["height_px"], row["width_px"])
            yield row["y_px"], row["x_px"], spread_channels(cam, present, classes)

    bands = [band.maps for band in stitch(maps(), len(classes), height, width)]
    return classes, np.concatenate(bands, axis=1)
