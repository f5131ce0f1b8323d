"""A fixed sample of the train split: the images that rounds and masks are scored on without ground truth."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jobs.manifest import Manifest

_THREADS = 16


def sample_ids(manifest: Manifest, num_images: int) -> dict[str, list[str]]:
    """Shard -> image_ids: images of train shards that lie evenly over the split, about num_images in all.

    The same ones for the same manifest and number. From as many shards as there are (or as many as images), since
    manifests are often sorted by class; so the classes have their shares in it.
    """
    names = manifest.shard_names("train")
    num_shards = min(len(names), num_images)
    picked = sorted({names[int(index)] for index in np.linspace(0, len(names) - 1, num_shards)})
    share = max(1, round(num_images / len(picked)))

    def read(name: str) -> list[str]:
        column = manifest.folder.read_table(f"{name}.parquet", columns=["image_id"])["image_id"].to_pylist()
        return list(column[:: max(1, len(column) // share)][:share])

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(picked, pool.map(read, picked), strict=True))
