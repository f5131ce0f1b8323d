"""A trainee of a few hundred weights on synthetic arrays, with switches for what can go wrong."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.storage import StorageError
from subcat_core.images import ImageError
from subcat_core.losses import multilabel_soft_margin

SIDE_PX = 8


def make_rows(num_rows: int) -> pa.Table:
    """image_id, uri and the number that the sample is made of."""
    return pa.table(
        {
            "image_id": [f"image-{i:03d}" for i in range(num_rows)],
            "uri": [f"/nowhere/{i}.png" for i in range(num_rows)],
            "value": pa.array(range(num_rows), pa.int32()),
        }
    )


class TinyNet(torch.nn.Module):
    """image (N, 3, 8, 8) uint8 -> logits (N, 2)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.norm(self.convolution(image.float() / 255)))
        return self.head(self.dropout(maps.mean(dim=(2, 3))))


@dataclasses.dataclass(frozen=True)
class TinyTrainee:
    """crash_dir: a rank dies once, as soon as the checkpoint of epoch 1 is in this folder, and leaves a copy of it
    there as `crashed`. full_disk: the validation fails like a write to a full disk, and counts in crash_dir how often.
    """

    dropout: float = 0.0
    bad_values: tuple[int, ...] = ()
    crash_dir: str | None = None
    fail_in_metrics: bool = False
    full_disk: bool = False
    loss_factor: float = 1.0

    def build_model(self) -> TinyNet:
        return TinyNet(self.dropout)

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        value = row["value"]
        if value in self.bad_values:
            raise ImageError(f"value {value} is no image")
        image = np.random.default_rng(value).integers(0, 128, (3, SIDE_PX, SIDE_PX), dtype=np.uint8)
        image[value % 3] += np.uint8(60)  # the telling part: which channel is bright
        image = image[:, :, ::-1] if rng.random() < 0.5 else image
        target = np.array([value % 3 == 0, value % 3 == 1], np.float32)
        return {"image": np.ascontiguousarray(image), "target": target}

    def empty_sample(self) -> dict[str, np.ndarray]:
        return {"image": np.zeros((3, SIDE_PX, SIDE_PX), np.uint8), "target": np.zeros(2, np.float32)}

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._crash_once()
        logits = model(batch["image"]).float()
        loss = self.loss_factor * multilabel_soft_margin(logits, batch["target"], batch["weight"])
        right = ((logits > 0) == (batch["target"] > 0)).float().mean()
        return loss, {"accuracy": right}

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr_factor": 1.0, "weight_decay_factor": 1.0}]

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"score": model(batch["image"]).float(), "target": batch["target"]}

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        if self.fail_in_metrics:
            raise ValueError("these metrics are not for numbers")
        if self.full_disk:
            with (Path(str(self.crash_dir)) / "attempts").open("a") as stream:
                stream.write("x")
            raise StorageError("/full: cannot write: the disk is full") from OSError(errno.ENOSPC, "No space left")
        num_images = len(outputs["score"])
        order = float((outputs["target"][:, 0] * np.arange(num_images)).sum())
        return {"map": float(((outputs["score"] > 0) == (outputs["target"] > 0)).mean()), "order": order}

    def _crash_once(self) -> None:
        if self.crash_dir is None:
            return
        folder = Path(self.crash_dir)
        checkpoint = folder / "checkpoints/epoch-0001.pt"
        if not checkpoint.exists():
            return
        try:
            with (folder / "crashed").open("xb") as stream:
                stream.write(checkpoint.read_bytes())
        except FileExistsError:  # this rank or the other one has died already
            return
        os._exit(1)
