"""Work that goes shard by shard over the cluster: a fixed pool of Ray Data actors, resumable, bad rows quarantined."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pydantic import Field

from cluster.image_reading import BadRow, iter_images
from cluster.progress import StageBar
from cluster.runtime import available_resources, peak_rss_bytes
from cluster.storage import Storage, StorageError
from subcat_core.settings import Settings

__all__ = ["BadRow", "ShardError", "ShardOutput", "ShardSummary", "StreamSettings", "iter_images", "map_shards"]

_MAX_DEATHS = 3  # of one actor's process that are mended by a new one, before the stage gives up
_MAX_NAMED_ROWS = 5
_SPAN_SHARDS = 4096
_SUMMARY_THREADS = 16
_SUMMARIES_AHEAD = 256


class StreamSettings(Settings):
    """How a stage that goes shard by shard is spread."""

    num_actors: int = Field(default=1, ge=0)
    """Actors, each with its own copy of the model; 0 runs in this process, without Ray."""
    cpus_per_actor: float = Field(default=1.0, gt=0)
    """Logical CPUs that one actor holds."""
    gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs, or a share of one, that one actor holds."""
    max_bad_frac: float = Field(default=0.02, ge=0, le=1)
    """Share of the images that may be unreadable before the stage fails."""


class ShardError(RuntimeError):
    """A stage failed at one shard; the message names it, and the cause holds the worker's trace."""


class WorkerTrace(Exception):  # noqa: N818 (not raised: it stands as the cause of a ShardError)
    """The trace of an error as the worker saw it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclasses.dataclass
class ShardOutput:
    """What a worker makes of one shard: table is written as part-*.parquet (None: no table), stats are JSON-able."""

    table: pa.Table | None
    bad: list[BadRow] = dataclasses.field(default_factory=list)
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_rows: int = 0


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What part-*.json keeps of a shard: all that the driver ever holds of it.

    num_rows: as the worker counted; num_inputs: rows of its first input. seconds: wall time, with reading and
    writing. peak_rss_bytes: of the process that worked, since its start.
    """

    name: str
    num_rows: int
    bad: list[BadRow]
    stats: dict[str, Any]
    seconds: float
    peak_rss_bytes: int
    num_inputs: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShardSummary:
        return cls(**{**data, "bad": [BadRow(**row) for row in data["bad"]]})


def map_shards(
    worker_class: Callable[..., Callable[[dict[str, pa.Table]], ShardOutput]],
    worker_kwargs: Mapping[str, Any],
    inputs: Mapping[str, Storage],
    shards: Sequence[str],
    output: Storage,
    settings: StreamSettings,
    bar: StageBar | None = None,
    stage: str = "stage",
    columns: Mapping[str, list[str]] | None = None,
    fold: Callable[[ShardSummary], None] | None = None,
) -> list[ShardSummary]:
    """Run a worker over every shard and return the summaries, in the order of `shards`.

    worker_class(**worker_kwargs) is built once an actor and called once a shard with one table for each of `inputs`
    (folder -> its part-*.parquet of the shard's name; columns: which of its columns). The table it returns is written
    to the output folder, then the summary, so a shard whose summary is there is whole and skipped. bar counts the rows
    of the first input. fold: called once with each summary, those of an earlier run too, in any order; it takes what it
    needs of the stats, which are then dropped, so that the driver's memory does not grow with large ones.

    ShardError where a worker fails, ValueError where more than max_bad_frac of the rows are bad; those shards are then
    forgotten, and read again by the next run.
    """
    done: dict[str, ShardSummary] = {}

    def keep(summary: ShardSummary) -> None:
        if fold is not None:
            fold(summary)
            summary = dataclasses.replace(summary, stats={})
        done[summary.name] = summary

    for summary in _finished(output, shards):
        keep(summary)
    if bar is not None and done:
        bar.skip(sum(summary.num_inputs for summary in done.values()))
    todo = [name for name in shards if name not in done]
    task = functools.partial(
        ShardTask, worker_class, dict(worker_kwargs), dict(inputs), output, dict(columns or {}), stage
    )
    results = _run_here(task, todo) if settings.num_actors == 0 else _run_on_ray(task, todo, settings, stage)
    num_bad = sum(len(summary.bad) for summary in done.values())
    with contextlib.closing(results):
        for summary in results:
            keep(summary)
            num_bad += len(summary.bad)
            if bar is not None:
                bar.advance(summary.num_inputs)
                if bar.total is not None and num_bad > settings.max_bad_frac * max(bar.total, bar.num_done):
                    break  # no need to read the rest
    _check_bad(done.values(), settings.max_bad_frac, output, stage)
    return [done[name] for name in shards]


