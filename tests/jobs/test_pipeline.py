"""The whole run: in process and through Ray, on a folder and on S3; skipped when complete; killed at any stage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import ArtifactMismatch
from cluster.progress import Progress
from cluster.storage import Storage
from cluster.tracking import Tracker
from jobs import pipeline
from jobs.config import Experiment, parse_experiment
from jobs.context import StageContext
from tests.conftest import S3_BUCKET
from tests.jobs.conftest import tiny_values

REPOSITORY = Path(__file__).resolve().parents[2]
Tiny = Callable[..., dict[str, Any]]


def _run(values: dict[str, Any], last_stage: str | None = None) -> tuple[Experiment, Storage]:
    experiment = parse_experiment(values)
    storage = Storage(experiment.output)
    with Tracker(experiment.tracking, storage, experiment.name) as tracker:
        pipeline.run(StageContext(experiment, storage, Progress(), tracker), last_stage)
    return experiment, storage


def _scores(storage: Storage) -> list[Any]:
    """Everything the final table says that is not a time or a memory."""
    names = ["rounds/00/cams", "rounds/01/cams", "pseudo_masks", "evaluation"]
    scores = [storage.read_json(f"{name}/scores.json") for name in names]
    return [*scores, storage.read_json("rounds/00/subcategories/result.json")]


def _folders(experiment: Experiment) -> list[str]:
    """Folders of the stages that have markers: all but the report, which is made again on every call."""
    return [step.folder for step in pipeline.plan(experiment) if step.stage != "report"]


def _check_complete(experiment: Experiment, storage: Storage) -> None:
    for folder in _folders(experiment):
        assert storage.exists(f"{folder}/marker.json"), folder
    assert b"<html" in storage.read_bytes("report/index.html")[:500].lower()
    assert len([name for name in storage.list_names("pseudo_masks/png") if name.endswith(".png")]) == 12
    assert len(storage.list_names("predictions/png")) == 4
    scores = storage.read_json("evaluation/scores.json")
    assert scores["splits"]["val"]["num_images"] == 4
    assert "not used" in scores["protocol"]["tags"]


def test_a_second_call_skips_everything(tiny: Tiny, finished_run: str, capfd: pytest.CaptureFixture[str]) -> None:
    experiment, storage = parse_experiment(tiny(output=finished_run)), Storage(finished_run)
    _check_complete(experiment, storage)
    markers = {folder: storage.read_bytes(f"{folder}/marker.json") for folder in _folders(experiment)}
    before = _scores(storage)
    capfd.readouterr()
    _run(tiny(output=finished_run))
    told = "".join(capfd.readouterr())
    assert told.count("complete, skipped") == len(markers)
    assert {folder: storage.read_bytes(f"{folder}/marker.json") for folder in markers} == markers
    assert _scores(storage) == before


def test_other_settings_in_the_same_folder_are_refused_by_name(tiny: Tiny) -> None:
    _run(tiny(), last_stage="prepare")
    values = tiny()
    values["prepare"]["rows_per_shard"] = 5
    with pytest.raises(ArtifactMismatch, match="rows_per_shard"):
        _run(values)


def test_a_mended_data_set_goes_on_in_the_same_folder(tiny: Tiny, tiny_table: Path, tmp_path: Path) -> None:
    good = tiny_table.read_text().replace("images/", f"{tiny_table.parent}/images/")
    good = good.replace("masks/", f"{tiny_table.parent}/masks/")
    table = tmp_path / "labels.csv"
    table.write_text(good + "nowhere.png,disc,train,\n")
    values = tiny()
    values["prepare"]["source"]["path"] = str(table)
    values["prepare"]["max_bad_frac"] = 0.0
    with pytest.raises(ValueError, match="nowhere"):
        _run(values, last_stage="prepare")
    table.write_text(good)
    _, storage = _run(values, last_stage="prepare")
    assert storage.read_json("manifest/marker.json")["stats"]["num_images"] == 16


def test_a_round_that_overrides_its_settings_trains_by_them(tiny: Tiny) -> None:
    values = tiny(round={"0": {"classifier": {"optimiser": {"epochs": 1}}, "kmeans": {"num_clusters": 3}}})
    _, storage = _run(values, last_stage="cluster_features")
    assert len(storage.read_json("rounds/00/classifier/result.json")["history"]) == 1
    assert storage.read_json("rounds/00/subcategories/result.json")["num_clusters"] == 3


def test_a_split_that_is_not_there_is_told_before_training(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"predict\.splits = 'test': no such split"):
        _run(tiny(predict={"splits": ["test"]}))


def test_stage_option_stops_after_the_stage(tiny: Tiny) -> None:
    _, storage = _run(tiny(), last_stage="cluster_features")
    assert storage.exists("rounds/00/subcategories/marker.json")
    assert not storage.exists("rounds/01/classifier/marker.json")


def test_through_ray_with_two_workers_on_s3(tiny: Tiny, ray_cluster: None, finished_run: str) -> None:
    """Two training workers, two streaming actors, all output in a bucket: complete, and as good as in process."""
    parallel = {"num_workers": 2, "input": "ray", "cpus_per_worker": 1.0}
    values = tiny(output=f"s3://{S3_BUCKET}/tiny-run", stream={"num_actors": 2})
    values["classifier"]["compute"] = parallel
    values["segmenter"]["compute"] = {**parallel, "input": "loader"}
    experiment, storage = _run(values)
    _check_complete(experiment, storage)
    local = Storage(finished_run)
    names = sorted(local.list_names("predictions/png"))
    assert storage.list_names("predictions/png") == names
    # Manifests are the same to the byte, so that fingerprints agree on any storage.
    assert storage.read_table("manifest/part-00000.parquet").drop(["uri", "mask_uri"]) == local.read_table(
        "manifest/part-00000.parquet"
    ).drop(["uri", "mask_uri"])


def test_killed_in_every_stage_and_called_again_ends_the_same(
    tiny_table: Path, tmp_path: Path, finished_run: str
) -> None:
    """One SIGKILL as soon as each stage has begun; the last call runs to the end."""
    values = tiny_values(tiny_table, str(tmp_path / "out"))
    experiment = parse_experiment(values)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    storage = Storage(experiment.output)
    killed = 0
    for folder in _folders(experiment):
        process = _start(config)
        while process.poll() is None and not (tmp_path / "out" / folder / "started.json").exists():
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 8, "most stages must have been interrupted for this test to mean anything"
    process = _start(config)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    _check_complete(experiment, storage)
    assert _scores(storage) == _scores(Storage(finished_run))


def _start(config: Path) -> subprocess.Popen[str]:
    """The same run as a process of its own."""
    code = "import json, sys; from tests.jobs.test_pipeline import _run; _run(json.load(open(sys.argv[1])))"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(config)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
