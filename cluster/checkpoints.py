"""Checkpoints of a training in the run's storage: one atomic file an epoch, the only way a killed training goes on."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import torch

from cluster.storage import Storage

_FOLDER = "checkpoints"
_NAME = re.compile(r"epoch-(\d{4,})\.pt")


@dataclasses.dataclass
class Checkpoint:
    """The state after an epoch, counted from 1; epoch 0 is the start. bad_rows: image_id -> {image_id, uri, reason}."""

    epoch: int
    model: dict[str, torch.Tensor]
    optimiser: dict[str, Any]
    history: list[dict[str, float]]
    bad_rows: dict[str, dict[str, str]]
    identity: dict[str, int]


def write_checkpoint(folder: Storage, checkpoint: Checkpoint, keep: int) -> None:
    """Write one, atomically, and then delete all but the newest `keep`."""
    folder.write_bytes(checkpoint_name(checkpoint.epoch), to_bytes(vars(checkpoint)))
    for epoch in _epochs(folder)[:-keep]:
        folder.delete(checkpoint_name(epoch))


def newest_epoch(folder: Storage) -> int:
    """The last epoch that has a checkpoint, or 0."""
    return max(_epochs(folder), default=0)


def read_checkpoint(folder: Storage, epoch: int, identity: dict[str, int]) -> Checkpoint:
    """The checkpoint of an epoch, on the CPU; ValueError where it is unreadable or of another training.

    identity: what must be the same (rows, batch size, epochs, steps, rng_seed) for its steps to mean the same.
    """
    name = checkpoint_name(epoch)
    data = folder.read_bytes(name)
    try:
        checkpoint = Checkpoint(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(
            f"{folder.uri(name)}: not a checkpoint of this program ({error}); delete it to go on from the one before"
        ) from error
    for key, expected in identity.items():
        if checkpoint.identity.get(key) != expected:
            raise ValueError(
                f"{folder.uri(name)}: made with {key} = {checkpoint.identity.get(key)}, this training has {expected}; "
                f"delete {folder.uri(_FOLDER)} to train again"
            )
    return checkpoint


def checkpoint_name(epoch: int) -> str:
    """`checkpoints/epoch-0001.pt`, below the training's folder."""
    return f"{_FOLDER}/epoch-{epoch:04d}.pt"


def to_bytes(value: Any) -> bytes:
    """torch.save of tensors, numbers, strings and their containers: loadable with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _epochs(folder: Storage) -> list[int]:
    matches = [_NAME.fullmatch(name) for name in folder.list_names(_FOLDER)]
    return sorted(int(match[1]) for match in matches if match)
