"""Self-training: the segmenter's own masks within the tags train the next one, which all later stages see."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from cluster.progress import Progress
from cluster.storage import Storage
from cluster.streams import ShardOutput
from cluster.tracking import Tracker
from jobs import pipeline, predict, results, summary
from jobs.config import ConfigError, Experiment, parse_experiment
from jobs.context import StageContext
from jobs.predict import PredictSettings
from jobs.self_training import SelfTrainingWorker, segmenter_rounds
from subcat_core.classes import IGNORE, ClassTable
from subcat_core.pseudo_mask import MaskSettings
from subcat_core.segmenter import Segmenter
from tests.jobs.conftest import small_values


class Colours(Segmenter):
    """Logits 20 * (0.5, red, green) by pixel: background unless a channel is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Identity()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float() / 255
        return torch.stack([torch.full_like(images[:, 0], 0.5), images[:, 0], images[:, 1]], dim=1) * 20


def _worker(folder: Path, monkeypatch: pytest.MonkeyPatch, *, has_background: bool, **mask: Any) -> SelfTrainingWorker:
    classes = ClassTable(("red", "green"), has_background=has_background)
    monkeypatch.setattr(predict, "load_segmenter", lambda storage: (Colours().eval(), classes, None))
    storage, settings = Storage(str(folder)), MaskSettings.model_validate({"crf": "none", **mask})
    of_masks = ClassTable(classes.names, {0: 0, 1: 1, 9: IGNORE}, has_background=has_background)
    return SelfTrainingWorker(
        segmenter=storage, output=storage, classes=of_masks, predict=PredictSettings(), mask=settings
    )


def _image(folder: Path) -> dict[str, Any]:
    """Dark, red and green thirds, with an annotated mask that calls the green one background."""
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:, 3:6, 0], pixels[:, 6:, 1] = 255, 255
    truth = np.repeat(np.array([[0, 1, 0]], np.uint8), 3, axis=1).repeat(6, axis=0)
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(truth).save(folder / "truth.png")
    return {"uri": str(folder / "image.png"), "height_px": 6, "width_px": 9, "mask_uri": str(folder / "truth.png")}


def _mask(folder: Path, image_id: str) -> list[int]:
    mask = np.array(Image.open(io.BytesIO((folder / f"png/{image_id}.png").read_bytes())))
    assert (mask == mask[:1]).all()
    return [int(value) for value in mask[0, ::3]]


def _counts(output: ShardOutput) -> list[list[int]]:
    return json.loads(output.stats["confusion"])["counts"]


def test_only_tags_and_background_compete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _worker(tmp_path, monkeypatch, has_background=True)
    image = _image(tmp_path)
    tags = {"both": [0, 1], "red": [0], "none": []}
    rows = [{"image_id": name, **image, "labels": labels} for name, labels in tags.items()]
    output = worker({"manifest": pa.Table.from_pylist(rows)})
    assert {name: _mask(tmp_path, name) for name in tags} == {"both": [0, 1, 2], "red": [0, 1, 0], "none": [0, 0, 0]}
    assert (output.stats["num_scored"], output.num_rows, output.bad) == (3, 3, [])
    # Pixels by (truth, mask): "both" calls 18 green, "none" misses 18 red.
    assert _counts(output) == [[36 + 18 + 36, 0, 18], [18, 36, 0], [0, 0, 0]]
    assert output.table is not None
    assert output.table["class_ids"].to_pylist() == [[1, 2], [1], []]


def test_pixels_below_the_limit_are_ignored_but_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Black has 1 / (1 + 2 exp(-10)) = 0.99991, the bright thirds 1 / (1 + exp(-10) + exp(-20)) = 0.99995.
    worker = _worker(tmp_path, monkeypatch, has_background=True, min_confidence=0.99993)
    row = {"image_id": "a", **_image(tmp_path), "labels": [0, 1]}
    output = worker({"manifest": pa.Table.from_pylist([row])})
    assert _mask(tmp_path, "a") == [IGNORE, 1, 2]
    assert _counts(output)[0] == [18, 0, 18]


def test_ground_truth_is_read_by_the_manifests_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _worker(tmp_path, monkeypatch, has_background=True)  # the segmenter's own table knows no value 9
    row = {"image_id": "a", **_image(tmp_path), "labels": [0, 1]}
    Image.fromarray(np.full((6, 9), 9, np.uint8)).save(tmp_path / "truth.png")
    output = worker({"manifest": pa.Table.from_pylist([row])})
    assert output.bad == []
    assert _counts(output) == [[0, 0, 0]] * 3


