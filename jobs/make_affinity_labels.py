"""CAMs -> the label maps that the affinity net learns from: sure foreground, sure background, and 255 between.

Reads:   manifest (train), CAMs of the chosen round
Writes:  affinity_labels: png/<image_id>.png (indexed; with kind = "psa" a pixel stands for a cell of the net),
         part-*.parquet (schema AFFINITY_LABELS)
Runs on: a fixed pool of Ray Data actors on CPUs, a shard at a time; in process with stream.num_actors = 0

Only with [affinity]. An image without tags has no label map and does not train the net.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.storage import Storage
from cluster.streams import BadRow, ShardOutput, ShardSummary, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.affinity_settings import AffinitySettingsOfAKind, PsaStageSettings
from jobs.cam_tables import read_cams
from jobs.context import StageContext, complete, stream_stats
from jobs.manifest import Manifest
from subcat_core import schemas
from subcat_core.affinity_labels import irn_labels, psa_labels
from subcat_core.classes import BACKGROUND, IGNORE, ClassTable
from subcat_core.images import encode_mask


class AffinityLabelWorker:
    """One actor: turns a CAM shard into PNG files and their index."""

    def __init__(self, *, output: Storage, classes: ClassTable, settings: AffinitySettingsOfAKind) -> None:
        self.output = output
        self.classes = classes
        self.settings = settings

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        cams = read_cams(inputs["cams"])
        bad: list[BadRow] = []
        made: list[dict[str, Any]] = []
        for row, image in iter_images(inputs["manifest"]):
            if isinstance(image, BadRow):
                bad.append(image)
                continue
            if row["image_id"] not in cams:
                bad.append(BadRow(row["image_id"], row["uri"], "no CAM was made for this image; see make_cams"))
                continue
            class_indices, cam = cams[row["image_id"]]
            if not class_indices:
                continue
            labels = self._labels(cam.astype(np.float32), class_indices, image)
            name = f"png/{row['image_id']}.png"
            self.output.write_bytes(name, encode_mask(labels, self.classes.flat_palette()))
            background = float((labels == BACKGROUND).mean())
            foreground = 1 - background - float((labels == IGNORE).mean())
            fractions = {"foreground_frac": foreground, "background_frac": background}
            made.append({"image_id": row["image_id"], "label_uri": self.output.uri(name), **fractions})
        sums = {key: float(sum(row[key] for row in made)) for key in ("foreground_frac", "background_frac")}
        table = pa.Table.from_pylist(made, schemas.AFFINITY_LABELS)
        return ShardOutput(table, bad=bad, stats=sums, num_rows=len(made))

    def _labels(self, cam: np.ndarray, class_indices: list[int], image: np.ndarray) -> np.ndarray:
        settings = self.settings
        if isinstance(settings, PsaStageSettings):
            return psa_labels(cam, class_indices, image, settings.labels, settings.net.backbone.output_stride)
        return irn_labels(cam, class_indices, image, settings.labels)


def run(context: StageContext, manifest: Manifest, cams: Artifact) -> Artifact:
    """Label maps of the train split, for the settings of [affinity], which must be there."""
    settings = context.experiment.affinity
    assert settings is not None

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        sums = {"foreground_frac": 0.0, "background_frac": 0.0}

        def fold(summary: ShardSummary) -> None:
            for key in sums:
                sums[key] += summary.stats[key]

        with context.progress.stage("make affinity labels", total=manifest.num_rows("train"), unit="images") as bar:
            summaries = map_shards(
                AffinityLabelWorker,
                {"output": artifact.folder, "classes": manifest.classes, "settings": settings},
                inputs={"manifest": manifest.folder, "cams": cams.folder},
                columns={"manifest": ["image_id", "uri"]},
                shards=manifest.shard_names("train"),
                output=artifact.folder,
                settings=context.experiment.stream.model_copy(update={"gpus_per_actor": 0.0}),
                bar=bar,
                stage="make_affinity_labels",
                fold=fold,
            )
        stats = stream_stats(summaries)
        stats |= {key: value / max(stats["num_images"], 1) for key, value in sums.items()}
        if not stats["foreground_frac"] or not stats["background_frac"]:
            context.progress.note(
                "warning: affinity labels: nothing is sure "
                f"{'foreground' if not stats['foreground_frac'] else 'background'}, so the net learns nothing of it; "
                "look at the CAMs, or change affinity.labels"
            )
        return stats

    made_by = {"kind": settings.kind, **settings.labels.model_dump(mode="json")}
    if isinstance(settings, PsaStageSettings):
        made_by["stride_px"] = settings.net.backbone.output_stride
    return complete(
        context,
        name="affinity_labels",
        stage="make_affinity_labels",
        inputs={"settings": made_by, "manifest": manifest.fingerprint, "cams": cams.output_fingerprint},
        work=work,
    )
