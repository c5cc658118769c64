"""Starts of a sampling: pure noise, a noisy image, or a noisy image of which a part is kept.

`IPTV2Pipeline` and its sub-classes share one sampling loop. A `Start` has the steps in which they differ.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from iptv2_diffusion.latents import LatentCodec

from .image_inputs import latent_mask, read_mask

__all__ = ["ImageStart", "MaskedStart", "Start"]


class Start:
    """Pure noise.

    Attributes:
        count: number of images that the user gives, each of which needs a label; 1 for noise.
        size: (height, width) in pixels, which the images determine; None for that of the call.
    """

    count: int = 1
    size: tuple[int, int] | None = None

    def timesteps(self, scheduler: SchedulerMixin, timesteps: Tensor) -> Tensor:
        """Return the timesteps of the scheduler that are sampled."""
        return timesteps

    def latents(self, scheduler: SchedulerMixin, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents (B, C, h, w) before the first step, from noise of unit variance."""
        return noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flow-matching schedulers have none

    def after_step(self, latents: Tensor, step: int) -> Tensor:
        """Return the latents (B, C, h, w) after a step."""
        return latents

    def finish(self, decoded: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) after decoding."""
        return decoded


class ImageStart(Start):
    """Images with noise, of which the last part of the steps is sampled (SDEdit, Meng et al. 2021, arXiv 2108.01073).

    Args:
        images: images (N, 3, H, W) in [-1, 1], or latents (N, C, h, w).
        strength: fraction of the steps that run, in [0, 1].
        codec: codec of the pipeline's VAE.

    Raises:
        ValueError: the strength is out of range.
    """

    size: tuple[int, int]

    def __init__(self, images: Tensor, strength: float, codec: LatentCodec):
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must be in [0, 1]")
        self.strength = strength
        self.count = len(images)
        self.pixels = None if images.shape[1] == codec.latent_channels else images
        # the posterior's mean: the result depends on the generator only through the noise
        self.clean = images if self.pixels is None else codec.encode(images, sample_posterior=False)
        self.size = codec.image_size(*self.clean.shape[-2:])

    def timesteps(self, scheduler: SchedulerMixin, timesteps: Tensor) -> Tensor:
        """Return the last `strength` of the steps; a scheduler of order 2 has two timesteps for a step."""
        steps = -(-len(timesteps) // scheduler.order)
        first = int(steps - steps * self.strength) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return timesteps[first:]

    def latents(self, scheduler: SchedulerMixin, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the images' latents with the noise of the first timestep; without noise for strength 0."""
        self.clean = repeat_to(self.clean, len(noise))
        return self.noisy(scheduler, noise, timesteps[0]) if len(timesteps) else self.clean

    def noisy(self, scheduler: SchedulerMixin, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the images' latents (B, C, h, w) with the noise of a timestep."""
        batch = timestep.reshape(1).expand(len(noise))
        if hasattr(scheduler, "scale_noise"):  # flow matching
            return scheduler.scale_noise(self.clean, batch, noise)
        return scheduler.add_noise(self.clean, noise, batch)


class MaskedStart(ImageStart):
    """Images with noise, of which the pixels outside a mask are kept.

    After every step, the image's latents with the noise of the next timestep replace the latents outside the mask.
    After decoding, the image's pixels replace those outside the mask.

    Args:
        images, strength, codec: see `ImageStart`.
        mask_image: white where the images are repainted; see `read_mask`. One, or one per image.

    Raises:
        ValueError: the numbers of masks and images differ, or the strength is out of range.
    """

    def __init__(self, images: Tensor, mask_image: Any, strength: float, codec: LatentCodec):
        super().__init__(images, strength, codec)
        self.mask = read_mask(mask_image, codec, *self.size).to(images.device)  # (1 or N, 1, H, W); 1: repaint
        if len(self.mask) != 1 and self.count not in (1, len(self.mask)):
            raise ValueError(f"{len(self.mask)} masks for {self.count} images; give one, or one per image")
        self.count = max(self.count, len(self.mask))
        self.latent_mask = latent_mask(self.mask, codec)

    def latents(self, scheduler: SchedulerMixin, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the images' latents with the noise of the first timestep."""
        self.scheduler, self.noise, self.steps = scheduler, noise, timesteps
        self.repainted = repeat_to(self.latent_mask, len(noise)) > 0
        return super().latents(scheduler, noise, timesteps)

    def after_step(self, latents: Tensor, step: int) -> Tensor:
        """Return the latents, with those of the image outside the mask."""
        last = step + 1 == len(self.steps)
        known = self.clean if last else self.noisy(self.scheduler, self.noise, self.steps[step + 1])
        return torch.where(self.repainted, latents, known)

    def finish(self, decoded: Tensor) -> Tensor:
        """Return the decoded images, with the pixels of the originals outside the mask."""
        if self.pixels is None:  # the user gave latents
            return decoded
        original, mask = (repeat_to(part, len(decoded)) for part in (self.pixels, self.mask))
        return torch.where(mask > 0, decoded, original.to(decoded.dtype))


def repeat_to(batch: Tensor, count: int) -> Tensor:
    """Repeat each item of a batch (N, ...) to `count` items; those of one item are consecutive."""
    return batch.repeat_interleave(count // len(batch), dim=0)
