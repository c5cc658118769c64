"""A VAE as a training task: batches, loss, held-out PSNR and previews of `train_vae.py`.

    loss = l1_weight·|y − x| + mse_weight·(y − x)² + kl_weight·KL

Each term is a mean over its elements (pixels, or latents for the KL divergence). x is in [-1, 1], and y is decoded from
a sample of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from iptv2_diffusion.data.draws import DataOrder, RunDraws, generator_for, read_ahead
from iptv2_diffusion.data.images import ImageTensors
from iptv2_diffusion.evaluation.pictures import picture_sheet
from iptv2_diffusion.evaluation.restoration_metrics import Protocol, psnr
from iptv2_diffusion.latents import LatentCodec
from iptv2_diffusion.recipes.vae.config import VAEConfig
from iptv2_diffusion.recipes.vae.data import FlippedImages
from iptv2_diffusion.training.accelerator import process_slices
from iptv2_diffusion.training.precision import device_of_sums
from iptv2_diffusion.training.run_folder import preview_path
from iptv2_diffusion.training.signals import no_interruption
from iptv2_diffusion.training.training_task import TrainingTask


class VAELoss(nn.Module):
    """Loss of pixels (B, 3, H, W) in [-1, 1] and posterior noise (B, c, h, w), a scalar.

    It is a module because data-parallel training synchronises only through `forward`.
    """

    def __init__(self, vae: AutoencoderKL, config: VAEConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        self.enable_gradient_checkpointing = vae.enable_gradient_checkpointing

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return the weighted sum of absolute error, squared error and KL divergence."""
        config = self.config
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - pixels
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return config.l1_weight * error.abs().mean() + config.mse_weight * error.square().mean() + config.kl_weight * kl


class VAETask(TrainingTask):
    """Training of a VAE. Images, flips and posterior noise of each step are a function of (seed, step).

    Args:
        config: configuration of the run.
        accelerator: accelerator of the run, for its device and processes.
        train: training images.
        heldout: images for the PSNR and previews.
        start: first optimiser step.
    """

    def __init__(
        self, config: VAEConfig, accelerator: Accelerator, train: ImageTensors, heldout: ImageTensors, start: int
    ) -> None:
        self.config, self.accelerator, self.train, self.heldout = config, accelerator, train, heldout
        slices = process_slices(accelerator, config.batch_size, config.gradient_accumulation_steps)
        order = DataOrder(len(train.valid_indices()), config.seed)
        latent_shape = (config.latent_channels, *(side // config.downscale for side in config.size))
        self.draws = RunDraws(order, config.batch_size, latent_shape, slices, diffusion=False)
        reading = {"start": start, "flip": config.random_flip, "num_workers": config.num_workers}
        self._pixels = read_ahead(FlippedImages(train), self.draws, **reading)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (pixels, posterior noise) of each micro-batch of optimiser step `step`. Steps must be in order."""
        device = self.accelerator.device
        for _ in self.draws.slices:
            pixels, draws = next(self._pixels)
            yield pixels.to(device, non_blocking=True), draws.posterior_noise.to(device, non_blocking=True)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss of a micro-batch."""
        return model(*batch)

    def evaluate(
        self, model: nn.Module, step: int, last: bool, interrupt: Callable[[], None] = no_interruption
    ) -> Mapping[str, float]:
        """Return the PSNR over the first `heldout_samples` of a fixed shuffle of the held-out images."""
        return {"heldout_psnr": self.psnr(model.vae, self._some(self.heldout, self.config.heldout_samples))}

    def psnr(self, vae: AutoencoderKL, indices: list[int]) -> float:
        """Return the mean PSNR in dB of reconstructions from the posterior mean.

        The PSNR of an image is over all RGB values, with both images rounded to 8 bits. It is computed in float32 and
        is the same on every process.
        """
        device = device_of_sums(self.accelerator)
        total = torch.zeros(2, dtype=torch.float64, device=device)
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        codec = LatentCodec(vae)
        for pixels in self._batches(self.heldout, mine):
            with torch.no_grad():
                decoded = codec.decode(codec.encode(pixels, sample_posterior=False))
            values = psnr(*((x.to(device) + 1) / 2 for x in (decoded, pixels)), Protocol(round=True))
            # The PSNR of a perfect reconstruction is infinite; count it as an error of half a level in one value.
            values = values.clamp(max=10 * math.log10(255**2 * pixels[0].numel() / 0.25))
            total += torch.stack([values.sum(), torch.ones_like(values).sum()])
        total = self.accelerator.reduce(total, "sum")
        return (total[0] / total[1]).item()

    def preview(self, model: nn.Module, step: int, interrupt: Callable[[], None] = no_interruption) -> Path:
        """Write previews/step-*.png: held-out originals above their reconstructions."""
        return self.picture(model.vae, preview_path(self.config, step))

    def picture(self, vae: AutoencoderKL, path: Path) -> Path:
        """Write an image of two rows of held-out images: originals above reconstructions."""
        codec = LatentCodec(vae)
        pixels = next(self._batches(self.heldout, self._some(self.heldout, self.config.preview_images), size=10**9))
        with torch.no_grad():
            decoded = codec.decode(codec.encode(pixels, sample_posterior=False))
        if not decoded.isfinite().all():
            self.accelerator.print(f"{path.name}: the VAE returns NaN or infinity; non-finite pixels are white")
            decoded = decoded.nan_to_num(1.0)
        rows = []
        for images in (pixels, decoded):
            levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            rows.append([Image.fromarray(image) for image in levels])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_sheet(rows, ["original", "decoded"]).save(path)
        return path

    def statistics(self, vae: AutoencoderKL) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation of each latent channel over training images.

        They are those of samples of the posterior, which the denoiser is trained on: the variance is the variance of
        the means plus the mean of the variances.
        """
        device = device_of_sums(self.accelerator)
        sums = torch.zeros(3, self.config.latent_channels, dtype=torch.float64, device=device)
        count = 0
        with torch.no_grad():
            for pixels in self._batches(self.train, self._some(self.train, self.config.statistics_samples)):
                posterior = vae.encode(pixels).latent_dist
                mean, variance = posterior.mean.to(device).double(), posterior.var.to(device).double()
                sums += torch.stack([v.sum((0, 2, 3)) for v in (mean, mean.square(), variance)])
                count += mean.numel() // self.config.latent_channels
        first, second, variance = sums / count
        return first.tolist(), (second - first.square() + variance).sqrt().tolist()

    def _some(self, images: ImageTensors, count: int) -> list[int]:
        """Return the first `count` image numbers of a fixed shuffle."""
        valid = images.valid_indices()
        order = torch.randperm(len(valid), generator=generator_for(0, "some")).tolist()
        return [valid[i] for i in order[:count]]

    def _batches(self, images: ImageTensors, indices: list[int], size: int = 64) -> Iterator[Tensor]:
        """Yield pixels (≤ size, 3, H, W) of the images, on the device."""
        for start in range(0, len(indices), size):
            pixels = [images.get(i)["pixel_values"] for i in indices[start : start + size]]
            yield torch.stack(pixels).to(self.accelerator.device)
