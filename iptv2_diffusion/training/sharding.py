"""Model state shared out over the processes: torch's own `fully_shard` (FSDP2), on GPUs and, over gloo, on CPUs alike.

    zero3   weights, gradients, optimiser and average live in shards; a block's weights are gathered when it runs
    zero2   likewise, but gathered weights stay until the backward pass: less traffic, more memory

Parameters become `DTensor`s cut along their first dimension, which AdamW and gradient clipping work on as they are.
accelerate's FSDP and DeepSpeed are refused: on CPUs accelerate drops the former without a word, and both keep weights
and checkpoints where exact resumption, averaging and the NaN stop of `loop.py` cannot reach them.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from iptv2_diffusion.training.errors import ConfigError


def refuse_other_sharding() -> None:
    """Raise `ConfigError` where `accelerate launch` was asked for FSDP or DeepSpeed."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"accelerate was asked for {name}, which these scripts do not use; leave it out of the accelerate "
                "configuration and add --sharding zero3 (or zero2): torch's FSDP2, on GPUs and CPUs alike"
            )


def shard(model: nn.Module, accelerator: Accelerator, *, reshard_after_forward: bool) -> None:
    """Shard a model's parameters over all processes, in place: block by block where it names its blocks."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in model.modules() if type(m).__name__ in names] + [model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one (every process must ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this process's part of a sharded one; the memory is shared with it."""
    return tensor.detach().to_local().requires_grad_(tensor.requires_grad) if isinstance(tensor, DTensor) else tensor


def from_local(part: Tensor, like: Tensor) -> Tensor:
    """`part` as this process's shard of a tensor that is sharded as `like` is."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, whole on every process, on the device and in the shards of `like`."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def forget_gathered(model: nn.Module) -> None:
    """Free what was gathered for a forward pass: it is out of date once the shards are written to."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts by parameter number, made zero where there are none yet."""
    tensors: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if _keeps_step_there(optimizer) else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        tensors |= {f"{number}.{name}": value for name, value in state.items()}
    return tensors


def _keeps_step_there(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused") or optimizer.param_groups[0].get("capturable"))
