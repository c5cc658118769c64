"""Sharding of the model state over the processes by torch's `fully_shard` (FSDP2), on GPUs and, with gloo, on CPUs.

    zero3   weights, gradients, optimiser and average are sharded; a block's weights are gathered when it runs
    zero2   the same, but gathered weights stay until the backward pass: less communication, more memory

Parameters become `DTensor`s that are sharded along their first dimension. AdamW and gradient clipping support them.

`accelerate launch --use_fsdp --fsdp_version 2` selects the same sharding, and runs this code in place of accelerate's
plugin. On CPUs accelerate silently ignores its plugin. With the plugin, exact resumption, averaging and the NaN stop of
`loop.py` could not access weights and checkpoints. DeepSpeed and FSDP 1, which keep both elsewhere, are refused.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from iptv2_diffusion.training.errors import ConfigError


def launcher_options() -> dict[str, Any]:
    """Return the options of a run that correspond to the sharding of `accelerate launch`; empty without sharding.

    Raises a `ConfigError` for DeepSpeed, FSDP 1 and parameters on the CPU, which are not supported.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "accelerate is set to DeepSpeed, which these scripts do not support; leave it out of the accelerate "
            "configuration and add --sharding zero3 (or zero2), which is torch's FSDP2 on GPUs and CPUs"
        )
    if not _asked("ACCELERATE_USE_FSDP"):
        return {}
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "accelerate is set to FSDP 1, which these scripts do not support; add --fsdp_version 2 to `accelerate "
            "launch`, or leave --use_fsdp out and add --sharding zero3 (or zero2) after the script"
        )
    if _asked("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            "accelerate is set to keep parameters on the CPU, which these scripts do not support; leave "
            "--fsdp_offload_params out, and use more GPUs or --gradient_checkpointing"
        )
    options: dict[str, Any] = {"sharding": "zero3" if _asked("FSDP_RESHARD_AFTER_FORWARD", "true") else "zero2"}
    if os.environ.get("FSDP_STATE_DICT_TYPE", "").upper() == "SHARDED_STATE_DICT":
        options["sharded_checkpoints"] = True
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        options["gradient_checkpointing"] = True
    return options


def switch_off_plugin() -> None:
    """Prevent accelerate and transformers from sharding in this process, because `shard` does it."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"


def _asked(variable: str, default: str = "false") -> bool:
    return os.environ.get(variable, default).lower() in ("true", "1")


def shard(model: nn.Module, accelerator: Accelerator, *, reshard_after_forward: bool) -> None:
    """Shard a model's parameters over all processes in place, block by block if the model names its blocks."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in model.modules() if type(m).__name__ in names] + [model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the whole of a sharded tensor (every process must call this)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or this process's part of a sharded tensor, with shared memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()
    return detached.to_local().requires_grad_(tensor.requires_grad)


def from_local(part: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is sharded like `like` and has `part` as this process's shard."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard `tensor`, which is whole on every process, like `like` and on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def forget_gathered(model: nn.Module) -> None:
    """Free the weights that were gathered for a forward pass, which are outdated when the shards change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return AdamW's moments and step counts by parameter number, created as zero if there are none yet."""
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
