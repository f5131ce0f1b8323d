"""tracking: a real sqlite database, a real server on loopback, and no server at all."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from cluster.storage import Storage
from cluster.tracking import TRACKING_FILE, Tracker, TrackingSettings
from cluster.tracking_client import clean_name, param_text, safe_text
from subcat_core.classes import ClassTable
from subcat_core.overlays import to_png
from tests.conftest import free_port


@pytest.fixture(autouse=True)
def _no_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of outputs for the module, since a new database costs seconds of migrations."""
    return tmp_path_factory.mktemp("outputs")


def client_of(root: Path) -> Any:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


def stored(storage: Storage) -> dict[str, Any]:
    return dict(storage.read_json(TRACKING_FILE))


def test_embedded_database_stands_beside_the_output(database: Path, capfd: pytest.CaptureFixture[str]) -> None:
    storage = Storage(str(database / "first"))
    with Tracker(TrackingSettings(), storage, "first run") as tracker:
        tracker.log_config({"rounds": "2", "classifier.backbone.name": "timm:x", "cluster.token": "abc"})
        with tracker.child("train_classifier", 0) as child:
            child.log_metrics({"train_classifier/loss": 2.5, "train_classifier/map": None, "a/b?c": float("nan")}, 3)
            child.log_params({"epochs": 4})
            child.log_image("images/x.png", to_png(np.zeros((4, 4, 3), np.uint8)))
            child.log_text("note.txt", "from s3://key:hidden@bucket/x")
    assert (database / "mlflow.db").is_file()
    assert (database / "mlartifacts").is_dir()
    assert not (database / "first" / "mlflow.db").exists()
    runs, client = stored(storage)["runs"], client_of(database)
    parent, child_run = client.get_run(runs["run"]), client.get_run(runs["train_classifier, round 0"])
    assert parent.info.run_name == "first run"
    assert parent.info.status == child_run.info.status == "FINISHED"
    assert parent.data.params == {"rounds": "2", "classifier.backbone.name": "timm:x", "cluster.token": "***"}
    assert child_run.data.tags["mlflow.parentRunId"] == runs["run"]
    assert child_run.data.tags["round"] == "0"
    assert child_run.data.metrics == {"train_classifier/loss": 2.5}
    assert {item.path for item in client.list_artifacts(child_run.info.run_id)} == {"images", "note.txt"}
    note = client.download_artifacts(child_run.info.run_id, "note.txt")
    assert Path(note).read_text() == "from s3://bucket/x"
    captured = capfd.readouterr()
    assert "alembic" not in captured.err + captured.out
    assert "INFO" not in captured.err + captured.out


def test_a_resumed_run_goes_on_in_the_same_runs(database: Path) -> None:
    storage = Storage(str(database / "resumed"))

    def broken_off() -> None:
        with Tracker(TrackingSettings(), storage, "run") as tracker, tracker.child("train_classifier", 1) as child:
            child.log_metrics({"train_classifier/loss": 3.0}, 0)
            child.log_metrics({"train_classifier/loss": 2.0}, 1)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        broken_off()
    before, client = stored(storage), client_of(database)
    run_id = before["runs"]["train_classifier, round 1"]
    assert client.get_run(run_id).info.status == client.get_run(before["runs"]["run"]).info.status == "FAILED"
    with Tracker(TrackingSettings(), storage, "run") as tracker:
        tracker.log_config({"rounds": "2"})
        with tracker.child("train_classifier", 1) as child:
            assert client.get_run(before["runs"]["run"]).info.status == "RUNNING"
            child.log_metrics({"train_classifier/loss": 2.0}, 1)  # a replay: stands there already
            child.log_metrics({"train_classifier/loss": 1.0}, 2)
            time.sleep(0.002)
            child.log_metrics({"train_classifier/loss": 0.5}, 2)  # a replay that came out otherwise
    assert stored(storage) == before
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "train_classifier/loss")]
    assert sorted(history) == [(0, 3.0), (1, 2.0), (2, 0.5), (2, 1.0)]
    assert client.get_run(run_id).data.metrics == {"train_classifier/loss": 0.5}
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_changed_setting_of_a_resumed_run_is_a_tag(database: Path) -> None:
    storage = Storage(str(database / "changed"))
    for workers in ("1", "4"):
        with Tracker(TrackingSettings(), storage, "run") as tracker:
            tracker.log_config({"workers": workers, "long": "x" * 9000} | {f"key.{i}": "v" for i in range(250)})
    run = client_of(database).get_run(stored(storage)["runs"]["run"])
    assert run.data.params["workers"] == "1"
    assert run.data.tags["changed.workers"] == "4"
    assert len(run.data.params) == 252
    assert len(run.data.params["long"]) == 500


