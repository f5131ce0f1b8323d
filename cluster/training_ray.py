"""Trainings on Ray Train: the group of workers, as many as there is room for, what rank 0 tells, and how it ends."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import traceback
from typing import Any

from cluster.placement import Ask, RoomWatch, wait_for_room
from cluster.storage import StorageError
from cluster.trainee import Post, TrainComputeSettings, TrainContext, TrainJob
from cluster.training_loop import run_worker

_POLL_S = 0.3
_START_FAILURES = 5  # a new group that does not get its workers within a minute is given up after so many minutes
_RESIZE_EVERY_S = 600.0  # another size costs what was trained since the last checkpoint, and a start
_LASTING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError)
"""Errors that the same input gives again: not retried, unlike lost workers, connections and memory."""
_LASTING_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""A full disk or a storage that must not be written: not retried either."""


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


def train_on_ray(job: TrainJob, section: str, handle: Post) -> None:
    """Start the workers, hand their messages on, on this thread, and return when result.json is there.

    section: the key of job.compute in the config. Raises what `cluster.training.train` says.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = room_for_workers(job.compute, section)
    wait_for_room(ask, until_free=True)
    watch = RoomWatch(ask)
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
                handle(*message)
            watch.check()  # after the loss of a node the workers may fit nowhere
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


def room_for_workers(compute: TrainComputeSettings, section: str) -> Ask:
    """What the workers of a training need at least, with a CPU for Ray Data's tasks where those read."""
    key = "num_workers" if compute.min_workers is None else "min_workers"
    return Ask(
        stage=section,
        noun="workers",
        num=getattr(compute, key),
        cpus=compute.cpus_per_worker,
        gpus=compute.gpus_per_worker,
        remedy=f"lower {section}.{key}, cpus_per_worker or gpus_per_worker",
        spare_cpu=compute.input == "ray",
    )


def _trainer(job: TrainJob, mailbox: Any, scratch: str) -> Any:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    settings: Any = ray.train  # its stubs still show the classes of Ray Train V1
    compute = job.compute
    gpus = {"GPU": compute.gpus_per_worker} if compute.gpus_per_worker else {}
    resources = {"CPU": compute.cpus_per_worker, **gpus}
    num_workers = compute.num_workers if compute.min_workers is None else (compute.min_workers, compute.num_workers)
    return TorchTrainer(
        _ray_worker,
        train_loop_config={"job": ray.put(job), "mailbox": mailbox},  # rows go through the object store, once a node
        scaling_config=settings.ScalingConfig(
            num_workers=num_workers,
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
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
