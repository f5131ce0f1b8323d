"""The state of k-means after its last pass, kept beside its output, so that a lost driver or actor costs one pass."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from typing import Any

import numpy as np

from cluster.storage import Storage
from subcat_core.kmeans import FeatureShard, KMeansState
from subcat_core.kmeans_settings import KMeansSettings

_NAME = "kmeans-progress.npz"  # C * K * D * 8 bytes


def progress_key(shard: FeatureShard, settings: KMeansSettings, rng_seed: int, num_clusters: np.ndarray | None) -> str:
    """What a state belongs to: settings that decide the passes, and the number of rows of each class."""
    values: dict[str, Any] = {
        "settings": settings.decides() | {"max_passes": None},  # more passes may go on from fewer
        "rng_seed": rng_seed,
        "rows": shard.counts.tolist(),
        "dimension": shard.dimension,
        "num_clusters": None if num_clusters is None else num_clusters.tolist(),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass
class StoredProgress:
    """A subcat_core.kmeans.Checkpoint in a storage."""

    output: Storage
    key: str

    def load(self) -> KMeansState | None:
        """None where there is nothing, or what is there is of other rows or settings, or cut off."""
        if not self.output.exists(_NAME):
            return None
        try:
            with np.load(io.BytesIO(self.output.read_bytes(_NAME)), allow_pickle=False) as arrays:
                if str(arrays["key"]) != self.key:
                    return None
                return KMeansState(**{field.name: arrays[field.name] for field in dataclasses.fields(KMeansState)})
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, state: KMeansState) -> None:
        buffer = io.BytesIO()
        arrays = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        np.savez(buffer, key=np.array(self.key), **arrays)
        self.output.write_bytes(_NAME, buffer.getvalue())

    def delete(self) -> None:
        if self.output.exists(_NAME):
            self.output.delete(_NAME)
