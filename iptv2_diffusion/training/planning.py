"""Estimate of the memory, the speed and the time of a run before it starts.

The memory on each device is computed by the forward and backward pass of one micro-batch on fake tensors, which have
sizes but no data, and a count of the live storages. The state is weights, AdamW's two moments and the average, in
float32. The speed is measured on three steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iptv2_diffusion.memory import peak_bytes
from iptv2_diffusion.models.activations import LiveStorages
from iptv2_diffusion.training.loop import Trainer
from iptv2_diffusion.training.signals import StopSignal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from iptv2_diffusion.training.options import TrainingConfig
    from iptv2_diffusion.training.training_task import TrainingTask

MB = 1e6


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        weights, gradients, optimizer, average: size of each, or of this process's part if they are sharded.
        activations: live bytes after the forward pass of a micro-batch, including casts of weights to half precision.
        peak: largest number of live bytes in a step, including all of the above.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    peak: int


def estimate_memory(
    make_model: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    sample: tuple[int, ...],
    config: TrainingConfig,
    *,
    processes: int = 1,
    precision: str = "no",
    checkpointing: bool = False,
) -> Memory:
    """Estimate the memory of a training step.

    Args:
        make_model: function that makes the model. It is called with fake tensors and takes no memory.
        loss: function of the model and a micro-batch; its result is averaged.
        sample: shape of a micro-batch, (B, C, h, w).
        config: configuration of the run.
        processes: number of processes that share the state, if `config.sharding` is set.
        precision: precision of autocast: no, bf16 or fp16.
        checkpointing: whether `gradient_checkpointing` is on.
    """
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with FakeTensorMode(allow_non_fake_inputs=True):  # the tables of an objective are real tensors
        model = make_model()
        parameters = list(model.parameters())
        if checkpointing:
            model.enable_gradient_checkpointing()
        with LiveStorages() as live:
            live.ignore([*parameters, *model.buffers()])
            with torch.autocast("cpu", dtype, enabled=precision != "no"):
                value = loss(model, torch.empty(sample)).mean()
            activations = live.bytes
            value.backward()
        weights = sum(p.numel() * p.element_size() for p in parameters)
    sharded = config.sharding != "none" and processes > 1
    share = processes if sharded else 1
    averages = len(config.ema_sigma_rels) if config.ema == "power" else int(config.ema_decay > 0)
    state = {
        "weights": weights // (processes if config.sharding == "zero3" and sharded else 1),
        "gradients": weights // share,
        "optimizer": 2 * weights // share,
        "average": averages * weights // share,
    }
    kept = state["weights"] + state["optimizer"] + state["average"]
    passes = live.peak - (weights - weights // share)  # the fake run held whole gradients
    buckets = weights if processes > 1 and not sharded else 0  # DDP's buffers for gradients
    update = weights // share if averages else 0  # the update of an average makes a copy
    return Memory(**state, activations=activations, peak=kept + buckets + max(passes, update))


@dataclass(frozen=True)
class Speed:
    """Seconds of a step (median of three after one warm-up) and the peak memory of the steps in bytes."""

    seconds: float
    peak: int


def measure(make_trainer: Callable[[], tuple[Trainer, TrainingTask]], steps: int = 3) -> Speed:
    """Run a few real steps without saving anything."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    before = _resident()
    trainer, task = make_trainer()
    seconds = []
    with StopSignal() as stop:
        for _ in range(steps + 1):
            started = time.perf_counter()
            trainer.train_step(task, stop)  # reads the loss and therefore waits for the device
            seconds.append(time.perf_counter() - started)
    if trainer.accelerator.device.type == "cuda":
        return Speed(statistics.median(seconds[1:]), torch.cuda.max_memory_allocated(device))
    return Speed(statistics.median(seconds[1:]), peak_bytes() - before)


def _resident() -> int:
    """Return the memory of this process in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def plan_text(memory: Mapping[str, Memory], speed: Speed, config: TrainingConfig, macs: float, parameters: int) -> str:
    """Format the plan as a table. `memory` has the estimates without and with checkpointing, by name."""
    rows = ["weights", "gradients", "optimizer", "average", "activations", "peak"]
    lines = [
        f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.4g} GMACs per image forward (in training; fused is less)",
        f"{'MB on each device':<18}" + "".join(f"{name:>24}" for name in memory),
        *(f"{row:<18}" + "".join(f"{getattr(m, row) / MB:>24,.0f}" for m in memory.values()) for row in rows),
    ]
    hours = speed.seconds * config.max_train_steps / 3600
    lines += [
        f"measured here: {config.batch_size / speed.seconds:.1f} images/s, {speed.seconds:.3f} s per step, peak "
        f"{speed.peak / MB:,.0f} MB",
        f"{config.max_train_steps:,} steps of {config.batch_size} images: {hours:.1f} hours at this speed",
    ]
    if config.max_train_minutes:
        steps = int(60 * config.max_train_minutes / speed.seconds)
        lines.append(f"but max_train_minutes {config.max_train_minutes:g} ends the run after some {steps:,} steps")
    return "\n".join(lines)
