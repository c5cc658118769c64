"""AdamW and the learning-rate schedule, which is a pure function of the step (or of the time spent)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from iptv2_diffusion.training.options import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW; weight decay, if any, on matrices and kernels only (biases, norms and scales are left alone).

    `fused` is one kernel over all parameters, on CPU too (a tenth of the time for a model of many small tensors). It
    steps over fp16 gradients inside the kernel, where accelerate cannot see it: callers turn it off for fp16.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=fused and all(p.device.type in ("cpu", "cuda") for p in parameters),
    )


class LearningRate:
    """Warm-up, then constant, linear, cosine or several cosines: diffusers' schedules, evaluated instead of stepped.

    `set(step, fraction)` writes the rate for optimiser step `step` (counted from 0) into the optimiser. Nothing is
    remembered, so a resumed run needs no schedule state. `fraction` (of a time budget, in [0, 1]) moves the schedule
    on when time runs faster than steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainingConfig) -> None:
        name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        scheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_cycles,
        )
        self._factor: Callable[[float], float] = scheduler.lr_lambdas[0]
        self._optimizer = optimizer
        self._steps = config.max_train_steps
        self._base, self._warmup = config.learning_rate, config.lr_warmup_steps

    def at(self, step: int, fraction: float = 0.0) -> float:
        """The learning rate for optimiser step `step`, counted from 0."""
        # diffusers' warm-up starts at a rate of 0, which would lose the first step: count from 1 while it lasts.
        position = max(step + (step < self._warmup), fraction * self._steps)
        factor = self._factor(min(position, self._steps))
        if step < self._warmup:  # warm-up is counted in steps, however fast the time runs
            factor = min(factor, (step + 1) / self._warmup)
        return self._base * factor

    def set(self, step: int, fraction: float = 0.0) -> float:
        """Write `at(step, fraction)` into the optimiser's groups and return it."""
        rate = self.at(step, fraction)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate
