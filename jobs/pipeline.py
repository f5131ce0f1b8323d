"""The ordered stages and the round loop: the whole story on one page.

    prepare -> [cut_tiles]
    round 0..R:  train_classifier -> make_cams (score) and, but for the last round, extract_features -> cluster_features
    choose_round -> make_train_cams -> [make_affinity_labels -> train_affinity ->] make_pseudo_masks -> train_segmenter
    -> predict -> evaluate -> [predict_train -> train_segmenter -> predict -> evaluate ->] [[cut_supervised_masks ->]
    train_supervised -> predict_supervised -> evaluate_supervised ->] report

Stages in brackets run where the config has their section.

With tiles, the rounds see tiles in place of images, and pseudo masks are of whole images again.
Every classifier starts from the pretrained weights again; a round hands on only its sub-categories (and, with
classifier.subcategory_head = "previous", its head for them). The last round makes none, for nothing would use them.
Pseudo masks come from the round that choose_round keeps. Rounds of self-training (self_training.py) have numbers of
their own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.artifacts import Artifact, code_version
from cluster.storage import Storage
from jobs import (
    choose_round,
    cluster_features,
    cut_tiles,
    evaluate,
    extract_features,
    make_affinity_labels,
    make_cams,
    make_pseudo_masks,
    predict,
    prepare,
    report,
    self_training,
    supervised_tiles,
    train_affinity,
    train_classifier,
    train_segmenter,
    train_supervised,
)
from jobs.context import StageContext, round_folder
from jobs.manifest import Manifest, open_manifest
from jobs.previous_head import PreviousRound

if TYPE_CHECKING:
    from jobs.config import Experiment


CONFIG = "config.json"
"""The resolved settings, beside the outputs."""


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One step of the run: its stage, its round (None outside rounds) and the folder it writes."""

    stage: str
    round_index: int | None
    folder: str


def plan(experiment: Experiment) -> list[StagePlan]:
    """The steps of an experiment in order."""
    steps = [StagePlan("prepare", None, "manifest")]
    if experiment.prepare.tiles is not None:
        steps.append(StagePlan(cut_tiles.STAGE, None, cut_tiles.FOLDER))
    for index in range(experiment.rounds + 1):
        steps.append(StagePlan("train_classifier", index, round_folder(index, "classifier")))
        steps.append(StagePlan("make_cams", index, round_folder(index, "cams")))
        if index < experiment.rounds:
            steps.append(StagePlan("extract_features", index, round_folder(index, "features")))
            steps.append(StagePlan("cluster_features", index, round_folder(index, "subcategories")))
    steps.append(StagePlan("choose_round", None, choose_round.FOLDER))
    steps.append(StagePlan("make_train_cams", None, "cams"))
    if experiment.affinity is not None:
        steps.append(StagePlan("make_affinity_labels", None, "affinity_labels"))
        steps.append(StagePlan("train_affinity", None, "affinity"))
    steps += [
        StagePlan("make_pseudo_masks", None, "pseudo_masks"),
    ]
    for step in self_training.segmenter_rounds(experiment):
        steps.append(StagePlan("train_segmenter", step.round_index, step.folder("segmenter")))
        steps.append(StagePlan("predict", step.round_index, step.folder("predictions")))
        steps.append(StagePlan("evaluate", step.round_index, step.folder("evaluation")))
        if not step.last:
            steps.append(StagePlan(self_training.STAGE, step.index + 1, self_training.masks_folder(step.index + 1)))
    if experiment.supervised is not None:
        folder = train_supervised.FOLDER
        if experiment.prepare.segmenter_sees_tiles:
            steps.append(StagePlan(supervised_tiles.STAGE, None, supervised_tiles.FOLDER))
        steps.append(StagePlan("train_supervised", None, f"{folder}/segmenter"))
        steps.append(StagePlan("predict_supervised", None, f"{folder}/predictions"))
        steps.append(StagePlan("evaluate_supervised", None, f"{folder}/evaluation"))
    return [*steps, StagePlan("report", None, "report")]


STAGES = (
    "prepare",
    "cut_tiles",
    "train_classifier",
    "make_cams",
    "extract_features",
    "cluster_features",
    "choose_round",
    "make_train_cams",
    "make_affinity_labels",
    "train_affinity",
    "make_pseudo_masks",
    "train_segmenter",
    "predict",
    "evaluate",
    "predict_train",
    "cut_supervised_masks",
    "train_supervised",
    "predict_supervised",
    "evaluate_supervised",
    "report",
)


def run(context: StageContext, last_stage: str | None = None) -> None:
    """Run every stage in order, skipping what is complete; stop after the last occurrence of `last_stage`."""
    names = [step.stage for step in plan(context.experiment)]
    if last_stage is not None and last_stage not in names:
        raise ValueError(
            f"--stage {last_stage}: this config has no such stage; it has {', '.join(dict.fromkeys(names))}"
        )
    num_steps = len(names) if last_stage is None else len(names) - names[::-1].index(last_stage)
    config = context.experiment.model_dump(mode="json")
    if not context.storage.exists(CONFIG):
        context.storage.write_json(CONFIG, config)
    for _ in itertools.islice(run_stages(context), num_steps):
        pass
    # Only now, when no stage refused its settings: a mistaken second call leaves the record of a run as it is.
    if context.storage.read_json(CONFIG) != config:
        context.storage.write_json(CONFIG, config)


