"""CAM -> [random walk] -> background score -> dense CRF -> pseudo mask, in one stream: only masks are kept.

Reads:   manifest (train), CAMs of the chosen round, with [affinity] the affinity net
Writes:  pseudo_masks: png/<image_id>.png (indexed, with palette), part-*.parquet (schema MASKS); scores.json; with
         pseudo_masks.write_confidence also confidence/<image_id>.png (8-bit grey, 255 for 1)
Runs on: a fixed pool of Ray Data actors, a shard at a time, on CPUs, but for the net; in process with
         stream.num_actors = 0
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.artifacts import Artifact
from cluster.storage import Storage
from cluster.streams import BadRow, ShardOutput, iter_images, map_shards
from cluster.tracking import ChildRun
from jobs.affinity_settings import AffinitySettingsOfAKind
from jobs.cam_tables import COLUMNS, read_cams
from jobs.context import StageContext, complete
from jobs.manifest import Manifest
from jobs.protocol import TAGS, Protocol
from jobs.tile_images import TILE_COLUMNS
from jobs.tile_masks import TileMaskWorker
from jobs.train_affinity import load_affinity
from jobs.training_masks import CONFUSIONS, MaskScores, MaskShard
from subcat_core.affinity_net import AffinityNet
from subcat_core.affinity_walk import (
    IrnWalkSettings,
    PsaWalkSettings,
    WalkedScores,
    walk_by_boundaries,
    walk_by_features,
)
from subcat_core.classes import ClassTable
from subcat_core.pseudo_mask import (
    PseudoMask,
    PseudoMaskSettings,
    labels_of_scores,
    make_pseudo_mask,
    mask_of_scores,
)
from subcat_core.settings import Settings


class PseudoMaskStageSettings(Settings):
    """How maps become masks."""

    mask: PseudoMaskSettings = PseudoMaskSettings()
    """With [affinity], the walk brings its own background (affinity.walk), and the one named here is not used."""
    write_confidence: bool = False
    """Also keep how likely each pixel's class is, one 8-bit PNG an image: what segmenter.loss = "confidence" needs. For
    the masks of [self_training] too."""

    def fingerprinted(self) -> dict[str, Any]:
        """What decides the output; younger than runs that are there, write_confidence counts where it is on."""
        return self.model_dump(mode="json", exclude=set() if self.write_confidence else {"write_confidence"})


@dataclasses.dataclass(frozen=True)
class TrainedAffinity:
    """Where the trained net is, and its settings."""

    folder: Storage
    settings: AffinitySettingsOfAKind


class PseudoMaskWorker:
    """One actor: turns a CAM shard into PNG files and their index."""

    def __init__(
        self,
        *,
        output: Storage,
        classes: ClassTable,
        settings: PseudoMaskStageSettings,
        affinity: TrainedAffinity | None = None,
    ) -> None:
        self.output = output
        self.classes = classes
        self.settings = settings
        self.affinity = affinity
        self.device = torch.device("cuda" if affinity is not None and torch.cuda.is_available() else "cpu")
        self.net = None if affinity is None else load_affinity(affinity.folder, affinity.settings).to(self.device)

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        cams = read_cams(inputs["cams"])
        keys = confusion_keys(self.affinity)
        shard = MaskShard(self.output, self.classes, keys, write_confidence=self.settings.write_confidence)
        for row, image in iter_images(inputs["manifest"]):
            if isinstance(image, BadRow):
                shard.bad.append(image)
                continue
            if row["image_id"] not in cams:
                shard.bad.append(BadRow(row["image_id"], row["uri"], "no CAM was made for this image; see make_cams"))
                continue
            class_indices, cam = cams[row["image_id"]]
            pseudo, walked = self._mask(cam.astype(np.float32), class_indices, image)
            shard.write(row["image_id"], pseudo)
            labels = dict.fromkeys(keys, pseudo.labels)  # an image without tags is background all along
            if walked is not None:
                labels["confusion_before_walk"] = labels_of_scores(walked.before, class_indices)
                labels["confusion_before_crf"] = labels_of_scores(walked.after, class_indices)
            shard.score(row, labels)
        return shard.result()

    def _mask(
        self, cam: np.ndarray, class_indices: list[int], image: np.ndarray
    ) -> tuple[PseudoMask, WalkedScores | None]:
        """The pseudo mask, and the scores around the walk where there was one."""
        if self.affinity is None or not class_indices:
            has_background = self.classes.has_background
            return make_pseudo_mask(cam, class_indices, image, self.settings.mask, has_background=has_background), None
        walk = self.affinity.settings.walk
        if isinstance(self.net, AffinityNet):
            assert isinstance(walk, PsaWalkSettings)
            walked = walk_by_features(self.net, cam, image, walk, self.device)
        else:
            assert self.net is not None
            assert isinstance(walk, IrnWalkSettings)
            walked = walk_by_boundaries(self.net, cam, image, walk, self.device)
        return mask_of_scores(walked.after, class_indices, image, self.settings.mask), walked


def confusion_keys(affinity: object | None) -> list[str]:
    """Which matrices a shard has; with a walk, also those of the maps before it and of its result before the CRF."""
    return ["confusion"] if affinity is None else list(CONFUSIONS)


def run(
    context: StageContext,
    manifest: Manifest,
    cams: Artifact,
    mask: PseudoMaskSettings,
    affinity: Artifact | None = None,
    tiles: Manifest | None = None,
) -> Artifact:
    """Pseudo masks of the train split. context: with the settings of the chosen round. mask: as choose_round has it.

    affinity: of `train_affinity`, where there is [affinity]. tiles: of the manifest's images, where the CAMs are theirs
    (tile_masks.py); there is no [affinity] then.
    """
    settings = context.experiment.pseudo_masks.model_copy(update={"mask": mask})
    of_net = context.experiment.affinity
    trained = None if affinity is None or of_net is None else TrainedAffinity(affinity.folder, of_net)
    cut = context.experiment.prepare.segmenter_sees_tiles
    stream = context.experiment.stream
    if trained is None:
        stream = stream.model_copy(update={"gpus_per_actor": 0.0})

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        scores = MaskScores(manifest, confusion_keys(trained))
        with context.progress.stage("make pseudo masks", total=manifest.num_rows("train"), unit="images") as bar:
            inputs = {"manifest": manifest.folder}
            options: dict[str, Any] = {"settings": settings, "affinity": trained}
            if tiles is not None:
                inputs = {"images": manifest.folder, "manifest": tiles.folder}
                options = {"settings": mask, "cut": cut, "write_confidence": settings.write_confidence}
            summaries = map_shards(
                PseudoMaskWorker if tiles is None else TileMaskWorker,
                {"output": artifact.folder, "classes": manifest.classes, **options},
                inputs={**inputs, "cams": cams.folder},
                columns={"manifest": COLUMNS if tiles is None else [*COLUMNS, *TILE_COLUMNS], "images": COLUMNS},
                shards=(tiles or manifest).shard_names("train"),
                output=artifact.folder,
                settings=stream,
                bar=bar,
                stage="make_pseudo_masks",
                fold=scores.add,
            )
        details: dict[str, Any] = {"min_confidence": mask.min_confidence, **context.experiment.prepare.protocol()}
        if trained is not None:
            details["random_walk"] = {"kind": trained.settings.kind, **trained.settings.walk.model_dump(mode="json")}
            details["before_walk"] = "argmax of the CAMs against the walk's background"
            details["before_crf"] = "argmax of what the walk gives"
        background = f" and background {_background(mask, trained)}" if manifest.classes.has_background else " alone"
        protocol = Protocol(
            supervision=TAGS,
            masks=context.experiment.evaluation.masks,
            tags="used: only the tagged classes compete",
            threshold=f"argmax over the tagged classes{background}, before 255 is set",
            crf=mask.crf,
            scales=context.experiment.cams.cam.scales,
            flip=context.experiment.cams.cam.flip,
            base_px=context.experiment.cams.cam.base_px,
            weights=context.experiment.classifier.backbone.weights,
            rng_seed=context.experiment.rng_seed,
            details=details,
        )
        scores.write(artifact, child, "make_pseudo_masks", protocol)
        return scores.stats(summaries)

    inputs: dict[str, Any] = {
        "settings": settings.fingerprinted(),
        "manifest": manifest.fingerprint,
        "cams": cams.output_fingerprint,
    }
    if affinity is not None and of_net is not None:  # a key of its own, so that runs without stay as they are
        inputs["affinity"] = {"net": affinity.output_fingerprint, "walk": of_net.walk.model_dump(mode="json")}
    if cut:
        inputs["masks_of_tiles"] = True
    return complete(context, name="pseudo_masks", stage="make_pseudo_masks", inputs=inputs, work=work)


def _background(mask: PseudoMaskSettings, trained: TrainedAffinity | None) -> str:
    """The background score in words."""
    if trained is not None:
        walk = trained.settings.walk
        return (
            f"(1 - max)^{walk.alpha}, walks along"
            if isinstance(walk, PsaWalkSettings)
            else (f"constant {walk.background_score}, beside the walk's result")
        )
    return f"(1 - max)^{mask.alpha:.3g}" if mask.background == "power" else f"constant {mask.background_score:.3g}"
