"""Schedule: numbers land where their names say, and the rate falls as the authors' code lets it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from subcat_core.schedule import build_sgd, parameter_groups, poly_factor, set_poly_lr


def net() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), nn.Linear(2, 2)


def test_poly_factor_by_hand() -> None:
    assert [poly_factor(step, 4, 2.0) for step in range(5)] == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert poly_factor(31 * 661, 61 * 661, 0.9) == pytest.approx(0.53, abs=0.005)  # epoch 31 of the authors' 61
    assert poly_factor(9, 4, 0.9) == 0.0
    assert poly_factor(3, 4, 0.0) == 1.0


@pytest.mark.parametrize(("step", "total"), [(-1, 4), (0, 0)])
def test_poly_factor_refuses(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected step >= 0"):
        poly_factor(step, total, 0.9)


def test_momentum_lands_in_momentum() -> None:
    trunk, head = net()
    sgd = build_sgd(parameter_groups(trunk, [head]), lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert sgd.defaults["momentum"] == 0.9
    assert {group["momentum"] for group in sgd.param_groups} == {0.9}
    assert [group["weight_decay"] for group in sgd.param_groups] == [5e-4, 0.0, 5e-4, 0.0]
    assert [group["lr"] for group in sgd.param_groups] == pytest.approx([0.01, 0.02, 0.1, 0.2])


def test_parameter_groups_hold_all_that_is_trained_once() -> None:
    trunk, head = net()
    groups = parameter_groups(trunk, [head])
    assert [(len(g["params"]), g["lr_factor"], g["weight_decay_factor"]) for g in groups] == [
        (2, 1.0, 1.0),
        (2, 2.0, 0.0),
        (1, 10.0, 1.0),
        (1, 20.0, 0.0),
    ]
    for parameter in trunk.parameters():
        parameter.requires_grad_(False)
    assert [group["lr_factor"] for group in parameter_groups(trunk, [head])] == [10.0, 20.0]


def test_the_rate_rises_first_where_asked() -> None:
    trunk, head = net()
    sgd = build_sgd(parameter_groups(trunk, [head]), lr=0.1, momentum=0.9, weight_decay=0.0)
    rates = [set_poly_lr(sgd, lr=0.1, step=step, total_steps=5, power=1.0, warmup_steps=2) for step in range(5)]
    assert rates == pytest.approx([0.05, 0.08, 0.06, 0.04, 0.02])


def test_the_rate_may_be_refreshed_every_so_many_steps() -> None:
    trunk, head = net()
    sgd = build_sgd(parameter_groups(trunk, [head]), lr=0.1, momentum=0.9, weight_decay=0.0)
    rates = [set_poly_lr(sgd, lr=0.1, step=step, total_steps=8, power=1.0, refresh_every=3) for step in range(8)]
    assert rates == pytest.approx([0.1] * 3 + [0.0625] * 3 + [0.025] * 2)
    assert sgd.param_groups[-1]["lr"] == pytest.approx(0.5)  # of the head's bias, 20 times


def test_steps_agree_with_plain_sgd() -> None:
    trunk, head = net()
    twin = copy.deepcopy(head)
    sgd = build_sgd(parameter_groups(trunk, [head]), lr=0.1, momentum=0.9, weight_decay=0.01)
    velocity = {name: torch.zeros_like(parameter) for name, parameter in twin.named_parameters()}
    data = torch.randn(4, 2)
    for step in range(3):
        rate = set_poly_lr(sgd, lr=0.1, step=step, total_steps=3, power=0.9)
        assert rate == pytest.approx(0.1 * (1 - step / 3) ** 0.9)
        sgd.zero_grad()
        head(data).square().mean().backward()
        sgd.step()
        twin.zero_grad()
        twin(data).square().mean().backward()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                decay, factor = (0.0, 20.0) if name == "bias" else (0.01, 10.0)
                velocity[name] = 0.9 * velocity[name] + parameter.grad + decay * parameter
                parameter -= rate * factor * velocity[name]
    torch.testing.assert_close(head.weight, twin.weight)
    torch.testing.assert_close(head.bias, twin.bias)
