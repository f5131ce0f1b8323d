"""The calls to MLflow that tracking.py makes: connect quietly, create runs, log in batches, put the model there.

Beside tracking_model.py, which MLflow itself executes, this is the only file that imports mlflow, on first use.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.outages import Rejected

_BATCH = 100
_MAX_VALUE_CHARS = 500
_MAX_TAG_CHARS = 5000
_REFUSALS = (
    "BAD_REQUEST",
    "FEATURE_DISABLED",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)
_BUSY = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_SECRET_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:signature|token|secret|password|credential|key)[\w.-]*=)[^&\s\"']+")
_SECRET_KEY = re.compile(r"(?i)(password|passwd|secret|token|api_?key|access_?key|credential)")
_MODEL_PACKAGES = (
    "mlflow",
    "numba",
    "numpy",
    "Pillow",
    "pyarrow",
    "pydantic",
    "safetensors",
    "segmentation-models-pytorch",
    "timm",
    "torch",
    "torchvision",
)


def safe_text(text: str) -> str:
    """The text without `user:password@` in URIs and without the values of signing queries."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("", text))


def clean_name(name: str) -> str:
    """A name that MLflow takes for a metric, parameter or tag: other characters become "_", at most 250 of them."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


def param_text(key: str, value: object, max_chars: int = _MAX_VALUE_CHARS) -> str:
    """A value as text, shortened to what every server takes; *** where the key sounds like a secret."""
    if _SECRET_KEY.search(key.rsplit(".", 1)[-1]):
        return "***"
    text = safe_text(str(value))
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


class TrackingClient:
    """One MLflow server or database, and one experiment in it.

    uri: of the server, None for MLFLOW_TRACKING_URI or the embedded database. folder: where the embedded mlflow.db and
    mlartifacts/ are. Raises OSError while the server is away; Rejected for what it will never take.
    """

    def __init__(self, uri: str | None, experiment: str, folder: Path, timeout_s: int) -> None:
        mlflow = quiet_mlflow(timeout_s)
        artifacts = None
        if uri is None and mlflow.is_tracking_uri_set():
            uri = str(mlflow.get_tracking_uri())
        if uri is None:
            folder.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri()
        self.uri = uri
        self._history: dict[tuple[str, str], dict[int, float]] = {}
        self._created: set[str] = set()
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._experiment_id = self._find_experiment(experiment, artifacts)
        except Exception as error:
            raise OSError(str(error)) from error

    def take_up(self, run_id: str) -> bool:
        """Set a run of an earlier process running again; False where the server does not have it any more."""
        from mlflow.exceptions import MlflowException

        with self._answers():
            try:
                if self._client.get_run(run_id).info.lifecycle_stage != "active":
                    return False
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise
            self._client.update_run(run_id, status="RUNNING")
        return True

    def create_run(self, name: str, tags: Mapping[str, str], parent_id: str | None) -> str:
        """A new run's id; parent_id nests it."""
        tags = dict(tags) if parent_id is None else {**tags, "mlflow.parentRunId": parent_id}
        with self._answers():
            run_id = str(self._client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id)
        self._created.add(run_id)
        return run_id

    def place(self, run_id: str) -> str:
        """The address of a run's page, or the database and the run's id."""
        if self.uri.startswith(("http://", "https://")):
            return f"{self.uri.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{run_id}"
        return f"{self.uri}, run {run_id}"

    def end_run(self, run_id: str, status: str) -> None:
        """status: FINISHED, FAILED or KILLED."""
        with self._answers():
            self._client.set_terminated(run_id, status)

    def log_metrics(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        """Finite values at a step; a value that stands at its step already is not repeated."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with self._answers():
            known = {name: self._known_steps(run_id, name) for name in values}
            batch = [Metric(n, value, now_ms, step) for n, value in values.items() if known[n].get(step) != value]
            for start in range(0, len(batch), _BATCH):
                self._client.log_batch(run_id, metrics=batch[start : start + _BATCH])
        for metric in batch:
            known[metric.key][step] = metric.value

    def log_params(self, run_id: str, values: Mapping[str, object]) -> None:
        """Parameters; MLflow never changes one, so a value that differs from the first becomes a tag `changed.KEY`."""
        from mlflow.entities import Param, RunTag

        with self._answers():
            known = self._client.get_run(run_id).data.params
            wanted = {clean_name(key): param_text(key, value) for key, value in values.items()}
            fresh = [Param(key, value) for key, value in wanted.items() if key not in known]
            changed = [
                RunTag(clean_name(f"changed.{key}"), value)
                for key, value in wanted.items()
                if known.get(key, value) != value
            ]
            for start in range(0, len(fresh), _BATCH):
                self._client.log_batch(run_id, params=fresh[start : start + _BATCH])
            for start in range(0, len(changed), _BATCH):
                self._client.log_batch(run_id, tags=changed[start : start + _BATCH])

    def set_tags(self, run_id: str, tags: Mapping[str, object]) -> None:
        """A later value replaces an earlier one."""
        from mlflow.entities import RunTag

        entries = [RunTag(clean_name(k), param_text(k, v, _MAX_TAG_CHARS)) for k, v in tags.items()]
        with self._answers():
            self._client.log_batch(run_id, tags=entries)

    def log_bytes(self, run_id: str, name: str, data: bytes) -> None:
        """A file among the run's artifacts; name: "images/examples.png"."""
        folder, _, file_name = name.rpartition("/")
        with self._answers(), tempfile.TemporaryDirectory(prefix="subcat-artifact-") as scratch:
            local = Path(scratch) / file_name
            local.write_bytes(data)
            self._client.log_artifact(run_id, str(local), folder or None)

    def log_model(
        self,
        run_id: str,
        files: Mapping[str, bytes],
        example: bytes,
        metadata: Mapping[str, object] | None = None,
        registered: str | None = None,
    ) -> str:
        """The pyfunc model of tracking_model.py as a logged model of a run; returns its URI.

        files: model.pt and segmenter.json; code travels as source. registered: the registry's model it becomes one of.
        """
        import mlflow
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

        import subcat_core

        one_binary = Schema([ColSpec("binary")])
        with self._answers(), tempfile.TemporaryDirectory(prefix="subcat-model-") as scratch:
            for name, data in files.items():
                (Path(scratch) / name).write_bytes(data)
            code = Path(scratch) / "subcat_core"
            shutil.copytree(Path(str(subcat_core.__file__)).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
            with _fluent(self.uri, run_id):
                logged = mlflow.pyfunc.log_model(
                    name="segmenter",
                    python_model=str(Path(__file__).with_name("tracking_model.py")),
                    artifacts={name: str(Path(scratch) / name) for name in files},
                    code_paths=[str(code)],
                    pip_requirements=_requirements(),
                    signature=ModelSignature(inputs=one_binary, outputs=one_binary),
                    input_example=[example],
                    metadata=None if metadata is None else dict(metadata),
                    registered_model_name=registered,
                    await_registration_for=None,
                )
        return str(logged.model_uri)

    def _find_experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except Exception:
                found = self._client.get_experiment_by_name(name)  # another run was quicker
                if found is None:
                    raise
        return str(found.experiment_id)

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        """Tell an absent server (OSError, worth a second try) from one that will never take the call (Rejected)."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            away = error.error_code not in _REFUSALS and (error.error_code in _BUSY or not self._is_there())
            raise (OSError if away else Rejected)(str(error)) from error
        except (OSError, Rejected):
            raise
        except Exception as error:
            raise Rejected(f"{type(error).__name__}: {error}") from error

    def _is_there(self) -> bool:
        """Many a fault of one call carries the code of a broken server; a second, simple call tells them apart."""
        try:
            self._client.get_experiment(self._experiment_id)
        except Exception:
            return False
        return True

    def _known_steps(self, run_id: str, name: str) -> dict[int, float]:
        """step -> value of a metric; asked of the server once, and only for runs that an earlier process began."""
        if (run_id, name) not in self._history:
            history = [] if run_id in self._created else self._client.get_metric_history(run_id, name)
            ordered = sorted(history, key=lambda metric: metric.timestamp)
            self._history[run_id, name] = {metric.step: metric.value for metric in ordered}
        return self._history[run_id, name]


@contextlib.contextmanager
def _fluent(uri: str, run_id: str) -> Iterator[None]:
    """MLflow's process-wide tracking URI and active run, for the one call that needs them; put back afterwards."""
    import mlflow
    from mlflow.environment_variables import MLFLOW_TRACKING_URI

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    variable = MLFLOW_TRACKING_URI.get() if MLFLOW_TRACKING_URI.is_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run(run_id=run_id):
            yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None is how it began
        if variable is None:
            MLFLOW_TRACKING_URI.unset()
        else:
            MLFLOW_TRACKING_URI.set(variable)
        mlflow.MlflowClient(tracking_uri=uri).update_run(run_id, status="RUNNING")


def quiet_mlflow(timeout_s: int) -> Any:
    """mlflow with short waits, no usage reports to its makers and no chatter; what the user has set stays."""
    import mlflow
    from mlflow import environment_variables as variables
    from mlflow import telemetry

    wanted = (
        (variables.MLFLOW_HTTP_REQUEST_TIMEOUT, timeout_s),
        (variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 1),
        (variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR, False),
        (variables.MLFLOW_DISABLE_TELEMETRY, True),
        (variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
    )
    for variable, value in wanted:
        if not variable.is_set():
            variable.set(value)
    telemetry.set_telemetry_client()  # reads the variable again: the import alone has made one
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _requirements() -> list[str]:
    """Exact versions of what the model's code imports."""
    found = []
    for name in _MODEL_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}=={importlib.metadata.version(name).split('+')[0]}")
    return found