def test_an_image_without_tags_or_background_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _worker(tmp_path, monkeypatch, has_background=False)
    image = {**_image(tmp_path), "mask_uri": None}
    rows = [{"image_id": name, **image, "labels": labels} for name, labels in (("red", [0]), ("none", []))]
    worker({"manifest": pa.Table.from_pylist(rows)})
    assert _mask(tmp_path, "red") == [1, 1, 1]
    assert _mask(tmp_path, "none") == [IGNORE] * 3


def _run(experiment: Experiment) -> Storage:
    storage = Storage(experiment.output)
    with Tracker(experiment.tracking, storage, experiment.name) as tracker:
        pipeline.run(StageContext(experiment, storage, Progress(), tracker))
    return storage


def test_the_last_segmenter_stands_where_all_look_and_the_first_beside_it(tiny_table: Path, tmp_path: Path) -> None:
    mask = {"crf": "none"}
    values = small_values(tiny_table, str(tmp_path / "out"), self_training={"rounds": 1, "mask": mask})
    values["pseudo_masks"] = {"mask": {"crf": "none"}, "write_confidence": True}
    values["segmenter"]["loss"] = "confidence"
    experiment = parse_experiment(values)
    storage = _run(experiment)
    steps = [(step.stage, step.round_index, step.folder) for step in pipeline.plan(experiment)]
    at = steps.index(("make_pseudo_masks", None, "pseudo_masks"))
    assert steps[at + 1 : -1] == [
        ("train_segmenter", 0, "self_training/00/segmenter"),
        ("predict", 0, "self_training/00/predictions"),
        ("evaluate", 0, "self_training/00/evaluation"),
        ("predict_train", 1, "self_training/01/masks"),
        ("train_segmenter", None, "segmenter"),
        ("predict", None, "predictions"),
        ("evaluate", None, "evaluation"),
    ]
    # Each learns from the one before: what it read is in its marker.
    read = [storage.read_json(f"{folder}/marker.json") for _, _, folder in steps[at:-1]]
    outputs = [marker["output"] for marker in read]
    assert [read[1]["inputs"]["pseudo_masks"], read[5]["inputs"]["pseudo_masks"]] == [outputs[0], outputs[4]]
    assert read[4]["inputs"]["segmenter"] == outputs[1]
    assert [read[2]["inputs"]["segmenter"], read[6]["inputs"]["segmenter"]] == [outputs[1], outputs[5]]
    first, last = (
        storage.read_json(f"{folder}/scores.json") for folder in ("self_training/00/evaluation", "evaluation")
    )
    masks = storage.read_json("self_training/01/masks/scores.json")
    assert [scores["protocol"]["self_training_round"] for scores in (first, last)] == [0, 1]
    for folder in ("pseudo_masks", "self_training/01/masks"):
        assert storage.list_names(f"{folder}/confidence") == storage.list_names(f"{folder}/png") != []
    assert masks["protocol"]["tags"] == "used: only the tagged classes compete"
    lines = results.scores_of_run(storage)
    assert lines[("segmenter of self-training, round 0", "val", "mIoU")] == first["splits"]["val"]["miou"]
    assert lines[("masks of self-training, round 1", "train", "mIoU")] == masks["splits"]["train"]["miou"]
    assert lines[("segmenter", "val", "mIoU")] == last["splits"]["val"]["miou"]
    assert "masks of self-training, round 1" in results.results_tables([experiment.output])
    found = [
        cells[0] for row in summary.summary_rows(storage, experiment) for cells in summary._scores(storage, row["step"])
    ]
    assert {"segmenter, self-training 0", "masks, self-training 1", "segmenter"} <= set(found)
    page = storage.read_bytes("report/index.html").decode()
    assert "Segmenter, self-training 0" in page
    assert "predict train, self-training 1" in page


def test_without_it_there_is_one_training_in_the_runs_own_folders(tiny_table: Path, tmp_path: Path) -> None:
    [only] = segmenter_rounds(parse_experiment(small_values(tiny_table, str(tmp_path))))
    assert (only.round_index, only.folder("segmenter")) == (None, "segmenter")


def test_tiles_of_the_segmenter_are_refused(tiny_table: Path, tmp_path: Path) -> None:
    values = small_values(tiny_table, str(tmp_path), self_training={})
    values["prepare"]["tiles"] = {"tile_px": 24, "stride_px": 24, "segmenter_sees": "tiles"}
    with pytest.raises(ConfigError, match=r"\[self_training\] with prepare.tiles.segmenter_sees"):
        parse_experiment(values)
