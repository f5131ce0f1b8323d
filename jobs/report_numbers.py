"""What a finished or half-finished run says of itself in numbers, read from its markers and result files."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Storage
from jobs.manifest import Manifest
from jobs.quarantine import read_bad
from subcat_core.classes import ClassTable

_ROUND_STAGES = (
    ("train_classifier", "classifier"),
    ("make_cams", "cams"),
    ("extract_features", "features"),
    ("cluster_features", "subcategories"),
)
_SELF_TRAINING_STAGES = (
    ("predict_train", "masks"),
    ("train_segmenter", "segmenter"),
    ("predict", "predictions"),
    ("evaluate", "evaluation"),
)
_LAST_STAGES = (
    ("choose_round", "choice"),
    ("make_train_cams", "cams"),
    ("make_affinity_labels", "affinity_labels"),
    ("train_affinity", "affinity"),
    ("make_pseudo_masks", "pseudo_masks"),
    ("train_segmenter", "segmenter"),
    ("predict", "predictions"),
    ("evaluate", "evaluation"),
    ("cut_supervised_masks", "supervised/masks"),
    ("train_supervised", "supervised/segmenter"),
    ("predict_supervised", "supervised/predictions"),
    ("evaluate_supervised", "supervised/evaluation"),
)


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """One finished stage: what its marker holds. round_index: None outside rounds. folder: below the run's output."""

    stage: str
    round_index: int | None
    folder: str
    stats: dict[str, Any]
    finished_at: str
    code_version: str


@dataclasses.dataclass(frozen=True)
class BadImage:
    """A quarantined image and why."""

    stage: str
    image_id: str
    uri: str
    reason: str


@dataclasses.dataclass(frozen=True)
class RunNumbers:
    """Everything the page says in numbers; what is not there yet, or not known, is missing from the dicts or None.

    num_images, num_masks: by split. cams, classifiers, subcategories: by round_index. Scores as in `scores.json`.
    """

    classes: ClassTable
    num_images: dict[str, int]
    num_masks: dict[str, int]
    stages: list[StageRecord]
    cams: dict[int, dict[str, Any]]
    classifiers: dict[int, dict[str, Any]]
    subcategories: dict[int, dict[str, Any]]
    choice: dict[str, Any] | None
    """choice.json: the round that was chosen and why."""
    affinity: dict[str, Any] | None
    pseudo_masks: dict[str, Any] | None
    segmenter: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    yardstick: dict[str, Any] | None
    """result.json of the segmenter that full masks train."""
    supervised: dict[str, Any] | None
    """Scores of the segmenter that full masks trained."""
    self_training: dict[str, dict[str, Any]]
    """Title -> scores of the masks and segmenters of self-training before the last segmenter."""
    bad_images: list[BadImage]
    num_bad: int

    @property
    def final_round(self) -> int | None:
        """The round that masks are made from; the last one so far where none is chosen yet; None before any."""
        if self.choice is not None:
            return int(self.choice["round_index"])
        return max(self.cams, default=None)

    def stage(self, name: str, round_index: int | None = None) -> StageRecord | None:
        """The record of a stage, or None while it is not complete."""
        found = [record for record in self.stages if (record.stage, record.round_index) == (name, round_index)]
        return found[0] if found else None


def read_numbers(storage: Storage, manifest: Manifest, num_rounds: int, max_bad: int) -> RunNumbers:
    """Read a run's output. num_rounds: R, so rounds 0..R are looked for. max_bad: rows of bad images to keep."""
    rounds = range(num_rounds + 1)
    stages = _stages(storage, num_rounds)
    bad, num_bad = _bad_images(storage, stages, max_bad)
    return RunNumbers(
        classes=manifest.classes,
        num_images={split: manifest.num_rows(split) for split in manifest.splits},
        num_masks={split: manifest.num_masks(split) for split in manifest.splits},
        stages=stages,
        cams=_by_round(storage, rounds, "cams/scores.json"),
        classifiers=_by_round(storage, rounds, "classifier/result.json"),
        subcategories=_by_round(storage, rounds, "subcategories/result.json"),
        choice=read_optional(storage, "choice/choice.json"),
        affinity=read_optional(storage, "affinity/result.json"),
        pseudo_masks=read_optional(storage, "pseudo_masks/scores.json"),
        segmenter=read_optional(storage, "segmenter/result.json"),
        evaluation=read_optional(storage, "evaluation/scores.json"),
        yardstick=read_optional(storage, "supervised/segmenter/result.json"),
        supervised=read_optional(storage, "supervised/evaluation/scores.json"),
        self_training=_self_training(storage),
        bad_images=bad,
        num_bad=num_bad,
    )


def read_optional(storage: Storage, name: str) -> Any:
    """The JSON of a file, or None where there is none."""
    try:
        return storage.read_json(name)
    except FileNotFoundError:
        return None


def _by_round(storage: Storage, rounds: range, name: str) -> dict[int, dict[str, Any]]:
    found = {index: read_optional(storage, f"rounds/{index:02d}/{name}") for index in rounds}
    return {index: value for index, value in found.items() if value is not None}


def _self_training(storage: Storage) -> dict[str, dict[str, Any]]:
    kinds = (("Masks", "masks"), ("Segmenter", "evaluation"))
    found = {
        f"{title}, self-training {int(index)}": read_optional(storage, f"self_training/{index}/{folder}/scores.json")
        for index in storage.list_folders("self_training")
        for title, folder in kinds
    }
    return {title: scores for title, scores in found.items() if scores is not None}


def _stages(storage: Storage, num_rounds: int) -> list[StageRecord]:
    """Records of the complete stages, in the order in which they ran."""
    steps: list[tuple[str, int | None, str]] = [("prepare", None, "manifest"), ("cut_tiles", None, "tiles")]
    for index in range(num_rounds + 1):
        steps += [(stage, index, f"rounds/{index:02d}/{folder}") for stage, folder in _ROUND_STAGES]
    again = storage.list_folders("self_training")
    steps += [
        (f"{stage}, self-training {int(index)}", None, f"self_training/{index}/{folder}")
        for index in again
        for stage, folder in _SELF_TRAINING_STAGES
    ]
    steps += [(stage, None, folder) for stage, folder in _LAST_STAGES]
    records = []
    for stage, round_index, folder in steps:
        marker = read_optional(storage, f"{folder}/marker.json")
        if marker is not None:
            finished, version = str(marker.get("finished_at") or ""), str(marker.get("code_version") or "")
            records.append(StageRecord(stage, round_index, folder, dict(marker.get("stats") or {}), finished, version))
    return records


def _bad_images(storage: Storage, stages: list[StageRecord], limit: int) -> tuple[list[BadImage], int]:
    """The first bad images of the whole run, each once a stage, and how many there are."""
    first: dict[tuple[str, str], BadImage] = {}
    ids: dict[str, list[pa.Array]] = {}
    for record in stages:
        bad = read_bad(storage.child(record.folder), record.stats)
        ids.setdefault(record.stage, []).extend(bad["image_id"].chunks)
        for row in bad.slice(0, limit).to_pylist():
            image = BadImage(record.stage, row["image_id"], row["uri"], row["reason"])
            first.setdefault((record.stage, image.image_id), image)
    num_bad = sum(pc.count_distinct(pa.chunked_array(chunks, pa.string())).as_py() for chunks in ids.values())
    return list(first.values())[:limit], num_bad
