"""AdamW and the learning-rate schedule, which is a function of the step (or of the time that has passed)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from iptv2_diffusion.training.options import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """Make AdamW. Weight decay applies only to matrices and kernels, not to biases, norms and scales.

    `fused` is one kernel over all parameters, also on CPUs (a tenth of the time for a model of many small tensors). It
    skips infinite fp16 gradients inside the kernel, where accelerate cannot detect it, so callers turn it off for fp16.
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
    """Learning-rate schedule of diffusers without state: warm-up, then constant, linear, cosine or several cosines.

    `set(step, fraction)` sets the learning rate of optimiser step `step`, counted from 0. The schedule has no state to
    save. `fraction`, the part of a time budget that has passed, in [0, 1], advances the schedule if the time ends
    before the steps.
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
        """Return the learning rate of optimiser step `step`, counted from 0."""
        # diffusers' warm-up starts at a learning rate of 0, which would waste the first step: count from 1 during it.
        position = max(step + (step < self._warmup), fraction * self._steps)
        factor = self._factor(min(position, self._steps))
        if step < self._warmup:  # the warm-up counts steps, not time
            factor = min(factor, (step + 1) / self._warmup)
        return self._base * factor

    def set(self, step: int, fraction: float = 0.0) -> float:
        """Set `at(step, fraction)` in the optimiser's groups and return it."""
        rate = self.at(step, fraction)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate
