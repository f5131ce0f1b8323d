"""Score predicted masks against annotated ones, and name the protocol.

Reads:   manifest (rows with a mask), predictions
Writes:  evaluation: scores.json (mIoU, per-class IoU, pixel accuracy, baselines), part-*.json with a matrix a shard
Runs on: a fixed pool of Ray Data actors on CPUs; only (C + 1)^2 counts travel
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.image_reading import max_pixels
from cluster.storage import MissingFileError, Storage, read_uri
from cluster.streams import BadRow, ShardOutput, map_shards
from cluster.tracking import ChildRun
from jobs.cam_tables import COLUMNS, read_truth
from jobs.context import StageContext, complete, stream_stats
from jobs.manifest import Manifest
from jobs.protocol import TAGS, Protocol
from jobs.scoring import SplitConfusions, baseline_scores, confusion_scores
from jobs.train_segmenter import trained_px
from subcat_core.classes import ClassTable
from subcat_core.images import ImageError, decode_mask
from subcat_core.metrics import ConfusionMatrix
from subcat_core.settings import Settings


class EvaluationSettings(Settings):
    """Nothing to set yet but which masks are meant."""

    masks: str = "the manifest's mask_uri"
    """Words for the protocol: whose masks these are."""


class EvaluateWorker:
    """One actor: turns a shard of predictions into a confusion matrix."""

    def __init__(self, *, classes: ClassTable) -> None:
        self.classes = classes
        self.prediction_lut = ClassTable(classes.names).mask_lut()

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        predicted = dict(
            zip(*(inputs["predictions"][key].to_pylist() for key in ("image_id", "mask_uri")), strict=True)
        )
        confusion = ConfusionMatrix(self.classes.num_classes)
        bad: list[BadRow] = []
        num_scored = 0
        for row in inputs["manifest"].to_pylist():
            if not row["mask_uri"]:
                continue
            if row["image_id"] not in predicted:
                bad.append(BadRow(row["image_id"], row["uri"], "no prediction for this image"))
                continue
            try:
                truth = read_truth(row, self.classes)
                prediction = decode_mask(read_uri(predicted[row["image_id"]]), self.prediction_lut, max_pixels(row))
                confusion.update(prediction, truth)
            except (ImageError, MissingFileError, ValueError) as error:
                bad.append(BadRow(row["image_id"], row["mask_uri"], str(error)))
                continue
            num_scored += 1
        stats = {"confusion": confusion.to_json(), "num_scored": num_scored}
        return ShardOutput(table=None, bad=bad, stats=stats, num_rows=num_scored)


def run(
    context: StageContext,
    manifest: Manifest,
    predictions: Artifact,
    *,
    name: str = "evaluation",
    stage: str = "evaluate",
    supervision: str = TAGS,
    segmenter: str = "segmenter",
    round_index: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> Artifact:
    """Scores of the run's predictions, by split. name: the folder to write. supervision, details: for the protocol.

    segmenter: the folder of the one that predicted. round_index: of self-training.
    """
    experiment = context.experiment
    splits = experiment.predict.splits
    shards = [shard.name for shard in manifest.shards if shard.split in splits and shard.num_masks]

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        total = manifest.num_rows_in(shards)
        confusions = SplitConfusions(manifest)
        with context.progress.stage(stage.replace("_", " "), total=total, unit="images") as bar:
            summaries = map_shards(
                EvaluateWorker,
                {"classes": manifest.classes},
                inputs={"manifest": manifest.folder, "predictions": predictions.folder},
                columns={"manifest": COLUMNS},
                shards=shards,
                output=artifact.folder,
                settings=experiment.stream.model_copy(update={"gpus_per_actor": 0.0}),
                bar=bar,
                stage=stage,
                fold=confusions.add,
            )
        background = "background and " if manifest.classes.has_background else ""
        protocol = Protocol(
            supervision=supervision,
            masks=experiment.evaluation.masks,
            tags="not used: the segmenter sees the image alone",
            threshold=f"none: argmax over {background}all classes",
            crf=experiment.predict.crf,
            scales=experiment.predict.scales,
            flip=experiment.predict.flip,
            base_px=experiment.predict.base_px or trained_px(experiment.segmenter),
            weights=experiment.segmenter.model.backbone.weights,
            rng_seed=experiment.rng_seed,
            details={
                "merge": experiment.predict.merge,
                "windows": experiment.predict.windows_text(),
                "num_train_images": context.storage.read_json(f"{segmenter}/segmenter.json")["num_train_images"],
                **(details or {}),
                **experiment.prepare.protocol(),
            },
        ).to_json()
        child.log_params({f"protocol.{key}": value for key, value in protocol.items()})
        scores = evaluation_scores(confusions.by_split, protocol, manifest.classes)
        artifact.folder.write_json("scores.json", scores)
        child.log_metrics({f"{stage}/miou_{split}": score["miou"] for split, score in scores["splits"].items()})
        return stream_stats(summaries)

    return complete(
        context,
        name=name,
        stage=stage,
        round_index=round_index,
        inputs={
            "settings": experiment.evaluation.model_dump(mode="json"),
            "splits": list(splits),
            "manifest": manifest.fingerprint,
            "predictions": predictions.output_fingerprint,
        },
        work=work,
    )


def evaluation_scores(
    confusions: dict[str, tuple[ConfusionMatrix, int]], protocol: dict[str, Any], classes: ClassTable
) -> dict[str, Any]:
    """scores.json: the segmenter by split, and what calling everything background would have scored; where there is no
    background, what calling everything one of the classes would.
    """
    splits = {split: confusion_scores(confusion, num) for split, (confusion, num) in confusions.items()}
    baselines: dict[str, dict[str, Any]] = {}
    for split, (confusion, num) in confusions.items():
        for name, score in baseline_scores(confusion, num, classes).items():
            baselines.setdefault(name, {})[split] = score
    return {"protocol": protocol, "splits": splits, "baselines": baselines}


def evaluate_folder(
    manifest: Manifest, split: str, predictions: Storage, protocol: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Scores of a folder of PNG masks named <image_id>.png against a split's masks, in process.

    protocol: what is known of how the masks were made; None where they come from elsewhere.
    """
    worker = EvaluateWorker(classes=manifest.classes)
    confusion, num_scored, bad = ConfusionMatrix(manifest.classes.num_classes), 0, []
    for name in manifest.shard_names(split, with_masks=True):
        rows = manifest.folder.read_table(f"{name}.parquet", columns=COLUMNS)
        rows = rows.filter(rows["mask_uri"].is_valid())
        ids = rows["image_id"].to_pylist()
        known = [image_id for image_id in ids if predictions.exists(f"{image_id}.png")]
        table = pa.table({"image_id": known, "mask_uri": [predictions.uri(f"{image_id}.png") for image_id in known]})
        output = worker({"manifest": rows, "predictions": table})
        confusion.merge(ConfusionMatrix.from_json(output.stats["confusion"]))
        num_scored += output.num_rows
        bad += output.bad
    if not num_scored:
        raise ValueError(
            f"{predictions.root}: no mask of split {split!r} could be scored ({len(bad)} without a readable "
            "prediction); expected files named <image_id>.png"
        )
    elsewhere = {
        "masks": "the manifest's mask_uri",
        "tags": "unknown: the masks were given as files",
        "threshold": "none: the masks are taken as they are",
    }
    protocol = {**(protocol or elsewhere), "num_missing": len(bad)}
    return evaluation_scores({split: (confusion, num_scored)}, protocol, manifest.classes)
