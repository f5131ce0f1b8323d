"""The pictures of the report: which images are shown, and what their masks and CAMs look like at thumbnail size.

Only as many shards are read as it takes, one at a time, so that a run of ten million images has a report too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Storage, StorageError, read_uri
from jobs.cam_tables import read_cams
from jobs.cut_tiles import has_tiles, open_tiles
from jobs.manifest import Manifest
from jobs.report_numbers import read_optional
from jobs.tile_masks import maps_of_image
from subcat_core.cam import upsample_cam
from subcat_core.classes import BACKGROUND, IGNORE, ClassTable
from subcat_core.images import ImageError, decode_image, decode_mask
from subcat_core.overlays import cam_overlay, mask_overlay, thumbnail

_ROW_COLUMNS = ["image_id", "uri", "labels", "mask_uri"]
_MAX_CAMS = 2
_MAX_SHARDS = 8
_CAM_LEVEL = 0.15


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image that could be shown. made_uri: its pseudo mask or prediction. score: IoU with the ground truth where
    there is one, else the mask's confidence; 0..1."""

    kind: str
    shard: str
    image_id: str
    uri: str
    labels: tuple[int, ...]
    truth_uri: str | None
    made_uri: str
    score: float
    is_iou: bool


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of an example; image (H, W, 3) uint8, or None where there is nothing to show."""

    caption: str
    image: np.ndarray | None
    is_photo: bool = True


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with its panels: columns of one or more pictures each."""

    candidate: Candidate
    is_worst: bool
    columns: list[list[Panel]]


