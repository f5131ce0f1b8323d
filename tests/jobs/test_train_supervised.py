"""The yardstick: the same segmenter on the full masks of the same images, beside the one from tags."""

from pathlib import Path

import pytest

from cluster.progress import Progress
from cluster.storage import Storage
from cluster.tracking import Tracker
from jobs import pipeline, results
from jobs.config import Experiment, parse_experiment
from jobs.context import StageContext
from tests.jobs.conftest import small_values


def _run(experiment: Experiment, last_stage: str | None = None) -> Storage:
    storage = Storage(experiment.output)
    with Tracker(experiment.tracking, storage, experiment.name) as tracker:
        pipeline.run(StageContext(experiment, storage, Progress(), tracker), last_stage)
    return storage


def test_it_trains_on_the_annotated_masks_of_the_images_that_have_a_pseudo_mask(
    tiny_table: Path, tmp_path: Path
) -> None:
    values = small_values(tiny_table, str(tmp_path / "out"), supervised={})
    storage = _run(parse_experiment(values))
    tags, full = storage.read_json("segmenter/result.json"), storage.read_json("supervised/segmenter/result.json")
    assert full["num_images"] == tags["num_images"] > 0
    assert full["history"] != tags["history"]  # the same batches and weights, other masks
    protocol = storage.read_json("supervised/evaluation/scores.json")["protocol"]
    assert (protocol["supervision"], protocol["num_train_images"]) == ("full masks", 12)
    assert storage.read_json("evaluation/scores.json")["protocol"]["supervision"] == "image tags"
    lines = results.scores_of_run(storage)
    from_tags, from_masks = (lines[(f"segmenter{name}", "val", "mIoU")] for name in ("", " from full masks"))
    assert from_tags is not None
    assert from_masks is not None
    assert lines[("tags / full masks", "val", "ratio")] == pytest.approx(from_tags / from_masks)
    assert "full masks" in storage.read_bytes("report/index.html").decode()

    # Pseudo masks that are the annotated masks give the yardstick itself, to the bit.
    for name in storage.list_names("pseudo_masks/png"):
        storage.write_bytes(
            f"pseudo_masks/png/{name}", (tiny_table.parent / "masks" / name.split("-")[-1]).read_bytes()
        )
    storage.delete_tree("segmenter")
    for folder in ("predictions", "evaluation", "supervised"):
        storage.delete_tree(folder)
    _run(parse_experiment(values))
    again = storage.read_json("segmenter/result.json"), storage.read_json("supervised/segmenter/result.json")
    losses = [[epoch["loss"] for epoch in result["history"]] for result in again]
    assert losses[0] == losses[1] == [epoch["loss"] for epoch in full["history"]]


def test_masks_of_a_folder_replace_those_of_the_manifest(tiny_table: Path, tmp_path: Path) -> None:
    values = small_values(tiny_table, str(tmp_path / "out"))
    values["supervised"] = {"masks_folder": str(tmp_path / "empty")}
    with pytest.raises(ValueError, match=r"supervised\.masks_folder: .*no such file"):
        _run(parse_experiment(values))


def test_no_annotated_mask_is_told(tiny_table: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    lines = [line.rpartition(",")[0] for line in tiny_table.read_text().splitlines()]
    table.write_text("\n".join(line.replace("images/", f"{tiny_table.parent}/images/") for line in lines) + "\n")
    values = small_values(table, str(tmp_path / "out"), supervised={})
    with pytest.raises(ValueError, match="no image of the train split has an annotated mask"):
        _run(parse_experiment(values))


def test_a_stage_that_the_config_lacks_is_refused_before_anything_runs(tiny_table: Path, tmp_path: Path) -> None:
    experiment = parse_experiment(small_values(tiny_table, str(tmp_path / "out")))
    with pytest.raises(ValueError, match="train_supervised: this config has no such stage"):
        _run(experiment, "train_supervised")
    assert not Storage(experiment.output).exists("config.json")
