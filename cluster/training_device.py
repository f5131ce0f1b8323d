"""How a model and its batches sit on a worker's device, in which precision, and what the ranks tell each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel

from cluster.trainee import OptimiserSettings, TrainContext
from subcat_core.freezing import freeze_batch_norm
from subcat_core.macs import is_depthwise


def choose_precision(precision: str, device: torch.device, model: torch.nn.Module) -> torch.dtype:
    """torch.bfloat16 for autocast, or torch.float32 for none.

    auto: bf16 on CUDA devices that have it, and on CPUs with AVX512_BF16 or AMX unless the model lives on depthwise
    convolutions. Measured on one AVX512_BF16 core, training images a second, fp32 / bf16: ResNet-18 5.9 / 11.4,
    EfficientNet-lite0 8.4 / 7.7.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    able = torch.cpu.get_capabilities()
    if not (able.get("avx512_bf16") or able.get("amx_bf16")):
        return torch.float32
    return torch.float32 if is_depthwise(model) else torch.bfloat16


def place_model(model: torch.nn.Module, optimiser: OptimiserSettings, context: TrainContext) -> torch.nn.Module:
    """The model on its device, in its memory format, with the backbone's batch norm frozen where that is asked for.

    Batch norm that still learns sees all ranks' images on CUDA; on CPUs, where torch cannot, each rank's own. Raises
    ValueError where it would see one image alone: pooled to one pixel, as in DeepLabV3+, that has no variance.
    """
    if optimiser.freeze_batch_norm:
        backbone = getattr(model, "backbone", model)
        freeze_batch_norm(backbone)
    if context.world_size > 1 and context.device.type == "cuda":
        synchronise_batch_norm(model)
    elif optimiser.batch_size // context.world_size < 2 and _learns_batch_norm(model):
        raise ValueError(
            f"batch_size {optimiser.batch_size} over {context.world_size} workers gives each one image, and batch norm "
            f"that learns needs at least 2; take batch_size {2 * context.world_size} or more, fewer workers, or a "
            "model whose batch norm is all in a frozen backbone (freeze_batch_norm, deeplabv2)"
        )
    if optimiser.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(context.device)


def wrap_model(model: torch.nn.Module, context: TrainContext) -> torch.nn.Module:
    """For several ranks: DistributedDataParallel, which also copies rank 0's weights to all."""
    if context.world_size == 1:
        return model
    devices = [context.device] if context.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, broadcast_buffers=_learns_batch_norm(model), gradient_as_bucket_view=True
    )


def synchronise_batch_norm(model: torch.nn.Module) -> None:
    """Replace each batch norm below `model` that learns by one over all ranks' images; frozen ones stay as they are.

    A replaced layer would forget that it is held in eval mode. timm's conversion also knows its layers of batch norm
    and activation in one.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _learns(child):
                parent.add_module(name, convert_sync_batchnorm(child))


def _learns(module: torch.nn.Module) -> bool:
    """Whether the module is a batch norm that is trained."""
    is_norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    return is_norm and any(parameter.requires_grad for parameter in module.parameters())


def _learns_batch_norm(model: torch.nn.Module) -> bool:
    return any(_learns(module) for module in model.modules())


def to_device(arrays: dict[str, np.ndarray], device: torch.device, channels_last: bool) -> dict[str, torch.Tensor]:
    """Tensors on the device; 4-D ones in channels_last."""
    batch = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())  # Ray's are read-only
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        if channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        batch[name] = tensor
    return batch


def from_rank_0(value: Any, context: TrainContext) -> Any:
    """Rank 0's value, on every rank."""
    if context.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any, context: TrainContext) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if context.world_size == 1:
        return [value]
    values = [None] * context.world_size
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(values: torch.Tensor, context: TrainContext) -> torch.Tensor:
    """The mean of a tensor over the ranks."""
    if context.world_size > 1:
        dist.all_reduce(values)
    return values / context.world_size
