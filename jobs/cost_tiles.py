"""What tiles will cost: cutting them, and which stages count tiles in place of images (legend: jobs/cost_stages.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.cost import MANIFEST_ROW_BYTES, CostAssumptions, DataCounts, StageCost
from jobs.pipeline import StagePlan

if TYPE_CHECKING:
    from jobs.config import Experiment

_TILE_BYTES_PER_PX = 2.2  # PNG at its fastest: 2.0 to 2.3 for GlaS
_ON_TILES = {
    "train_classifier",
    "make_cams",
    "extract_features",
    "cluster_features",
    "choose_round",
    "make_train_cams",
    "make_pseudo_masks",
}
_OF_SEGMENTER = {"train_segmenter", "train_supervised"}


def counts_in_tiles(experiment: Experiment, counts: DataCounts) -> dict[str, DataCounts]:
    """Stages that see tiles, and how many of what size; empty without prepare.tiles."""
    tiles = experiment.prepare.tiles
    if tiles is None:
        return {}
    stages = _ON_TILES | (_OF_SEGMENTER if experiment.prepare.segmenter_sees_tiles else set())
    return dict.fromkeys(stages, counts.of_tiles(tiles.tile_px, tiles.stride_px))


def cut_tiles(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    assert e.prepare.tiles is not None
    tiles = n.of_tiles(e.prepare.tiles.tile_px, e.prepare.tiles.stride_px)
    num_images, num_tiles = sum(n.num_images.values()), sum(tiles.num_images.values())
    num_masks = 0 if e.prepare.tiles.tags_from_masks_frac is None else sum(n.num_masks.values())
    written = num_tiles * (tiles.image_px * _TILE_BYTES_PER_PX + MANIFEST_ROW_BYTES)
    read_ns = n.image_px * (num_images * a.decode_ns_per_px + num_masks * a.png_ns_per_px)
    return StageCost(
        step,
        num_images,
        read_bytes=n.image_px * (num_images * a.image_bytes_per_px + num_masks * a.mask_bytes_per_px),
        written_bytes=written,
        kept_bytes=written,
        cpu_s=1e-9 * (read_ns + num_tiles * tiles.image_px * a.png_ns_per_px),
        what=f"{num_tiles:,} tiles, {num_tiles // max(num_images, 1)} an image, which the stages up to the masks count",
    )


def cut_supervised_masks(step: StagePlan, e: Experiment, n: DataCounts, a: CostAssumptions) -> StageCost:
    assert e.prepare.tiles is not None
    tiles = n.of_tiles(e.prepare.tiles.tile_px, e.prepare.tiles.stride_px)
    written = tiles.num_train * tiles.image_px * a.mask_bytes_per_px
    return StageCost(
        step,
        n.num_train,
        read_bytes=n.num_train * n.image_px * a.mask_bytes_per_px,
        written_bytes=written,
        kept_bytes=written,
        cpu_s=1e-9 * a.png_ns_per_px * (n.num_train * n.image_px + tiles.num_train * tiles.image_px),
        what=f"{tiles.num_train:,} tiles",
    )
