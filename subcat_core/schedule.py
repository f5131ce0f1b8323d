"""SGD with parameter groups and the polynomial learning rate: momentum and power are two numbers, each passed by name.

The authors' optimiser (shared by psa, irn, SEAM and SC-CAM) passes weight_decay to torch's SGD by position, where it
lands in `momentum`; its own "momentum" of 0.9 is the power of the schedule. Their published runs are therefore SGD of
nearly no momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

# The last two are of timm's Eva, which DINOv3 is one of.
_BIASES = ("bias", "q_bias", "v_bias")


def poly_factor(step: int, total_steps: int, power: float) -> float:
    """(1 - step / total_steps) ** power, for the learning rate of update `step` = 0, 1, ...; 0 from total_steps on."""
    if total_steps < 1 or step < 0:
        raise ValueError(f"got step {step} of {total_steps}; expected step >= 0 and at least one step in all")
    return max(0.0, 1.0 - step / total_steps) ** power


def parameter_groups(
    trunk: nn.Module, heads: Sequence[nn.Module], *, head_factor: float = 10.0
) -> list[dict[str, Any]]:
    """Groups {params, lr_factor, weight_decay_factor} of all that is trained; empty groups are left out.

    Trunk weights 1x, trunk biases 2x, head weights head_factor, head biases twice that; biases are not decayed
    (values of the authors' code, and of deeplab-pytorch for the segmenter). Frozen parameters are not listed.
    """
    head_parameters = [item for head in heads for item in head.named_parameters()]
    groups = []
    for named, factor in ((list(trunk.named_parameters()), 1.0), (head_parameters, head_factor)):
        for biases in (False, True):
            params = [
                parameter
                for name, parameter in named
                if parameter.requires_grad and (name.rsplit(".", 1)[-1] in _BIASES) == biases
            ]
            groups.append(
                {
                    "params": params,
                    "lr_factor": factor * (2.0 if biases else 1.0),
                    "weight_decay_factor": float(not biases),
                }
            )
    return [group for group in groups if group["params"]]


def build_sgd(
    groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float, nesterov: bool = False
) -> torch.optim.SGD:
    """torch's SGD over groups as `parameter_groups` makes them. lr is that of step 0, before each group's factor."""
    prepared = [
        {
            "params": group["params"],
            "lr": lr * group["lr_factor"],
            "weight_decay": weight_decay * group["weight_decay_factor"],
            "lr_factor": group["lr_factor"],
        }
        for group in groups
    ]
    return torch.optim.SGD(prepared, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def set_poly_lr(
    optimiser: torch.optim.Optimizer,
    *,
    lr: float,
    step: int,
    total_steps: int,
    power: float,
    refresh_every: int = 1,
    warmup_steps: int = 0,
) -> float:
    """Set every group's rate for update `step` = 0, 1, ..., before that update; returns the rate at factor 1.

    refresh_every: the rate changes at steps that are multiples of it alone (10 in deeplab-pytorch). warmup_steps: the
    first so many updates take 1/n, 2/n, ... of the rate.
    """
    now = lr * poly_factor(step - step % refresh_every, total_steps, power)
    if step < warmup_steps:
        now *= (step + 1) / warmup_steps
    for group in optimiser.param_groups:
        group["lr"] = now * group["lr_factor"]
    return now
