"""The compiled lattice against a plain one in float64, and against the Gaussian it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from subcat_core.permutohedral import MAX_KEY, build_lattice, filter_values, scale_factors
from tests.subcat_core.plain_lattice import gaussian, plain_filter, simplex


def _photo_features(rng: np.random.Generator, height: int = 14, width: int = 18) -> np.ndarray:
    """(5, P): position and colour of a smooth picture with an edge, in standard deviations."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    colour = np.stack([6 * (x > 8) + y / 9, y / 5, 3 * (x > 8) + x / 11]) + rng.normal(0, 0.2, (3, height, width))
    return np.concatenate([np.stack([x, y]) / 8, colour]).reshape(5, -1).astype(np.float32)


@pytest.mark.parametrize("num_dimensions", [1, 2, 3, 5])
def test_equals_the_plain_lattice(rng: np.random.Generator, num_dimensions: int) -> None:
    features = rng.normal(0, 2, (num_dimensions, 150)).astype(np.float32)
    values = rng.random((150, 3)).astype(np.float32)
    found = filter_values(build_lattice(features), values)
    np.testing.assert_allclose(found, plain_filter(features, values), rtol=1e-4, atol=1e-5)


def test_equals_the_plain_lattice_on_a_picture(rng: np.random.Generator) -> None:
    features = _photo_features(rng)
    values = rng.random((features.shape[1], 2)).astype(np.float32)
    lattice = build_lattice(features)
    expected = plain_filter(features, values)
    np.testing.assert_allclose(filter_values(lattice, values), expected, atol=1e-5 * expected.max())
    vertices = {vertex for feature in features.T.astype(np.float64) for vertex, _ in simplex(feature)}
    assert abs(lattice.num_vertices - len(vertices)) <= 2


@pytest.mark.parametrize("num_dimensions", [1, 2, 5])
def test_weights_are_barycentric(rng: np.random.Generator, num_dimensions: int) -> None:
    features = rng.normal(0, 3, (num_dimensions, 400)).astype(np.float32)
    lattice = build_lattice(features)
    assert lattice.num_dimensions == num_dimensions
    assert lattice.weights.min() > -1e-5
    np.testing.assert_allclose(lattice.weights.sum(axis=1), 1, atol=1e-5)
    expected = np.array([[weight for _, weight in simplex(feature)] for feature in features.T.astype(np.float64)])
    np.testing.assert_allclose(lattice.weights, expected, atol=2e-5)


def test_neighbours_point_at_each_other(rng: np.random.Generator) -> None:
    lattice = build_lattice(rng.normal(0, 1, (2, 300)).astype(np.float32))
    for before, after in (lattice.neighbours[axis].T for axis in range(3)):
        (linked,) = np.nonzero(before < lattice.num_vertices)
        assert len(linked)
        assert np.array_equal(after[before[linked]], linked)


def test_many_vertices_survive_growth_of_the_table(rng: np.random.Generator) -> None:
    features = rng.uniform(0, 200, (2, 20_000)).astype(np.float32)
    lattice = build_lattice(features)
    assert lattice.num_vertices > 10_000
    assert lattice.vertices.max() == lattice.num_vertices - 1
    total = filter_values(lattice, np.ones((20_000, 1), np.float32))
    assert total.min() > 0


def test_approximates_the_gaussian(rng: np.random.Generator) -> None:
    """Normalised filtering differs from the true Gaussian by a few per cent (Adams et al. 2010, section 5)."""
    features = _photo_features(rng)
    values = rng.random((features.shape[1], 4)).astype(np.float32)
    values[:, 3] = features[2] > 3
    ones = np.ones((features.shape[1], 1), np.float32)
    lattice = build_lattice(features)
    found = filter_values(lattice, values) / filter_values(lattice, ones)
    kernel = gaussian(features)
    expected = kernel @ values / kernel.sum(axis=1, keepdims=True)
    assert np.abs(found - expected).max() < 0.05
    assert np.abs(found - expected).mean() < 0.01


def test_filter_is_linear_and_symmetric(rng: np.random.Generator) -> None:
    """Blur axes do not commute at the border of the lattice, so symmetry holds to a few per cent only."""
    lattice = build_lattice(_photo_features(rng))
    a, b = rng.random((2, len(lattice.vertices), 1)).astype(np.float32)
    np.testing.assert_allclose(
        filter_values(lattice, 2 * a + b), 2 * filter_values(lattice, a) + filter_values(lattice, b), rtol=1e-4
    )
    assert np.sum(a * filter_values(lattice, b)) == pytest.approx(np.sum(b * filter_values(lattice, a)), rel=0.02)


def test_one_pixel() -> None:
    lattice = build_lattice(np.zeros((5, 1), np.float32))
    assert lattice.vertices.shape == (1, 6)
    # All weight on one of six vertices; one walk around the simplex, a half at each step, comes back to it.
    expected = lattice.gain * (1 + 0.5**6)
    assert filter_values(lattice, np.ones((1, 2), np.float32))[0] == pytest.approx([expected] * 2)


def test_scale_of_two_dimensions() -> None:
    np.testing.assert_allclose(scale_factors(2), [np.sqrt(3.0), 1.0], rtol=1e-6)


def test_errors() -> None:
    for shape in ((5,), (0, 4), (3, 0)):
        with pytest.raises(ValueError, match=r"expected \(d, N\)"):
            build_lattice(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="nan or infinite"):
        build_lattice(np.array([[0, np.nan]], np.float32))
    with pytest.raises(ValueError, match="raise the standard deviations"):
        build_lattice(np.array([[0, 1e7]] * 5, np.float32))
    assert MAX_KEY < 2**63
    with pytest.raises(ValueError, match=r"expected \(1, V\)"):
        filter_values(build_lattice(np.zeros((2, 1), np.float32)), np.zeros((2, 1), np.float32))
