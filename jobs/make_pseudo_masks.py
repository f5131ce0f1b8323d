"""CAM -> background score -> dense CRF -> pseudo mask, in one stream: nothing at full resolution is kept but the masks.

Reads:   manifest (train), CAMs of the chosen round
Writes:  pseudo_masks: png/<image_id>.png (indexed, with palette), part-*.parquet (schema MASKS); scores.json
Runs on: a fixed pool of Ray Data actors on CPUs, a shard at a time; in process with stream.num_actors = 0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.storage import MissingFileError, Storage
from cluster.streams import BadRow, ShardOutput, ShardSummary, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, stream_stats
from jobs.make_cams import COLUMNS, read_cams, read_truth
from jobs.manifest import Manifest
from jobs.protocol import TAGS, Protocol
from jobs.scoring import SplitConfusions, all_background, confusion_scores
from subcat_core import schemas
from subcat_core.classes import ClassTable
from subcat_core.images import ImageError, encode_mask
from subcat_core.metrics import ConfusionMatrix
from subcat_core.pseudo_mask import PseudoMaskSettings, make_pseudo_mask
from subcat_core.settings import Settings


class PseudoMaskStageSettings(Settings):
    """How maps become masks."""

    mask: PseudoMaskSettings = PseudoMaskSettings()


class PseudoMaskWorker:
    """One actor: turns a CAM shard into PNG files and their index."""

    def __init__(self, *, output: Storage, classes: ClassTable, settings: PseudoMaskStageSettings) -> None:
        self.output = output
        self.classes = classes
        self.settings = settings

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        cams = read_cams(inputs["cams"])
        confusion = ConfusionMatrix(self.classes.num_classes)
        num_scored = 0
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
            pseudo = make_pseudo_mask(cam.astype(np.float32), class_indices, image, self.settings.mask)
            name = f"png/{row['image_id']}.png"
            self.output.write_bytes(name, encode_mask(pseudo.mask, self.classes.flat_palette()))
            made.append(
                {
                    "image_id": row["image_id"],
                    "mask_uri": self.output.uri(name),
                    "class_ids": [int(value) for value in pseudo.class_ids],
                    "coverage_frac": pseudo.coverage_frac,
                    "ignore_frac": pseudo.ignore_frac,
                    "confidence": pseudo.confidence,
                }
            )
            if row["mask_uri"]:
                try:
                    truth = read_truth(row, self.classes)
                except (ImageError, MissingFileError) as error:
                    bad.append(BadRow(row["image_id"], row["mask_uri"], str(error)))
                    continue
                confusion.update(pseudo.labels, truth)
                num_scored += 1
        stats = {
            "confusion": confusion.to_json(),
            "num_scored": num_scored,
            "coverage": float(np.sum([row["coverage_frac"] for row in made])),
            "ignored": float(np.sum([row["ignore_frac"] for row in made])),
        }
        return ShardOutput(pa.Table.from_pylist(made, schemas.MASKS), bad=bad, stats=stats, num_rows=len(made))


def run(context: StageContext, manifest: Manifest, cams: Artifact, mask: PseudoMaskSettings) -> Artifact:
    """Pseudo masks of the train split. context: with the settings of the chosen round. mask: as choose_round has it."""
    settings = context.experiment.pseudo_masks.model_copy(update={"mask": mask})

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        confusions, areas = SplitConfusions(manifest), {"coverage": 0.0, "ignored": 0.0}

        def fold(summary: ShardSummary) -> None:
            confusions.add(summary)
            for key in areas:
                areas[key] += summary.stats[key]

        with context.progress.stage("make pseudo masks", total=manifest.num_rows("train"), unit="images") as bar:
            summaries = map_shards(
                PseudoMaskWorker,
                {"output": artifact.folder, "classes": manifest.classes, "settings": settings},
                inputs={"manifest": manifest.folder, "cams": cams.folder},
                columns={"manifest": COLUMNS},
                shards=manifest.shard_names("train"),
                output=artifact.folder,
                settings=context.experiment.stream.model_copy(update={"gpus_per_actor": 0.0}),
                bar=bar,
                stage="make_pseudo_masks",
                fold=fold,
            )
        stats = stream_stats(summaries)
        num_made = max(stats["num_images"], 1)
        stats["coverage_frac"] = areas["coverage"] / num_made
        stats["ignore_frac"] = areas["ignored"] / num_made
        background = (
            f"(1 - max)^{mask.alpha:.3g}" if mask.background == "power" else f"constant {mask.background_score:.3g}"
        )
        protocol = Protocol(
            supervision=TAGS,
            masks=context.experiment.evaluation.masks,
            tags="used: only the tagged classes compete",
            threshold=f"argmax over the tagged classes and background {background}, before unsure pixels become 255",
            crf=mask.crf,
            scales=context.experiment.cams.cam.scales,
            flip=context.experiment.cams.cam.flip,
            base_px=context.experiment.cams.cam.base_px,
            weights=context.experiment.classifier.backbone.weights,
            rng_seed=context.experiment.rng_seed,
            details={"min_confidence": mask.min_confidence},
        ).to_json()
        child.log_params({f"protocol.{key}": value for key, value in protocol.items()})
        splits = {
            split: {
                **confusion_scores(confusion, num_scored),
                "all_background": confusion_scores(all_background(confusion), num_scored),
            }
            for split, (confusion, num_scored) in confusions.by_split.items()
        }
        artifact.folder.write_json("scores.json", {"protocol": protocol, "splits": splits})
        child.log_metrics({f"make_pseudo_masks/miou_{split}": score["miou"] for split, score in splits.items()})
        return stats

    return complete(
        context,
        name="pseudo_masks",
        stage="make_pseudo_masks",
        inputs={
            "settings": settings.model_dump(mode="json"),
            "manifest": manifest.fingerprint,
            "cams": cams.output_fingerprint,
        },
        work=work,
    )
