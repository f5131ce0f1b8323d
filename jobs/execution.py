"""A run from its settings to its table: starts what it needs (Ray, MLflow), runs the stages, prints what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer
from rich.console import Console

from cluster.progress import Progress
from cluster.runtime import ClusterSettings, check_shared_storage, start_ray
from cluster.storage import Storage
from cluster.tracking import Tracker
from jobs import pipeline, summary
from jobs.config import Experiment
from jobs.context import StageContext

T = TypeVar("T")


def execute(experiment: Experiment, *, last_stage: str | None = None, verbose: bool = False, command: str = "") -> None:
    """Start what the run needs, run the pipeline up to `last_stage`, print the table.

    command: the command line as typed, for the report and MLflow. verbose: show what Ray and its workers print.
    """
    storage = Storage(experiment.output)
    storage.check_writable()
    progress = Progress()
    tracker = Tracker(experiment.tracking, storage, experiment.name)

    def work() -> None:
        if needs_ray(experiment):
            check_shared_storage(storage, experiment.cluster.shared_folder)
        with tracker:
            tracker.log_config(experiment.flattened(), command)
            pipeline.run(StageContext(experiment, storage, progress, tracker, command), last_stage)

    try:
        with_ray(experiment.cluster, needs_ray(experiment), work, verbose)
    finally:  # a run that failed is looked at there, too
        if tracker.place is not None:
            typer.echo(f"MLflow: {tracker.place}")
    summary.print_summary(storage, experiment, Console())
    if storage.exists("report/index.html"):
        typer.echo(f"report: {storage.uri('report/index.html')}")


def needs_ray(experiment: Experiment) -> bool:
    """Whether any stage of the run, in any round, asks for workers or actors."""
    rounds = [experiment.for_round(index) for index in range(experiment.rounds + 1)]
    compute = [*(part.classifier.compute for part in rounds), experiment.segmenter.compute]
    if experiment.affinity is not None:
        compute.append(experiment.affinity.compute)
    return experiment.stream.num_actors > 0 or any(part.num_workers > 0 for part in compute)


def with_ray(settings: ClusterSettings, needed: bool, work: Callable[[], T], verbose: bool) -> T:
    """Call `work`, inside a Ray session where one is needed."""
    if not needed:
        return work()
    with start_ray(settings, verbose=verbose):
        return work()
