"""Class activation maps of the tagged classes, and their score wherever there is ground truth.

Reads:   manifest, classifier of the round
Writes:  rounds/RR/cams: part-*.parquet (schema CAMS, a quarter of the resolution); scores.json with the threshold
         curves. `run_train` writes the same tables of the whole train split, of the round that was chosen, to cams
Runs on: a fixed pool of Ray Data actors, a shard at a time; in process with stream.num_actors = 0

A round's own folder covers what rounds are compared by: the images with ground truth, and a sample of the train split
that is scored without it (subcat_core/label_free.py). Tags gate the maps on every split: no deployable numbers, and the
protocol says so. Maps of tiles are scored once they are put together to those of whole images; without ground truth, a
sampled tile is scored by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from cluster.artifacts import Artifact
from cluster.streams import ShardSummary, map_shards
from cluster.tracking import ChildRun
from jobs.cam_tables import COLUMNS
from jobs.cam_worker import CamStageSettings, CamWorker
from jobs.context import StageContext, complete, round_folder, stream_stats
from jobs.manifest import Manifest
from jobs.protocol import TAGS, Protocol
from jobs.sample import sample_ids
from jobs.scoring import SplitSweeps, label_free_scores
from jobs.tile_images import TILE_COLUMNS


def run(
    context: StageContext, manifest: Manifest, round_index: int, classifier: Artifact, images: Manifest | None = None
) -> Artifact:
    """CAMs of one round, of the images that rounds are compared by. images: of which `manifest` holds the tiles.

    Raises ValueError for maps that are a softmax over classes beside which there is background.
    """
    experiment = context.experiment
    settings = experiment.cams
    has_background = manifest.classes.has_background
    if settings.cam.normalise == "softmax" and has_background:
        raise ValueError(
            'cams.cam.normalise = "softmax": an image of one class would be that class all over, and nothing '
            'background; use "maximum", or a source without background (has_background = false)'
        )

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        sample = sample_ids(manifest, settings.num_label_free)
        scored = set((images or manifest).shard_names(with_masks=True)) & set(manifest.shard_names())
        shards = sorted({*scored, *sample})
        in_sample = frozenset(image_id for ids in sample.values() for image_id in ids)
        sweeps, plain_sweeps = SplitSweeps(manifest, "sweep"), SplitSweeps(manifest, "plain_sweep")
        label_free: dict[str, list[float]] = {}

        def fold(summary: ShardSummary) -> None:
            sweeps.add(summary)
            label_free.update(summary.stats["label_free"])
            if settings.cam.affinity is not None:
                plain_sweeps.add(summary)

        where = f"round {round_index}"
        stats = _stream(context, manifest, artifact, classifier, shards, where, in_sample, fold, images)
        affinity = settings.cam.affinity
        protocol = Protocol(
            supervision=TAGS,
            masks=experiment.evaluation.masks,
            tags="used: only the tagged classes have maps, on every split",
            threshold="constant background score; best one picked on the split itself"
            if has_background
            else "none: argmax over the tagged classes; the data set has no background",
            crf=None,
            scales=settings.cam.scales,
            flip=settings.cam.flip,
            base_px=settings.cam.base_px,
            weights=experiment.classifier.backbone.weights,
            rng_seed=experiment.rng_seed,
            details={
                "affinity": "no" if affinity is None else affinity.model_dump(mode="json"),
                "normalise": settings.cam.normalise,
                **experiment.prepare.protocol(),
            },
        ).to_json()
        child.log_params({f"protocol.{key}": value for key, value in protocol.items()})
        scores: dict[str, Any] = {"protocol": protocol, "splits": sweeps.scores()}
        for split, plain in plain_sweeps.scores().items():
            scores["splits"][split]["plain"] = {key: plain[key] for key in ("fixed", "best", "miou") if key in plain}
        scores["label_free"] = label_free_scores(settings.thresholds(manifest.classes), label_free)
        artifact.folder.write_json("scores.json", scores)
        for split, score in scores["splits"].items():
            curve = {"best": score["best"], "015": score["fixed"]} if "best" in score else {"argmax": score}
            values = {f"make_cams/miou_{split}_{kind}": part["miou"] for kind, part in curve.items()}
            child.log_metrics(values, round_index)
        child.log_metrics({"make_cams/label_free": scores["label_free"]["best"]["score"]}, round_index)
        return stats

    return complete(
        context,
        name=round_folder(round_index, "cams"),
        stage="make_cams",
        round_index=round_index,
        inputs={**_inputs(settings, manifest, classifier), "covers": "images with ground truth, and a sample of train"},
        work=work,
    )


def run_train(context: StageContext, manifest: Manifest, round_index: int, classifier: Artifact) -> Artifact:
    """CAMs of the whole train split by the classifier of the chosen round; `context` has that round's settings.

    manifest: of images, or of their tiles.
    """

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        shards, where = manifest.shard_names("train"), f"train split, round {round_index}"
        return _stream(context, manifest, artifact, classifier, shards, where, None, lambda summary: None)

    return complete(
        context,
        name="cams",
        stage="make_train_cams",
        inputs={
            **_inputs(context.experiment.cams, manifest, classifier, leave_out={"num_label_free", "num_thresholds"}),
            "covers": "train",
        },
        work=work,
    )


def _inputs(
    settings: CamStageSettings, manifest: Manifest, classifier: Artifact, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    in_cam = {"pass_px"} | ({"normalise"} if settings.cam.normalise == "maximum" else set())  # younger than runs
    excluded: dict[str, Any] = {"batch_size": True, "cam": in_cam, **dict.fromkeys(leave_out, True)}
    return {
        "settings": settings.model_dump(mode="json", exclude=excluded),
        "manifest": manifest.fingerprint,
        "classifier": classifier.output_fingerprint,
    }


def _stream(
    context: StageContext,
    manifest: Manifest,
    artifact: Artifact,
    classifier: Artifact,
    shards: list[str],
    where: str,
    sample: frozenset[str] | None,
    fold: Callable[[ShardSummary], None],
    images: Manifest | None = None,
) -> dict[str, Any]:
    """Maps of some shards; returns the stream's stats. where: for the progress bar. images: of tiles to be scored."""
    experiment = context.experiment
    total = manifest.num_rows_in(shards)
    with context.progress.stage(f"make CAMs, {where}", total=total, unit="images") as bar:
        summaries = map_shards(
            CamWorker,
            {
                "classifier": classifier.folder,
                "classifier_settings": experiment.classifier,
                "classes": manifest.classes,
                "settings": experiment.cams,
                "sample": sample,
            },
            inputs={"manifest": manifest.folder} | ({} if images is None else {"images": images.folder}),
            columns={"manifest": COLUMNS if images is None else [*COLUMNS, *TILE_COLUMNS], "images": COLUMNS},
            shards=shards,
            output=artifact.folder,
            settings=experiment.stream,
            bar=bar,
            stage="make_cams",
            fold=fold,
        )
    return stream_stats(summaries)
