"""Dense conditional random field: soft class maps snap to the colours of the image.

Kraehenbuehl & Koltun 2011, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials": mean-field
inference with a Potts model over two Gaussian kernels (position; position and colour), both normalised symmetrically
and filtered on the permutohedral lattice. Conventions are those of pydensecrf, whose results it gives to rounding.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from pydantic import Field

from subcat_core.mean_field import mean_field
from subcat_core.permutohedral import Lattice, build_lattice, filter_values
from subcat_core.settings import Settings

MIN_PROBABILITY = 1e-5
"""Scores are clipped to this before the logarithm (value of the authors' code)."""

_MAX_CACHE_BYTES = 128 * 2**20


class CrfSettings(Settings):
    """Defaults are the authors' (Ahn & Kwak 2018, which Chang et al. 2020 build on)."""

    iterations: int = Field(default=10, ge=1, le=1000)
    """Mean-field steps."""
    spatial_sigma_px: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Standard deviation of the smoothness kernel."""
    spatial_weight: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    """Potts weight of the smoothness kernel; 0 switches it off."""
    bilateral_sigma_px: float = Field(default=80.0, gt=0, allow_inf_nan=False)
    """Standard deviation in position of the appearance kernel."""
    bilateral_sigma_rgb: float = Field(default=13.0, gt=0, allow_inf_nan=False)
    """Standard deviation in colour (0..255) of the appearance kernel."""
    bilateral_weight: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """Potts weight of the appearance kernel; 0 switches it off."""


def dense_crf(probability: np.ndarray, image: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """Marginals of the dense CRF.

    probability: (L, H, W) float, finite; clipped to 1e-5..1, need not sum to 1 (the authors' maps do not).
    image: (H, W, 3) uint8 RGB. Returns (L, H, W) float32 in 0..1 that sums to 1 over L. Runs in one thread without
    the GIL; safe to call from many. ValueError for other shapes, types and values that are not finite.
    """
    _check(probability, image)
    num_labels, height, width = probability.shape
    if settings.spatial_weight == settings.bilateral_weight == 0:  # nothing that neighbours say counts
        clipped = np.clip(probability, MIN_PROBABILITY, 1.0, dtype=np.float32)
        return clipped / clipped.sum(axis=0)
    spatial = _spatial_kernels.get(height, width, settings.spatial_sigma_px)
    bilateral = _Kernel(build_lattice(_bilateral_features(image, settings)))
    marginals = mean_field(
        np.log(np.clip(probability.reshape(num_labels, -1), MIN_PROBABILITY, 1.0, dtype=np.float32)),
        spatial.lattice.vertices,
        spatial.weights,
        spatial.lattice.neighbours,
        np.float32(settings.spatial_weight * spatial.lattice.gain),
        bilateral.lattice.vertices,
        bilateral.weights,
        bilateral.lattice.neighbours,
        np.float32(settings.bilateral_weight * bilateral.lattice.gain),
        settings.iterations,
    )
    return marginals.reshape(num_labels, height, width)


def _check(probability: np.ndarray, image: np.ndarray) -> None:
    if probability.ndim != 3 or 0 in probability.shape or not np.issubdtype(probability.dtype, np.floating):
        raise ValueError(f"probability: got {probability.dtype} {probability.shape}, expected floats of (L, H, W)")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: got {image.dtype} {image.shape}, expected uint8 of (H, W, 3)")
    if probability.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"probability is {probability.shape[1]} x {probability.shape[2]} px and the image "
            f"{image.shape[0]} x {image.shape[1]} px; upsample the maps to the size of the image"
        )
    if not np.isfinite(probability).all():
        raise ValueError("probability holds nan or infinite values; check the maps that went in")


class _Kernel:
    """A lattice with symmetric normalisation folded into its weights: w_i / sqrt(sum of the kernel at pixel i)."""

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        total = filter_values(lattice, np.ones((len(lattice.vertices), 1), np.float32))
        self.weights = lattice.weights / np.sqrt(total + np.float32(1e-20))

    @property
    def num_bytes(self) -> int:
        return self.lattice.num_bytes + self.weights.nbytes


class _SpatialKernels:
    """The smoothness kernel depends on the size of the image alone: the last few sizes are kept, within a bound."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kernels: OrderedDict[tuple[int, int, float], _Kernel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, height: int, width: int, sigma_px: float) -> _Kernel:
        """From the cache, or built: outside the lock, since two threads building the same one do no harm."""
        key = (height, width, sigma_px)
        with self._lock:
            if key in self._kernels:
                self._kernels.move_to_end(key)
                return self._kernels[key]
        kernel = _Kernel(build_lattice(_positions(height, width, sigma_px)))
        with self._lock:
            self._kernels[key] = kernel
            while sum(kept.num_bytes for kept in self._kernels.values()) > self.max_bytes:
                self._kernels.popitem(last=False)
        return kernel


_spatial_kernels = _SpatialKernels(_MAX_CACHE_BYTES)


def _positions(height: int, width: int, sigma_px: float) -> np.ndarray:
    """(2, H * W) float32: x and y in standard deviations."""
    features = np.empty((2, height, width), np.float32)
    features[0] = np.arange(width, dtype=np.float32) / np.float32(sigma_px)
    features[1] = (np.arange(height, dtype=np.float32) / np.float32(sigma_px))[:, None]
    return features.reshape(2, -1)


def _bilateral_features(image: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """(5, H * W) float32: x, y, red, green and blue in standard deviations."""
    height, width = image.shape[:2]
    colours = image.reshape(-1, 3).T / np.float32(settings.bilateral_sigma_rgb)
    return np.concatenate([_positions(height, width, settings.bilateral_sigma_px), colours])
