"""Two ranks of one training, without Ray: what they must agree on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from cluster.storage import Storage
from cluster.trainee import OptimiserSettings, TrainComputeSettings, TrainContext, TrainJob
from cluster.training_loop import run_worker
from tests.cluster.tiny_trainee import TinyTrainee, make_rows

OPTIMISER = OptimiserSettings(epochs=1, batch_size=8, precision="fp32", freeze_batch_norm=False)
COMPUTE = TrainComputeSettings(num_decode_workers=0)


@dataclasses.dataclass(frozen=True)
class ScoringTrainee(TinyTrainee):
    """Its validation tells the scores of the images."""

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        return {f"score/{index}": float(score[0]) for index, score in enumerate(outputs["score"])}


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    job = TrainJob(
        ScoringTrainee(), make_rows(64), make_rows(10), Storage(f"{folder}/out"), OPTIMISER, COMPUTE, 7, 0.02
    )
    run_worker(job, TrainContext(rank, 2, torch.device("cpu"), lambda *message: None, 1))
    dist.destroy_process_group()


def test_all_ranks_validate_the_model_that_is_kept(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    trainee = ScoringTrainee()
    model = trainee.build_model().eval()
    model.load_state_dict(torch.load(tmp_path / "out/model.pt", weights_only=True))
    images = [trainee.make_sample(row, np.random.default_rng(0))["image"] for row in make_rows(10).to_pylist()]
    with torch.no_grad():  # chance mirrors some of the images
        both = [model(torch.from_numpy(np.stack(images)[..., ::step].copy()))[:, 0] for step in (1, -1)]
    told = Storage(str(tmp_path / "out")).read_json("result.json")["metrics"]
    scores = np.array([told[f"score/{index}"] for index in range(10)])
    nearest = np.min([np.abs(scores - side.numpy()) for side in both], axis=0)
    assert nearest.max() == pytest.approx(0, abs=1e-6)