def test_a_run_deleted_in_between_begins_anew(database: Path) -> None:
    storage = Storage(str(database / "deleted"))
    with Tracker(TrackingSettings(), storage, "run"):
        pass
    first = stored(storage)["runs"]["run"]
    client_of(database).delete_run(first)
    with Tracker(TrackingSettings(), storage, "run") as tracker:
        pass
    assert tracker.run_id not in (None, first)
    assert stored(storage)["runs"]["run"] == tracker.run_id


def test_a_call_that_is_refused_leaves_a_finished_run_alone(database: Path) -> None:
    storage = Storage(str(database / "finished"))
    with Tracker(TrackingSettings(), storage, "run") as tracker:
        tracker.log_config({"rng_seed": "0"}, "subcat run x.toml")
    client, run_id = client_of(database), stored(storage)["runs"]["run"]
    before = client.get_run(run_id)

    def refused() -> None:
        with Tracker(TrackingSettings(), storage, "run") as tracker:
            tracker.log_config({"rng_seed": "1"}, "subcat run x.toml --set rng_seed=1")
            raise ValueError("made from other inputs")

    with pytest.raises(ValueError, match="other inputs"):
        refused()
    after = client.get_run(run_id)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert after.data.tags == before.data.tags
    assert Path(client.download_artifacts(run_id, "command.txt")).read_text() == "subcat run x.toml"


