"""The whole run: in process and through Ray, on a folder and on S3; skipped when complete; killed at any stage."""

import json
import shutil
import subprocess
import sys
import time
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
from tests.jobs.conftest import Tiny, scores_of, tiny_values

REPOSITORY = Path(__file__).resolve().parents[2]


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


def test_another_rng_seed_in_a_finished_folder_is_refused_and_leaves_its_config(
    tiny: Tiny, tmp_path: Path, finished_run: str
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished_run, output, ignore=shutil.ignore_patterns("*.pt"))
    config = (output / "config.json").read_bytes()
    with pytest.raises(ArtifactMismatch, match="rng_seed: 0 -> 7"):
        _run(tiny(output=str(output), rng_seed=7))
    assert (output / "config.json").read_bytes() == config
    assert json.loads(config)["rng_seed"] == 0


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


def test_through_ray_with_two_workers_on_s3(tiny_table: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Two training workers, two streaming actors, images and all output in a bucket: as good as in process.

    The trainings have no chance in them (every rank draws its own dropout) and batch norm does not learn (each rank
    sees its own images), so that two workers give the numbers of one up to rounding (TrainComputeSettings).
    """
    data = Storage(f"s3://{S3_BUCKET}/tiny-data")
    for path in tiny_table.parent.rglob("*"):
        if path.is_file():
            data.write_bytes(str(path.relative_to(tiny_table.parent)), path.read_bytes())
    _, local = _run(_without_chance(str(tiny_table), str(tmp_path / "out")))
    values = _without_chance(data.uri("labels.csv"), f"s3://{S3_BUCKET}/tiny-run", stream={"num_actors": 2})
    parallel = {"num_workers": 2, "input": "ray", "cpus_per_worker": 1.0}
    values["classifier"]["compute"] = parallel
    values["segmenter"]["compute"] = {**parallel, "input": "loader"}
    experiment, storage = _run(values)
    _check_complete(experiment, storage)
    assert storage.list_names("predictions/png") == local.list_names("predictions/png")
    # Manifests are the same to the byte, so that fingerprints agree on any storage.
    name = "manifest/part-00000.parquet"
    assert storage.read_table(name).drop(["uri", "mask_uri"]) == local.read_table(name).drop(["uri", "mask_uri"])
    assert storage.read_table(name)["uri"].to_pylist()[0] == data.uri("images/000.png")
    for folder in ("rounds/00/classifier", "rounds/01/classifier", "segmenter"):
        losses, expected = (
            [record["loss"] for record in root.read_json(f"{folder}/result.json")["history"]]
            for root in (storage, local)
        )
        assert losses == pytest.approx(expected, rel=1e-3), folder
    scores, expected = _mious(storage), _mious(local)
    assert scores.keys() == expected.keys()
    assert scores == pytest.approx(expected, abs=0.005)


def _without_chance(table: str, output: str, **changes: Any) -> dict[str, Any]:
    """Two rounds of trainings that are the same on any number of workers, up to rounding."""
    values = tiny_values(Path("labels.csv"), output, **changes)
    values["prepare"]["source"]["path"] = table
    for part in ("classifier", "segmenter"):
        # At ten times this learning rate the untrained, unnormalised network blows rounding up.
        steady = {"freeze_batch_norm": True, "precision": "fp32", "learning_rate": 0.001}
        values[part]["optimiser"] = {**values[part]["optimiser"], **steady}
    values["classifier"]["dropout"] = 0.0
    return values


def _mious(storage: Storage) -> dict[str, float]:
    """Every mIoU of the final table, by stage, split and threshold."""
    found: dict[str, float] = {}
    for folder, scores in scores_of(storage.root).items():
        for split, score in scores["splits"].items():
            for kind in ("fixed", "best") if "best" in score else ("",):
                found[f"{folder} {split} {kind}"] = (score[kind] if kind else score)["miou"]
    return found


def test_killed_in_every_stage_and_called_again_ends_the_same(
    tiny_table: Path, tmp_path: Path, finished_run: str
) -> None:
    """One SIGKILL in the middle of each stage; the last call runs to the end."""
    values = tiny_values(tiny_table, str(tmp_path / "out"))
    experiment = parse_experiment(values)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    log = tmp_path / "run.log"
    storage = Storage(experiment.output)
    interrupted = []
    for folder in _folders(experiment):
        if storage.exists(f"{folder}/marker.json"):  # the kill before came a little late
            continue
        before = _half_done(tmp_path / "out" / folder)
        process = _start(config, log)
        while process.poll() is None and not _half_done(tmp_path / "out" / folder) - before:
            time.sleep(0.01)
        process.kill()
        process.wait()
        if not storage.exists(f"{folder}/marker.json"):
            interrupted.append(folder)
    assert {"rounds/00/classifier", "rounds/01/cams", "segmenter"} <= set(interrupted), interrupted
    assert len(interrupted) >= 8, "most stages must have been interrupted for this test to mean anything"
    process = _start(config, log)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    _check_complete(experiment, storage)
    assert _scores(storage) == _scores(Storage(finished_run))


def _half_done(folder: Path) -> set[Path]:
    """What says that a stage is in its middle: an epoch's checkpoint or a shard's summary, where it makes such."""
    if folder.name == "subcategories":
        return set(folder.glob("started.json"))
    return {*folder.glob("checkpoints/epoch-*.pt"), *folder.glob("part-*.json")}


def _start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    """The same run as a process of its own; it writes to a file, since an unread pipe would stop it when full."""
    code = "import json, sys; from tests.jobs.test_pipeline import _run; _run(json.load(open(sys.argv[1])))"
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(config)], cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT
        )
