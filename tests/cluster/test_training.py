"""Training in process: what is written, how it goes on after SIGKILL, and what it says when something is wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.runtime import ROOT
from cluster.storage import Storage, StorageError
from cluster.training import OptimiserSettings, TrainComputeSettings, TrainResult, train
from cluster.training_device import choose_precision
from cluster.training_ray import lasting_kind
from tests.cluster.tiny_trainee import TinyTrainee, make_rows

OPTIMISER = OptimiserSettings(
    epochs=3, batch_size=8, learning_rate=0.3, weight_decay=0.0, precision="fp32", freeze_batch_norm=True
)
THREADS = TrainComputeSettings(num_decode_workers=0, threads_per_worker=1)


def run_training(folder: Path | Storage, trainee: TinyTrainee | None = None, **changes: Any) -> TrainResult:
    """A training of 12 steps an epoch; in process with threads unless told otherwise."""
    arguments: dict[str, Any] = {
        "val_rows": make_rows(10),
        "folder": folder if isinstance(folder, Storage) else Storage(str(folder)),
        "optimiser": OPTIMISER,
        "compute": THREADS,
        "rng_seed": 7,
        **changes,
    }
    return train(trainee or TinyTrainee(), arguments.pop("rows", make_rows(100)), **arguments)


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


class CountingBar:
    def __init__(self) -> None:
        self.num_done = self.num_skipped = 0

    def advance(self, num: int) -> None:
        assert num > 0
        self.num_done += num

    def skip(self, num: int) -> None:
        self.num_skipped += num


def test_a_training_learns_and_leaves_model_checkpoints_and_result(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    bar = CountingBar()
    optimiser = OPTIMISER.model_copy(update={"epochs": 12, "validate_every": 5})
    result = run_training(
        tmp_path, optimiser=optimiser, bar=bar, on_metrics=lambda step, values: told.append((step, values))
    )
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert [record["step"] for record in result.history] == [12 * epoch for epoch in range(1, 13)]
    assert [record["epoch"] for record in result.history if "map" in record] == [5, 10, 12]
    assert result.metrics["map"] > 0.9
    assert result.metrics["loss"] == losses[-1]
    assert result.num_images == 12 * 12 * 8
    assert result.images_per_s > 0
    assert result.peak_rss_bytes > 10_000_000
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-0011.pt", "epoch-0012.pt"]
    assert set(load_model(tmp_path)) == set(TinyTrainee().build_model().state_dict())

    assert bar.num_done == 1200
    steps = [step for step, values in told if "loss" in values]
    assert steps[:4] == [10, 12, 22, 24]
    assert told[0][1].keys() == {"loss", "accuracy", "learning_rate", "images_per_s"}
    # Polynomial rate of update 9 of 144 (counted from 0), the one that step 10 reports.
    assert told[0][1]["learning_rate"] == pytest.approx(0.3 * (1 - 9 / 144) ** 0.9)
    epochs = [values for _, values in told if "epoch" in values]
    assert [values["epoch"] for values in epochs] == list(range(1, 13))
    assert epochs[4].keys() >= {"epoch_loss", "map"}

    again = CountingBar()
    assert run_training(tmp_path, optimiser=optimiser, bar=again) == result  # done: read, not trained
    assert (again.num_done, again.num_skipped) == (0, 1200)


def test_validation_sees_each_image_once_in_the_order_of_its_rows(tmp_path: Path) -> None:
    result = run_training(tmp_path, val_rows=make_rows(21), optimiser=OPTIMISER.model_copy(update={"epochs": 1}))
    assert result.metrics["order"] == sum(range(0, 21, 3))


def test_a_training_killed_in_its_second_epoch_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    trainee = TinyTrainee(dropout=0.5)
    expected = run_training(straight, trainee)
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from tests.cluster.test_training import run_training\n"
        "from tests.cluster.tiny_trainee import TinyTrainee\n"
        "def die(step, values):\n"
        "    if step == 22:\n"  # in the middle of the second epoch
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run_training(Path({str(killed)!r}), TinyTrainee(dropout=0.5), on_metrics=die)\n"
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["epoch-0001.pt"]
    assert not (killed / "model.pt").exists()

    bar = CountingBar()
    result = run_training(killed, trainee, bar=bar)
    assert (bar.num_skipped, bar.num_done) == (100, 200)
    assert [record["loss"] for record in result.history] == [record["loss"] for record in expected.history]
    before, after = load_model(straight), load_model(killed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stopping_early_gives_the_longer_trainings_model_of_that_epoch(tmp_path: Path) -> None:
    trainee = TinyTrainee(dropout=0.5)
    run_training(tmp_path / "long", trainee, optimiser=OPTIMISER.model_copy(update={"keep_checkpoints": 3}))
    bar = CountingBar()
    stopping = OPTIMISER.model_copy(update={"stop_after_epochs": 2})
    result = run_training(tmp_path / "stopped", trainee, optimiser=stopping, bar=bar)
    assert [record["step"] for record in result.history] == [12, 24]
    assert "map" in result.history[1]  # validated after its last epoch
    assert (result.num_images, bar.num_done) == (2 * 12 * 8, 200)
    expected = torch.load(tmp_path / "long/checkpoints/epoch-0002.pt", weights_only=True)["model"]
    stopped = load_model(tmp_path / "stopped")
    assert all(torch.equal(stopped[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"result\.json is of a training with"):
        run_training(tmp_path / "stopped", trainee)
    (tmp_path / "stopped/result.json").unlink()
    with pytest.raises(ValueError, match="made with epochs = 2, this training has 3"):
        run_training(tmp_path / "stopped", trainee)


def test_a_number_of_steps_ends_within_an_epoch_and_goes_on_there(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    optimiser = OPTIMISER.model_copy(update={"max_steps": 29, "refresh_lr_every": 4})
    bar = CountingBar()
    result = run_training(
        tmp_path,
        optimiser=optimiser,
        bar=bar,
        on_metrics=lambda step, values: told.append((step, values.get("learning_rate", 0.0))),
    )
    assert [record["step"] for record in result.history] == [12, 24, 29]
    assert (result.num_images, bar.num_done) == (29 * 8, round(100 * 29 / 12))
    assert "map" in result.history[2]
    rates = dict(step_and_rate for step_and_rate in told if step_and_rate[1])
    assert rates[10] == pytest.approx(0.3 * (1 - 8 / 29) ** 0.9)  # update 9, counted from 0, has the rate of update 8
    assert rates[29] == pytest.approx(0.3 * (1 - 28 / 29) ** 0.9)

    before = load_model(tmp_path)
    (tmp_path / "result.json").unlink()
    again = run_training(tmp_path, optimiser=optimiser)  # all epochs are done: only the result is made anew
    assert again.history == result.history
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints/epoch-0003.pt").unlink()
    skipping = CountingBar()
    run_training(tmp_path, optimiser=optimiser, bar=skipping)
    assert (skipping.num_skipped, skipping.num_done) == (200, 42)
    after = load_model(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_any_storage_keeps_checkpoints(storage_root: str) -> None:
    folder = Storage(storage_root)
    expected = run_training(folder)
    for name in ("result.json", "model.pt", "checkpoints/epoch-0003.pt"):
        folder.delete(name)
    result = run_training(folder)
    assert result.metrics == expected.metrics
    assert result.history[:2] == expected.history[:2]  # read back, with their timings
    assert folder.list_names("checkpoints") == ["epoch-0002.pt", "epoch-0003.pt"]


def test_bad_images_are_counted_and_leave_the_rest_as_it_is(tmp_path: Path) -> None:
    result = run_training(tmp_path, TinyTrainee(bad_values=(3, 50)), max_bad_frac=0.03)
    assert result.num_bad == 2
    assert result.bad_rows == [
        {"image_id": f"image-{i:03d}", "uri": f"/nowhere/{i}.png", "reason": f"value {i} is no image"} for i in (3, 50)
    ]
    assert result.metrics["order"] == 0 + 5 + 8  # values 0, 6 and 9, in a validation without value 3


def test_too_many_bad_images_are_an_error_that_shows_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bad images among 110, the limit is 2\.0% .*nowhere.*is no image"):
        run_training(tmp_path, TinyTrainee(bad_values=tuple(range(0, 100, 10))))
    assert not (tmp_path / "model.pt").exists()


def test_a_batch_of_bad_images_alone_changes_nothing(tmp_path: Path) -> None:
    optimiser = OPTIMISER.model_copy(update={"epochs": 1})
    arguments = {"rows": make_rows(4), "val_rows": None, "optimiser": optimiser, "max_bad_frac": 1.0}
    result = run_training(tmp_path, TinyTrainee(bad_values=(0, 1, 2, 3)), **arguments)
    assert (result.num_bad, result.history[0]["loss"]) == (4, 0.0)


def test_a_loss_that_is_not_finite_names_the_step_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 0 of 36 .*lower optimiser\.learning_rate"):
        run_training(tmp_path, TinyTrainee(loss_factor=float("inf")))
    assert not (tmp_path / "checkpoints").exists()


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 8: does not divide among 3 workers; take 6 or 9"):
        run_training(tmp_path, compute=TrainComputeSettings(num_workers=3))
    with pytest.raises(ValueError, match='input "ray" needs Ray workers'):
        run_training(tmp_path, compute=TrainComputeSettings(num_workers=0, input="ray"))
    with pytest.raises(ValueError, match="no image to train on"):
        run_training(tmp_path, rows=make_rows(0))
    with pytest.raises(ValueError, match="no column uri"):
        run_training(tmp_path, rows=make_rows(8).drop_columns(["uri"]))


def test_one_image_a_worker_is_too_few_for_batch_norm_that_learns(tmp_path: Path) -> None:
    optimiser = OPTIMISER.model_copy(update={"batch_size": 1, "freeze_batch_norm": False})
    with pytest.raises(ValueError, match=r"batch_size 1 over 1 workers .* needs at least 2; take batch_size 2 or more"):
        run_training(tmp_path, optimiser=optimiser)
    frozen = optimiser.model_copy(update={"freeze_batch_norm": True, "epochs": 1})
    assert run_training(tmp_path, rows=make_rows(4), val_rows=None, optimiser=frozen).num_images == 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_no_more_is_a_lasting_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="cannot write") as raised:
        run_training(tmp_path)
    assert lasting_kind(raised.value) == "StorageError"


def test_errors_that_may_pass_are_tried_again() -> None:
    for error in (ConnectionResetError(), TimeoutError(), StorageError("s3://b/k: failed 5 times"), RuntimeError()):
        assert lasting_kind(error) is None
    assert lasting_kind(ZeroDivisionError()) == "RuntimeError"
    assert lasting_kind(PermissionError("denied")) == "StorageError"  # as s3fs raises it, without a number


def test_the_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    run_training(tmp_path)
    with pytest.raises(ValueError, match=r"result\.json is of a training with"):
        run_training(tmp_path, rng_seed=8)
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match="made with rng_seed = 7, this training has 8"):
        run_training(tmp_path, rng_seed=8)
    (tmp_path / "checkpoints" / "epoch-0003.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"epoch-0003\.pt: not a checkpoint"):
        run_training(tmp_path)


def test_a_frozen_batch_norm_stays_and_a_free_one_learns(tmp_path: Path) -> None:
    run_training(tmp_path / "frozen")
    frozen = load_model(tmp_path / "frozen")
    assert torch.equal(frozen["norm.running_mean"], torch.zeros(8))
    assert torch.equal(frozen["norm.weight"], torch.ones(8))
    run_training(tmp_path / "free", optimiser=OPTIMISER.model_copy(update={"freeze_batch_norm": False}))
    free = load_model(tmp_path / "free")
    assert not torch.equal(free["norm.running_mean"], torch.zeros(8))
    assert not torch.equal(free["norm.weight"], torch.ones(8))


def test_bf16_and_memory_format_change_the_loss_by_rounding_only(tmp_path: Path) -> None:
    base = run_training(tmp_path / "base")
    other = OPTIMISER.model_copy(update={"precision": "bf16", "channels_last": False})
    bf16 = run_training(tmp_path / "bf16", optimiser=other)
    assert bf16.metrics["loss"] == pytest.approx(base.metrics["loss"], rel=0.05)


def test_auto_precision_spares_models_of_depthwise_convolutions() -> None:
    cpu = torch.device("cpu")
    dense = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3))
    depthwise = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 8, 1))
    able = torch.cpu.get_capabilities()
    bf16_is_fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    assert choose_precision("auto", cpu, dense) == (torch.bfloat16 if bf16_is_fast else torch.float32)
    assert choose_precision("auto", cpu, depthwise) == torch.float32
    assert choose_precision("bf16", cpu, depthwise) == torch.bfloat16
    assert choose_precision("fp32", cpu, dense) == torch.float32
