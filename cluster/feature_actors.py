"""The actors that hold feature rows: started, fed by Ray Data, asked, and always ended."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from cluster.runtime import peak_rss_bytes
from cluster.shard_dispatch import FEATURE_COLUMNS, DispatchedShard, ShardFile, ShardPlan, Work, image_rows
from cluster.storage import Storage, StorageError
from cluster.streams import StreamSettings
from subcat_core.kmeans import KMeansResult

logger = logging.getLogger("subcat")

_READING_CPUS = 1.0  # kept free of actors, or the tasks that feed them would wait for ever


def with_actors(
    holder_class: type,
    features: Storage,
    parts: Sequence[Sequence[ShardFile]],
    plan: ShardPlan,
    stream: StreamSettings,
    work: Work,
    *,
    attempts: int,
) -> KMeansResult:
    """Run `work` over a dispatcher of one actor for each part; from the start again, up to `attempts`, when one dies.

    holder_class: what an actor runs, as feature_shards.FaissShard. Errors of the rows come out as ValueError.
    """
    for attempt in range(1, attempts + 1):
        try:
            with _actor_pool(holder_class, parts, plan, stream) as pool:
                cache_bytes = sum(pool.call("reserve"))
                logger.info("k-means caches %.2f GB of features in %d actors", cache_bytes / 1e9, len(parts))
                _feed(features, parts, pool)
                pool.call("finish")
                result = work(DispatchedShard(pool.call, plan.num_blocks))
                peak = max(peak_rss_bytes(), *pool.call("peak_rss"))
                return dataclasses.replace(result, peak_rss_bytes=peak)
        except ray.exceptions.RayActorError as error:
            if attempt == attempts:
                raise RuntimeError(
                    f"an actor that holds feature rows died {attempts} times ({str(error).splitlines()[0]}); "
                    "most often memory ran out: use kmeans.stored_dtype = 'float16', or more nodes and actors"
                ) from error
            logger.warning("an actor that holds feature rows died; k-means starts again")
    raise AssertionError("attempts is at least 1")


@dataclasses.dataclass
class _ActorPool:
    actors: list[Any]

    def call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all actors, in order; a ValueError of an actor comes out as it went in."""
        shared = [ray.put(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        try:
            return ray.get([actor.ask.remote(method, *shared) for actor in self.actors])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError | OSError):
                raise error.cause from None
            raise


@contextlib.contextmanager
def _actor_pool(
    holder_class: type, parts: Sequence[Sequence[ShardFile]], plan: ShardPlan, stream: StreamSettings
) -> Iterator[_ActorPool]:
    num_cpus = _cpus_per_actor(len(parts), stream)
    plan = dataclasses.replace(plan, num_threads=max(1, int(num_cpus)))
    actor_class: Any = ray.remote(holder_class).options(num_cpus=num_cpus, num_gpus=stream.gpus_per_actor)
    actors: list[Any] = [actor_class.remote(list(files), plan) for files in parts]
    try:
        yield _ActorPool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


def _cpus_per_actor(num_actors: int, stream: StreamSettings) -> float:
    """What the setting says, or less where the actors would leave no CPU to the tasks that read."""
    total = ray.cluster_resources().get("CPU", 1.0)
    fair = max(0.0, (total - _READING_CPUS) / num_actors)
    if stream.cpus_per_actor <= fair:
        return stream.cpus_per_actor
    return int(fair * 100) / 100 if fair < 1 else float(int(fair))


@dataclasses.dataclass
class _Push:
    """A Ray Data step that hands each block's rows to the owners of their files."""

    owners: dict[str, Any]

    def __call__(self, table: pa.Table) -> pa.Table:
        names = [PurePosixPath(path).name.removesuffix(".parquet") for path in table["path"].to_pylist()]
        codes, groups = np.unique(np.array(names, np.str_), return_inverse=True)
        pushed = []
        for code, name in enumerate(codes.tolist()):
            rows = image_rows(name, table.take(np.flatnonzero(groups == code)))
            pushed.append(self.owners[name].add.remote(name, rows))
        return pa.table({"num_rows": pa.array(ray.get(pushed), pa.int64())})


def _feed(features: Storage, parts: Sequence[Sequence[ShardFile]], pool: _ActorPool) -> None:
    """Read all files by Ray Data; rows go from the reading tasks to the actors, the driver sees numbers of rows."""
    owners = {file.name: actor for files, actor in zip(parts, pool.actors, strict=True) for file in files}
    located = [features.arrow_filesystem(f"{name}.parquet") for name in owners]
    dataset = ray.data.read_parquet(
        [path for _, path in located], filesystem=located[0][0], columns=FEATURE_COLUMNS, include_paths=True
    )
    pushed = dataset.map_batches(_Push(owners), batch_size=None, batch_format="pyarrow")
    try:
        num_rows = sum(row["num_rows"] for row in pushed.iter_rows())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayActorError):
            raise error.cause from error
        reason = str(error.cause or error).strip().splitlines()[-1]
        raise StorageError(f"{features.uri()}: reading the feature shards failed ({reason}); run again") from error
    logger.debug("fed %d rows to %d actors", num_rows, len(pool.actors))
