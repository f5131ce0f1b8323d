"""Choose the round whose maps become pseudo masks, and how strong background is in them, without ground truth.

Reads:   the label-free scores of every round's CAMs; for background also images and CAMs of the sample (manifest, CAMs)
Writes:  choice: choice.json (round, threshold, background, and what they were chosen by), part-*.json
Runs on: the driver; for background a fixed pool of Ray Data actors on CPUs, or this process with stream.num_actors = 0

A later round is kept only where its maps are clearly better on the same images; otherwise sub-categories did not help,
and the round before it stands. What "better" means, and how far to trust it: subcat_core/label_free.py. The
manifest is that of the images, or tiles, whose CAMs the rounds made. Without a background, only the round is chosen.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.streams import BadRow, ShardOutput, ShardSummary, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.cam_tables import COLUMNS, read_cams
from jobs.context import StageContext, complete, stream_stats
from jobs.manifest import Manifest
from jobs.sample import sample_ids
from subcat_core.classes import to_class_ids
from subcat_core.label_free import LabelFreeGrid, clearly_better
from subcat_core.pseudo_mask import PseudoMaskSettings, make_pseudo_mask
from subcat_core.settings import Settings

FOLDER = "choice"
RESULT = "choice.json"
_FEWEST = 20  # images, below which a mean over them says little
_BACKGROUND = {"background", "alpha", "background_score"}


class ChoiceSettings(Settings):
    """What is chosen by the label-free score, and what is taken as the config has it."""

    round: Literal["label_free", "last"] = "label_free"
    """label_free: the last round that is clearly better than the one kept before it. last: the last (the paper)."""
    num_errors: float = Field(default=2.0, ge=0)
    """A round is kept where the mean difference on the same images exceeds this many of its standard errors."""
    background: Literal["label_free", "config"] = "label_free"
    """label_free: alpha (or background_score) by the score of the masks that it gives on a part of the sample; what
    pseudo_masks.mask says of it is not looked at. config: as it stands there. With [affinity] the walk has its own, and
    for classes without a background there is none."""
    strengths: tuple[float, ...] = Field(default=(1.0, 0.85, 0.7, 0.55), min_length=1)
    """Candidates for background, as factors of the threshold that the round's maps score best at. 1 breaks even with a
    map at that threshold; less makes more foreground, which the dense CRF then cuts to the edges."""
    num_masks: int = Field(default=80, ge=1)
    """Images of the sample that the candidates are tried on; each costs a pseudo mask a candidate."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen. mask: the settings that pseudo masks are made with."""

    artifact: Artifact
    round_index: int
    mask: PseudoMaskSettings


class ChoiceWorker:
    """One actor: makes pseudo masks of a shard's sampled images with every candidate, and scores them."""

    def __init__(self, *, sample: frozenset[str], candidates: Sequence[PseudoMaskSettings]) -> None:
        self.sample = sample
        self.candidates = candidates

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        cams = read_cams(inputs["cams"])
        wanted = [
            image_id in self.sample and image_id in cams for image_id in inputs["manifest"]["image_id"].to_pylist()
        ]
        scores: dict[str, list[float]] = {}
        bad: list[BadRow] = []
        for row, image in iter_images(inputs["manifest"].filter(pa.array(wanted, pa.bool_()))):
            if isinstance(image, BadRow):
                bad.append(image)
                continue
            class_indices, cam = cams[row["image_id"]]
            if not class_indices:
                continue
            maps = cam.astype(np.float32)
            grid = LabelFreeGrid(maps, to_class_ids(np.asarray(class_indices)), image)
            masks = (make_pseudo_mask(maps, class_indices, image, settings) for settings in self.candidates)
            scores[row["image_id"]] = [grid.mask_score(mask.labels) for mask in masks]
        return ShardOutput(table=None, bad=bad, stats={"scores": scores}, num_rows=len(scores))


