"""Trainings on the driver: start the worker loop, in this process or on Ray Train, show progress, read the result."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import pyarrow as pa
import torch

from cluster.storage import Storage
from cluster.trainee import OptimiserSettings, TrainComputeSettings, TrainContext, Trainee, TrainJob, TrainResult
from cluster.training_loop import run_worker
from cluster.training_ray import train_on_ray
from cluster.training_rows import RowFile

__all__ = ["OptimiserSettings", "TrainComputeSettings", "TrainResult", "Trainee", "train"]

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
    section: str = "compute",
) -> TrainResult:
    """Train, or go on from the newest checkpoint in `folder`, or return the result of a training that is done.

    rows, val_rows: tables with image_id, uri (strings) and whatever the trainee reads; a table goes to every worker, a
    RowFile stays where it is, and is deleted once the training is done. Writes into folder:
    checkpoints/epoch-0001.pt after each epoch, model.pt (a state dict) and, last, result.json. The folder belongs to
    one training: that its content is of these settings is for the caller to know (`cluster.artifacts`).
    section: the key of compute in the config, for errors.
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
        train_on_ray(job, section, monitor.handle)
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
    if problem := job.compute.batch_problem(job.optimiser.batch_size):
        raise ValueError(f"batch_size {job.optimiser.batch_size}: {problem}")
    if job.compute.input == "ray" and job.compute.num_workers == 0:
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