class ShardTask:
    """What an actor runs: read a shard's inputs, call the worker, write its output. Errors come back as values."""

    def __init__(
        self,
        worker_class: Callable[..., Any],
        worker_kwargs: dict[str, Any],
        inputs: dict[str, Storage],
        output: Storage,
        columns: dict[str, list[str]],
        stage: str,
    ) -> None:
        self._build = functools.partial(worker_class, **worker_kwargs)
        self._inputs, self._output, self._columns, self._stage = inputs, output, columns, stage
        self._worker: Any = None  # built at the first shard, where an error can be told

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """batch: one shard name, as Ray Data hands it on; returns its name, summary (JSON) and error (or '')."""
        (name,) = batch["name"]
        try:
            return {
                "summary": [json.dumps(self.run(str(name)).to_json())],
                "error": [""],
                "trace": [""],
                "name": [str(name)],
            }
        except Exception as error:  # whatever the worker raises is told on the driver, with the shard's name
            text = f"{self._stage}: shard {name}: {_one_line(error)}"
            return {"summary": [""], "error": [text], "trace": [traceback.format_exc()], "name": [str(name)]}

    def run(self, name: str) -> ShardSummary:
        start_s = time.perf_counter()
        if self._worker is None:
            self._worker = self._build()
        file = f"{name}.parquet"
        tables = {key: folder.read_table(file, self._columns.get(key)) for key, folder in self._inputs.items()}
        output: ShardOutput = self._worker(tables)
        if output.table is not None:
            self._output.write_table(file, output.table)
        summary = ShardSummary(
            name=name,
            num_rows=output.num_rows,
            bad=output.bad,
            stats=output.stats,
            seconds=round(time.perf_counter() - start_s, 4),
            peak_rss_bytes=peak_rss_bytes(),
            num_inputs=next(iter(tables.values())).num_rows if tables else output.num_rows,
        )
        self._output.write_json(f"{name}.json", summary.to_json())
        return summary


def _finished(output: Storage, shards: Sequence[str]) -> Iterator[ShardSummary]:
    """Summaries of the shards that an earlier run has written: one listing of the stage's own folder."""
    there = set(output.list_names())
    names = [name for name in shards if f"{name}.json" in there]
    with ThreadPoolExecutor(_SUMMARY_THREADS) as pool:
        for start in range(0, len(names), _SUMMARIES_AHEAD):
            records = pool.map(lambda name: output.read_json(f"{name}.json"), names[start : start + _SUMMARIES_AHEAD])
            yield from map(ShardSummary.from_json, records)


def _run_here(task: Callable[[], ShardTask], shards: Sequence[str]) -> Generator[ShardSummary]:
    work = task()
    for name in shards:
        yield _unpack({key: values[0] for key, values in work({"name": np.array([name])}).items()})


def _run_on_ray(
    task: functools.partial[ShardTask], shards: Sequence[str], settings: StreamSettings, stage: str
) -> Generator[ShardSummary]:
    """Summaries in the order in which actors finish them; leaving the generator stops the actors.

    The driver holds some kilobytes for each shard of a Ray Data execution, so very many of them take several.
    """
    for start in range(0, len(shards), _SPAN_SHARDS):
        yield from _run_span(task, shards[start : start + _SPAN_SHARDS], settings, stage)


