"""The gated CRF loss: two cells by hand, and plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from subcat_core.gated_crf import GatedCrfSettings, gated_crf_loss, half_square

CELLS_OF_A_PIXEL = GatedCrfSettings(cell_px=1, radius=1, position_sigma=1.0, colour_sigma=10.0)


def test_two_cells_by_hand() -> None:
    # Probabilities (0.75, 0.25) and (0.5, 0.5): 1 - 0.5 = 0.5. Colours 10 apart: exp(-0.5 - 0.5). Two cells, two pairs.
    logits = torch.tensor([[[[math.log(3.0), 0.0]], [[0.0, 0.0]]]])
    images = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    images[0, 1, 0, 1] = 10
    loss = gated_crf_loss(logits, images, torch.ones(1, 1, 2), CELLS_OF_A_PIXEL)
    assert loss.item() == pytest.approx(0.5 * math.exp(-1), rel=1e-6)


def test_equal_and_certain_cells_cost_nothing_and_an_edge_is_cheaper_where_colours_change() -> None:
    images = torch.zeros(1, 3, 4, 6)
    images[..., 3:] = 200
    settings = GatedCrfSettings(cell_px=1, radius=2)

    def cost(border: int) -> float:
        logits = torch.zeros(1, 2, 4, 6)
        logits[:, 0, :, :border], logits[:, 1, :, border:] = 60.0, 60.0
        return gated_crf_loss(logits, images, torch.ones(1, 4, 6), settings).item()

    assert cost(6) == pytest.approx(0, abs=1e-6)
    assert cost(3) < 0.01 * cost(2)


def test_every_neighbour_is_met_once() -> None:
    offsets = set(half_square(2))
    opposite = {(-rows, -columns) for rows, columns in offsets}
    assert not offsets & opposite
    assert offsets | opposite == {(y, x) for y in range(-2, 3) for x in range(-2, 3)} - {(0, 0)}


@pytest.mark.parametrize("radius", [1, 3, 9])
def test_agrees_with_plain_loops_in_float64(rng: np.random.Generator, radius: int) -> None:
    settings = GatedCrfSettings(cell_px=2, radius=radius, position_sigma=2.0, colour_sigma=60.0)
    images = rng.integers(0, 256, (2, 3, 8, 10), dtype=np.uint8)
    gate = np.ones((2, 8, 10))
    gate[0, 3, :4], gate[1] = 0, 0.5
    logits = rng.normal(size=(2, 3, 4, 5)) * 2
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    cells = images.astype(np.float64).reshape(2, 3, 4, 2, 5, 2).mean(axis=(3, 5))
    open_ = gate.reshape(2, 4, 2, 5, 2).min(axis=(2, 4))
    energy = 0.0
    places = list(np.ndindex(4, 5))
    for image in range(2):
        for y, x in places:
            for v, u in places:
                if (y, x) == (v, u) or max(abs(y - v), abs(x - u)) > radius:
                    continue
                far = ((cells[image, :, y, x] - cells[image, :, v, u]) ** 2).sum() / 60.0**2
                kernel = math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * 2.0**2) - far / 2)
                unlike = 1 - float(probability[image, :, y, x] @ probability[image, :, v, u])
                energy += open_[image, y, x] * open_[image, v, u] * kernel * unlike
    made = torch.from_numpy(logits).float().requires_grad_()
    loss = gated_crf_loss(made, torch.from_numpy(images), torch.from_numpy(gate), settings)
    assert loss.item() == pytest.approx(energy / open_.sum(), rel=1e-5)
    loss.backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0


def test_no_open_gate_is_nothing_with_a_gradient() -> None:
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = gated_crf_loss(logits, torch.zeros(1, 3, 12, 12), torch.zeros(1, 12, 12), GatedCrfSettings())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0
