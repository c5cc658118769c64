"""Restoration as a training task: batches, loss, held-out PSNR and previews of `train_restoration.py`.

    loss(step) = mean over the batch of a weighted sum of pixel losses between model(degraded, σ) and clean

Patches, flips, degradations and mixing of a step are a function of (seed, step) alone; see `data/patches.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import save_image

from iptv2_diffusion.data.draws import generator_for
from iptv2_diffusion.evaluation.restoration_metrics import psnr
from iptv2_diffusion.recipes.restoration.config import LOSSES, RestorationConfig
from iptv2_diffusion.recipes.restoration.data import Batch, Source
from iptv2_diffusion.training.accelerator import process_slices
from iptv2_diffusion.training.errors import user_errors
from iptv2_diffusion.training.run_folder import preview_path
from iptv2_diffusion.training.signals import no_interruption
from iptv2_diffusion.training.training_task import TrainingTask

CHARBONNIER_EPSILON = 1e-3


class RestorationTask(TrainingTask):
    """Training of a restorer.

    Args:
        config: configuration of the run.
        accelerator: accelerator of the run, for its device and processes.
        model: the bare restorer, of which only the config is read.
        sources: one source per task of the model. The task of each sample is drawn at random.
        heldout: name -> held-out batch, from `heldout_batches`.
    """

    def __init__(
        self,
        config: RestorationConfig,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        sources: Sequence[Source],
        heldout: Mapping[str, Batch],
    ) -> None:
        self.config, self.accelerator, self.sources, self.heldout = config, accelerator, sources, heldout
        self.images = len(set(sources[0].sampler.clean.files))
        self.takes_sigma = model.config.sigma_conditioning is not None
        self.takes_task = model.config.num_tasks is not None
        self.merge_logits = [p for name, p in model.named_parameters() if name.endswith("merge_logits")]

    # ----------------------------------------------------------------------------------------------------------------
    # Training

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield this process's micro-batches of a step, on the device."""
        config = self.config
        stage = bisect_right(config.patch_steps, step)
        size = config.patch_sizes[stage]
        batch_size = config.patch_batch_sizes[stage] if config.patch_batch_sizes else config.batch_size
        batch = self.draw(step, batch_size, size)
        for part in process_slices(self.accelerator, batch_size, config.gradient_accumulation_steps):
            yield batch.map(lambda value, part=part: value[part].to(self.accelerator.device, non_blocking=True))

    def draw(self, step: int, batch_size: int, size: int) -> Batch:
        """Draw the global batch of a step."""
        config = self.config
        generator = generator_for(config.seed, "restoration", step)
        with user_errors(ValueError):
            if config.tasks:
                batch = self._draw_mixed(batch_size, size, generator)
            else:
                batch = self.sources[0].draw(batch_size, size, generator)
        if config.rgb_shuffle and batch.clean.shape[1] == 3:
            order = torch.rand(batch_size, 3, generator=generator).argsort(dim=1)[:, :, None, None]
            degraded, clean = (t.gather(1, order.expand_as(t)) for t in (batch.degraded, batch.clean))
            batch = replace(batch, degraded=degraded, clean=clean)
        if config.mixup > 0:
            batch = mix(batch, config.mixup, generator)
        return batch

    def _draw_mixed(self, batch_size: int, size: int, generator: torch.Generator) -> Batch:
        """Draw samples of all tasks in one batch. A task without noise has σ = 0."""
        tasks = torch.randint(len(self.sources), (batch_size,), generator=generator).sort().values
        parts = [
            source.draw(count, size, generator)
            for source, count in zip(self.sources, tasks.bincount(minlength=len(self.sources)).tolist(), strict=True)
            if count
        ]
        sigmas = [torch.zeros(len(p.clean)) if p.sigma is None else p.sigma for p in parts]
        return Batch(
            torch.cat([p.degraded for p in parts]), torch.cat([p.clean for p in parts]), torch.cat(sigmas), tasks
        )

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the restored batch, not clipped."""
        conditions = {"sigma": batch.sigma} if self.takes_sigma else {}
        if self.takes_task:
            conditions["task"] = batch.task
        return model(batch.degraded, **conditions, return_dict=False)[0]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the weighted sum of pixel losses of a micro-batch."""
        restored = self.predict(model, batch).float()
        total = sum(weight * LOSS_FUNCTIONS[name](restored, batch.clean) for name, weight in self.config.losses.items())
        # FCSA omits its shifted branch on maps of one window, but DDP still waits for a gradient of every parameter.
        return total + 0.0 * sum(logits.sum() for logits in self.merge_logits)

    # ----------------------------------------------------------------------------------------------------------------
    # Held-out quality

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, step: int, last: bool, interrupt: Callable[[], None] = no_interruption
    ) -> dict[str, float]:
        """Return the mean PSNR of each kind of held-out crops, clipped to [0, 1]. Every process computes them all."""
        figures = {}
        for name, batch in self.heldout.items():
            interrupt()
            batch = batch.map(lambda value: value.to(self.accelerator.device))
            restored = [self.predict(model, batch.map(lambda v, i=i: v[i : i + 1])) for i in range(len(batch.clean))]
            figures[f"psnr_{name}"] = float(psnr(torch.cat(restored).cpu(), batch.clean.cpu()).mean())
        if figures:
            figures["psnr"] = sum(figures.values()) / len(figures)
        return figures

    def preview(self, model: nn.Module, step: int, interrupt: Callable[[], None] = no_interruption) -> Path | None:
        """Write previews/step-*.png; see `picture`."""
        return self.picture(model, preview_path(self.config, step))

    @torch.no_grad()
    def picture(self, model: nn.Module, path: Path) -> Path | None:
        """Write the first held-out crop of each kind, degraded, restored and clean; return None without such crops."""
        if not self.heldout:
            return None
        rows = []
        for batch in self.heldout.values():
            first = batch.map(lambda value: value[:1].to(self.accelerator.device))
            rows += [first.degraded, self.predict(model, first), first.clean]
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.cat(rows).float()
        if not pixels.isfinite().all():  # they would be black squares
            self.accelerator.print(f"no {path.name}: the model returns NaN or infinity")
            return None
        save_image(pixels.clamp(0, 1), path, nrow=3)
        return path


