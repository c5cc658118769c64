"""Cost of a latent-diffusion run, estimated from three steps on noise: the table that `--plan` prints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iptv2_diffusion.data.draws import DataOrder, StepDraws
from iptv2_diffusion.data.latent_encoding import LatentSource
from iptv2_diffusion.latents import LatentCodec
from iptv2_diffusion.models.presets import count_macs, count_parameters
from iptv2_diffusion.objectives import DiffusionObjective, null_label
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.recipes.latent_diffusion.data import run_draws
from iptv2_diffusion.recipes.latent_diffusion.task import LatentDiffusionTask
from iptv2_diffusion.training.loop import Trainer
from iptv2_diffusion.training.planning import estimate_memory, measure, plan_text


def show_plan(
    config: LDMConfig,
    accelerator: Accelerator,
    codec: LatentCodec,
    objective: DiffusionObjective,
    fresh_model: Callable[[], nn.Module],
) -> None:
    """Print parameters, GMACs, memory without and with checkpointing, and the speed and time of the run."""
    draws = run_draws(config, accelerator, codec, DataOrder(1 << 20, config.seed))
    sample = (draws.slices[0].stop - draws.slices[0].start, *draws.latent_shape)

    def loss(model: nn.Module, latents: Tensor) -> Tensor:
        timesteps = torch.zeros(len(latents), dtype=torch.long)
        labels = None if null_label(model) is None else timesteps
        return objective.loss(model, latents, torch.empty_like(latents), timesteps, labels)

    def make_trainer() -> tuple[Trainer, LatentDiffusionTask]:
        trainer = Trainer(replace(config, output_dir=scratch), accelerator, fresh_model())
        task = LatentDiffusionTask(
            config,
            accelerator,
            codec=codec,
            model=trainer.state.module,
            objective=objective,
            source=SyntheticLatents(draws),
            heldout=None,
            names=[],
        )
        return trainer, task

    with tempfile.TemporaryDirectory() as scratch:
        speed = measure(make_trainer)
    options: dict[str, Any] = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
    memory = {
        name: estimate_memory(fresh_model, loss, sample, config, checkpointing=checkpointing, **options)
        for name, checkpointing in (("no checkpointing", False), ("gradient_checkpointing", True))
    }
    model = fresh_model()
    accelerator.print(
        plan_text(memory, speed, config, count_macs(model, batch_size=sample[0]), count_parameters(model))
    )


class SyntheticLatents(LatentSource):
    """Noise in place of latents, so that planning needs no images."""

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, StepDraws]]:
        """Yield noise, label 0 and draws."""
        for draws in self.draws.micro_batches(step):
            yield draws.posterior_noise, torch.zeros_like(draws.items), draws
