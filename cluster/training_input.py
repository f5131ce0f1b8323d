"""Batches for training: which rows at which step; read by threads, DataLoader processes or Ray Data, all the same."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cluster.reading_errors import ReadFailure
from cluster.storage import MissingFileError
from cluster.training_rows import Rows
from subcat_core.images import ImageError

if TYPE_CHECKING:
    from cluster.trainee import TrainComputeSettings, Trainee

VALIDATION = 0
"""The epoch of batches that are not trained on; training counts epochs from 1."""

_NUM_THREADS = 4
_SPAN_ROWS = 16_384  # rows of one Ray Data execution: its start costs a second, its plan some bytes a row
_AHEAD_BYTES = 256 * 2**20  # decoded arrays that Ray Data may hold for one rank; its own limit grows with the machine
_EPOCH, _REASON, _FAILURE, _WEIGHT = "_epoch", "_reason", "_failure", "weight"


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Which rows make which batch: the same global batches for any number of ranks.

    Every epoch is a fresh permutation cut into whole batches, its remainder dropped; fewer rows than one batch are
    repeated to fill it. A rank takes its slice of every global batch, so all ranks run the same number of steps.
    """

    num_rows: int
    batch_size: int
    rng_seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_rows // self.batch_size)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(steps, batch_size) int64: row numbers of all ranks together."""
        order = np.random.default_rng([self.rng_seed, epoch]).permutation(self.num_rows)
        steps, count = self.steps_per_epoch, self.steps_per_epoch * self.batch_size
        order = order[:count] if count <= len(order) else np.resize(order, count)  # np.resize copies: 8 bytes an image
        return order.reshape(steps, self.batch_size)

    def batches(self, rank: int, world_size: int, epochs: Iterable[int]) -> Iterator[BatchKey]:
        """This rank's batches of the epochs, in order, made as they are asked for."""
        local = self.batch_size // world_size
        for epoch in epochs:
            for rows in self.epoch_order(epoch)[:, rank * local : (rank + 1) * local]:
                yield BatchKey(epoch, rows)


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """A batch before it is read: rows: (n,) int64 row numbers; epoch: part of the augmentation's seed."""

    epoch: int
    rows: np.ndarray


def validation_batches(num_rows: int, batch_size: int, rank: int, world_size: int) -> Iterator[BatchKey]:
    """This rank's share of all rows in batches of at most batch_size; ranks may have different numbers of batches."""
    mine = np.arange(rank, num_rows, world_size)
    for start in range(0, len(mine), batch_size):
        yield BatchKey(VALIDATION, mine[start : start + batch_size])