def run(context: StageContext, manifest: Manifest, cams: Sequence[Artifact]) -> Choice:
    """Choose among the rounds, whose CAMs are given in their order."""
    experiment = context.experiment
    settings, mask = experiment.choice, experiment.pseudo_masks.mask
    has_background = manifest.classes.has_background
    background_by = "config" if settings.background == "config" else "label_free"
    if experiment.affinity is not None or not has_background:
        background_by = "walk" if has_background else "none"  # a walk has a background of its own
    tries = background_by == "label_free"

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        scores = [round_cams.folder.read_json("scores.json")["label_free"] for round_cams in cams]
        steps, kept = choose_round(scores, settings)
        threshold = scores[kept]["best"]["threshold"]
        if min(len(score["images"]) for score in scores) < _FEWEST:
            context.progress.note(
                f"warning: fewer than {_FEWEST} images of the sample could be scored in some round; the choice of "
                f"round {kept} and of its background says little"
            )
        result: dict[str, Any] = {
            "round_index": kept,
            "round_by": settings.round,
            "background_by": background_by,
            "threshold": threshold,
            "rounds": steps,
        }
        stats: dict[str, Any] = {"round": kept, "threshold": threshold}
        chosen = mask
        if tries:
            candidates = background_candidates(mask, threshold, settings.strengths)
            means, streamed = _try_candidates(context, manifest, artifact, cams[kept], kept, candidates)
            stats |= streamed
            if any(means):  # no image could be scored where all are 0
                chosen = candidates[int(np.argmax(means))]
            result["background"] = [
                {"alpha": each.alpha, "background_score": each.background_score, "score": round(mean, 6)}
                for each, mean in zip(candidates, means, strict=True)
            ]
        result["mask"] = chosen.model_dump(mode="json", include=_BACKGROUND)
        if has_background:
            stats["background"] = chosen.alpha if chosen.background == "power" else chosen.background_score
        artifact.folder.write_json(RESULT, result)
        child.log_metrics({"choose_round/round": float(kept), "choose_round/threshold": threshold})
        child.log_text(RESULT, json.dumps(result, indent=2))
        return stats

    artifact = complete(
        context,
        name=FOLDER,
        stage="choose_round",
        inputs={
            "settings": settings.model_dump(mode="json", include=None if tries else {"round", "num_errors"}),
            "mask": mask.model_dump(mode="json", exclude={"alpha", "background_score"}) if tries else None,
            "manifest": manifest.fingerprint,
            "cams": [round_cams.output_fingerprint for round_cams in cams],
        },
        work=work,
    )
    result = artifact.folder.read_json(RESULT)
    chosen = mask.model_copy(update=result["mask"]) if tries else mask
    return Choice(artifact, result["round_index"], chosen)


def choose_round(scores: Sequence[dict[str, Any]], settings: ChoiceSettings) -> tuple[list[dict[str, Any]], int]:
    """(what was seen of each round, index of the round that is kept).

    scores: the label-free part of every round's scores.json. Compared are the images that both rounds scored, each
    round at its own best threshold.
    """
    steps, kept = [], 0
    for index, score in enumerate(scores):
        ids = sorted(set(score["images"]) & set(scores[kept]["images"]))
        new = np.array([score["images"][image_id] for image_id in ids])
        old = np.array([scores[kept]["images"][image_id] for image_id in ids])
        better = index > 0 and clearly_better(new, old, settings.num_errors)
        differences = new - old
        error = float(differences.std(ddof=1) / math.sqrt(len(ids))) if len(ids) > 1 else 0.0
        steps.append(
            {
                **score["best"],
                "num_images": len(ids),
                "compared_with": kept,
                "difference": round(float(differences.mean()), 6) if ids else 0.0,
                "standard_error": round(error, 6),
                "clearly_better": better,
            }
        )
        if better:
            kept = index
    return steps, len(scores) - 1 if settings.round == "last" else kept


def background_candidates(
    mask: PseudoMaskSettings, threshold: float, strengths: Sequence[float]
) -> list[PseudoMaskSettings]:
    """`mask` with the background that breaks even with a map at threshold x strength, for each strength.

    A threshold outside (0, 1) says nothing, and leaves `mask` as it is.
    """
    levels = [threshold * strength for strength in strengths]
    if not all(0 < level < 1 for level in levels):
        return [mask]
    if mask.background == "constant":
        return [mask.model_copy(update={"background_score": level}) for level in levels]
    # (1 - level)^alpha = level
    return [mask.model_copy(update={"alpha": math.log(level) / math.log(1 - level)}) for level in levels]


def _try_candidates(
    context: StageContext,
    manifest: Manifest,
    artifact: Artifact,
    cams: Artifact,
    round_index: int,
    candidates: list[PseudoMaskSettings],
) -> tuple[list[float], dict[str, Any]]:
    """The mean score of each candidate over the images that could be scored, and the stream's stats."""
    experiment = context.experiment
    num_sampled = experiment.for_round(round_index).cams.num_label_free
    sample = sample_ids(manifest, num_sampled)
    whole, num_masks = [image_id for of_shard in sample.values() for image_id in of_shard], experiment.choice.num_masks
    ids = frozenset(whole[:: max(1, len(whole) // num_masks)][:num_masks])
    scores: dict[str, list[float]] = {}

    def fold(summary: ShardSummary) -> None:
        scores.update(summary.stats["scores"])

    total = manifest.num_rows_in(sample)
    with context.progress.stage("choose background", total=total, unit="images") as bar:
        summaries = map_shards(
            ChoiceWorker,
            {"sample": ids, "candidates": candidates},
            inputs={"manifest": manifest.folder, "cams": cams.folder},
            columns={"manifest": COLUMNS},
            shards=sorted(sample),
            output=artifact.folder,
            settings=experiment.stream.model_copy(update={"gpus_per_actor": 0.0}),
            bar=bar,
            stage="choose_round",
            fold=fold,
        )
    table = np.array([scores[image_id] for image_id in sorted(scores)]).reshape(len(scores), len(candidates))
    means = table.mean(axis=0) if len(table) else np.zeros(len(candidates))
    return [float(mean) for mean in means], stream_stats(summaries)
