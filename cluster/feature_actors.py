"""The actors that hold feature rows: started, fed by Ray Data, asked, and always ended."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from cluster.placement import NodeSize, node_sizes, wait_for_room
from cluster.runtime import peak_rss_bytes
from cluster.shard_dispatch import (
    FEATURE_COLUMNS,
    ShardFile,
    ShardPlan,
    Work,
    check_memory,
    image_rows,
)
from cluster.storage import Storage, StorageError
from cluster.streams import StreamSettings, room_for_actors
from subcat_core.kmeans import Assignment
from subcat_core.kmeans_result import KMeansResult

logger = logging.getLogger("subcat")

_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,  # these three: of a node that is gone
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
)
_FILES_AT_ONCE = 4  # in one reading task
_READING_CPUS = 1.0  # kept free of actors, or the tasks that feed them would wait for ever


def with_actors(
    holder_class: type,
    features: Storage,
    parts: Sequence[Sequence[ShardFile]],
    plan: ShardPlan,
    stream: StreamSettings,
    work: Work,
    *,
    max_deaths: int,
    num_passes: Callable[[], int],
) -> KMeansResult:
    """Run `work` over one actor for each part; with new actors again when one dies.

    It ends when actors died `max_deaths` times without a whole pass between; num_passes: how many `work` has done so
    far. holder_class: what an actor runs, as feature_shards.FaissShard. Errors of the rows come out as ValueError,
    those of their files as StorageError.
    """
    num_deaths, passes_before = 0, num_passes()
    while True:
        try:
            with _actor_pool(holder_class, parts, plan, stream) as pool:
                reservations = pool.call("reserve")
                check_memory(reservations)
                cache_bytes = sum(reservation.cache_bytes for reservation in reservations)
                logger.info("k-means caches %.2f GB of features in %d actors", cache_bytes / 1e9, len(parts))
                _feed(features, parts, pool)
                pool.call("finish")
                result = work(pool)
                peak = max(peak_rss_bytes(), *pool.call("peak_rss"))
                return dataclasses.replace(result, peak_rss_bytes=peak)
        except _DEATHS as error:
            num_deaths = 1 if num_passes() > passes_before else num_deaths + 1
            passes_before = num_passes()
            if num_deaths == max_deaths:
                raise RuntimeError(
                    f"an actor that holds feature rows died {num_deaths} times ({str(error).splitlines()[0]}); "
                    "most often memory ran out: use kmeans.cache_bytes, kmeans.stored_dtype = 'float16', or more nodes"
                ) from error
            logger.warning("an actor that holds feature rows died; k-means goes on after its last pass")


@dataclasses.dataclass
class _ActorPool:
    actors: list[Any]

    def call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all actors, in order; a ValueError of an actor comes out as it went in."""
        return _get(self._ask(method, *args))

    def total(self, method: str, *args: Any) -> Assignment:
        """The sum of all answers, added up by the actors in pairs, then pairs of pairs: one comes to the driver."""
        answers = self._ask(method, *args)
        step = 1
        while step < len(answers):
            for i in range(0, len(answers) - step, 2 * step):
                answers[i] = self.actors[i].merged.remote(answers[i], answers[i + step])
            step *= 2
        return _get(answers[0])

    def _ask(self, method: str, *args: Any) -> list[Any]:
        shared = [ray.put(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        return [actor.ask.remote(method, *shared) for actor in self.actors]


def _get(answers: Any) -> Any:
    try:
        return ray.get(answers)
    except ray.exceptions.RayTaskError as error:
        cause: Any = error
        while isinstance(cause, ray.exceptions.RayTaskError):  # an answer that was to be added may have failed
            cause = cause.cause
        if isinstance(cause, (ValueError, OSError, *_DEATHS)):
            raise cause from None
        raise


@contextlib.contextmanager
def _actor_pool(
    holder_class: type, parts: Sequence[Sequence[ShardFile]], plan: ShardPlan, stream: StreamSettings
) -> Iterator[_ActorPool]:
    num_cpus = _cpus_per_actor(len(parts), stream, node_sizes())
    plan = dataclasses.replace(plan, num_threads=max(1, int(num_cpus)))
    wait_for_room(room_for_actors("cluster_features", len(parts), num_cpus, stream.gpus_per_actor))
    # Ray's default fills one node before the next: the rows would lie in the memory of one.
    actor_class: Any = ray.remote(holder_class).options(
        num_cpus=num_cpus, num_gpus=stream.gpus_per_actor, scheduling_strategy="SPREAD"
    )
    actors: list[Any] = [actor_class.remote(list(files), plan) for files in parts]
    try:
        yield _ActorPool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


def _cpus_per_actor(num_actors: int, stream: StreamSettings, nodes: Sequence[NodeSize]) -> float:
    """What the setting says, or less where the actors would leave no CPU to the tasks that read, or fit on no node."""
    total = sum(node.cpus for node in nodes)
    if total == 0:  # an autoscaler's cluster before its first machine
        return stream.cpus_per_actor
    fair = max(0.0, (total - _READING_CPUS) / num_actors)
    for num_cpus in (stream.cpus_per_actor, *map(float, range(int(min(fair, stream.cpus_per_actor)), 0, -1))):
        if room_for_actors("k-means", num_actors, num_cpus, 0.0).num_that_fit(nodes) == num_actors:
            return num_cpus
    return int(min(fair, stream.cpus_per_actor, 0.99) * 100) / 100


_FEED_ERRORS: dict[str, Callable[[str], Exception]] = {
    "rows": ValueError,
    "file": StorageError,
    "death": lambda text: ray.exceptions.RayActorError(error_msg=text),
}


@dataclasses.dataclass
class _Feeder:
    """A Ray Data step that reads feature shards and hands their rows to the owners of the files.

    Errors come back as values, of a kind of _FEED_ERRORS: Ray Data loses the class of an error that is raised.
    """

    features: Storage
    owners: dict[str, Any]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """batch: names of shards; returns what became of each."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            return pa.Table.from_pylist(list(pool.map(self._feed, batch["name"].to_pylist())))

    def _feed(self, name: str) -> dict[str, Any]:
        num_rows, kind, text = 0, "", ""
        try:
            rows = image_rows(name, self.features.read_table(f"{name}.parquet", columns=FEATURE_COLUMNS))
            num_rows = ray.get(self.owners[name].add.remote(name, rows))
        except _DEATHS as error:
            kind, text = "death", str(error)
        except StorageError as error:
            kind, text = "file", str(error)
        except ValueError as error:
            kind, text = "rows", str(error)
        return {"num_rows": num_rows, "kind": kind, "text": text}


def _feed(features: Storage, parts: Sequence[Sequence[ShardFile]], pool: _ActorPool) -> None:
    """Read all files by Ray Data; rows go from the reading tasks to the actors, the driver sees numbers of rows."""
    owners = {file.name: actor for files, actor in zip(parts, pool.actors, strict=True) for file in files}
    fed = ray.data.from_items([{"name": name} for name in owners]).map_batches(
        _Feeder(features, owners), batch_size=_FILES_AT_ONCE, batch_format="pyarrow"
    )
    num_rows = 0
    batches: Any = iter(fed.iter_batches(batch_size=None, batch_format="pyarrow"))
    with contextlib.closing(batches):  # or the tasks of a feeding that failed would go on
        for row in (row for batch in batches for row in batch.to_pylist()):
            if row["kind"]:
                raise _FEED_ERRORS[row["kind"]](row["text"])
            num_rows += row["num_rows"]
    logger.debug("fed %d rows to %d actors", num_rows, len(pool.actors))