def _run_span(
    task: functools.partial[ShardTask], shards: Sequence[str], settings: StreamSettings, stage: str
) -> Generator[ShardSummary]:
    num_actors = min(settings.num_actors, len(shards))
    _check_room(num_actors, settings, stage)
    from ray.data import ActorPoolStrategy, from_items

    dataset = from_items([{"name": name} for name in shards], override_num_blocks=len(shards)).map_batches(
        ShardTask,
        fn_constructor_args=task.args,
        batch_size=1,
        compute=ActorPoolStrategy(size=num_actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
        # Without a bound Ray Data tries for ever; with two different ones a failed stage leaves an actor behind.
        ray_remote_args_fn=lambda: {"max_restarts": _MAX_DEATHS, "max_task_retries": _MAX_DEATHS},
    )
    unfinished = dict.fromkeys(shards)
    try:
        batches: Any = iter(dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
        with contextlib.closing(batches):  # or the actors of a stage that failed would hold their CPUs and GPUs
            for batch in batches:
                for index, name in enumerate(batch["name"]):
                    unfinished.pop(str(name))
                    yield _unpack({key: str(batch[key][index]) for key in ("name", "summary", "error", "trace")})
    except ray.exceptions.RayError as error:
        first = ", ".join(list(unfinished)[: num_actors + 1])
        raise ShardError(
            f"{stage}: a worker process died again and again, at one of shards {first}; most often memory ran out: "
            f"use fewer actors or smaller settings ({_one_line(error, named=False)[:200]})"
        ) from error


def _unpack(row: Mapping[str, Any]) -> ShardSummary:
    if row["error"]:
        raise ShardError(row["error"]) from WorkerTrace(row["trace"])
    return ShardSummary.from_json(json.loads(row["summary"]))


def _check_room(num_actors: int, settings: StreamSettings, stage: str) -> None:
    """ValueError where the actors can never fit on the one node there is: Ray would wait for ever."""
    have = available_resources()
    need = {"num_cpus": num_actors * settings.cpus_per_actor, "num_gpus": num_actors * settings.gpus_per_actor}
    # One CPU stays free for the tasks of Ray Data; a cluster of several nodes may still grow.
    if have["num_nodes"] <= 1 and (need["num_cpus"] + 1 > have["num_cpus"] or need["num_gpus"] > have["num_gpus"]):
        raise ValueError(
            f"{stage}: {num_actors} actors need {need['num_cpus']:g} CPUs and {need['num_gpus']:g} GPUs, and the "
            f"cluster has {have['num_cpus']:g} (one stays free) and {have['num_gpus']:g}; lower stream.num_actors, "
            "cpus_per_actor or gpus_per_actor"
        )


def _check_bad(summaries: Iterable[ShardSummary], max_bad_frac: float, output: Storage, stage: str) -> None:
    """ValueError where too many rows are bad; their shards are forgotten, so a next run reads them again."""
    summaries = list(summaries)
    bad = [row for summary in summaries for row in summary.bad]
    num_inputs = sum(summary.num_inputs for summary in summaries)
    if len(bad) <= max_bad_frac * num_inputs:
        return
    for summary in summaries:
        if summary.bad:
            output.delete(f"{summary.name}.json")
    named = "; ".join(f"{row.image_id} ({row.uri}): {row.reason}" for row in bad[:_MAX_NAMED_ROWS])
    more = f"; and {len(bad) - _MAX_NAMED_ROWS} more" if len(bad) > _MAX_NAMED_ROWS else ""
    key = f"{'prepare' if stage == 'prepare' else 'stream'}.max_bad_frac"
    raise ValueError(
        f"{stage}: {len(bad)} of {num_inputs} images are bad, more than {key} = {max_bad_frac:g} allows: "
        f"{named}{more}; mend or remove them, or raise the limit"
    )


def _one_line(error: BaseException, named: bool = True) -> str:
    """The message in one line; with the type of the error where it is not one that is worded for users."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if not named or isinstance(error, (ValueError, StorageError)) else f"{type(error).__name__}: {text}"
