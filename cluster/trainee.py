"""What a training is made of: its settings, the Trainee that knows the model, and the job that every worker gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator

from cluster.storage import Storage
from cluster.training_input import BatchPlan
from cluster.training_rows import RowFile
from subcat_core.settings import Settings


@dataclasses.dataclass(frozen=True)
class TrainLength:
    """total_steps: planned updates, over which the learning rate falls to 0; num_steps: those that are made, in
    num_epochs epochs, the last of which may be cut short; num_rows: images of an epoch.
    """

    steps_per_epoch: int
    total_steps: int
    num_steps: int
    num_epochs: int
    num_rows: int

    @property
    def num_images(self) -> int:
        """What a progress bar counts: an epoch is all its images, whatever is dropped or repeated to fill batches."""
        return round(self.num_rows * self.num_steps / self.steps_per_epoch)

    def steps_of(self, epoch: int) -> range:
        """Updates of epoch 1..num_epochs, counted from 0 over the whole training."""
        return range((epoch - 1) * self.steps_per_epoch, self.steps_until(epoch))

    def steps_until(self, epoch: int) -> int:
        """Updates made once epoch 0..num_epochs is done."""
        return min(epoch * self.steps_per_epoch, self.num_steps)


class OptimiserSettings(Settings):
    """SGD with momentum and a polynomial learning rate, and how often results are kept."""

    epochs: int = Field(default=15, ge=1)
    """Passes over the training images (15 in PSA's recipe for the classifier; SC-CAM's code plans 61)."""
    stop_after_epochs: int | None = Field(default=None, ge=1)
    """End after so many of the epochs, while the learning rate falls as planned for all of them (SC-CAM's code plans
    61 and uses what is there after 31, 41 and 51 in rounds 1, 2 and 3); null goes to the end."""
    max_steps: int | None = Field(default=None, ge=1)
    """Updates in all, in place of epochs, which are then not looked at (20,000 in deeplab-pytorch); null counts by
    epochs. The last epoch ends early where they do not fill it."""
    batch_size: int = Field(default=16, ge=1)
    """Images of one step over all workers together; split evenly, so it must be a multiple of num_workers."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Of the backbone's weights at step 0; the parameter groups multiply it by their lr_factor."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Real SGD momentum. (The 0.9 called momentum in the authors' code is the polynomial power.)"""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty on weights; biases have none (value of the authors' code)."""
    poly_power: float = Field(default=0.9, ge=0)
    """Learning rate at step t of T: learning_rate * (1 - t / T) ** poly_power."""
    refresh_lr_every: int = Field(default=1, ge=1)
    """Steps between changes of the learning rate (10 in deeplab-pytorch)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the rate rises evenly to its value (0: none, as the authors). A network that meets pictures
    unlike those of its pretraining can be lost in the first steps without."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 means autocast with float32 weights. auto: bf16 where it is faster, see `choose_precision`."""
    channels_last: bool = True
    """Memory order of images and convolutions: by default the faster one (docs/performance.md); results differ by
    rounding."""
    freeze_batch_norm: bool = True
    """Keep the backbone's batch norm at its pretrained statistics and scales; other layers still learn."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that stay, one an epoch; a training goes on from the last, and the other is a spare."""
    validate_every: int | None = Field(default=None, ge=1)
    """Epochs between validations; null validates once, after the last epoch."""

    @model_validator(mode="after")
    def _ends_once(self) -> OptimiserSettings:
        if self.stop_after_epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"stop_after_epochs = {self.stop_after_epochs} and max_steps = {self.max_steps}: both say where the "
                "training ends; give one of them"
            )
        if self.stop_after_epochs is not None and self.stop_after_epochs > self.epochs:
            raise ValueError(
                f"stop_after_epochs = {self.stop_after_epochs} is beyond epochs = {self.epochs}; lower it, or raise "
                "epochs"
            )
        return self

    def length(self, num_rows: int) -> TrainLength:
        """How long a training on so many images is."""
        steps_per_epoch = BatchPlan(num_rows, self.batch_size, 0).steps_per_epoch
        planned = self.max_steps or self.epochs * steps_per_epoch
        num_steps = min(planned, (self.stop_after_epochs or planned) * steps_per_epoch)
        return TrainLength(steps_per_epoch, planned, num_steps, -(-num_steps // steps_per_epoch), num_rows)


class TrainComputeSettings(Settings):
    """Where a training runs. Another number of workers gives the same batches, samples, losses and gradients, up to
    rounding, but not the same chance: every rank draws its own dropout, and on CPUs batch norm that learns sees each
    rank's own images. The other settings change nothing but rounding.
    """

    num_workers: int = Field(default=0, ge=0)
    """Ray Train workers, one rank each; 0 trains in this process, without Ray."""
    cpus_per_worker: float = Field(default=1.0, ge=0)
    """Logical CPUs that one Ray worker holds: what Ray books, not how many threads run (see threads_per_worker)."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that one Ray worker holds; 0 trains on the CPU. In this process (num_workers = 0) a GPU is used if there is
    one."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost workers are replaced before the training fails."""
    input: Literal["loader", "ray"] = "loader"
    """loader: a torch DataLoader beside each worker. ray: Ray Data tasks anywhere on the cluster."""
    num_decode_workers: int = Field(default=1, ge=0)
    """Processes (loader) or concurrent Ray tasks (ray) of each worker that read and augment; loader with 0: threads."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Torch threads of one worker; null shares the CPUs of a node among its workers."""


class Trainee(Protocol):
    """What the worker loop needs to know of a model: a small picklable object, implemented in jobs/.

    A trainee may also have `make_validation_sample(row) -> sample`; without it, validation calls make_sample with a
    generator that is the same for an image at every validation.
    """

    def build_model(self) -> torch.nn.Module:
        """With its initial weights, on the CPU. Called by every rank; rank 0's weights are what counts."""

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of fixed shape and dtype (uint8 images) of one row; ImageError or MissingFileError for a bad image."""

    def empty_sample(self) -> dict[str, np.ndarray]:
        """What stands in for a bad image, with weight 0: the shapes and dtypes of make_sample."""

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar to minimise, and scalars to log.

        batch: the stacked samples and `weight` (N,) float32, 0 for bad images; the result must be finite (and 0) when
        all weights are 0. The gradients of all ranks are averaged: take weighted means by
        `subcat_core.losses.global_mean`. Runs under autocast: take the loss itself in float32. Call `model(...)` once,
        and nothing else of it: it may be wrapped for data-parallel training.
        """

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """[{params, lr_factor, weight_decay_factor}]."""

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Validation: tensors with one row an image. Runs in eval mode, without gradients, under autocast."""

    def metrics(self, outputs: dict[str, np.ndarray]) -> dict[str, float]:
        """Validation: numbers from the outputs of all readable images, in the order of the rows."""


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """All that a worker needs. rows and val_rows: tables with at least image_id (string) and uri (string)."""

    trainee: Trainee
    rows: pa.Table | RowFile
    val_rows: pa.Table | RowFile | None
    folder: Storage
    optimiser: OptimiserSettings
    compute: TrainComputeSettings
    rng_seed: int
    max_bad_frac: float

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan(self.rows.num_rows, self.optimiser.batch_size, self.rng_seed)

    @property
    def length(self) -> TrainLength:
        return self.optimiser.length(self.rows.num_rows)

    def identity(self) -> dict[str, int]:
        """What a checkpoint must agree with, so that steps and batches mean the same, and the end does too."""
        return {
            "num_rows": self.rows.num_rows,
            "batch_size": self.optimiser.batch_size,
            "epochs": self.length.num_epochs,
            "total_steps": self.length.total_steps,
            "rng_seed": self.rng_seed,
        }

    def validates_after(self, epoch: int) -> bool:
        """Whether a validation follows epoch 1..length.num_epochs."""
        if self.val_rows is None or self.val_rows.num_rows == 0:
            return False
        every = self.optimiser.validate_every
        return epoch == self.length.num_epochs or (every is not None and epoch % every == 0)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The content of result.json.

    history: one dict an epoch: epoch, step, loss and the trainee's scalars (means over the epoch), learning_rate,
    seconds, images_per_s, and validation metrics where there was one. metrics: the last epoch's losses and the last
    validation. num_images: samples that went through the training. bad_rows: image_id, uri, reason of each bad image.
    seconds: of the epochs, over all resumed parts. peak_rss_bytes: of the largest worker.
    """

    history: list[dict[str, float]]
    metrics: dict[str, float]
    num_images: int
    num_bad: int
    bad_rows: list[dict[str, str]]
    seconds: float
    images_per_s: float
    peak_rss_bytes: int


Post = Callable[[str, int, dict[str, float]], None]
"""(kind "progress" | "metrics", step, values): how rank 0 tells the driver. Steps may repeat after a restart."""


@dataclasses.dataclass(frozen=True)
class TrainContext:
    """A worker's place in the group: Ray Train's, or rank 0 of 1 in this process."""

    rank: int
    world_size: int
    device: torch.device
    post: Post
    num_threads: int | None
    """Torch threads to use; None leaves them."""
