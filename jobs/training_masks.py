"""Masks that train the segmenter, whatever they are made of: how a worker writes them, how a stage scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact
from cluster.storage import MissingFileError, Storage
from cluster.streams import BadRow, ShardOutput, ShardSummary
from cluster.tracking import ChildRun
from jobs.cam_tables import read_truth
from jobs.context import stream_stats
from jobs.joins import with_column
from jobs.manifest import Manifest
from jobs.protocol import Protocol
from jobs.scoring import SplitConfusions, baseline_scores, confusion_scores
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import ImageError, encode_mask
from subcat_core.metrics import ConfusionMatrix
from subcat_core.pseudo_mask import PseudoMask, confidence_levels

CONFUSIONS = {"confusion": "", "confusion_before_walk": "before_walk", "confusion_before_crf": "before_crf"}
"""Matrices that a shard may have, and where their scores stand in scores.json below the split ("": the masks' own)."""

_GREY = bytes(level for level in range(256) for _ in range(3))


def confidence_name(image_id: str) -> str:
    """Where the confidence of an image's mask lies below its stage's folder, where it is written."""
    return f"confidence/{image_id}.png"


def encode_confidence(chosen: np.ndarray) -> bytes:
    """(H, W) float32 in 0..1 -> PNG of 256 grey levels, 255 for 1."""
    return encode_mask(confidence_levels(chosen), _GREY)


def tile_mask_name(tile_id: str) -> str:
    """Where the pseudo mask of a tile lies below the stage's folder."""
    return f"tiles/{tile_id}.png"


def tile_confidence_name(tile_id: str) -> str:
    """Where its confidence lies, where it is written."""
    return f"tile_confidence/{tile_id}.png"


def pseudo_mask_rows(manifest: Manifest, pseudo_masks: Artifact, tiles: Manifest | None = None) -> Iterator[pa.Table]:
    """image_id, uri, mask_uri and confidence_uri (whether such a file was written or not) of the images that have a
    pseudo mask, or of the tiles of these images, by shard.
    """
    folder = pseudo_masks.folder

    def with_mask(name: str, rows: pa.Table) -> pa.Table:
        masks = folder.read_table(f"{name}.parquet", ["image_id", "mask_uri"])
        if tiles is not None:
            return tile_mask_rows(rows, masks, folder)
        return _with_uris(with_column(rows, masks, "mask_uri"), "confidence_uri", folder, confidence_name)

    if tiles is not None:  # its shards have the names of the manifest's
        return tiles.joined("train", ["image_id", "uri", "parent_id"], with_mask)
    return manifest.joined("train", ["image_id", "uri"], with_mask)


def tile_mask_rows(rows: pa.Table, masks: pa.Table, folder: Storage) -> pa.Table:
    """The same of those rows of tiles (image_id, uri, parent_id) whose image is in `masks`; folder: of their stage."""
    rows = rows.filter(pc.is_in(rows["parent_id"], value_set=masks["image_id"].combine_chunks()))
    rows = _with_uris(rows.drop_columns(["parent_id"]), "mask_uri", folder, tile_mask_name)
    return _with_uris(rows, "confidence_uri", folder, tile_confidence_name)


def _with_uris(rows: pa.Table, column: str, folder: Storage, name: Callable[[str], str]) -> pa.Table:
    uris = [folder.uri(name(image_id)) for image_id in rows["image_id"].to_pylist()]
    return rows.append_column(column, pa.array(uris, pa.string()))


class MaskShard:
    """What a worker makes of one shard: PNG files, their index, and matrices where there is ground truth.

    keys: of CONFUSIONS. write_confidence: a PNG of each pixel's confidence too, beside the masks.
    """

    def __init__(
        self,
        output: Storage,
        classes: ClassTable,
        keys: Sequence[str] = ("confusion",),
        *,
        write_confidence: bool = False,
    ) -> None:
        self.bad: list[BadRow] = []
        self._output = output
        self._classes = classes
        self._write_confidence = write_confidence
        self._confusions = {key: ConfusionMatrix(classes.num_classes) for key in keys}
        self._num_scored = 0
        self._made: list[dict[str, Any]] = []

    def write(self, image_id: str, pseudo: PseudoMask) -> None:
        """Write the files of one image, and note its row of the index."""
        name = f"png/{image_id}.png"
        self._output.write_bytes(name, encode_mask(pseudo.mask, self._classes.flat_palette()))
        if self._write_confidence:
            self._output.write_bytes(confidence_name(image_id), encode_confidence(pseudo.chosen))
        self._made.append(
            {
                "image_id": image_id,
                "mask_uri": self._output.uri(name),
                "class_ids": [int(value) for value in pseudo.class_ids],
                "coverage_frac": pseudo.coverage_frac,
                "ignore_frac": pseudo.ignore_frac,
                "confidence": pseudo.confidence,
            }
        )

    def score(self, row: Mapping[str, Any], labels: Mapping[str, np.ndarray]) -> None:
        """Count one image's labels, (H, W) uint8 by key, where the manifest's row names an annotated mask."""
        if not row["mask_uri"]:
            return
        try:
            truth = read_truth(dict(row), self._classes)
        except (ImageError, MissingFileError) as error:
            self.bad.append(BadRow(row["image_id"], row["mask_uri"], str(error)))
            return
        for key, confusion in self._confusions.items():
            confusion.update(labels[key], truth)
        self._num_scored += 1

    def result(self) -> ShardOutput:
        """The shard's index and numbers."""
        stats = {
            **{key: confusion.to_json() for key, confusion in self._confusions.items()},
            "num_scored": self._num_scored,
            "coverage": float(np.sum([row["coverage_frac"] for row in self._made])),
            "ignored": float(np.sum([row["ignore_frac"] for row in self._made])),
        }
        table = pa.Table.from_pylist(self._made, schemas.MASKS)
        return ShardOutput(table, bad=self.bad, stats=stats, num_rows=len(self._made))


class MaskScores:
    """What the driver adds up of the shards; `add` is a fold. keys: as of the shards."""

    def __init__(self, manifest: Manifest, keys: Sequence[str] = ("confusion",)) -> None:
        self._classes = manifest.classes
        self._confusions = {key: SplitConfusions(manifest, key) for key in keys}
        self._areas = {"coverage": 0.0, "ignored": 0.0}

    def add(self, summary: ShardSummary) -> None:
        for of_kind in self._confusions.values():
            of_kind.add(summary)
        for key in self._areas:
            self._areas[key] += summary.stats[key]

    def stats(self, summaries: list[ShardSummary]) -> dict[str, Any]:
        """Of the stage, for its marker."""
        stats = stream_stats(summaries)
        num_made = max(stats["num_images"], 1)
        stats["coverage_frac"] = self._areas["coverage"] / num_made
        stats["ignore_frac"] = self._areas["ignored"] / num_made
        return stats

    def write(self, artifact: Artifact, child: ChildRun, stage: str, protocol: Protocol) -> None:
        """scores.json with the protocol, and both to MLflow."""
        told = protocol.to_json()
        child.log_params({f"protocol.{key}": value for key, value in told.items()})
        splits = {
            split: {
                **confusion_scores(confusion, num_scored),
                **baseline_scores(confusion, num_scored, self._classes),
            }
            for split, (confusion, num_scored) in self._confusions["confusion"].by_split.items()
        }
        for key, of_kind in self._confusions.items():
            for split, (confusion, num_scored) in of_kind.by_split.items():
                if CONFUSIONS[key]:
                    splits[split][CONFUSIONS[key]] = confusion_scores(confusion, num_scored)
        artifact.folder.write_json("scores.json", {"protocol": told, "splits": splits})
        for split, score in splits.items():
            steps = {f"_{step}": score[step] for step in CONFUSIONS.values() if step in score}
            values = {name: part["miou"] for name, part in {"": score, **steps}.items()}
            child.log_metrics({f"{stage}/miou_{split}{name}": value for name, value in values.items()})
