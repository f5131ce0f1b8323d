"""StageContext, what every stage gets; `complete`, the one way a stage is skipped, run, timed, logged, committed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.artifacts import STARTED, Artifact
from cluster.image_reading import BadRow
from cluster.memory import MemorySampler
from cluster.progress import Progress
from cluster.runtime import peak_rss_bytes
from cluster.storage import Storage
from cluster.streams import ShardSummary
from cluster.tracking import ChildRun, Tracker
from cluster.training import TrainResult
from jobs.gpu_time import held_gpus
from jobs.quarantine import keep_bad

if TYPE_CHECKING:
    from jobs.config import Experiment


@dataclasses.dataclass(frozen=True)
class StageContext:
    """Where a stage reads and writes, and whom it tells. `storage` is the root of the run's output."""

    experiment: Experiment
    storage: Storage
    progress: Progress
    tracker: Tracker
    command: str = ""
    """The command line of the run, for the report."""

    def for_round(self, round_index: int) -> StageContext:
        """The same context with the settings of one round."""
        return dataclasses.replace(self, experiment=self.experiment.for_round(round_index))


def round_folder(round_index: int, stage: str) -> str:
    """`rounds/02/features`."""
    return f"rounds/{round_index:02d}/{stage}"


def complete(
    context: StageContext,
    *,
    name: str,
    stage: str,
    inputs: dict[str, Any],
    work: Callable[[Artifact, ChildRun], dict[str, Any]],
    round_index: int | None = None,
) -> Artifact:
    """Skip a finished stage, or do its `work` and write its marker last.

    name: folder below the run's root. inputs: settings and fingerprints that decide the output. work: gets the begun
    artifact and its MLflow run, writes into `artifact.folder` and returns JSON-able stats for the marker, and in them
    `bad`, a list of BadRow (jobs/quarantine.py).
    Its seconds are those of this call; `resumed` says that an earlier call had done a part. driver_rss_bytes: the
    driver's peak since its start; run_bytes: the stage's peak of all processes of the run (cluster/memory.py);
    gpu_hours: of the GPUs that the stage held, where it held any.
    Raises ArtifactMismatch when the folder holds the output of other inputs.
    """
    artifact = Artifact(context.storage, name, {"stage": stage, **inputs})
    where = stage if round_index is None else f"{stage}, round {round_index}"
    if artifact.is_complete():
        context.progress.note(f"{where}: complete, skipped")
        return artifact
    resumed = artifact.folder.exists(STARTED)
    artifact.begin()
    started = time.monotonic()
    with context.tracker.child(stage, round_index) as child:
        with MemorySampler() as memory:
            stats = work(artifact, child)
        seconds = time.monotonic() - started
        measured = {"driver_rss_bytes": peak_rss_bytes(), "run_bytes": memory.peak_bytes}
        stats = {
            "seconds": round(seconds, 2),
            "resumed": resumed,
            **measured,
            **keep_bad(artifact.folder, stage, stats),
        }
        if stats.get("num_images") and not resumed:
            stats.setdefault("images_per_s", round(stats["num_images"] / max(seconds, 1e-9), 2))
        if gpus := held_gpus(context.experiment, stage):
            stats["gpu_hours"] = round(gpus * seconds / 3600, 5)
        numbers = {f"{stage}/{key}": float(value) for key, value in stats.items() if isinstance(value, int | float)}
        child.log_metrics({name: value for name, value in numbers.items() if name not in child.told_by_step})
        artifact.commit(stats)
    return artifact


def stream_stats(summaries: list[ShardSummary]) -> dict[str, Any]:
    """The stats every streaming stage keeps: rows, bad rows with their reasons, and the workers' peak memory."""
    return {
        "num_images": sum(summary.num_rows for summary in summaries),
        "num_bad": sum(len(summary.bad) for summary in summaries),
        "peak_rss_bytes": max((summary.peak_rss_bytes for summary in summaries), default=0),
        "bad": [bad for summary in summaries for bad in summary.bad],
    }


def training_stats(artifact: Artifact, result: TrainResult) -> dict[str, Any]:
    """The stats every training stage keeps."""
    return {
        "weights": artifact.folder.read_json("result.json")["weights"],
        "num_images": result.num_images,
        "images_per_s": result.images_per_s,
        "peak_rss_bytes": result.peak_rss_bytes,
        "num_bad": result.num_bad,
        "bad": [BadRow(**bad) for bad in result.bad_rows],
    }


def warn_of_loss(context: StageContext, title: str, result: TrainResult, guess: float | None = None) -> None:
    """Tell of a training that learned nothing: a loss that is finite, and no lower in the last epoch than in the first.

    What such a network makes looks like output, and every stage after it would pass it on. guess: the loss of always
    answering the same, where it is known: a parent_loss above it is that of a network that tells no images apart.
    """
    first, last = result.history[0]["loss"], result.history[-1]["loss"]
    if len(result.history) > 1 and last >= first:
        context.progress.note(
            f"warning: {title}: the loss did not fall ({first:.3g} in the first epoch, {last:.3g} in the last); "
            "lower optimiser.learning_rate"
        )
    reached = result.history[-1].get("parent_loss")
    if guess is not None and reached is not None and reached >= guess:
        context.progress.note(
            f"warning: {title}: the loss of the last epoch ({reached:.3g}) is not below {guess:.3g}, that of always "
            "answering how frequent each class is; lower optimiser.learning_rate, or train longer"
        )
