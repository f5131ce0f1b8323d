"""A whole run followed in MLflow: what stands in an embedded database afterwards, and a server that is not there."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run
from PIL import Image

from cluster.storage import Storage
from cluster.tracking import TRACKING_FILE
from cluster.tracking_search import output_of_run
from jobs.config import Experiment, parse_experiment
from jobs.execution import execute
from jobs.manifest import open_manifest
from jobs.pipeline import plan
from jobs.protocol import protocol_text
from tests.conftest import free_port
from tests.jobs.conftest import TINY_CLASSES, scores_of, small_values


def _experiment(table: Path, output: Path, tracking: dict[str, Any]) -> Experiment:
    return parse_experiment(small_values(table, str(output), rounds=1, tracking=tracking))


@pytest.fixture(scope="module", autouse=True)
def _no_server_of_the_user() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


class Followed:
    """A finished run and what MLflow's own client finds of it. output: beside mlflow.db."""

    def __init__(self, output: Path, experiment: Experiment) -> None:
        self.experiment = experiment
        self.storage = Storage(str(output))
        self.client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output.parent / 'mlflow.db'}")
        self.parent: Run = self.client.get_run(self.storage.read_json(TRACKING_FILE)["runs"]["run"])
        nested = self.client.search_runs(
            [self.parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{self.parent.info.run_id}'"
        )
        self.children: dict[str, Run] = {run.info.run_name: run for run in nested}

    def history(self, child: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in order of its steps."""
        found = self.client.get_metric_history(self.children[child].info.run_id, metric)
        return sorted((entry.step, entry.value) for entry in found)


@pytest.fixture(scope="module")
def followed(tiny_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Followed:
    output = tmp_path_factory.mktemp("followed") / "out"
    experiment = _experiment(tiny_table, output, {"enabled": True})
    execute(experiment, command="subcat run tiny.toml")
    return Followed(output, experiment)


def test_the_parent_run_holds_settings_command_and_final_scores(followed: Followed) -> None:
    parent = followed.parent
    assert (parent.info.run_name, parent.info.status) == ("tiny", "FINISHED")
    assert parent.data.params == {key: value[:500] for key, value in followed.experiment.flattened().items()}
    assert not [tag for tag in parent.data.tags if tag.startswith("changed.")]
    command = followed.client.download_artifacts(parent.info.run_id, "command.txt")
    assert Path(command).read_text() == "subcat run tiny.toml"
    scores = scores_of(followed.storage.root)
    final = parent.data.metrics
    assert final["final/segmenter_miou_val"] == scores["evaluation"]["splits"]["val"]["miou"]
    assert final["final/pseudo_mask_miou_train"] == scores["pseudo_masks"]["splits"]["train"]["miou"]
    chosen = followed.storage.read_json("choice/choice.json")["round_index"]
    assert final["final/cam_miou_val_best"] == scores[f"rounds/{chosen:02d}/cams"]["splits"]["val"]["best"]["miou"]


def test_tags_tell_the_data_the_code_and_how_each_score_was_taken(followed: Followed) -> None:
    tags = followed.parent.data.tags
    assert tags["data"] == open_manifest(followed.storage).fingerprint
    assert tags["code_version"] == followed.storage.read_json("segmenter/marker.json")["code_version"]
    told = {key for key in tags if key.startswith("protocol.")}
    assert told == {"protocol.cam", "protocol.pseudo_mask", "protocol.segmenter"}
    protocol = followed.storage.read_json("evaluation/scores.json")["protocol"]
    assert tags["protocol.segmenter"] == protocol_text(protocol)
    assert "supervision: image tags; " in tags["protocol.segmenter"]
    assert "rng seed" not in tags["protocol.segmenter"]


def test_every_stage_of_every_round_is_a_child_run_that_ended_well(followed: Followed) -> None:
    steps = {
        step.stage if step.round_index is None else f"{step.stage}, round {step.round_index}": step
        for step in plan(followed.experiment)
    }
    assert followed.children.keys() == steps.keys()
    for name, run in followed.children.items():
        assert run.info.status == "FINISHED", name
        assert run.data.tags["stage"] == steps[name].stage
        index = steps[name].round_index
        assert run.data.tags.get("round") == (None if index is None else str(index))


def test_metrics_stand_at_their_steps(followed: Followed) -> None:
    for child, folder in (
        ("train_classifier, round 0", "rounds/00/classifier"),
        ("train_classifier, round 1", "rounds/01/classifier"),
        ("train_segmenter", "segmenter"),
    ):
        stage = child.split(",")[0]
        records = followed.storage.read_json(f"{folder}/result.json")["history"]
        assert [record["step"] for record in records] == [3, 6]  # 12 images in batches of 4, two epochs
        told = [(int(record["step"]), pytest.approx(record["loss"])) for record in records]
        assert followed.history(child, f"{stage}/loss") == told
        assert followed.history(child, f"{stage}/epoch_loss") == told
    for index in range(2):
        best = followed.storage.read_json(f"rounds/{index:02d}/cams/scores.json")["splits"]["val"]["best"]["miou"]
        assert followed.history(f"make_cams, round {index}", "make_cams/miou_val_best") == [(index, best)]
    num_passes = followed.storage.read_json("rounds/00/subcategories/result.json")["num_passes"]
    passes = followed.history("cluster_features, round 0", "cluster_features/pass_inertia")
    assert len({step for step, _ in passes}) == len(passes) == num_passes


def test_the_thumbnails_can_be_opened(followed: Followed) -> None:
    run_id = followed.children["report"].info.run_id
    with Image.open(followed.client.download_artifacts(run_id, "images/examples.png")) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100, "a blank sheet"


def test_the_model_is_there_with_the_weights_of_the_run(followed: Followed, tmp_path: Path) -> None:
    """That such a model predicts in another process stands in tests/cluster/test_tracking.py."""
    (model,) = followed.client.search_logged_models([followed.parent.info.experiment_id])
    assert (model.name, model.status) == ("segmenter", "READY")
    assert model.source_run_id == followed.parent.info.run_id
    folder = Path(mlflow.artifacts.download_artifacts(model.artifact_location, dst_path=str(tmp_path)))
    metadata = mlflow.models.Model.load(str(folder)).metadata
    assert metadata == {"classes": list(TINY_CLASSES), "has_background": True}
    assert (folder / "artifacts/model.pt").read_bytes() == followed.storage.read_bytes("segmenter/model.pt")


def test_a_server_that_is_not_there_is_a_warning_and_changes_no_score(
    followed: Followed, tiny_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = {"enabled": True, "uri": f"http://127.0.0.1:{free_port()}", "timeout_s": 1}
    with caplog.at_level(logging.WARNING):
        execute(_experiment(tiny_table, tmp_path / "out", tracking))
    warnings = [record.message for record in caplog.records if record.name == "cluster.outages"]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("MLflow could not open the run (Connection refused)")
    lost = [record.message for record in caplog.records if record.name == "cluster.tracking"]
    assert len(lost) == 1
    assert "never got" in lost[0]
    assert scores_of(str(tmp_path / "out")) == scores_of(followed.storage.root)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_is_found_by_its_id_and_by_its_name(followed: Followed) -> None:
    uri = followed.storage.read_json(TRACKING_FILE)["uri"]
    assert output_of_run(uri, followed.parent.info.run_id) == followed.storage.root
    assert output_of_run(uri, "tiny") == followed.storage.root
    with pytest.raises(ValueError, match="other: neither the output folder of a run nor the id or name of a parent"):
        output_of_run(uri, "other")
    with pytest.raises(ValueError, match="train_segmenter: neither the output"):  # a stage's run
        output_of_run(uri, "train_segmenter")
    followed.client.create_run(followed.parent.info.experiment_id, run_name="tiny")
    with pytest.raises(ValueError, match=r"tiny: 2 MLflow runs have this name; give an id or a folder"):
        output_of_run(uri, "tiny")
