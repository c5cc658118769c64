"""Latent diffusion as a training task: batches, loss, held-out loss and previews of `train_ldm.py`.

    loss(step) = mean over the batch of objective(model(x_t, t, label), x0, noise)

Latents, noise, timesteps and label drops of a step are a function of (seed, step) alone; see `data/draws.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from iptv2_diffusion import IPTV2Pipeline
from iptv2_diffusion.data.draws import DataOrder, StepDraws, draw_step
from iptv2_diffusion.data.latent_cache import StoredLatents
from iptv2_diffusion.data.latent_encoding import LatentSource
from iptv2_diffusion.data.streaming import join_positions
from iptv2_diffusion.evaluation.kernel_distance import KernelDistance
from iptv2_diffusion.evaluation.pictures import picture_sheet
from iptv2_diffusion.latents import LatentCodec
from iptv2_diffusion.non_finite import NonFiniteImageError
from iptv2_diffusion.objectives import DiffusionObjective, null_label
from iptv2_diffusion.recipes.latent_diffusion.alignment import Alignment, TargetFeatures
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.errors import LocalError, user_errors
from iptv2_diffusion.training.precision import device_of_sums
from iptv2_diffusion.training.run_folder import preview_path
from iptv2_diffusion.training.signals import no_interruption
from iptv2_diffusion.training.training_task import TrainingTask

NOISE_BANDS = 4  # the held-out loss is also reported for each quarter of the timesteps


class LatentDiffusionTask(TrainingTask):
    """Training of a latent denoiser.

    Args:
        config: configuration of the run.
        accelerator: accelerator of the run, for its device and processes.
        codec: codec of the latents; the saved pipelines contain its VAE.
        model: the bare denoiser, of which only the config and the alignment are read.
        objective: training objective.
        source: latents of the training images, with the draws of the run.
        heldout: latents of the held-out images, or None.
        names: names of the model's classes; empty if unknown.
        label_ids: the model's class for each label of the data; None if they are the same.
        distance: metric of samples, computed at `kid_every`; or None.
        target_features: target features of the model's `alignment` (see `alignment.py`), if it has one.
    """

    works_together = True

    def __init__(
        self,
        config: LDMConfig,
        accelerator: Accelerator,
        *,
        codec: LatentCodec,
        model: nn.Module,
        objective: DiffusionObjective,
        source: LatentSource,
        heldout: StoredLatents | None,
        names: list[str],
        label_ids: list[int] | None = None,
        distance: KernelDistance | None = None,
        target_features: TargetFeatures | None = None,
    ) -> None:
        self.config, self.accelerator, self.codec, self.objective = config, accelerator, codec, objective
        self.source, self.heldout, self.distance = source, heldout, distance
        self.null_label = null_label(model)
        self.label_ids = None if label_ids is None else torch.tensor(label_ids)
        self.images = source.images
        self.id2label = dict(enumerate(names))
        self.target_features = target_features
        self.alignment: Alignment | None = getattr(model, "alignment", None)

    # ----------------------------------------------------------------------------------------------------------------
    # Training

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield (latents, noise, timesteps, labels) of each micro-batch, on the device."""
        micro_batches = self.source.micro_batches(step)
        for _ in self.source.draws.slices:
            with user_errors(OSError, ValueError, as_error=LocalError):  # from images that are read during training
                latents, labels, draws = next(micro_batches)
            yield self._prepare(latents, labels, draws, self.config.label_dropout)

    def _prepare(self, latents: Tensor, labels: Tensor, draws: StepDraws, label_dropout: float) -> tuple[Tensor, ...]:
        """Return the arguments of `loss` on the device, with the timesteps and the label drops of the draws."""
        if self.label_ids is not None:
            labels = self.label_ids[labels]
        if self.null_label is not None:
            labels = labels.masked_fill(draws.label_drops < label_dropout, self.null_label)
        timesteps = self.objective.sample_timesteps(draws.timesteps)
        device = self.accelerator.device
        return tuple(t.to(device, non_blocking=True) for t in (latents, draws.noise, timesteps, labels))

    def position(self, step: int) -> dict[str, Any] | None:
        """Return the position of an image stream at the start of `step`; None for data with random access."""
        own = self.source.position(step)
        if own is None:
            return None
        return join_positions(gather_object([own]) if self.accelerator.num_processes > 1 else [own])

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean loss of a micro-batch, including the alignment loss if there is one."""
        losses = self._losses(model, batch)
        if self.alignment is not None:
            with torch.no_grad():
                features = self.target_features(batch[0])
            losses = losses + self.config.align_weight * self.alignment.loss(features)
        return losses.mean()

    def _losses(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of each sample, (B,)."""
        latents, noise, timesteps, labels = batch
        return self.objective.loss(model, latents, noise, timesteps, None if self.null_label is None else labels)

    # ----------------------------------------------------------------------------------------------------------------
    # Held-out loss, KID

    def evaluate(
        self, model: nn.Module, step: int, last: bool, interrupt: Callable[[], None] = no_interruption
    ) -> dict[str, float]:
        """Return the held-out loss, and KID every `kid_every` steps and after the last step."""
        config, figures = self.config, self.heldout_loss(model, interrupt)
        if self.distance is not None and (last or step % config.kid_every == 0):
            sampling = {"num_inference_steps": config.sample_steps, "guidance_scale": config.guidance_scale}
            figures |= self.distance(self.pipeline(model), interrupt, **sampling)
        return figures

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module, interrupt: Callable[[], None] = no_interruption) -> dict[str, float]:
        """Return the held-out loss over all timesteps and over each quarter of them.

        Images, noise and timesteps are the same each time. Timesteps are spread evenly over the images, regardless of
        `stratified_timesteps`. Each process computes a share of the images.
        """
        if self.heldout is None:
            return {}
        config, accelerator = self.config, self.accelerator
        count = min(len(self.heldout), config.heldout_samples)
        draws = draw_step(DataOrder(len(self.heldout), config.seed), 0, count, self.heldout.latent_shape)
        draws = replace(draws, flips=torch.zeros_like(draws.flips))
        device = device_of_sums(accelerator)
        sums = torch.zeros(2, NOISE_BANDS, dtype=torch.float64, device=device)  # sums of losses and of samples
        part = self.source.draws.slices[0]
        size = part.stop - part.start
        for start in range(0, count, accelerator.num_processes * size):
            # All processes run equally many batches, because they gather the weights of a sharded model together.
            # Positions beyond the end use the first images and do not count.
            interrupt()
            own = start + accelerator.process_index * size
            counts = own < count
            some = draws[own : own + size] if counts else draws[:size]
            with user_errors(OSError, ValueError, as_error=LocalError):  # from latents that are read during training
                latents, labels = self.heldout.batch(some)
            batch = self._prepare(latents, labels, some, 0.0)
            losses = self._losses(model, batch).to(device).double()
            band = (batch[2].to(device).double() / self.objective.num_train_timesteps * NOISE_BANDS).long()
            band = band.clamp(max=NOISE_BANDS - 1)
            sums[0].index_add_(0, band, losses * counts)
            sums[1].index_add_(0, band, torch.ones_like(losses) * counts)
        totals, counts = accelerator.reduce(sums, "sum").tolist()
        bands = {
            f"heldout_loss_t{100 * i // NOISE_BANDS}": totals[i] / counts[i] for i in range(NOISE_BANDS) if counts[i]
        }
        return {"heldout_loss": sum(totals) / sum(counts), **bands}

    # ----------------------------------------------------------------------------------------------------------------
    # Samples

    def pipeline(self, model: nn.Module) -> Any:
        """Return a pipeline of a denoiser with this run's VAE, sampler and class names."""
        scheduler = sampling_scheduler(self.objective)
        return IPTV2Pipeline(model, self.codec.vae, scheduler, id2label=self.id2label or None)

    def preview(self, model: nn.Module, step: int, interrupt: Callable[[], None] = no_interruption) -> Path:
        """Write previews/step-*.png: a row per class, with the same seeds each time. The processes share the rows."""
        path = preview_path(self.config, step)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return self.sheet(self.pipeline(model), path, process, processes, interrupt)

    def sheet(
        self,
        pipeline: Any,
        path: Path,
        process: int = 0,
        processes: int = 1,
        interrupt: Callable[[], None] = no_interruption,
        show_progress: bool = False,
    ) -> Path:
        """Draw samples, one row per class (at most `config.preview_classes`), and write them as one image.

        Each of n processes draws every n-th row. All draw the same number of rows, as a sharded model requires. The
        first process writes the image. `show_progress` shows a bar over the rows' steps.
        """
        config = self.config
        pipeline.set_progress_bar_config(disable=True)
        classes: list[int | None] = [*range(min(self.null_label or 0, config.preview_classes))] or [None]
        drawn = []
        bar = tqdm(total=len(classes) * config.sample_steps, desc=path.name, disable=not show_progress, leave=False)

        def count_step(*_: Any) -> dict[str, Any]:
            bar.update()
            return {}

        for start in range(0, len(classes), processes):
            interrupt()
            row = (start + process) % len(classes)
            label = classes[row]
            seeds = [torch.Generator().manual_seed(1000 * row + column) for column in range(config.preview_per_class)]
            try:
                images = pipeline(
                    label,
                    num_images_per_label=config.preview_per_class,
                    num_inference_steps=config.sample_steps,
                    guidance_scale=config.guidance_scale,
                    generator=seeds,
                    callback_on_step_end=count_step,
                ).images
            except NonFiniteImageError as error:  # the other rows continue, and missing images are white
                print(f"{path.name}, row {row + 1}: {error}", flush=True)
                images = list(error.images)
                for index in error.indices:
                    images[index] = Image.new("RGB", images[index].size, "white")
            drawn.append((row, images))
        bar.close()
        rows = dict(gather_object(drawn) if processes > 1 else drawn)
        names = [self.id2label.get(label, f"class {label}") for label in classes if label is not None]
        if process == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture_sheet([rows[row] for row in range(len(classes))], names).save(path)
        return path


def sampling_scheduler(objective: DiffusionObjective) -> Any:
    """Return the pipeline's scheduler: DPM-Solver++, which needs the fewest steps, or DDPM for a learned variance."""
    if objective.prediction_type == "flow" or objective.learned_variance:
        return objective.scheduler
    return DPMSolverMultistepScheduler.from_config(objective.scheduler.config)
