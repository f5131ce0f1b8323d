"""Self-training: the segmenter's own masks of the training images, within their tags, train the next segmenter.

Reads:   manifest (train, with tags), the segmenter of the round before
Writes:  self_training/NN/masks, as make_pseudo_masks does: png/<image_id>.png, part-*.parquet, scores.json
Runs on: as predict

Made where `[self_training]` stands in the config. Its rounds have numbers of their own: the segmenter of round 0 learns
from the pseudo masks, that of round n from the masks that the one of round n - 1 makes, each from the pretrained
weights again. The last one's folders are those of a run without self-training (segmenter, predictions, evaluation), so
all that comes after sees it; the others', with their own predictions and scores, stand in self_training/NN.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Artifact
from cluster.storage import Storage
from cluster.streams import BadRow, ShardOutput, map_shards
from cluster.tracking import ChildRun
from jobs.cam_tables import COLUMNS
from jobs.context import StageContext, complete
from jobs.manifest import Manifest
from jobs.predict import PredictSettings, PredictWorker
from jobs.protocol import TAGS, Protocol
from jobs.train_segmenter import trained_px
from jobs.training_masks import MaskScores, MaskShard
from subcat_core.classes import ClassTable, to_class_ids
from subcat_core.pseudo_mask import MaskSettings, PseudoMask, mask_of_probability
from subcat_core.settings import Settings

if TYPE_CHECKING:
    from jobs.config import Experiment

FOLDER = "self_training"
STAGE = "predict_train"


class SelfTrainingSettings(Settings):
    """How often, and how the segmenter's probabilities become masks; it looks at images as [predict] says."""

    rounds: int = Field(default=1, ge=1, le=9)
    """Trainings after the one on pseudo masks."""
    mask: MaskSettings = MaskSettings()
    """The CRF on the segmenter's probabilities and the limit below which a pixel is ignored; predict.crf does not
    count here."""


@dataclasses.dataclass(frozen=True)
class SegmenterRound:
    """One training of the segmenter. index: in self-training, 0 on pseudo masks; the only one is also the last."""

    index: int
    last: bool

    @property
    def round_index(self) -> int | None:
        """Of the stages: none for the last, whose folders are the run's own."""
        return None if self.last else self.index

    def folder(self, name: str) -> str:
        """Where the round keeps its segmenter, predictions and evaluation."""
        return name if self.last else f"{FOLDER}/{self.index:02d}/{name}"


def masks_folder(index: int) -> str:
    """Where the masks lie that train a round: `self_training/01/masks`."""
    return f"{FOLDER}/{index:02d}/masks"


def segmenter_rounds(experiment: Experiment) -> list[SegmenterRound]:
    """The trainings of the segmenter in order: one without self-training."""
    last = 0 if experiment.self_training is None else experiment.self_training.rounds
    return [SegmenterRound(index, index == last) for index in range(last + 1)]


class SelfTrainingWorker:
    """One actor: holds the segmenter, turns a shard of training images with tags into masks and their index.

    classes: of the manifest, which knows what values of ground truth to skip; the segmenter's own file does not.
    """

    def __init__(
        self,
        *,
        segmenter: Storage,
        output: Storage,
        classes: ClassTable,
        predict: PredictSettings,
        mask: MaskSettings,
        write_confidence: bool = False,
    ) -> None:
        self.output = output
        self.classes = classes
        self.mask = mask
        self.write_confidence = write_confidence
        self.predictor = PredictWorker(
            segmenter=segmenter, output=output, settings=predict.model_copy(update={"crf": mask.crf})
        )

    def __call__(self, inputs: dict[str, pa.Table]) -> ShardOutput:
        shard = MaskShard(self.output, self.classes, write_confidence=self.write_confidence)
        for row, image in self.predictor.images(inputs["manifest"]):
            if isinstance(image, BadRow):
                shard.bad.append(image)
                continue
            pseudo = self._mask(image, row["labels"] or [])
            shard.write(row["image_id"], pseudo)
            shard.score(row, {"confusion": pseudo.labels})
        return shard.result()

    def _mask(self, image: np.ndarray, labels: list[int]) -> PseudoMask:
        """Tagged classes and background compete; an image without a tag is background, or where there is none 255."""
        has_background = self.classes.has_background
        if labels:
            mask, chosen = self.predictor.predict(image, to_class_ids(np.asarray(labels)).tolist())
        else:
            mask = np.zeros(image.shape[:2], np.uint8)
            chosen = np.full(image.shape[:2], float(has_background), np.float32)
        return mask_of_probability(mask, chosen, self.mask, has_background=has_background)


def run(context: StageContext, manifest: Manifest, segmenter: Artifact, index: int) -> Artifact:
    """Masks of the train split for the training of self-training round `index`. segmenter: of the round before."""
    experiment = context.experiment
    assert experiment.self_training is not None
    mask = experiment.self_training.mask

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        scores = MaskScores(manifest)
        with context.progress.stage("predict train", total=manifest.num_rows("train"), unit="images") as bar:
            summaries = map_shards(
                SelfTrainingWorker,
                {
                    "segmenter": segmenter.folder,
                    "output": artifact.folder,
                    "classes": manifest.classes,
                    "predict": experiment.predict,
                    "mask": mask,
                    "write_confidence": experiment.pseudo_masks.write_confidence,
                },
                inputs={"manifest": manifest.folder},
                columns={"manifest": COLUMNS},
                shards=manifest.shard_names("train"),
                output=artifact.folder,
                settings=experiment.stream,
                bar=bar,
                stage=STAGE,
                fold=scores.add,
            )
        scores.write(artifact, child, STAGE, _protocol(experiment, manifest, index))
        return scores.stats(summaries)

    return complete(
        context,
        name=masks_folder(index),
        stage=STAGE,
        round_index=index,
        inputs={
            "mask": mask.model_dump(mode="json"),
            "predict": experiment.predict.views(),
            "manifest": manifest.fingerprint,
            "segmenter": segmenter.output_fingerprint,
            **({"write_confidence": True} if experiment.pseudo_masks.write_confidence else {}),
        },
        work=work,
    )


def _protocol(experiment: Experiment, manifest: Manifest, index: int) -> Protocol:
    assert experiment.self_training is not None
    predict, mask = experiment.predict, experiment.self_training.mask
    background = " and background" if manifest.classes.has_background else ""
    return Protocol(
        supervision=TAGS,
        masks=experiment.evaluation.masks,
        tags="used: only the tagged classes compete",
        threshold=f"argmax over the tagged classes{background}, before 255 is set",
        crf=mask.crf,
        scales=predict.scales,
        flip=predict.flip,
        base_px=predict.base_px or trained_px(experiment.segmenter),
        weights=experiment.segmenter.model.backbone.weights,
        rng_seed=experiment.rng_seed,
        details={
            "merge": predict.merge,
            "windows": predict.windows_text(),
            "min_confidence": mask.min_confidence,
            "made_by": f"the segmenter of self-training round {index - 1}",
            **experiment.prepare.protocol(),
        },
    )
