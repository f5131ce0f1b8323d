"""MLflow: one parent run a run, one child run a (round, stage), the model; an outage never stops training.

mlflow itself is imported in tracking_client.py (on first use) and in tracking_model.py (which MLflow executes) alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from pydantic import Field, field_validator

from cluster.outages import Outages
from cluster.storage import Storage
from cluster.tracking_client import TrackingClient, clean_name, safe_text
from subcat_core.classes import ClassTable
from subcat_core.settings import Settings

_log = logging.getLogger(__name__)

TRACKING_FILE = "tracking.json"
_PARENT = "run"


class TrackingSettings(Settings):
    """Where the run is followed."""

    enabled: bool = True
    """False: nothing is logged and mlflow is not imported."""
    uri: str | None = None
    """MLflow server or database. None: MLFLOW_TRACKING_URI where it is set, else mlflow.db and mlartifacts/ beside
    the output folder (in the working directory for s3:// outputs). User and password come from
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, never from here."""
    experiment: str = Field(default="subcat", min_length=1)
    """Name of the MLflow experiment."""
    registered_model: str | None = Field(default=None, min_length=1)
    """Name in MLflow's model registry that each trained segmenter becomes a version of. None: the model stands with its
    run alone."""
    timeout_s: int = Field(default=10, ge=1, le=600)
    """Longest wait for one answer of the server; each call is retried once."""

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        if uri is not None and safe_text(uri) != uri:
            raise ValueError(
                "the URI holds a user, a password or a token, which would be written back with the config; give it "
                "without them and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI"
            )
        return uri


class Tracker:
    """The MLflow parent run of one run, opened by the driver; no method raises for what the server does.

    `with Tracker(settings, storage, name) as tracker:` The run ids stand in OUT/tracking.json, so that a resumed run
    goes on in the same MLflow runs. What an outage keeps from the server waits in memory and follows when it answers.
    Nothing is opened before there is something to tell: a call that is refused leaves the runs of an earlier one alone.
    """

    def __init__(self, settings: TrackingSettings, storage: Storage, run_name: str) -> None:
        self.settings = settings
        self._storage = storage
        self._run_name = run_name
        self._outages = Outages("MLflow", _worded)
        self._client: TrackingClient | None = None
        self._run_ids: dict[str, str] = {}
        self._opened = False
        self._first: list[Callable[[], None]] = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.settings.enabled or (kind is not None and not self._opened):
            return
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.record(_PARENT, "close the run", lambda client, run_id: client.end_run(run_id, status))
        self._outages.flush(last_try=True)
        num_lost = self._outages.num_waiting + self._outages.num_dropped
        if num_lost:
            _log.warning("MLflow never got %d entries of this run; the report and the markers hold them", num_lost)

    @property
    def uri(self) -> str | None:
        """The tracking URI in use, without secrets; None before the first answer."""
        return None if self._client is None else safe_text(self._client.uri)

    @property
    def place(self) -> str | None:
        """Where to look at the parent run: its page on a server, else the database and the run's id; None as above."""
        if self._client is None or self.run_id is None:
            return None
        return safe_text(self._client.place(self.run_id))

    @property
    def run_id(self) -> str | None:
        """Id of the parent run; None before the first answer."""
        return self._run_ids.get(_PARENT)

    @contextlib.contextmanager
    def child(self, stage: str, round_index: int | None = None) -> Iterator[ChildRun]:
        """The child run of a stage, or of a stage in a round; closed with how the block ended."""
        child = ChildRun(self, stage if round_index is None else f"{stage}, round {round_index}")
        child.set_tags({"stage": stage} if round_index is None else {"stage": stage, "round": round_index})
        status = "KILLED"
        try:
            yield child
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self.record(child.key, "close a stage's run", lambda client, run_id: client.end_run(run_id, status))

    def log_config(self, flattened: Mapping[str, str], command: str = "") -> None:
        """Dotted key -> value, as parameters of the parent run; what a resumed run changed: tags `changed.KEY`.

        command: the command line, kept as command.txt. Both are logged once the run has something else to tell.
        """
        kept = dict(flattened)

        def log() -> None:
            self._parent().log_params(kept)
            if command:
                self._parent().log_text("command.txt", command)

        self._with_the_rest(log)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tags of the parent run, set once the run has something else to tell."""
        kept = dict(tags)
        self._with_the_rest(lambda: self._parent().set_tags(kept))

    def _with_the_rest(self, log: Callable[[], None]) -> None:
        """Now, or as the run opens: what alone is no reason to open it."""
        if self._opened:
            log()
        else:
            self._first.append(log)

    def log_metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Metrics of the parent run; see ChildRun.log_metrics."""
        self._parent().log_metrics(values, step)

    def log_image(self, name: str, png: bytes) -> None:
        """A picture of the parent run."""
        self._parent().log_image(name, png)

    def log_model(
        self,
        *,
        state: bytes,
        settings: Settings,
        classes: ClassTable,
        example: bytes,
        base_px: int | None = None,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = True,
        merge: str = "mean",
    ) -> str | None:
        """The segmenter as an MLflow model with signature: encoded images in, indexed PNG masks out, no tags asked for.

        state: bytes of `torch.save` of its state dict. settings: SegmenterSettings. example: one encoded image, the
        model's input example. base_px, scales, flip, merge: as PredictSettings. Returns the model's URI; None where it
        is not logged yet: it waits with the rest until the server answers.
        """
        if not self.settings.enabled:
            return None
        described = {
            "model": settings.model_dump(mode="json"),
            "classes": list(classes.names),
            "has_background": classes.has_background,
            "base_px": base_px,
            "scales": list(scales),
            "flip": flip,
            "merge": merge,
        }
        files = {"model.pt": state, "segmenter.json": json.dumps(described, indent=2).encode()}
        table = {"classes": list(classes.names), "has_background": classes.has_background}
        registered = self.settings.registered_model
        logged: list[str] = []

        def log(client: TrackingClient, run_id: str) -> None:
            logged.append(client.log_model(run_id, files, example, metadata=table, registered=registered))

        self.record(_PARENT, "log the model", log)
        return logged[0] if logged else None

    def record(self, key: str, what: str, call: Callable[[TrackingClient, str], object]) -> None:
        """Do call(client, run_id) for the run of a key: now, or when the server is back."""
        if not self.settings.enabled:
            return
        if not self._opened:
            self._opened = True
            self.record(_PARENT, "open the run", lambda client, run_id: None)
            for log in self._first:
                log()
        self._outages.enqueue(what, lambda: call(self._connected(), self._run_id(key)))

    def _parent(self) -> ChildRun:
        return ChildRun(self, _PARENT)

    def _connected(self) -> TrackingClient:
        if self._client is None:
            beside = Path(self._storage.root).parent if self._storage.is_local else Path.cwd()
            settings = self.settings
            self._client = TrackingClient(settings.uri, settings.experiment, beside, settings.timeout_s)
        return self._client

    def _run_id(self, key: str) -> str:
        """Id of a run of ours: taken up again from tracking.json, or created and written there."""
        if key in self._run_ids:
            return self._run_ids[key]
        client = self._connected()
        known = self._known_ids()
        run_id = known.get(key)
        if run_id is None or not client.take_up(run_id):
            name = self._run_name if key == _PARENT else key
            parent_id = None if key == _PARENT else self._run_id(_PARENT)
            run_id = client.create_run(name, {"output": safe_text(self._storage.uri())}, parent_id)
        self._run_ids[key] = run_id
        runs = {**known, **self._run_ids}
        if runs != known:
            document = {"uri": self.uri, "experiment": self.settings.experiment, "runs": runs}
            self._storage.write_json(TRACKING_FILE, document)
        return run_id

    def _known_ids(self) -> dict[str, str]:
        """Run ids of tracking.json, where they belong to this server and experiment."""
        if not self._storage.exists(TRACKING_FILE):
            return {}
        document = self._storage.read_json(TRACKING_FILE)
        ours = document.get("uri") == self.uri and document.get("experiment") == self.settings.experiment
        return dict(document.get("runs", {})) if ours else {}


class ChildRun:
    """What a stage logs to: its own MLflow run below the parent. Nothing here raises for what the server does."""

    def __init__(self, tracker: Tracker, key: str) -> None:
        self.key = key
        self._tracker = tracker
        self.told_by_step: set[str] = set()
        """Metrics that have a step of their own: a single value among them would stand at step 0 of their chart."""

    def log_metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """`stage/metric` -> value at a step (0 without one); None, NaN and infinities are left out.

        A replay after a resume does not repeat a value that stands at its step already; another value at the same
        step is logged later, and MLflow counts the later one.
        """
        numbers = {clean_name(name): float(value) for name, value in values.items() if value is not None}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if step is not None:
            self.told_by_step |= set(numbers)
        if finite:
            self._record("log metrics", lambda client, run_id: client.log_metrics(run_id, finite, step or 0))

    def log_params(self, values: Mapping[str, object]) -> None:
        """Parameters of this run; MLflow keeps the first value of each."""
        kept = dict(values)
        self._record("log parameters", lambda client, run_id: client.log_params(run_id, kept))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tags of this run; a later value replaces an earlier one."""
        kept = dict(tags)
        self._record("set tags", lambda client, run_id: client.set_tags(run_id, kept))

    def log_image(self, name: str, png: bytes) -> None:
        """A picture among the run's artifacts; name: "images/examples.png"."""
        self._record("log a picture", lambda client, run_id: client.log_bytes(run_id, name, png))

    def log_text(self, name: str, text: str) -> None:
        """A text file among the run's artifacts, without secrets."""
        data = safe_text(text).encode()
        self._record("log a text", lambda client, run_id: client.log_bytes(run_id, name, data))

    def _record(self, what: str, call: Callable[[TrackingClient, str], object]) -> None:
        self._tracker.record(self.key, what, call)


def _worded(error: BaseException) -> str:
    """One line for the log, without secrets."""
    text = safe_text(str(error)).strip() or type(error).__name__
    # MLflow wraps the cause in three lines of connection pools; a few words of them say what happened.
    cause = re.search(r"Connection refused|timed out|Name or service not known|No route to host|Unauthorized", text)
    return cause.group(0) if cause else text.split("\n")[0][:300]
