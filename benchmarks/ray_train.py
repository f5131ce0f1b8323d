"""A training step through Ray Train against torchrun: `python -m benchmarks.ray_train [--turns 5] [--quick]`.

Two groups of two gloo ranks run the same worker loop (`cluster.training_loop`) on a small CNN, one started by Ray Train
and one by torchrun; they live side by side and take turns of some steps each, the other one asleep. A turn's number is
the median wall time of its steps on rank 0, its first steps not counted; a ratio is the median over the turns. The
losses of both must be the same to 1e-6.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from benchmarks.harness import finish, parser, table
from cluster.runtime import ClusterSettings, start_ray
from cluster.storage import Storage
from cluster.trainee import OptimiserSettings, TrainComputeSettings, TrainContext, TrainJob
from cluster.training import train
from cluster.training_loop import run_worker

SIDES = ("Ray Train", "torchrun")
NUM_RANKS, BATCH_SIZE, SIDE_PX, NUM_ROWS = 2, 16, 64, 4096
STEPS, QUICK_STEPS, WARM_STEPS, TURNS = 40, 8, 3, 5
MAX_RATIO = 1.05
_POLL_S = 0.02
_LONGEST_WAIT_S = 600.0


@dataclasses.dataclass
class TurnTrainee:
    """A small CNN on noise; before each turn its ranks wait for the file <side>-<turn>.go in `folder`."""

    side: str
    folder: str
    steps_per_turn: int
    num_turns: int
    times: list[float] = dataclasses.field(default_factory=list)
    turn: int = -1

    def build_model(self) -> torch.nn.Module:
        layers = [torch.nn.Conv2d(3, 32, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, 2, 1), torch.nn.ReLU()]
        head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)]
        return torch.nn.Sequential(*layers, *head)

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = rng.random((3, SIDE_PX, SIDE_PX), np.float32)
        return {"image": image, "target": np.array(row["number"] % 10, np.int64)}

    def empty_sample(self) -> dict[str, np.ndarray]:
        return {"image": np.zeros((3, SIDE_PX, SIDE_PX), np.float32), "target": np.array(0, np.int64)}

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        if len(self.times) % self.steps_per_turn == 0:
            self._next_turn()
        self.times.append(time.perf_counter())
        value = torch.nn.functional.cross_entropy(model(batch["image"]), batch["target"])
        return value, {"loss": value.detach()}

    def _next_turn(self) -> None:
        if self.turn >= 0 and dist.get_rank() == 0:
            steps = np.diff([*self.times, time.perf_counter()])[WARM_STEPS:]
            Storage(self.folder).write_json(f"{self.side}-{self.turn}.json", float(np.median(steps)))
        self.times, self.turn = [], self.turn + 1
        if self.turn < self.num_turns:
            wait_for(Path(self.folder) / f"{self.side}-{self.turn}.go")

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters()), "lr_factor": 1.0, "weight_decay_factor": 1.0}]

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        return {}


def wait_for(path: Path) -> None:
    """Until a file is there. TimeoutError after ten minutes."""
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: not there after {_LONGEST_WAIT_S:.0f} s")
        time.sleep(_POLL_S)


def make_job(side: str, folder: str, steps: int, turns: int) -> TrainJob:
    """The same training for both sides: one more step than the turns take, which ends the last of them."""
    rows = pa.table(
        {"image_id": [f"{n}" for n in range(NUM_ROWS)], "uri": ["/none"] * NUM_ROWS, "number": range(NUM_ROWS)}
    )
    optimiser = OptimiserSettings(
        max_steps=steps * turns + 1, batch_size=BATCH_SIZE, learning_rate=0.01, precision="fp32", keep_checkpoints=1
    )
    compute = TrainComputeSettings(num_workers=NUM_RANKS, num_decode_workers=0, threads_per_worker=1)
    trainee = TurnTrainee(side, folder, steps, turns)
    return TrainJob(trainee, rows, None, Storage(folder).child(f"out-{side}"), optimiser, compute, 0, 0.0)


def run_rank(folder: str, steps: int, turns: int) -> None:
    """A rank of torchrun."""
    dist.init_process_group("gloo")
    context = TrainContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), lambda *message: None, 1)
    run_worker(make_job(SIDES[1], folder, steps, turns), context)
    dist.destroy_process_group()


def run_sides(folder: str, steps: int, turns: int) -> dict[str, list[float]]:
    """side -> the median step of each turn, the first one, which warms up, not counted."""
    job = make_job(SIDES[0], folder, steps, turns)
    by_ray = threading.Thread(
        target=lambda: train(
            job.trainee,
            job.rows,
            val_rows=None,
            folder=job.folder,
            optimiser=job.optimiser,
            compute=job.compute,
            rng_seed=0,
        ),
        daemon=True,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    command += ["-m", "benchmarks.ray_train", "--rank-of", folder, "--steps", str(steps), "--turns", str(turns)]
    with subprocess.Popen(command, env=os.environ) as by_torchrun:
        by_ray.start()
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(turns):
            for side in SIDES:
                Storage(folder).write_bytes(f"{side}-{turn}.go", b"")
                wait_for(Path(folder) / f"{side}-{turn}.json")
                seconds[side].append(Storage(folder).read_json(f"{side}-{turn}.json"))
        by_ray.join()
    assert by_torchrun.returncode == 0, f"torchrun ended with exit code {by_torchrun.returncode}"
    return {side: values[1:] for side, values in seconds.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=0)
    options.add_argument("--steps", type=int, default=0, help="of one turn")
    options.add_argument("--rank-of", help="used by the benchmark itself: a rank of torchrun")
    arguments = options.parse_args()
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    turns = arguments.turns or (2 if arguments.quick else TURNS + 1)
    if arguments.rank_of:
        run_rank(arguments.rank_of, steps, turns)
        return
    with (
        tempfile.TemporaryDirectory(prefix="subcat-ray-train-") as folder,
        start_ray(ClusterSettings(num_cpus=4, num_gpus=0, object_store_bytes=200_000_000)),
    ):
        seconds = run_sides(folder, steps, turns)
        histories = [Storage(folder).read_json(f"out-{side}/result.json")["history"] for side in SIDES]
    losses = [[epoch["loss"] for epoch in history] for history in histories]
    difference = float(np.abs(np.subtract(*losses)).max())
    ratios = [a / b for a, b in zip(seconds[SIDES[0]], seconds[SIDES[1]], strict=True)]
    ratio = statistics.median(ratios)
    rows = [[side, 1e3 * statistics.median(values)] for side, values in seconds.items()]
    shown = table(["side", "ms a step, median"], rows)
    shown += f"\nRay Train / torchrun: {ratio:.3f} (turns {min(ratios):.3f} to {max(ratios):.3f}); losses differ by"
    shown += f" {difference:.1e} at most"
    failures = [f"losses differ by {difference:.1e}"] if difference > 1e-6 else []
    if ratio > MAX_RATIO and not arguments.quick:
        failures.append(f"ratio {ratio:.3f} above {MAX_RATIO}")
    numbers = {"ratio": ratio, "step_s": seconds, "loss_difference": difference}
    finish("ray_train", numbers, shown, failures, arguments.json)


if __name__ == "__main__":
    main()