def mix(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """Mix-up: with probability `share`, x becomes a·x + (1 - a)·x', with its neighbour x' and a uniform in [0.4, 1].

    Mixed noise has the standard deviation sqrt((a σ)² + ((1 - a) σ')²).
    """
    count = len(batch.clean)
    a = 1 - 0.6 * torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < share)
    wide = a[:, None, None, None]
    degraded, clean = (wide * t + (1 - wide) * t.roll(1, 0) for t in (batch.degraded, batch.clean))
    sigma = batch.sigma
    if sigma is not None:
        sigma = ((a * sigma) ** 2 + ((1 - a) * sigma.roll(1, 0)) ** 2).sqrt()
    return Batch(degraded, clean, sigma, batch.task)


# ---------------------------------------------------------------------------------------------------------------------
# Losses, each a mean over all pixels and channels


def charbonnier(restored: Tensor, clean: Tensor) -> Tensor:
    """sqrt(error² + ε²): L1 that is smooth at zero."""
    return ((restored - clean).square() + CHARBONNIER_EPSILON**2).sqrt().mean()


def psnr_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean over the batch of 10 log₁₀(MSE), the negative PSNR (as in NAFNet)."""
    return 10 * ((restored - clean).square().flatten(1).mean(dim=1) + 1e-8).log10().mean()


def sobel(restored: Tensor, clean: Tensor) -> Tensor:
    """L1 distance between the Sobel gradients of both images."""
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=restored.device) / 8
    kernels = torch.stack([kernel, kernel.T])[:, None]
    error = (restored - clean).flatten(0, 1)[:, None]
    return F.conv2d(error, kernels).abs().mean()


LOSS_FUNCTIONS = dict(zip(LOSSES, (F.l1_loss, F.mse_loss, charbonnier, psnr_loss, sobel), strict=True))
