"""The dense CRF against mean-field steps with whole matrices, against pydensecrf2, and at its edges."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from subcat_core import crf
from subcat_core.crf import CrfSettings, dense_crf
from tests.subcat_core.plain_lattice import gaussian, plain_filter

SETTINGS = CrfSettings()
# What deeplab-pytorch refines its predictions with.
DEEPLAB = CrfSettings(
    iterations=10,
    spatial_sigma_px=1,
    spatial_weight=3,
    bilateral_sigma_px=67,
    bilateral_sigma_rgb=3,
    bilateral_weight=4,
)
SMALL = CrfSettings(spatial_sigma_px=1.5, bilateral_sigma_px=6, bilateral_sigma_rgb=20, bilateral_weight=4)


def _photo(height: int, width: int, name: str = "china.jpg") -> np.ndarray:
    return np.array(Image.fromarray(load_sample_image(name)).resize((width, height), Image.Resampling.BICUBIC))


def _probability(rng: np.random.Generator, num_labels: int, height: int, width: int) -> np.ndarray:
    """Smooth maps like upsampled CAMs: (L, H, W) float32 in 0..1 that do not sum to 1."""
    coarse = rng.random((num_labels, height // 12 + 2, width // 12 + 2)).astype(np.float32)
    maps = [Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR) for grid in coarse]
    return np.stack([np.array(grid) for grid in maps])


def _features(image: np.ndarray, settings: CrfSettings) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    position = np.stack([x.ravel(), y.ravel()])
    colour = image.reshape(-1, 3).T.astype(np.float32)
    appearance = [position / settings.bilateral_sigma_px, colour / settings.bilateral_sigma_rgb]
    return position / settings.spatial_sigma_px, np.concatenate(appearance).astype(np.float32)


def _plain_mean_field(probability: np.ndarray, kernels: list[tuple[np.ndarray, float]], iterations: int) -> np.ndarray:
    """(L, N) marginals from whole (N, N) kernel matrices, in float64."""

    def softmax(logit: np.ndarray) -> np.ndarray:
        power = np.exp(logit - logit.max(axis=0))
        return power / power.sum(axis=0)

    unary = np.log(np.clip(probability.reshape(len(probability), -1).astype(np.float64), 1e-5, 1))
    marginals = softmax(unary)
    for _ in range(iterations):
        logit = unary.copy()
        for matrix, weight in kernels:
            norm = 1 / np.sqrt(matrix.sum(axis=1))
            logit += weight * ((marginals * norm) @ matrix.T) * norm
        marginals = softmax(logit)
    return marginals


@pytest.mark.parametrize(("num_labels", "settings"), [(1, SMALL), (2, SMALL), (3, SMALL), (6, SMALL), (3, DEEPLAB)])
def test_equals_mean_field_with_whole_matrices(
    rng: np.random.Generator, num_labels: int, settings: CrfSettings
) -> None:
    image = _photo(12, 17)
    probability = _probability(rng, num_labels, 12, 17)
    identity = np.eye(12 * 17, dtype=np.float32)
    matrices = [plain_filter(features, identity) for features in _features(image, settings)]
    kernels = list(zip(matrices, [settings.spatial_weight, settings.bilateral_weight], strict=True))
    expected = _plain_mean_field(probability, kernels, settings.iterations).reshape(probability.shape)
    found = dense_crf(probability, image, settings)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_approximates_the_true_gaussian_crf(rng: np.random.Generator) -> None:
    image = _photo(24, 32)
    probability = _probability(rng, 3, 24, 32)
    kernels = [
        (gaussian(features), weight)
        for features, weight in zip(
            _features(image, SMALL), [SMALL.spatial_weight, SMALL.bilateral_weight], strict=True
        )
    ]
    expected = _plain_mean_field(probability, kernels, SMALL.iterations).reshape(probability.shape)
    found = dense_crf(probability, image, SMALL)
    assert (found.argmax(axis=0) == expected.argmax(axis=0)).mean() > 0.95


@pytest.mark.parametrize("num_labels", [2, 3, 5, 21])
def test_equals_pydensecrf(rng: np.random.Generator, num_labels: int) -> None:
    peer = pytest.importorskip(
        "pydensecrf.densecrf", reason="pydensecrf2 needs a C++ compiler and Python 3.11 or 3.12: pip install '.[peers]'"
    )
    image = _photo(200, 267, "flower.jpg")
    probability = _probability(rng, num_labels, 200, 267)
    model = peer.DenseCRF2D(267, 200, num_labels)
    model.setUnaryEnergy(-np.log(np.clip(probability, 1e-5, 1)).reshape(num_labels, -1))
    model.addPairwiseGaussian(sxy=3, compat=3)
    model.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    expected = np.array(model.inference(10)).reshape(probability.shape)
    found = dense_crf(probability, image, SETTINGS)
    assert np.abs(found - expected).max() <= 1e-3
    assert (found.argmax(axis=0) == expected.argmax(axis=0)).mean() >= 0.9999


def test_marginals_sum_to_one_and_follow_the_edge() -> None:
    """A map that spills over a colour edge is pulled back to it."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = (220, 200, 40)
    probability = np.full((2, 40, 60), 0.2, np.float32)
    probability[0, :, :36], probability[1, :, 36:] = 0.8, 0.8
    found = dense_crf(probability, image, SETTINGS)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    assert np.array_equal(found.argmax(axis=0), np.broadcast_to(np.arange(60) >= 30, (40, 60)))


