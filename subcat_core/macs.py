"""How many multiply-adds a network needs for one image, counted without computing any of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(network: nn.Module, height: int, width: int) -> int:
    """Multiply-adds (MAC) of the convolutions and matrix products of one forward pass over (1, 3, height, width).

    network: on the meta device (built under `with torch.device("meta")`), so nothing is computed and no memory taken.
    Biases, norms, activations, pooling and resizing are not counted: they are a few per cent. torch counts two
    operations a multiply-add; a training step takes about three forward passes (once forward, twice backward).
    Raises ValueError for a network on another device.
    """
    devices = {parameter.device.type for parameter in network.parameters()}
    if devices - {"meta"}:
        raise ValueError(f"got a network on {', '.join(sorted(devices))}; build it under `with torch.device('meta')`")
    was_training = network.training
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(torch.zeros(1, 3, height, width, device="meta"))
    finally:
        network.train(was_training)
    return int(counter.get_total_flops()) // 2


def count_parameters(network: nn.Module) -> int:
    """Numbers in the parameters of a network, frozen ones too."""
    return sum(parameter.numel() for parameter in network.parameters())


def is_depthwise(network: nn.Module) -> bool:
    """Whether more than a quarter of its convolutions work on each channel apart: these wait for memory, not for
    multiply-adds.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    num_depthwise = sum(convolution.groups == convolution.in_channels > 1 for convolution in convolutions)
    return 4 * num_depthwise > len(convolutions)
