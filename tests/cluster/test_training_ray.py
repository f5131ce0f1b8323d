"""Training on two Ray Train workers: the same result as alone, over the death of one of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.checkpoints import read_checkpoint
from cluster.storage import Storage, StorageError
from cluster.training import TrainComputeSettings
from tests.cluster.test_training import OPTIMISER, CountingBar, load_model, run_training
from tests.cluster.tiny_trainee import TinyTrainee, make_rows

pytestmark = pytest.mark.usefixtures("ray_cluster")

TWO_WORKERS = TrainComputeSettings(num_workers=2, threads_per_worker=1, max_failures=1, num_decode_workers=1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_training(folder, TinyTrainee(bad_values=(5,)))


def test_two_workers_on_ray_data_one_of_which_dies_give_the_result_of_one(
    tmp_path: Path, alone: tuple[Path, Any]
) -> None:
    folder, expected = alone
    told: dict[int, dict[str, float]] = {}
    epochs: list[float] = []
    threads = set()
    bar = CountingBar()

    def on_metrics(step: int, values: dict[str, float]) -> None:
        threads.add(threading.current_thread())
        told.setdefault(step, {}).update(values)
        epochs.extend([values["epoch"]] if "epoch" in values else [])

    result = run_training(
        tmp_path,
        TinyTrainee(bad_values=(5,), crash_dir=str(tmp_path)),
        compute=TWO_WORKERS.model_copy(update={"input": "ray"}),
        bar=bar,
        on_metrics=on_metrics,
    )
    # The epoch before the crash was trained once: its record, with its timings, is the one of the checkpoint.
    kept = torch.load(tmp_path / "crashed", weights_only=True)["history"]
    assert [record["epoch"] for record in kept] == [1]
    assert result.history[:1] == kept
    assert epochs == [1, 2, 3]
    _assert_same_history(result.history, expected.history)
    assert result.bad_rows == expected.bad_rows
    assert result.metrics["order"] == expected.metrics["order"]
    before, after = load_model(folder), load_model(tmp_path)
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    assert sorted(told) == [10, 12, 22, 24, 34, 36]  # live, on the caller's thread, and complete over the restart
    assert told[36]["map"] == result.metrics["map"]
    assert threads == {threading.current_thread()}
    assert (bar.num_skipped, bar.num_done) == (0, 300)


def test_an_error_that_would_come_again_reaches_the_caller_as_it_is(tmp_path: Path, alone: tuple[Path, Any]) -> None:
    """Two workers with DataLoader processes, up to metrics that raise after the last epoch."""
    trainee = TinyTrainee(bad_values=(5,), fail_in_metrics=True)
    with pytest.raises(ValueError, match=r"^these metrics are not for numbers$"):
        run_training(tmp_path, trainee, compute=TWO_WORKERS)
    identity = {"num_rows": 100, "batch_size": 8, "epochs": OPTIMISER.epochs, "rng_seed": 7}
    checkpoint = read_checkpoint(Storage(str(tmp_path)), 2, identity)
    _assert_same_history(checkpoint.history, alone[1].history[:2])


def test_a_full_disk_reaches_the_caller_at_once(tmp_path: Path) -> None:
    trainee = TinyTrainee(full_disk=True, crash_dir=str(tmp_path))
    compute = TWO_WORKERS.model_copy(update={"num_workers": 1, "num_decode_workers": 0, "max_failures": 3})
    with pytest.raises(StorageError, match=r"^/full: cannot write: the disk is full$"):
        run_training(
            tmp_path, trainee, rows=make_rows(8), compute=compute, optimiser=OPTIMISER.model_copy(update={"epochs": 1})
        )
    assert (tmp_path / "attempts").read_text() == "x"


def test_more_workers_than_the_cluster_holds_are_refused(tmp_path: Path) -> None:
    compute = TrainComputeSettings(num_workers=8, input="ray")
    with pytest.raises(
        ValueError,
        match=r"^head.compute: 8 workers ask for 1 CPU and 0 GPUs each, and Ray Data's tasks 1 CPU; each must fit "
        r"on one node, and there is room for 7 \(nodes: 1 of 8 CPUs and 0 GPUs\); lower head.compute.num_workers, ",
    ):
        run_training(tmp_path, compute=compute, section="head.compute")


def test_as_many_workers_as_fit_train_the_same_batches_in_uneven_slices(
    tmp_path: Path, alone: tuple[Path, Any]
) -> None:
    """Up to four workers where three fit: the batches of 8 are cut 2, 3, 3."""
    folder, expected = alone
    compute = TrainComputeSettings(num_workers=4, min_workers=1, cpus_per_worker=2.5, threads_per_worker=1)
    compute = compute.model_copy(update={"num_decode_workers": 0})
    result = run_training(tmp_path, TinyTrainee(bad_values=(5,)), compute=compute)
    assert [record["num_workers"] for record in result.history] == [3, 3, 3]
    assert [record["num_workers"] for record in expected.history] == [1, 1, 1]
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert result.bad_rows == expected.bad_rows
    assert result.metrics["order"] == expected.metrics["order"]
    before, after = load_model(folder), load_model(tmp_path)
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def _assert_same_history(history: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(history) == len(expected)
    for ours, theirs in zip(history, expected, strict=True):
        for name in ("epoch", "step", "loss", "accuracy", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
