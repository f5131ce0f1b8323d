"""The walk by steps is the released code's dense matrix, squared; and what bounds it."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from subcat_core.affinity_pairs import pair_offsets
from subcat_core.random_walk import RandomWalkSettings, random_walk, transition
from tests.subcat_core.plain_affinity import Cell, all_pairs, dense_walk


def _affinity(
    size: tuple[int, int], radius: int, pad_border: bool, rng: np.random.Generator
) -> tuple[np.ndarray, dict[tuple[Cell, Cell], float]]:
    """Random affinities, at the sources and by pair; radius 5 on a small grid has offsets that fit nowhere."""
    offsets = pair_offsets(radius)
    values = np.zeros((len(offsets), *size))
    named = {}
    for source, partner in all_pairs(*size, radius, pad_border):
        value = float(rng.random()) ** 0.2
        values[(offsets.index((partner[0] - source[0], partner[1] - source[1])), *source)] = value
        named[source, partner] = value
    return values, named


@pytest.mark.parametrize("pad_border", [True, False])
@pytest.mark.parametrize(("size", "radius"), [((7, 9), 3), ((9, 12), 5), ((3, 5), 5), ((1, 6), 4)])
def test_equals_the_dense_power_in_float64(
    size: tuple[int, int], radius: int, pad_border: bool, rng: np.random.Generator
) -> None:
    affinity, named = _affinity(size, radius, pad_border, rng)
    maps = rng.random((3, *size))
    walked = random_walk(maps, transition(affinity, pair_offsets(radius), 8.0), 2**8)
    assert walked.dtype == np.float64
    np.testing.assert_allclose(walked, dense_walk(maps, named, 8.0, 8), atol=1e-12)


def test_float32_maps_are_within_rounding_of_it_even_where_little_moves(rng: np.random.Generator) -> None:
    affinity, named = _affinity((12, 15), 5, True, rng)
    affinity, named = affinity * 0.25, {pair: value * 0.25 for pair, value in named.items()}
    maps = rng.random((3, 12, 15)).astype(np.float32)
    walked = random_walk(maps, transition(affinity.astype(np.float32), pair_offsets(5), 8.0), 2**8)
    assert walked.dtype == np.float32
    np.testing.assert_allclose(walked, dense_walk(maps, named, 8.0, 8), atol=1e-6)


def test_one_step_by_hand() -> None:
    # Three cells in a row, radius 2: affinities 1/2 and 1, squared 1/4 and 1. offsets: (0, 1), (1, -1), (1, 0), (1, 1)
    affinity = np.zeros((4, 1, 3))
    affinity[0, 0] = [0.5, 1.0, 0.0]
    maps = np.array([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 9.0]]])
    walked = random_walk(maps, transition(affinity, pair_offsets(2), 2.0), 1)
    # cell 0: 1 and 1/4 of 1.25; cell 1: 1/4, 1 and 1 of 2.25; cell 2: 1 and 1 of 2
    np.testing.assert_allclose(walked, [[[1 / 1.25, 0.25 / 2.25, 0]], [[0, 9 / 2.25, 4.5]]])


def test_a_cell_without_pairs_keeps_its_value_and_no_value_grows(rng: np.random.Generator) -> None:
    affinity, _ = _affinity((9, 11), 5, False, rng)
    maps = rng.random((2, 9, 11))
    walked = random_walk(maps, transition(affinity, pair_offsets(5), 1.0), 16)
    # PSA's border: three corners have no pair, and nothing reaches them; the upper right one has its left neighbours.
    for corner in ((0, 0), (8, 0), (8, 10)):
        np.testing.assert_allclose(walked[:, *corner], maps[:, *corner])
    assert not np.allclose(walked[:, 0, 10], maps[:, 0, 10])
    assert walked.max() <= maps.max()
    assert walked.min() >= maps.min()
    full, _ = _affinity((9, 11), 5, True, rng)
    padded = random_walk(maps, transition(full, pair_offsets(5), 1.0), 16)
    assert not np.isclose(padded[:, [0, 8, 8], [0, 0, 10]], maps[:, [0, 8, 8], [0, 0, 10]]).any()


def test_constant_maps_stay_and_no_step_changes_nothing(rng: np.random.Generator) -> None:
    affinity, _ = _affinity((6, 6), 3, True, rng)
    step = transition(affinity, pair_offsets(3), 8.0)
    np.testing.assert_allclose(step.weights.sum(axis=0), 1)
    np.testing.assert_allclose(random_walk(np.full((1, 6, 6), 0.3), step, 2**8), 0.3)
    maps = rng.random((2, 6, 6))
    np.testing.assert_array_equal(random_walk(maps, step, 0), maps)
    assert random_walk(np.zeros((0, 6, 6)), step, 4).shape == (0, 6, 6)


def test_what_does_not_fit_is_named() -> None:
    offsets = pair_offsets(2)
    with pytest.raises(ValueError, match=r"got affinities \(3, 2, 2\) for 4 offsets; expected \(4, h, w\)"):
        transition(np.zeros((3, 2, 2)), offsets, 8.0)
    with pytest.raises(ValueError, match=r"affinities from 0\.0 to 1\.5, expected finite values in 0\.\.1"):
        transition(np.array([0.0, 1.5, 0.0, 0.0]).reshape(4, 1, 1), offsets, 8.0)
    with pytest.raises(ValueError, match="expected finite values"):
        transition(np.full((4, 1, 1), np.nan), offsets, 8.0)
    step = transition(np.zeros((4, 2, 3)), offsets, 8.0)
    with pytest.raises(ValueError, match=r"got maps \(1, 3, 2\), expected \(n, 2, 3\)"):
        random_walk(np.zeros((1, 3, 2)), step, 1)
    with pytest.raises(ValidationError, match="less than or equal to 12"):
        RandomWalkSettings(log_steps=13)
