"""A fixed sample of the train split: the images that rounds and masks are scored on without ground truth."""

from __future__ import annotations

import numpy as np

from jobs.manifest import Manifest

_MAX_SHARDS = 64


def sample_ids(manifest: Manifest, num_images: int) -> dict[str, list[str]]:
    """Shard -> image_ids: images of train shards that lie evenly over the split, about num_images in all.

    The same ones for the same manifest and number; at most 64 shards are read, whatever the size of the split.
    """
    names = manifest.shard_names("train")
    num_rows = max(1, manifest.num_rows("train") // len(names))
    num_shards = min(len(names), max(1, -(-num_images // num_rows) * 4), _MAX_SHARDS)
    picked = sorted({names[int(index)] for index in np.linspace(0, len(names) - 1, num_shards)})
    share = max(1, round(num_images / len(picked)))
    ids = {}
    for name in picked:
        column = manifest.folder.read_table(f"{name}.parquet", columns=["image_id"])["image_id"].to_pylist()
        ids[name] = column[:: max(1, len(column) // share)][:share]
    return ids
