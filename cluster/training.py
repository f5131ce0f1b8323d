"""Trainings on the driver: start the worker loop, in this process or on Ray Train, show progress, read the result."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyarrow as pa
import torch

from cluster.runtime import available_resources
from cluster.storage import Storage, StorageError
from cluster.trainee import OptimiserSettings, TrainComputeSettings, TrainContext, Trainee, TrainJob, TrainResult
from cluster.training_loop import run_worker
from cluster.training_rows import RowFile

__all__ = ["OptimiserSettings", "TrainComputeSettings", "TrainResult", "Trainee", "train"]

_POLL_S = 0.3
_START_FAILURES = 5  # a group that cannot get its workers within a minute is given up after so many minutes
_LASTING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError)
"""Errors that the same input gives again: not retried, unlike lost workers, connections and memory."""
_LASTING_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""A full disk or a storage that must not be written: not retried either."""

OnMetrics = Callable[[int, dict[str, float]], None]


class Bar(Protocol):
    """Where images are counted: a stage of `cluster.progress`."""

    def advance(self, num: int) -> None:
        """num more are done."""

    def skip(self, num: int) -> None:
        """num were done by an earlier run."""


def train(
    trainee: Trainee,
    rows: pa.Table | RowFile,
    *,
    val_rows: pa.Table | RowFile | None,
    folder: Storage,
    optimiser: OptimiserSettings,
    compute: TrainComputeSettings,
    rng_seed: int,
    bar: Bar | None = None,
    on_metrics: OnMetrics | None = None,
    max_bad_frac: float = 0.02,
) -> TrainResult:
    """Train, or go on from the newest checkpoint in `folder`, or return the result of a training that is done.

    rows, val_rows: tables with image_id, uri (strings) and whatever the trainee reads; a table goes to every worker, a
    RowFile stays where it is, and is deleted once the training is done. Writes into folder:
    checkpoints/epoch-0001.pt after each epoch, model.pt (a state dict) and, last, result.json. The folder belongs to
    one training: that its content is of these settings is for the caller to know (`cluster.artifacts`).
    bar gets optimiser.length(number of rows).num_images in all. on_metrics(step, values) is called on the caller's
    thread: every few steps with loss, the trainee's scalars, learning_rate and images_per_s; after each epoch with
    epoch, epoch_* means and validation metrics. A step may come again after a lost worker was replaced. Raises
    ValueError for empty tables, settings that do not fit together or the cluster, more than max_bad_frac bad images,
    and a loss that is not finite; StorageError where the folder cannot be written; RuntimeError for too many losses.
    """
    job = TrainJob(trainee, rows, val_rows, folder, optimiser, compute, rng_seed, max_bad_frac)
    _check(job)
    monitor = _Monitor(job, bar, on_metrics)
    if _is_done(job):
        monitor.handle("progress", job.length.num_steps, {})
    elif compute.num_workers == 0:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with _threads_restored():
            run_worker(job, TrainContext(0, 1, device, monitor.handle, compute.threads_per_worker))
    else:
        _train_on_ray(job, monitor)
    for file in (rows, val_rows):
        if isinstance(file, RowFile):
            file.delete()
    result = folder.read_json("result.json")
    return TrainResult(**{field.name: result[field.name] for field in dataclasses.fields(TrainResult)})


def _check(job: TrainJob) -> None:
    if job.rows.num_rows == 0:
        raise ValueError("there is no image to train on; check the split, and that its images have labels")
    for table in (job.rows, job.rows if job.val_rows is None else job.val_rows):
        if missing := {"image_id", "uri"} - set(table.column_names):
            raise ValueError(f"the rows have no column {', '.join(sorted(missing))}; give image_id and uri")
    num_workers, batch_size = job.compute.num_workers, job.optimiser.batch_size
    if num_workers and batch_size % num_workers:
        raise ValueError(
            f"batch_size {batch_size} cannot be split evenly over {num_workers} workers; "
            f"take {batch_size - batch_size % num_workers or num_workers} or {batch_size + -batch_size % num_workers}"
        )
    if job.compute.input == "ray" and num_workers == 0:
        raise ValueError('input "ray" needs Ray workers; set num_workers to 1 or more, or input to "loader"')


def _is_done(job: TrainJob) -> bool:
    if not job.folder.exists("result.json"):
        return False
    done = job.folder.read_json("result.json").get("identity")
    if done != job.identity():
        raise ValueError(
            f"{job.folder.uri('result.json')} is of a training with {done}, this one has {job.identity()}; "
            "delete the folder or take another"
        )
    return True


@contextlib.contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Monitor:
    """Turns what rank 0 tells into a bar's progress and metrics."""

    def __init__(self, job: TrainJob, bar: Bar | None, on_metrics: OnMetrics | None) -> None:
        self._bar, self._on_metrics = bar, on_metrics
        self._num_images, self._num_steps = job.length.num_images, job.length.num_steps
        self._shown: int | None = None

    def handle(self, kind: str, step: int, values: dict[str, float]) -> None:
        """A message of rank 0; steps that come again move nothing."""
        num_done = round(self._num_images * step / self._num_steps)
        if self._bar is not None and self._shown is None:
            self._bar.skip(num_done)
        elif self._bar is not None and num_done > (self._shown or 0):
            self._bar.advance(num_done - (self._shown or 0))
        self._shown = max(num_done, self._shown or 0)
        if kind == "metrics" and self._on_metrics is not None:
            self._on_metrics(step, values)


