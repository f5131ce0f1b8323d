"""The pieces of a mean-field step that can be checked by themselves."""

from __future__ import annotations

import numpy as np

from subcat_core.mean_field import exp_negative, softmax_rows


def test_exponential_is_exact_to_rounding() -> None:
    values = -np.concatenate([np.linspace(0, 87, 20_001), np.geomspace(1e-8, 1, 500)]).astype(np.float32)
    found = np.array([exp_negative(value) for value in values])
    np.testing.assert_allclose(found, np.exp(values.astype(np.float64)), rtol=4e-7)


def test_exponential_far_below_zero_vanishes() -> None:
    assert 0 <= exp_negative(np.float32(-1e4)) < 1e-37


def test_softmax_fills_the_asked_rows_alone(rng: np.random.Generator) -> None:
    rows = rng.normal(0, 5, (6, 2, 4)).astype(np.float32)
    rows[:, 1, 3] = -1e4
    before = rows.copy()
    softmax_rows(rows, 4)
    power = np.exp(before[:4].astype(np.float64).reshape(4, 8))
    np.testing.assert_allclose(rows[:4].reshape(4, 8), power / power.sum(axis=1, keepdims=True), rtol=2e-6, atol=1e-30)
    assert rows[:4, 1, 3].max() < 1e-37
    assert np.array_equal(rows[4:], before[4:])