def _check_splits(experiment: Experiment, manifest: Manifest) -> None:
    """ValueError for a split that the settings name and the manifest lacks, before hours of training.

    The default "val" may be missing: then nothing is held out.
    """
    if not manifest.num_rows("train"):
        raise ValueError(
            f"the manifest has no split train (it has {', '.join(manifest.splits)}); nothing can be learned"
        )
    _check_supervised(experiment, manifest)
    named = [("classifier.validation_split", experiment.classifier.validation_split)]
    named += [("predict.splits", split) for split in experiment.predict.splits]
    for key, split in named:
        if split not in (None, "val", *manifest.splits):
            raise ValueError(f"{key} = {split!r}: no such split; the manifest has {', '.join(manifest.splits)}")


def _check_supervised(experiment: Experiment, manifest: Manifest) -> None:
    """ValueError where the yardstick would find no full mask, before hours of training."""
    settings = experiment.supervised
    if settings is None:
        return
    if settings.masks_folder is None and not manifest.num_masks("train"):
        raise ValueError(
            "[supervised]: no image of the train split has an annotated mask in the manifest; give "
            "supervised.masks_folder, or leave the section out"
        )
    if settings.masks_folder is not None:
        [image_id] = manifest.rows("train", ["image_id"], limit=1)["image_id"].to_pylist()[:1]
        mask = Storage(settings.masks_folder).uri(f"{image_id}.png")
        if not Storage(mask).exists(""):
            raise ValueError(f"supervised.masks_folder: {mask}: no such file; give a folder of <image_id>.png")


def run_stages(context: StageContext) -> Iterator[str]:
    """Yields the name of each stage once it is complete, in the order of `plan`."""
    prepare.run(context)
    manifest = open_manifest(context.storage)
    _check_splits(context.experiment, manifest)
    context.tracker.set_tags({"data": manifest.fingerprint, "code_version": code_version()})
    yield "prepare"

    tiles: Manifest | None = None
    if context.experiment.prepare.tiles is not None:
        tiles = cut_tiles.run(context, manifest)
        yield "cut_tiles"
    seen, images = (manifest, None) if tiles is None else (tiles, manifest)  # seen: by the rounds

    classifiers: list[Artifact] = []
    cams: list[Artifact] = []
    subcategories: list[Artifact] = []
    for round_index in range(context.experiment.rounds + 1):
        last = round_index == context.experiment.rounds
        in_round = context.for_round(round_index)
        previous = PreviousRound(classifiers[-1], subcategories[-2]) if round_index > 1 else None
        classifier = train_classifier.run(in_round, seen, round_index, next(reversed(subcategories), None), previous)
        classifiers.append(classifier)
        yield "train_classifier"
        cams.append(make_cams.run(in_round, seen, round_index, classifier, images))
        yield "make_cams"
        if not last:
            features = extract_features.run(in_round, seen, round_index, classifier)
            yield "extract_features"
            subcategories.append(cluster_features.run(in_round, seen, round_index, features))
            yield "cluster_features"

    choice = choose_round.run(context, seen, cams)
    yield "choose_round"
    chosen = context.for_round(choice.round_index)
    train_cams = make_cams.run_train(chosen, seen, choice.round_index, classifiers[choice.round_index])
    yield "make_train_cams"
    affinity: Artifact | None = None
    if context.experiment.affinity is not None:
        labels = make_affinity_labels.run(chosen, manifest, train_cams)
        yield "make_affinity_labels"
        affinity = train_affinity.run(chosen, manifest, labels)
        yield "train_affinity"
    pseudo_masks = make_pseudo_masks.run(chosen, manifest, train_cams, choice.mask, affinity, tiles)
    yield "make_pseudo_masks"
    on_tiles = tiles if context.experiment.prepare.segmenter_sees_tiles else None
    yield from _train_segmenters(context, manifest, pseudo_masks, on_tiles)
    if context.experiment.supervised is not None:
        tile_masks: Artifact | None = None
        if on_tiles is not None:
            tile_masks = supervised_tiles.run(context, manifest, on_tiles)
            yield supervised_tiles.STAGE
        segmenter = train_supervised.train(context, manifest, pseudo_masks, on_tiles, tile_masks)
        yield "train_supervised"
        predictions = train_supervised.predict_masks(context, manifest, segmenter)
        yield "predict_supervised"
        train_supervised.score(context, manifest, predictions)
        yield "evaluate_supervised"
    report.run(context)
    yield "report"


def _train_segmenters(
    context: StageContext, manifest: Manifest, pseudo_masks: Artifact, on_tiles: Manifest | None
) -> Iterator[str]:
    """The segmenter's stages, once, or with self-training in every round of it; yields as `_run_stages`."""
    masks = pseudo_masks
    for step in self_training.segmenter_rounds(context.experiment):
        at, folder = step.round_index, step.folder
        name = folder("segmenter")
        segmenter = train_segmenter.run(context, manifest, masks, on_tiles, name=name, round_index=at)
        yield "train_segmenter"
        predictions = predict.run(context, manifest, segmenter, name=folder("predictions"), round_index=at)
        yield "predict"
        told = {"self_training_round": step.index} if context.experiment.self_training is not None else None
        evaluate.run(
            context,
            manifest,
            predictions,
            name=folder("evaluation"),
            segmenter=name,
            round_index=at,
            details=told,
        )
        yield "evaluate"
        if not step.last:
            masks = self_training.run(context, manifest, segmenter, step.index + 1)
            yield self_training.STAGE
