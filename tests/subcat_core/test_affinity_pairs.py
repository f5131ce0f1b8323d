"""Pairs of cells: which there are, what labels say of them, and the loss, against plain loops and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from subcat_core.affinity_pairs import PairKinds, balanced_loss, pair_ends, pair_kinds, pair_offsets, source_mask
from subcat_core.classes import IGNORE
from tests.subcat_core.plain_affinity import all_pairs, plain_kind

SIZES = [(9, 11), (5, 9), (3, 4), (1, 6), (6, 1), (1, 1)]


def _pairs(mask: np.ndarray, radius: int) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """(source, partner) of every True of (P, h, w)."""
    offsets = pair_offsets(radius)
    found = [(offsets[p], (int(y), int(x))) for p, y, x in np.argwhere(mask)]
    return {(source, (source[0] + dy, source[1] + dx)) for (dy, dx), source in found}


def test_radius_5_has_the_34_offsets_of_the_authors() -> None:
    offsets = pair_offsets(5)
    assert len(offsets) == len(set(offsets)) == 34
    assert offsets[:5] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, -4)]
    assert pair_offsets(2) == [(0, 1), (1, -1), (1, 0), (1, 1)]
    # 52 x 48 sources on PSA's grid of 56 x 56 cells, and 84,864 pairs
    assert int(source_mask(56, 56, 5, pad_border=False).sum()) * 34 == 84_864


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pad_border", [True, False])
def test_kinds_agree_with_plain_loops(size: tuple[int, int], pad_border: bool, rng: np.random.Generator) -> None:
    radius = 4
    labels = rng.choice([0, 0, 1, 2, IGNORE], size=(2, *size)).astype(np.uint8)
    kinds = pair_kinds(torch.from_numpy(labels), radius, pad_border)
    for image in range(2):
        expected: dict[str, set] = {"background": set(), "foreground": set(), "negative": set(), "unknown": set()}
        for source, partner in all_pairs(*size, radius, pad_border):
            expected[plain_kind(labels[image][source], labels[image][partner])].add((source, partner))
        for name, mask in kinds._asdict().items():
            assert _pairs(mask[image].numpy(), radius) == expected[name], name


@pytest.mark.parametrize("size", SIZES)
def test_ends_are_the_cells_that_have_a_partner(size: tuple[int, int]) -> None:
    found = set()
    cells = np.stack(np.mgrid[: size[0], : size[1]], axis=-1)
    for offset in pair_offsets(4):
        sources, partners = pair_ends(*size, offset)
        for source, partner in zip(cells[sources].reshape(-1, 2), cells[partners].reshape(-1, 2), strict=True):
            assert tuple(partner - source) == offset
            found.add((tuple(source.tolist()), tuple(partner.tolist())))
    assert found == set(all_pairs(*size, 4, pad_border=True))


def test_loss_by_hand() -> None:
    affinity = torch.tensor([0.5, 0.25, 0.9, 0.2, 0.7]).view(1, 5, 1, 1)
    mask = torch.eye(5, dtype=torch.bool).view(5, 1, 5, 1, 1)
    loss, parts = balanced_loss(affinity, PairKinds(mask[0] | mask[1], mask[2], mask[3]))
    expected = {"bg_loss": (math.log(2) + math.log(4)) / 2, "fg_loss": -math.log(0.9), "neg_loss": -math.log(0.8)}
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, abs=1e-4), name
    assert loss.item() == pytest.approx(
        expected["bg_loss"] / 4 + expected["fg_loss"] / 4 + expected["neg_loss"] / 2, abs=1e-4
    )
    assert parts["loss"].item() == loss.item()


def test_loss_agrees_with_the_authors_equation_in_float64(rng: np.random.Generator) -> None:
    labels = rng.choice([0, 1, 2, IGNORE], size=(3, 7, 8)).astype(np.uint8)
    kinds = pair_kinds(torch.from_numpy(labels), 3, pad_border=False)
    affinity = rng.random((3, len(pair_offsets(3)), 7, 8))
    sums, counts = dict.fromkeys(kinds._fields, 0.0), dict.fromkeys(kinds._fields, 1e-5)
    for name, mask in kinds._asdict().items():
        for place in np.argwhere(mask.numpy()):
            value = affinity[tuple(place)]
            sums[name] -= math.log(1 + 1e-5 - value) if name == "negative" else math.log(value + 1e-5)
            counts[name] += 1
    means = {name: sums[name] / counts[name] for name in sums}
    expected = means["background"] / 4 + means["foreground"] / 4 + means["negative"] / 2
    assert balanced_loss(torch.from_numpy(affinity), kinds)[0].item() == pytest.approx(expected, rel=1e-6)


def test_no_pair_at_all_costs_nothing_and_has_a_gradient_of_0() -> None:
    affinity = torch.full((1, len(pair_offsets(4)), 4, 4), 0.5, requires_grad=True)
    loss, _ = balanced_loss(affinity, pair_kinds(torch.full((1, 4, 4), IGNORE, dtype=torch.uint8), 4, True))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(affinity.grad, torch.zeros_like(affinity))


def test_certain_affinities_have_finite_gradients() -> None:
    labels = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    affinity = torch.ones(1, 4, 1, 4).requires_grad_()  # every pair taken for alike; and the one of 0 for unlike
    loss, _ = balanced_loss(affinity, pair_kinds(labels, 2, True))
    loss.backward()
    assert loss.isfinite()
    assert affinity.grad.isfinite().all()


def _loss_of(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and leaf of some of four images of very uneven numbers of pairs of each kind."""
    labels = torch.zeros((4, 6, 6), dtype=torch.uint8)
    labels[0, 2:4] = 1
    labels[1] = IGNORE
    labels[2, :, 3:] = IGNORE
    labels[3, 1, 1] = 2
    generator = torch.Generator().manual_seed(4)
    affinity = torch.rand((4, len(pair_offsets(3)), 6, 6), generator=generator, dtype=torch.float64)[rows]
    affinity.requires_grad_()
    return balanced_loss(affinity, pair_kinds(labels[rows], 3, True))[0], affinity


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    loss, affinity = _loss_of(slice(2 * rank, 2 * rank + 2))
    loss.backward()
    torch.save((loss.detach(), affinity.grad), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_of_uneven_pairs_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    loss, affinity = _loss_of(slice(0, 4))
    loss.backward()
    parts = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 2, affinity.grad)