class PictureReader:
    """Reads the pictures of one run. side_px: long side of each panel."""

    def __init__(self, storage: Storage, manifest: Manifest, side_px: int) -> None:
        self._storage = storage
        self._manifest = manifest
        self._classes = manifest.classes
        self._side_px = side_px
        self._truth_lut = manifest.classes.mask_lut()
        self._made_lut = ClassTable(manifest.classes.names).mask_lut()
        choice = read_optional(storage, "choice/choice.json") or {}
        self._cam_folders = {choice.get("round_index"): "cams"}
        """Of the chosen round, whose maps of the whole train split lie in a folder of their own."""

    def candidates(self, kind: str, limit: int) -> list[Candidate]:
        """At most `limit` images of `pseudo_masks` or `predictions`, from shards spread evenly over the run; scored."""
        shards = self._spread_shards(kind)
        share = -(-limit // max(1, len(shards)))
        rows: list[tuple[str, dict[str, Any]]] = []
        for name in shards:
            joined = list(self._joined(kind, name))
            rows += [(name, row) for row in joined[:: max(1, -(-len(joined) // share))]]
        scored = (self._scored(kind, name, row) for name, row in rows[:limit])
        return [candidate for candidate in scored if candidate is not None]

    def _spread_shards(self, kind: str) -> list[str]:
        """A few shards of the splits that the stage made masks of; those with ground truth if there are any.

        Spread, since manifests are often sorted by class.
        """
        by_split = {split: self._manifest.shard_names(split) for split in self._manifest.splits}
        made = [s for s, names in by_split.items() if names and self._storage.exists(f"{kind}/{names[0]}.parquet")]
        scored = [name for split in made for name in self._manifest.shard_names(split, with_masks=True)]
        names = scored or [name for split in made for name in by_split[split]]
        picked = np.linspace(0, len(names) - 1, min(len(names), _MAX_SHARDS)).round().astype(int)
        return [names[index] for index in picked]

    def example(self, candidate: Candidate, rounds: Sequence[int], is_worst: bool) -> Example | None:
        """The panels of a candidate; None where its image cannot be read."""
        try:
            picture = thumbnail(decode_image(read_uri(candidate.uri)), self._side_px)
        except (ImageError, StorageError):
            return None
        columns = [[Panel("image", picture)]]
        columns += [self._cam_panels(candidate, picture, index) for index in rounds]
        for kind, caption in (("pseudo_masks", "pseudo mask"), ("predictions", "prediction")):
            made_uri = candidate.made_uri if kind == candidate.kind else self._made_uri(kind, candidate)
            columns.append([self._mask_panel(caption, made_uri, picture, self._made_lut)])
        columns.append([self._mask_panel("ground truth", candidate.truth_uri, picture, self._truth_lut)])
        return Example(candidate, is_worst, columns)

    def _joined(self, kind: str, name: str) -> Iterator[dict[str, Any]]:
        """Manifest rows of a shard with the made mask's uri and confidence; none where the shard has no masks made."""
        try:
            made = self._storage.read_table(f"{kind}/{name}.parquet", columns=["image_id", "mask_uri", "confidence"])
        except FileNotFoundError:
            return
        of = {row["image_id"]: row for row in made.to_pylist()}
        for row in self._storage.read_table(f"manifest/{name}.parquet", columns=_ROW_COLUMNS).to_pylist():
            if row["image_id"] in of:
                found = of[row["image_id"]]
                yield {**row, "made_uri": found["mask_uri"], "confidence": found["confidence"]}

    def _scored(self, kind: str, shard: str, row: dict[str, Any]) -> Candidate | None:
        score, is_iou = float(row["confidence"] or 0.0), False
        if row["mask_uri"]:
            try:
                made = decode_mask(read_uri(row["made_uri"]), self._made_lut)
                score, is_iou = image_iou(made, decode_mask(read_uri(row["mask_uri"]), self._truth_lut)), True
            except (ImageError, StorageError, ValueError):
                return None
        labels = tuple(row["labels"] or ())
        image_id, uri, truth_uri = row["image_id"], row["uri"], row["mask_uri"]
        return Candidate(kind, shard, image_id, uri, labels, truth_uri, row["made_uri"], score, is_iou)

    def _made_uri(self, kind: str, candidate: Candidate) -> str | None:
        uris = [row["made_uri"] for row in self._joined(kind, candidate.shard) if row["image_id"] == candidate.image_id]
        return uris[0] if uris else None

    def _cam_panels(self, candidate: Candidate, picture: np.ndarray, round_index: int) -> list[Panel]:
        """The maps of an image in one round, a panel a class."""
        caption = f"CAM, round {round_index}"
        found: tuple[list[int], np.ndarray] | None = None
        for folder in (f"rounds/{round_index:02d}/cams", self._cam_folders.get(round_index)):
            with contextlib.suppress(FileNotFoundError):
                if folder and found is None:
                    found = self._maps(self._storage.read_table(f"{folder}/{candidate.shard}.parquet"), candidate)
        if found is None or not found[0]:
            return [Panel(caption, None)]
        maps = upsample_cam(found[1].astype(np.float32), *picture.shape[:2])
        names = [self._classes.names[index] for index in found[0]]
        shown = list(zip(names, maps, strict=True))[:_MAX_CAMS]
        return [
            Panel(f"{caption} · {name}" if len(names) > 1 else caption, cam_overlay(picture, cam, level=_CAM_LEVEL))
            for name, cam in shown
        ]

    def _maps(self, cams: pa.Table, candidate: Candidate) -> tuple[list[int], np.ndarray] | None:
        """Class indices and maps (n, h, w) of an image, put together where it was cut into tiles; None without maps."""
        if has_tiles(self._storage):
            tiles = open_tiles(self._storage).folder.read_table(f"{candidate.shard}.parquet")
            return maps_of_image(tiles.filter(pc.equal(tiles["parent_id"], candidate.image_id)), cams)
        return read_cams(cams.filter(pc.equal(cams["image_id"], candidate.image_id))).get(candidate.image_id)

    def _mask_panel(self, caption: str, uri: str | None, picture: np.ndarray, lut: np.ndarray) -> Panel:
        if not uri:
            return Panel(caption, None)
        try:
            mask = thumbnail(decode_mask(read_uri(uri), lut), self._side_px)
            return Panel(caption, mask_overlay(picture, mask, self._classes.palette, 0.62))
        except (ImageError, StorageError, ValueError):
            return Panel(caption, None)


def image_iou(made: np.ndarray, truth: np.ndarray) -> float:
    """Mean IoU of one image over the foreground classes in either mask; pixels of IGNORE in the truth are skipped.

    made, truth: (H, W) uint8 class ids; IGNORE in `made` counts as background. 1.0 where both hold background alone.
    Raises ValueError where the sizes differ.
    """
    if made.shape != truth.shape:
        raise ValueError(f"image_iou: masks of {made.shape} and {truth.shape}; both must be of the image's size")
    counted = truth != IGNORE
    ours = np.where(made == IGNORE, BACKGROUND, made)[counted]
    theirs = truth[counted]
    ids = [value for value in np.union1d(ours, theirs) if value != BACKGROUND]
    if not ids:
        return 1.0
    shares = [
        np.sum((ours == value) & (theirs == value)) / np.sum((ours == value) | (theirs == value)) for value in ids
    ]
    return float(np.mean(shares))


def choose(
    candidates: Sequence[Candidate], num_shown: int, num_worst: int, num_classes: int
) -> list[tuple[Candidate, bool]]:
    """The same images every time: the worst ones, and medians taken class by class. Returns (candidate, is_worst).

    Worst: lowest score, among the images with ground truth where there are any.
    """
    ranked = sorted(candidates, key=lambda c: (not c.is_iou, c.score, c.image_id))
    worst = ranked[: min(num_worst, num_shown)]
    taken = {candidate.image_id for candidate in worst}
    pools = [[c for c in ranked if index in c.labels] for index in range(num_classes)] or [ranked]
    if not any(pools):
        pools = [list(ranked)]
    typical: list[Candidate] = []
    while len(typical) + len(worst) < num_shown:
        before = len(typical)
        for pool in pools:
            left = [c for c in pool if c.image_id not in taken]
            if left and len(typical) + len(worst) < num_shown:
                middle = left[len(left) // 2]
                typical.append(middle)
                taken.add(middle.image_id)
        if len(typical) == before:
            break
    return [(c, False) for c in typical] + [(c, True) for c in worst]