@dataclasses.dataclass(frozen=True)
class Batch:
    """arrays: stacked samples and weight (n,) float32; reasons: (n,) why a row has weight 0, or ""."""

    arrays: dict[str, np.ndarray]
    rows: np.ndarray
    reasons: list[str]


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Turns rows into arrays. The sample of an image depends on (rng_seed, epoch, image_id) and on nothing else."""

    trainee: Trainee
    rng_seed: int

    def read(self, rows: Rows, key: BatchKey) -> Batch:
        """The batch of the rows that the key names. Raises every error but those of a single bad image."""
        samples, reasons = self._samples(rows.take(key.rows).to_pylist(), itertools.repeat(key.epoch))
        return Batch(_stack(samples, reasons), key.rows, reasons)

    def read_table(self, table: pa.Table) -> dict[str, np.ndarray]:
        """The same inside a Ray Data task: rows with an epoch column to columns of fixed-shape arrays.

        An error fills a column, beside empty samples.
        """
        failure = ""
        try:
            rows = table.drop_columns([_EPOCH]).to_pylist()
            samples, reasons = self._samples(rows, table[_EPOCH].to_pylist())
        except Exception as error:
            failure = ReadFailure.of(error).to_json()
            samples, reasons = [self.trainee.empty_sample()] * table.num_rows, [""] * table.num_rows
        told = {_REASON: reasons, _FAILURE: [failure] * table.num_rows}
        return {**_stack(samples, reasons), **{name: np.array(texts, dtype=object) for name, texts in told.items()}}

    def _samples(
        self, rows: list[dict[str, Any]], epochs: Iterable[int]
    ) -> tuple[list[dict[str, np.ndarray]], list[str]]:
        samples, reasons = [], []
        for row, epoch in zip(rows, epochs, strict=False):
            try:
                samples.append(self._sample(row, epoch))
                reasons.append("")
            except (ImageError, MissingFileError) as error:
                samples.append(self.trainee.empty_sample())
                reasons.append(str(error) or type(error).__name__)
            except Exception as error:
                error.add_note(f"while making the training sample of image_id {row['image_id']!r}")
                raise
        return samples, reasons

    def _sample(self, row: dict[str, Any], epoch: int) -> dict[str, np.ndarray]:
        make_validation_sample = getattr(self.trainee, "make_validation_sample", None)
        if epoch == VALIDATION and make_validation_sample is not None:
            return make_validation_sample(row)
        name = int.from_bytes(hashlib.blake2b(row["image_id"].encode(), digest_size=8).digest(), "little")
        return self.trainee.make_sample(row, np.random.default_rng([self.rng_seed, epoch, name]))


def _stack(samples: list[dict[str, np.ndarray]], reasons: list[str]) -> dict[str, np.ndarray]:
    arrays = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {**arrays, _WEIGHT: np.array([0.0 if reason else 1.0 for reason in reasons], np.float32)}


def stream_batches(
    reader: BatchReader, rows: Rows, keys: Iterable[BatchKey], compute: TrainComputeSettings
) -> Iterator[Batch]:
    """The batches of the keys, in order, read ahead by a bounded number; close the iterator to stop the readers.

    One stream runs over all epochs, so nothing starts anew between them.
    """
    if compute.input == "ray":
        return _read_by_ray(reader, rows, keys, max(1, compute.num_decode_workers))
    if compute.num_decode_workers == 0:
        return _read_by_threads(reader, rows, keys)
    return _read_by_processes(reader, rows, keys, compute.num_decode_workers)


def _read_by_threads(reader: BatchReader, rows: Rows, keys: Iterable[BatchKey]) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="decode")
    waiting: collections.deque[Future[Batch]] = collections.deque()
    try:
        for key in keys:
            waiting.append(pool.submit(reader.read, rows, key))
            if len(waiting) > _NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Keys(Sampler[BatchKey]):
    def __init__(self, keys: Iterable[BatchKey]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[BatchKey]:
        return iter(self._keys)


class _Batches(Dataset["Batch | ReadFailure"]):
    """Hands out whole batches of numpy arrays: they come through a pipe, so a small /dev/shm is enough."""

    def __init__(self, reader: BatchReader, rows: Rows) -> None:
        self._reader = reader
        self._rows = rows

    def __getitem__(self, key: BatchKey) -> Batch | ReadFailure:
        try:
            return self._reader.read(self._rows, key)
        except Exception as error:
            return ReadFailure.of(error)


def _as_is(batch: Any) -> Any:
    return batch


def _read_by_processes(
    reader: BatchReader, rows: Rows, keys: Iterable[BatchKey], num_processes: int
) -> Iterator[Batch]:
    # Not fork: Ray's and s3fs's threads do not survive one. The fork server imports torch once for all its children.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    for batch in DataLoader(
        _Batches(reader, rows),
        batch_size=None,
        sampler=_Keys(keys),
        num_workers=num_processes,
        collate_fn=_as_is,
        multiprocessing_context=context,
        generator=torch.Generator(),  # the global one belongs to the training
    ):
        if isinstance(batch, ReadFailure):
            batch.reraise()
        yield batch


def _read_by_ray(reader: BatchReader, rows: Rows, keys: Iterable[BatchKey], num_tasks: int) -> Iterator[Batch]:
    import ray.data
    from ray.data import ExecutionResources, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    keys = iter(keys)
    while span := _take_span(keys):
        # One block a batch: a task decodes exactly one batch. Only rows (URIs and labels) stand in the blocks.
        blocks = [rows.take(key.rows).append_column(_EPOCH, pa.array([key.epoch] * len(key.rows))) for key in span]
        dataset = ray.data.from_arrow(blocks)
        dataset.context.enable_progress_bars = False
        options = dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = ExecutionResources(object_store_memory=_AHEAD_BYTES)
        decoded = dataset.map_batches(
            reader.read_table,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            compute=TaskPoolStrategy(size=num_tasks),
        )
        sizes = {len(key.rows) for key in span[:-1]} or {len(span[0].rows)}
        assert len(sizes) == 1, "only the last batch of a validation may be shorter"
        batches: Iterable[Any] = decoded.iter_batches(batch_size=sizes.pop(), batch_format="numpy", prefetch_batches=2)
        for key, columns in zip(span, batches, strict=True):
            arrays = dict(columns)
            failure = str(arrays.pop(_FAILURE)[0])
            if failure:
                ReadFailure.from_json(failure).reraise()
            reasons = [str(reason) for reason in arrays.pop(_REASON)]
            yield Batch(arrays, key.rows, reasons)


def _take_span(keys: Iterator[BatchKey]) -> list[BatchKey]:
    span: list[BatchKey] = []
    num_rows = 0
    for key in keys:
        span.append(key)
        num_rows += len(key.rows)
        if num_rows >= _SPAN_ROWS:
            break
    return span
