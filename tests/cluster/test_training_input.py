"""The same batches for any number of ranks and any kind of reader."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import MissingFileError, StorageError
from cluster.trainee import TrainComputeSettings
from cluster.training_input import BatchKey, BatchPlan, BatchReader, stream_batches, validation_batches
from cluster.training_rows import Rows
from tests.cluster.tiny_trainee import SIDE_PX, TinyTrainee, make_rows

ON_RAY = TrainComputeSettings(num_workers=1, input="ray", num_decode_workers=2)


@dataclasses.dataclass(frozen=True)
class FailingTrainee(TinyTrainee):
    """Raises the failure for every image."""

    failure: Exception = dataclasses.field(default_factory=Exception)

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise self.failure


def test_an_epoch_is_a_permutation_in_whole_batches() -> None:
    plan = BatchPlan(num_rows=10, batch_size=4, rng_seed=3)
    order = plan.epoch_order(1)
    assert order.shape == (2, 4)
    assert len(set(order.ravel())) == 8  # two rows are left out this time
    assert not np.array_equal(order, plan.epoch_order(2))
    assert np.array_equal(order, BatchPlan(10, 4, 3).epoch_order(1))
    assert not np.array_equal(order, BatchPlan(10, 4, 4).epoch_order(1))


def test_few_rows_are_repeated_to_fill_one_batch() -> None:
    plan = BatchPlan(num_rows=3, batch_size=8, rng_seed=0)
    assert plan.steps_per_epoch == 1
    assert sorted(Counter(plan.epoch_order(5).ravel().tolist()).values()) == [2, 3, 3]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_of_a_step_make_up_the_global_batch(world_size: int) -> None:
    plan = BatchPlan(num_rows=50, batch_size=8, rng_seed=1)
    ranks = [list(plan.batches(rank, world_size, range(1, 3))) for rank in range(world_size)]
    assert {len(keys) for keys in ranks} == {12}
    for step, keys in enumerate(zip(*ranks, strict=True)):
        epoch = 1 + step // 6
        assert {key.epoch for key in keys} == {epoch}
        assert np.array_equal(np.concatenate([key.rows for key in keys]), plan.epoch_order(epoch)[step % 6])


def test_validation_sees_every_row_once() -> None:
    seen = [validation_batches(11, 2, rank, 3) for rank in range(3)]
    rows = [key.rows.tolist() for keys in seen for key in keys]
    assert rows == [[0, 3], [6, 9], [1, 4], [7, 10], [2, 5], [8]]


def test_bad_images_become_empty_samples_of_weight_0_with_a_reason() -> None:
    reader = BatchReader(TinyTrainee(bad_values=(1,)), rng_seed=0)
    batch = reader.read(Rows(make_rows(3)), BatchKey(1, np.array([2, 1])))
    assert batch.arrays["weight"].tolist() == [1.0, 0.0]
    assert batch.reasons == ["", "value 1 is no image"]
    assert batch.arrays["image"].dtype == np.uint8
    assert batch.arrays["image"].shape == (2, 3, SIDE_PX, SIDE_PX)
    assert not batch.arrays["image"][1].any()


def test_a_missing_file_is_a_bad_image_and_an_outage_is_not() -> None:
    def read(error: Exception) -> list[str]:
        return (
            BatchReader(FailingTrainee(failure=error), rng_seed=0)
            .read(Rows(make_rows(1)), BatchKey(1, np.array([0])))
            .reasons
        )

    assert read(MissingFileError("/0.png: cannot read: no such file")) == ["/0.png: cannot read: no such file"]
    with pytest.raises(StorageError, match="Input/output error"):
        read(StorageError("/0.png: cannot read: Input/output error"))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("compute", [TrainComputeSettings(num_decode_workers=n) for n in (0, 1)] + [ON_RAY])
@pytest.mark.parametrize("failure", [ValueError("class 9 of 2"), StorageError("/0.png: cannot read: denied")])
def test_an_error_comes_out_of_every_reader_as_it_went_in(compute: TrainComputeSettings, failure: Exception) -> None:
    stream = stream_batches(
        BatchReader(FailingTrainee(failure=failure), rng_seed=0),
        Rows(make_rows(4)),
        [BatchKey(1, np.arange(4))],
        compute,
    )
    with contextlib.closing(stream), pytest.raises(type(failure)) as caught:  # type: ignore[type-var]
        next(stream)
    assert type(caught.value) is type(failure)
    assert str(caught.value) == str(failure)
    assert "image-000" in "".join(caught.value.__notes__)


def test_other_errors_name_the_image() -> None:
    rows = Rows(make_rows(2).drop_columns(["value"]))
    with pytest.raises(KeyError) as caught:
        BatchReader(TinyTrainee(), rng_seed=0).read(rows, BatchKey(1, np.array([1])))
    assert "image-001" in caught.value.__notes__[0]


@pytest.mark.usefixtures("ray_cluster")
def test_threads_processes_and_ray_data_give_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.training_input._SPAN_ROWS", 20)  # several executions of Ray Data
    rows = Rows(make_rows(21))
    reader = BatchReader(TinyTrainee(bad_values=(7,)), rng_seed=5)
    plan = BatchPlan(rows.num_rows, batch_size=4, rng_seed=5)
    keys = [*plan.batches(0, 1, range(1, 4)), *validation_batches(7, 4, 0, 1)]
    computes = [
        TrainComputeSettings(num_decode_workers=0),
        TrainComputeSettings(num_decode_workers=2),
        ON_RAY,
    ]
    expected = [reader.read(rows, key) for key in keys]
    assert any(reason for batch in expected for reason in batch.reasons)
    for compute in computes:
        with contextlib.closing(stream_batches(reader, rows, iter(keys), compute)) as stream:  # type: ignore[type-var]
            batches = list(stream)
        assert len(batches) == len(expected) == 17
        for batch, wanted in zip(batches, expected, strict=True):
            assert batch.reasons == wanted.reasons
            assert np.array_equal(batch.rows, wanted.rows)
            assert batch.arrays.keys() == wanted.arrays.keys()
            for name, array in wanted.arrays.items():
                assert batch.arrays[name].dtype == array.dtype
                assert np.array_equal(batch.arrays[name], array), (compute, name)


def test_readers_read_ahead_by_a_bounded_number_and_stop_when_closed(tmp_path: Path) -> None:
    asked = []

    def keys():
        for epoch in range(1, 10_000):
            asked.append(epoch)
            yield BatchKey(epoch, np.array([0]))

    reader = BatchReader(TinyTrainee(), rng_seed=0)
    stream = stream_batches(reader, Rows(make_rows(1)), keys(), TrainComputeSettings(num_decode_workers=0))
    next(stream)
    assert len(asked) < 10
    stream.close()
