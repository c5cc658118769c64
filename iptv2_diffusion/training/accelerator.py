"""Set-up of accelerate for a run: processes, precision and threads, and the devices of model and optimiser."""

from __future__ import annotations

import dataclasses
import math
import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import nn

from iptv2_diffusion.data.draws import own_slices
from iptv2_diffusion.memory import keep_freed_memory
from iptv2_diffusion.training.errors import ConfigError, user_errors
from iptv2_diffusion.training.logging import available_trackers
from iptv2_diffusion.training.optimisation import LearningRate, make_optimizer
from iptv2_diffusion.training.options import TrainingConfig
from iptv2_diffusion.training.precision import fastest_precision
from iptv2_diffusion.training.sharding import launcher_options, shard, switch_off_plugin

# Longest time that a process waits for another, such as the one that writes a checkpoint or the final samples.
PROCESS_TIMEOUT = timedelta(hours=2)

RunConfig = TypeVar("RunConfig", bound=TrainingConfig)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Make the accelerator of a training run. The batch must divide over processes and micro-batches."""
    accelerator = start_accelerator(config)
    check_batch_size("batch_size", config.batch_size, accelerator, config.gradient_accumulation_steps)
    return accelerator


def check_batch_size(name: str, batch_size: int, accelerator: Accelerator, micro_batches: int) -> None:
    """Raise `ConfigError` unless a batch, named `name`, divides over processes and micro-batches."""
    parts = accelerator.num_processes * micro_batches
    if batch_size % parts:
        raise ConfigError(
            f"{name} {batch_size} does not divide over {accelerator.num_processes} processes x {micro_batches} "
            f"micro-batches; use {math.ceil(batch_size / parts) * parts}"
        )


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Make the accelerator without checking the batch."""
    trackers, messages = available_trackers(config.report_to)
    precision = config.mixed_precision
    if precision == "auto":
        # The processes already synchronise here. PartialState, unlike Accelerator, does not read the variable.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PROCESS_TIMEOUT)
        precision = fastest_precision()
    with user_errors(ValueError, ImportError):  # such as fp16 on a CPU
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
            # the loop divides by the number of micro-batches, so accelerate must not, regardless of the environment
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    if accelerator.device.type == "cuda":  # this sets the precision of float32 products on other devices too
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_threads(config.num_threads, accelerator)
    for message in messages:
        accelerator.print(message)
    return accelerator


def resolve_sharding(config: RunConfig) -> RunConfig:
    """Return the configuration with the sharding of `accelerate launch`, unless its own options set one."""
    asked = launcher_options()
    if asked:
        switch_off_plugin()
    if not asked or config.sharding != "none":
        return config
    config = dataclasses.replace(config, **asked)
    if os.environ.get("RANK", "0") == "0":
        print(f"accelerate's FSDP 2 is --sharding {config.sharding} here: torch's fully_shard, block by block")
    return config


def set_threads(num_threads: int | None, accelerator: Accelerator) -> None:
    """Set the CPU threads of this process. `accelerate launch` sets one per process, which leaves cores idle."""
    if num_threads is None and accelerator.device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        num_threads = max(1, available_cores() // max(1, processes))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_slices(accelerator: Accelerator, batch_size: int, micro_batches: int) -> list[slice]:
    """Return this process's parts of a global batch, one slice per micro-batch (see `own_slices`)."""
    return own_slices(batch_size, accelerator.num_processes, accelerator.process_index, micro_batches)


def is_sharded(config: TrainingConfig, accelerator: Accelerator) -> bool:
    """Return whether the run shards its model state. Raises a `ConfigError` if it cannot."""
    if config.sharding == "none":
        return False
    if accelerator.num_processes == 1:
        accelerator.print(f"sharding is {config.sharding}, but there is only one process: nothing is sharded")
        return False
    if accelerator.mixed_precision == "fp16":  # a possible value of `accelerate launch`
        raise ConfigError("sharding does not work with fp16, because it has no loss scaling; use bf16")
    return True


def prepare(
    model: nn.Module, config: TrainingConfig, accelerator: Accelerator, *, sharded: bool
) -> tuple[nn.Module, torch.optim.Optimizer, LearningRate]:
    """Return the model on its device, prepared by accelerate, its AdamW, and the learning-rate schedule."""
    model.to(accelerator.device)
    if config.channels_last and not sharded:  # fully_shard accepts only contiguous parameters
        model.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.torch_compile:
        compile_blocks(model)
        accelerator.print(compile_notice(model))
    if sharded:
        shard(model, accelerator, reshard_after_forward=config.sharding == "zero3")
    optimizer = make_optimizer(model, config, fused=accelerator.scaler is None)
    schedule = LearningRate(optimizer, config)
    if sharded:  # torch does the sharding; accelerate only adds its autocast
        return accelerator.prepare_model(model, evaluation_mode=True), optimizer, schedule
    return *accelerator.prepare(model, optimizer), schedule


def compile_blocks(model: nn.Module) -> None:
    """Compile in place: the repeated blocks if the model names them (fast to compile), otherwise the whole model."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(dynamic=False)  # dynamic shapes recompile slowly, and there are few shapes
    else:
        model.compile()


def compile_notice(model: nn.Module) -> str:
    """Return what `compile_blocks` costs and where its result is kept."""
    names = getattr(model, "_repeated_blocks", None) or ()
    blocks = sum(type(module).__name__ in names for module in model.modules())
    what = f"{blocks} blocks of the model compile" if blocks else "the model compiles"
    notice = f"torch_compile: {what} during the first training step and the first evaluation, which can take minutes"
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder:
        return f"{notice}; the result is kept in {folder}"
    return f"{notice}; set TORCHINDUCTOR_CACHE_DIR to a folder that stays, and later runs reuse the result"
