"""Settings of k-means, and which of them decide its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from subcat_core.settings import Settings


class KMeansSettings(Settings):
    """How each parent class is split into sub-categories."""

    num_clusters: int = Field(default=10, ge=1, le=1024)
    """K: sub-categories of each parent class; a class with fewer rows gets fewer."""
    num_restarts: int = Field(default=10, ge=1)
    """k-means++ starts in the projected space; the one of lowest inertia goes on."""
    max_passes: int = Field(default=50, ge=1)
    """Exact passes over all rows, at most; they stop earlier when no row changes its cluster."""
    sample_rows_per_class: int = Field(default=16384, ge=256)
    """Rows of a class that the restarts see; also bounds the driver's memory (times D times 4 bytes)."""
    projection_dims: int = Field(default=64, ge=1)
    """Principal components the restarts work in."""
    stored_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """How rows are cached while clustering; the others halve the memory, sums stay float64."""
    search: Literal["faiss", "numba"] = "faiss"
    """What finds the nearest centroid of a row on a GPU: faiss, or (numba) the compiled loop of lloyd.py, on the CPU.
    Without a GPU it is always the loop, which takes half the time of faiss there."""
    clusters_by_class: dict[str, int] = Field(default_factory=dict)
    """Fewer sub-categories for some classes: class name -> 1..num_clusters."""
    min_rows_per_cluster: int = Field(default=1, ge=1)
    """A class of n rows gets at most n / min_rows_per_cluster clusters, and at least one."""
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """A class stops once a pass lowers its inertia by no more than this share; 0 goes on until no row changes."""
    spherical: bool = False
    """Rows and centroids of length 1: clusters by the angle between features, not by their length too."""
    pca_dims: int | None = Field(default=None, ge=1)
    """Cluster the principal components inside the classes, this many; None clusters the features as they are."""
    whiten: bool = False
    """With pca_dims: components of equal variance."""
    cache_bytes: int | None = Field(default=None, ge=1)
    """Features that one actor keeps in memory, at most; the rest goes to a file in its temporary folder (TMPDIR), which
    is mapped into memory. None: all in memory, or an error where that is too small."""

    @model_validator(mode="after")
    def _fit(self) -> KMeansSettings:
        for name, num_clusters in self.clusters_by_class.items():
            if not 1 <= num_clusters <= self.num_clusters:
                raise ValueError(
                    f"clusters_by_class.{name} = {num_clusters}: expected 1 to num_clusters ({self.num_clusters})"
                )
        if self.whiten and self.pca_dims is None:
            raise ValueError("whiten = true: needs pca_dims, the components to whiten")
        if self.spherical and self.pca_dims is not None:
            raise ValueError("spherical = true with pca_dims: components have no length of their own; leave one out")
        return self

    def decides(self) -> dict[str, Any]:
        """What of this decides the result, for a fingerprint: not what only moves memory, nor what is left alone.

        Left alone means as before there was the setting: results that were made without it stay valid.
        """
        later = ("clusters_by_class", "min_rows_per_cluster", "tolerance", "spherical", "pca_dims", "whiten")
        unused = {
            name
            for name in later
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True)
        }
        return self.model_dump(mode="json", exclude={"cache_bytes"} | unused)

    def clusters_of(self, class_names: Sequence[str]) -> np.ndarray:
        """(C,) int64: the clusters wanted of each class. ValueError where clusters_by_class names no such class."""
        for name in self.clusters_by_class:
            if name not in class_names:
                raise ValueError(
                    f"kmeans.clusters_by_class.{name}: no such class; expected one of {', '.join(class_names)}"
                )
        return np.array([self.clusters_by_class.get(name, self.num_clusters) for name in class_names], np.int64)