def test_a_refused_name_or_a_bad_file_never_raises(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(str(database / "refused"))
    with Tracker(TrackingSettings(), storage, "run") as tracker, tracker.child("stage") as child:
        child.log_text("../outside.txt", "x")
        child.log_metrics({"stage/after": 1.0})
    assert "refused to log a text" in caplog.text
    run_id = stored(storage)["runs"]["stage"]
    assert client_of(database).get_run(run_id).data.metrics == {"stage/after": 1.0}


def test_an_absent_server_is_one_warning_and_quick(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    settings = TrackingSettings(uri=f"http://127.0.0.1:{free_port()}", timeout_s=2)
    with caplog.at_level(logging.INFO), Tracker(settings, Storage(str(tmp_path / "out")), "run") as tracker:
        tracker.log_config({"a": "b"})
        for step in range(50):
            with tracker.child("train_classifier", 0) as child:
                child.log_metrics({"train_classifier/loss": 1.0}, step)
        assert tracker.run_id is None
    assert time.monotonic() - started < 30
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, warnings
    assert "MLflow could not open the run (Connection refused)" in warnings[0]
    assert "never got" in warnings[1]


def test_disabled_does_nothing(tmp_path: Path) -> None:
    with Tracker(TrackingSettings(enabled=False), Storage(str(tmp_path / "out")), "run") as tracker:
        tracker.log_config({"a": "b"})
        with tracker.child("stage") as child:
            child.log_metrics({"stage/x": 1.0})
        classes = ClassTable(("cat",))
        assert tracker.log_model(state=b"", settings=tracker.settings, classes=classes, example=b"") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri", ["http://me:word@host:5000", "postgresql://me:word@host/db", "https://host/x?token=abc", "http://me@host"]
)
def test_settings_refuse_secrets(uri: str) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME"):
        TrackingSettings(uri=uri)


def test_text_without_secrets() -> None:
    assert safe_text("see http://a:b@c:5000/x and s3://d/e") == "see http://c:5000/x and s3://d/e"
    assert safe_text("https://b/x?X-Amz-Signature=12ab&y=1") == "https://b/x?X-Amz-Signature=***&y=1"
    assert safe_text("mail me@host, 3 @ 4") == "mail me@host, 3 @ 4"
    assert clean_name("cluster/inertia_dog (small)?") == "cluster/inertia_dog _small__"
    assert param_text("storage.secret_key", "x") == "***"
    assert param_text("kmeans.num_keys", 3) == "3"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on loopback, with its own artifacts; ended by its process group."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    log = (tmp_path / "server.log").open("wb")
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # half of the start-up time
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(720):
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                time.sleep(0.25)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
        log.close()


def test_a_real_server_on_loopback(server: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    settings = TrackingSettings(uri=server, experiment="over http", timeout_s=10)
    with Tracker(settings, storage, "remote") as tracker, tracker.child("make_cams", 2) as child:
        child.log_metrics({"make_cams/miou_val_best": 0.5}, 2)
        child.log_image("images/x.png", to_png(np.zeros((4, 4, 3), np.uint8)))
    document = stored(storage)
    assert document["uri"] == server
    client = mlflow.MlflowClient(tracking_uri=server)
    run = client.get_run(document["runs"]["make_cams, round 2"])
    assert run.data.metrics == {"make_cams/miou_val_best": 0.5}
    assert [item.path for item in client.list_artifacts(run.info.run_id, "images")] == ["images/x.png"]
    assert not (tmp_path / "mlflow.db").exists()


@pytest.fixture
def tiny_segmenter() -> tuple[Any, bytes]:
    """(settings, state bytes) of an untrained network of two classes."""
    from subcat_core.backbones import BackboneSettings
    from subcat_core.segmenter import SegmenterSettings, build_segmenter

    torch.manual_seed(0)
    settings = SegmenterSettings(backbone=BackboneSettings(name="torchvision:resnet18", weights="none"))
    model, _ = build_segmenter(settings, 2)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return settings, buffer.getvalue()


def test_the_model_comes_back_and_predicts(database: Path, tiny_segmenter: tuple[Any, bytes]) -> None:
    from subcat_core.images import decode_mask

    settings, state = tiny_segmenter
    classes = ClassTable(("cat", "dog"))
    example = to_png(np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8))
    uri_before = mlflow.get_tracking_uri()
    registered = TrackingSettings(registered_model="pets")
    with Tracker(registered, Storage(str(database / "model")), "model") as tracker:
        uri = tracker.log_model(
            state=state, settings=settings, classes=classes, example=example, base_px=32, flip=False
        )
        assert uri is not None
        assert client_of(database).get_run(tracker.run_id).info.status == "RUNNING"
        (version,) = client_of(database).search_model_versions("name = 'pets'")
        assert version.run_id == tracker.run_id
    assert mlflow.get_tracking_uri() == uri_before
    code = f"""
import json, sys, mlflow, numpy as np, pandas as pd, base64
mlflow.set_tracking_uri("sqlite:///{database / "mlflow.db"}")
model = mlflow.pyfunc.load_model("{uri}")
import subcat_core
data = open("{database / "example.png"}", "rb").read()
inputs = [[data, data], np.array([data, data], dtype=object), pd.DataFrame({{"image": [data, data]}})]
masks = [model.predict(value) for value in inputs]
assert all(list(value) == list(masks[0]) for value in masks)
open("{database / "mask.png"}", "wb").write(masks[0][1])
print(json.dumps({{"code": subcat_core.__file__, "signature": str(model.metadata.signature)}}))
"""
    (database / "example.png").write_bytes(example)
    # Another process in another folder: the model must bring its own code.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=database, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "binary" in answer["signature"]
    mask = decode_mask((database / "mask.png").read_bytes(), classes.mask_lut())
    assert mask.shape == (40, 56)
    assert mask.max() <= 2
    files = [path for path in (database / "mlartifacts").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pyc")]
    assert pd.Series([path.name for path in files]).str.contains("tracking_model.py").any()