def test_without_weights_is_the_softmax_of_the_scores(rng: np.random.Generator) -> None:
    probability = _probability(rng, 3, 20, 30) * 0.5 + 0.1
    settings = CrfSettings(spatial_weight=0, bilateral_weight=0, iterations=2)
    found = dense_crf(probability.astype(np.float64), _photo(20, 30), settings)
    np.testing.assert_allclose(found, probability / probability.sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3), (9, 130)])
def test_small_images(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    probability = rng.random((3, *shape)).astype(np.float32)
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = dense_crf(probability, image, SETTINGS)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)


def test_constant_image_and_certain_scores() -> None:
    image = np.full((30, 30, 3), 255, np.uint8)
    probability = np.zeros((2, 30, 30), np.float32)
    probability[0] = 1
    found = dense_crf(probability, image, SETTINGS)
    assert found[0].min() > 0.999
    np.testing.assert_allclose(dense_crf(np.full_like(probability, 0.5), image, SETTINGS), 0.5, atol=1e-5)


def test_threads_agree_with_one_thread(rng: np.random.Generator) -> None:
    jobs = [(_probability(rng, 3, 50 + k, 70), _photo(50 + k, 70)) for k in range(8)]
    alone = [dense_crf(probability, image, SETTINGS) for probability, image in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: dense_crf(*job, SETTINGS), jobs))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


def test_inputs_are_left_alone_and_need_not_be_contiguous(rng: np.random.Generator) -> None:
    probability, image = _probability(rng, 2, 40, 60), _photo(40, 60)
    image.flags.writeable = False
    before = probability.copy()
    expected = dense_crf(np.ascontiguousarray(probability[:, ::2]), np.ascontiguousarray(image[::2]), SETTINGS)
    assert np.array_equal(dense_crf(probability[:, ::2], image[::2], SETTINGS), expected)
    assert np.array_equal(probability, before)


def test_spatial_kernels_are_kept_within_a_bound() -> None:
    one = crf._SpatialKernels(2**40).get(20, 30, 3.0)
    kernels = crf._SpatialKernels(2 * one.num_bytes + 1000)
    first, second = kernels.get(20, 30, 3.0), kernels.get(30, 20, 3.0)
    assert kernels.get(20, 30, 3.0) is first
    kernels.get(20, 30, 3.5)
    assert kernels.get(20, 30, 3.0) is first
    assert kernels.get(30, 20, 3.0) is not second
    assert sum(kept.num_bytes for kept in kernels._kernels.values()) <= kernels.max_bytes


def test_a_kernel_larger_than_the_bound_is_not_kept() -> None:
    kernels = crf._SpatialKernels(1)
    assert kernels.get(5, 5, 3.0).weights.shape == (25, 3)
    assert not kernels._kernels


@pytest.mark.parametrize(
    ("probability", "image", "message"),
    [
        (np.full((2, 4, 5), np.nan, np.float32), np.zeros((4, 5, 3), np.uint8), "nan or infinite"),
        (np.full((2, 4, 5), np.inf, np.float32), np.zeros((4, 5, 3), np.uint8), "nan or infinite"),
        (np.ones((2, 4, 6), np.float32), np.zeros((4, 5, 3), np.uint8), "4 x 6 px and the image 4 x 5 px"),
        (np.ones((2, 4, 5), np.int64), np.zeros((4, 5, 3), np.uint8), "expected floats of"),
        (np.ones((4, 5), np.float32), np.zeros((4, 5, 3), np.uint8), r"\(L, H, W\)"),
        (np.ones((0, 4, 5), np.float32), np.zeros((4, 5, 3), np.uint8), r"\(L, H, W\)"),
        (np.ones((2, 4, 5), np.float32), np.zeros((4, 5, 3), np.float32), "expected uint8"),
        (np.ones((2, 4, 5), np.float32), np.zeros((4, 5, 4), np.uint8), "expected uint8"),
    ],
)
def test_errors(probability: np.ndarray, image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_crf(probability, image, SETTINGS)


def test_settings_are_checked() -> None:
    for change in ({"iterations": 0}, {"spatial_sigma_px": 0.0}, {"bilateral_weight": -1.0}, {"sxy": 3.0}):
        with pytest.raises(ValidationError):
            CrfSettings(**change)  # type: ignore[arg-type]