class _Mailbox:
    """A small actor on the driver's node: messages of rank 0, and the error that no restart would cure."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, int, dict[str, float]]] = []
        self._error: tuple[str, str, str] | None = None

    def post(self, kind: str, step: int, values: dict[str, float]) -> None:
        self._messages.append((kind, step, values))

    def drain(self) -> list[tuple[str, int, dict[str, float]]]:
        messages, self._messages = self._messages, []
        return messages

    def fail(self, kind: str, message: str, trace: str) -> None:
        self._error = self._error or (kind, message, trace)

    def error(self) -> tuple[str, str, str] | None:
        return self._error


def _train_on_ray(job: TrainJob, monitor: _Monitor) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _check_cluster(job.compute)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    scratch = tempfile.mkdtemp(prefix="subcat-train-")  # Ray Train wants a folder; our checkpoints are not there
    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            _trainer(job, mailbox, scratch).fit()
        except BaseException as error:
            outcome.append(error)

    # In a thread of its own: callers hear of metrics on their own thread, and Ctrl-C stays Python's.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            for message in ray.get(mailbox.drain.remote()):
                monitor.handle(*message)
        lasting = ray.get(mailbox.error.remote())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        ray.kill(mailbox)
    if lasting is not None:
        kind, message, trace = lasting
        if kind == "RuntimeError":
            message = f"training failed: {message}\n{trace}"
        raise {"ValueError": ValueError, "StorageError": StorageError, "RuntimeError": RuntimeError}[kind](message)
    if outcome:
        raise RuntimeError(
            f"training failed, lost workers were replaced {job.compute.max_failures} times "
            f"({_first_cause(outcome[0])}); the newest checkpoint is kept, and the same command goes on from it"
        ) from outcome[0]


def _first_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [f"rank {rank}: {str(failure).strip().splitlines()[-1]}" for rank, failure in sorted(failures.items())]
    return "; ".join(causes) or str(error).strip().splitlines()[-1]


def _check_cluster(compute: TrainComputeSettings) -> None:
    """ValueError where a cluster of one node cannot hold the workers; larger ones may still grow."""
    have = available_resources()
    for_input = 1.0 if compute.input == "ray" else 0.0
    cpus = compute.num_workers * compute.cpus_per_worker + for_input
    gpus = compute.num_workers * compute.gpus_per_worker
    if have["num_nodes"] > 1 or (cpus <= have["num_cpus"] and gpus <= have["num_gpus"]):
        return
    tasks = " and one CPU for Ray Data" if for_input else ""
    raise ValueError(
        f"{compute.num_workers} workers{tasks} need {cpus:g} CPUs and {gpus:g} GPUs, the cluster has "
        f"{have['num_cpus']:g} and {have['num_gpus']:g}; lower num_workers, cpus_per_worker or gpus_per_worker, "
        "or add nodes"
    )


def _trainer(job: TrainJob, mailbox: Any, scratch: str) -> Any:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    settings: Any = ray.train  # its stubs still show the classes of Ray Train V1
    compute = job.compute
    gpus = {"GPU": compute.gpus_per_worker} if compute.gpus_per_worker else {}
    resources = {"CPU": compute.cpus_per_worker, **gpus}
    return TorchTrainer(
        _ray_worker,
        train_loop_config={"job": ray.put(job), "mailbox": mailbox},  # rows go through the object store, once a node
        scaling_config=settings.ScalingConfig(
            num_workers=compute.num_workers,
            use_gpu=compute.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=settings.RunConfig(
            name="train",
            storage_path=scratch,
            failure_config=settings.FailureConfig(
                max_failures=compute.max_failures, controller_failure_limit=_START_FAILURES
            ),
            logging_config=settings.LoggingConfig(log_level="ERROR"),
        ),
    )


def _ray_worker(config: dict[str, Any]) -> None:
    """One rank of a Ray Train group. After a lasting error the group is restarted by Ray once, and ends at once."""
    import ray
    import ray.train
    import ray.train.torch

    mailbox = config["mailbox"]
    if ray.get(mailbox.error.remote()) is not None:
        return
    job: TrainJob = ray.get(config["job"])
    place = ray.train.get_context()
    rank = place.get_world_rank()

    def post(kind: str, step: int, values: dict[str, float]) -> None:
        if rank == 0:
            mailbox.post.remote(kind, step, values)

    threads = job.compute.threads_per_worker or max(1, _num_cores() // place.get_local_world_size())
    context = TrainContext(rank, place.get_world_size(), ray.train.torch.get_device(), post, threads)
    try:
        run_worker(job, context)
    except Exception as error:
        kind = lasting_kind(error)
        if kind is not None:
            ray.get(mailbox.fail.remote(kind, str(error), traceback.format_exc()))
        raise


def lasting_kind(error: BaseException) -> str | None:
    """The class `train` raises for a worker's error that would come again; None where another try may do better."""
    if isinstance(error, _LASTING):
        return "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    cause: BaseException | None = error
    while isinstance(cause, OSError):  # a StorageError has its reason as its cause
        if isinstance(cause, PermissionError) or cause.errno in _LASTING_ERRNOS:
            return "StorageError"
        cause = cause.__cause__
    return None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
