"""Small shards of known rows for the k-means tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from subcat_core.block_shard import BlockShard
from subcat_core.feature_blocks import FeatureBlock, ImageRows
from subcat_core.kmeans import FeatureShard


def image_ids(num_images: int) -> list[str]:
    return [f"image-{i:05d}" for i in range(num_images)]


def rows_of(ids: Sequence[str], labels: Sequence[Sequence[int]], features: np.ndarray) -> ImageRows:
    values = [label for own in labels for label in own]
    return ImageRows(list(ids), np.array([len(own) for own in labels], np.int64), np.array(values, np.int64), features)


def block_shard(
    labels: Sequence[Sequence[int]], features: np.ndarray, num_classes: int, rows_per_block: int = 100, **options: Any
) -> BlockShard:
    """A BlockShard of all rows, rows_per_block images in a block."""
    ids = image_ids(len(features))
    blocks = {}
    for block_id, start in enumerate(range(0, len(features), rows_per_block)):
        part = slice(start, start + rows_per_block)
        rows = rows_of(ids[part], labels[part], np.asarray(features[part], np.float32))
        blocks[block_id] = FeatureBlock(f"part-{block_id:05d}", rows, num_classes)
    return BlockShard(blocks, num_classes, **options)


def labels_of(shard: FeatureShard) -> dict[tuple[str, int], int]:
    """(image_id, class_index) -> cluster_id, of all tables of a shard."""
    tables: list[pa.Table] = []
    shard.write_labels(lambda _name, table: tables.append(table))
    rows = [row for table in tables for row in table.to_pylist()]
    return {(r["image_id"], c): k for r in rows for c, k in zip(r["labels"], r["cluster_ids"], strict=True)}


def power_law(num_rows: int, dimension: int, rng: np.random.Generator) -> np.ndarray:
    """(N, D) float32 normal rows whose variances fall as a power, turned by a random rotation: like pooled features."""
    scales = np.arange(1, dimension + 1) ** -0.7
    rotation = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0]
    return ((rng.standard_normal((num_rows, dimension)) * scales) @ rotation).astype(np.float32)


def separated(num_rows: int, rng: np.random.Generator) -> tuple[list[list[int]], np.ndarray]:
    """Labels over 3 classes, one or two to an image, and rows in 4 far clouds of 8 dimensions."""
    labels = [sorted(rng.choice(3, rng.integers(1, 3), replace=False).tolist()) for _ in range(num_rows)]
    centres = rng.standard_normal((4, 8)) * 50
    return labels, (centres[rng.integers(0, 4, num_rows)] + rng.standard_normal((num_rows, 8))).astype(np.float32)
