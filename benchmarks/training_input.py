"""Images a second into a training, against a plain torch DataLoader: `python -m benchmarks.training_input [--quick]`.

Both sides read JPEG files of 375 x 500 px from a disk, decode, resize, crop and mirror them by the same function, and
hand out shuffled batches of 16: ours by `cluster.training_input`, the peer by a map-style Dataset with the default
collate. Once in this process (ours with its decoding threads) and once with two decoding processes each. The loaders
live side by side and take turns of some batches each; what one has read ahead while the other worked is in its favour,
and as much for both. Wall time, since processes that live on tell no CPU time. Kept where ours takes at most
MAX_RATIO of the DataLoader's time.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.crf import photos
from benchmarks.harness import finish, interleave, parser, table
from cluster.storage import read_uri
from cluster.trainee import TrainComputeSettings
from cluster.training_input import BatchPlan, BatchReader, stream_batches
from cluster.training_rows import Rows
from subcat_core.images import augment, decode_image
from subcat_core.random_crop import AugmentSettings

OURS, PEER = "ours", "DataLoader"
NUM_IMAGES, BATCH_SIZE, CROP_PX = 256, 16, 256
BATCHES, QUICK_BATCHES, TURNS, QUICK_TURNS = 40, 4, 5, 2
AUGMENT = AugmentSettings(resize_min_px=256, resize_max_px=512, crop_px=CROP_PX)
MAX_RATIO = 1.1


class Crops:
    """Makes the sample of a row, for both sides."""

    def make_sample(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": augment(decode_image(read_uri(row["uri"])), AUGMENT, rng, pad_rgb=(124, 116, 104))[0]}


@dataclasses.dataclass(frozen=True)
class PlainDataset(Dataset[dict[str, np.ndarray]]):
    """The peer's: one sample an index, as tutorials have it."""

    crops: Crops
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.crops.make_sample(self.rows[index], np.random.default_rng())


def draw(folder: Path, num_images: int) -> list[dict[str, Any]]:
    """Rows of JPEG files: two photos by turns, each time shifted by a pixel more."""
    made = photos(None, 2)
    rows = []
    for index in range(num_images):
        path = folder / f"{index:04d}.jpg"
        Image.fromarray(np.roll(made[index % len(made)], index, axis=1)).save(path, quality=90)
        rows.append({"image_id": path.stem, "uri": str(path)})
    return rows


def our_batches(rows: list[dict[str, Any]], num_processes: int) -> Iterator[torch.Tensor]:
    """(16, 3, 256, 256) uint8, without end."""
    reader: Any = BatchReader(Crops(), rng_seed=0)  # type: ignore[arg-type]
    keys = BatchPlan(len(rows), BATCH_SIZE, rng_seed=0).batches(0, 1, itertools.count(1))
    compute = TrainComputeSettings(num_decode_workers=num_processes)
    for batch in stream_batches(reader, Rows(pa.Table.from_pylist(rows)), keys, compute):
        yield torch.from_numpy(batch.arrays["image"])


def plain_batches(rows: list[dict[str, Any]], num_processes: int) -> Iterator[torch.Tensor]:
    """As our_batches."""
    loader = DataLoader(
        PlainDataset(Crops(), rows),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=num_processes,
        multiprocessing_context="spawn" if num_processes else None,
        persistent_workers=num_processes > 0,
    )
    while True:
        for batch in loader:
            yield batch["image"]


def taking(batches: Iterator[torch.Tensor], number: int) -> Callable[[], tuple[int, ...]]:
    """A side: the next batches; returns the shape of all of them together."""

    def take() -> tuple[int, ...]:
        shapes = [tuple(next(batches).shape) for _ in range(number)]
        assert len(set(shapes)) == 1
        return (number * shapes[0][0], *shapes[0][1:])

    return take


def compare(rows: list[dict[str, Any]], num_processes: int, num_batches: int, turns: int) -> dict[str, Any]:
    """Images a second by side, and the ratio of their times."""
    made = {OURS: our_batches(rows, num_processes), PEER: plain_batches(rows, num_processes)}
    shape = (num_batches * BATCH_SIZE, 3, CROP_PX, CROP_PX)

    def check(results: Any) -> None:
        assert all(found == shape for found in results.values()), results

    try:
        both = interleave({side: taking(made[side], num_batches) for side in made}, turns, check=check)
    finally:
        for batches in made.values():
            batches.close()  # type: ignore[attr-defined]
    rates = {side: shape[0] / both.median(side, "wall_s") for side in made}
    return {"images_per_s": rates, "ratio": both.ratio(OURS, PEER, "wall_s"), **both.to_json()}


def main() -> None:
    options = parser(__doc__)
    arguments = options.parse_args()
    num_batches, turns = (QUICK_BATCHES, QUICK_TURNS) if arguments.quick else (BATCHES, TURNS)
    records, table_rows, failures = {}, [], []
    with tempfile.TemporaryDirectory(prefix="subcat-input-") as folder:
        rows = draw(Path(folder), BATCH_SIZE * 2 if arguments.quick else NUM_IMAGES)
        for title, num_processes in (("in process", 0), ("2 processes each", 2)):
            found = records[title] = compare(rows, num_processes, num_batches, turns)
            rates, ratio = found["images_per_s"], found["ratio"]
            table_rows.append([title, rates[OURS], rates[PEER], ratio])
            if ratio > MAX_RATIO and not arguments.quick:
                failures.append(f"{title}: {ratio:.2f} of the DataLoader's time, at most {MAX_RATIO}")
    shown = table(["decoding", "images/s, ours", "images/s, DataLoader", "time / DataLoader"], table_rows)
    finish("training_input", records, shown, failures, arguments.json)


if __name__ == "__main__":
    main()
