"""Synthetic degradations of clean patches during training: noise, blur, rain, JPEG.

Each is a callable `(clean, generator) -> (degraded, sigma)` on a batch (B, C, H, W) in [0, 1]. `sigma` is the standard
deviation of the noise on the 0–255 scale, (B,), or None if there is none. All random numbers come from the generator,
so a step is a function of (seed, step). The output is `margin` pixels smaller than the input on each side. Patches are
cut larger by this margin, so that a blur sees the pixels outside.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = [
    "Degradation",
    "GaussianBlur",
    "GaussianNoise",
    "JPEGCompression",
    "MotionBlur",
    "RainStreaks",
    "Sequential",
    "Sometimes",
    "gaussian_kernels",
    "motion_kernels",
]


class Degradation(ABC):
    """Interface of all degradations."""

    @property
    @abstractmethod
    def margin(self) -> int:
        """Number of pixels that the output is smaller than the input on each side."""

    @abstractmethod
    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]: ...


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers (count,) in [low, high]."""
    return low + (high - low) * torch.rand(count, generator=generator)


@dataclass(frozen=True)
class GaussianNoise(Degradation):
    """Additive white Gaussian noise, not clipped or quantised, with σ uniform in [low, high] on the 0–255 scale."""

    low: float
    high: float
    margin: int = 0

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        sigma = uniform(len(clean), self.low, self.high, generator)
        noise = torch.randn(clean.shape, generator=generator)
        return clean + noise * (sigma[:, None, None, None] / 255), sigma


@dataclass(frozen=True)
class GaussianBlur(Degradation):
    """Anisotropic Gaussian blur with standard deviations uniform in [low, high] pixels and a random angle."""

    low: float
    high: float

    @property
    def margin(self) -> int:
        return math.ceil(3 * self.high)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        count = len(clean)
        along, across = (uniform(count, self.low, self.high, generator) for _ in range(2))
        angle = uniform(count, 0, math.pi, generator)
        return blur(clean, gaussian_kernels(along, across, angle, self.margin)), None


@dataclass(frozen=True)
class MotionBlur(Degradation):
    """Motion blur of a hand-held camera: a smooth random path with a length uniform in [low, high] pixels."""

    low: float
    high: float

    @property
    def margin(self) -> int:
        return math.ceil(self.high / 2) + 1

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        count = len(clean)
        length = uniform(count, self.low, self.high, generator)
        angle = uniform(count, 0, 2 * math.pi, generator)
        bend = uniform(count, -1.5, 1.5, generator)  # change of direction over the path, in radians
        return blur(clean, motion_kernels(length, angle, bend, self.margin)), None


@dataclass(frozen=True)
class RainStreaks(Degradation):
    """Rain as sparse bright dots drawn out into streaks, added to the image [ours; after the usual Photoshop recipe].

    The density, the share of pixels where a drop starts, is uniform in [low, high]. Streaks have `length` pixels, are
    within 0.6 rad of vertical and have a brightness of 0.3 to 0.9.
    """

    low: float
    high: float
    length: float = 21.0

    @property
    def margin(self) -> int:
        return math.ceil(self.length / 2) + 1

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        count, _, height, width = clean.shape
        density = uniform(count, self.low, self.high, generator)[:, None, None, None]
        drops = (torch.rand(count, 1, height, width, generator=generator) < density).float()
        drops = drops * torch.rand(count, 1, height, width, generator=generator)
        length = uniform(count, self.length / 2, self.length, generator)
        angle = math.pi / 2 + uniform(count, -0.6, 0.6, generator)
        streaks = blur(drops, motion_kernels(length, angle, torch.zeros(count), self.margin))
        brightness = uniform(count, 0.3, 0.9, generator)[:, None, None, None]
        # One drop of strength 1 spreads over `length` pixels.
        streaks = (streaks * length[:, None, None, None] * brightness).clamp(max=1)
        margin = self.margin
        inner = clean[..., margin : height - margin, margin : width - margin]
        return (inner + streaks).clamp(max=1), None


@dataclass(frozen=True)
class JPEGCompression(Degradation):
    """JPEG compression with a quality uniform in [low, high]. The result is quantised to 8 bits, as in a file.

    The grid of 8×8 blocks starts at a random pixel, as in photographs that were cropped after compression.
    """

    low: float
    high: float
    margin: int = 8

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        count, _, height, width = clean.shape
        qualities = uniform(count, self.low, self.high, generator).round().int().tolist()
        starts = torch.randint(self.margin + 1, (count, 2), generator=generator).tolist()
        pixels = (clean.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        inner = []
        for image, quality, (top, left) in zip(pixels, qualities, starts, strict=True):
            decoded = through_jpeg(np.ascontiguousarray(image[top:, left:]), quality)
            top, left = self.margin - top, self.margin - left
            inner.append(decoded[top : top + height - 2 * self.margin, left : left + width - 2 * self.margin])
        return torch.from_numpy(np.stack(inner)).permute(0, 3, 1, 2).float() / 255, None


@dataclass(frozen=True)
class Sometimes(Degradation):
    """Apply a degradation to each sample with a probability. The other samples do not change."""

    step: Degradation
    probability: float

    @property
    def margin(self) -> int:
        return self.step.margin

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        chosen = torch.rand(len(clean), generator=generator) < self.probability
        degraded, sigma = self.step(clean, generator)
        height, width = clean.shape[-2:]
        inner = clean[..., self.margin : height - self.margin, self.margin : width - self.margin]
        if sigma is not None:
            sigma = sigma.where(chosen, 0.0)
        return degraded.where(chosen[:, None, None, None], inner), sigma


class Sequential(Degradation):
    """Apply several degradations in order. σ comes from the one that adds noise."""

    def __init__(self, *steps: Degradation) -> None:
        self.steps = steps

    @property
    def margin(self) -> int:
        return sum(step.margin for step in self.steps)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        sigma = None
        for step in self.steps:
            clean, found = step(clean, generator)
            sigma = found if found is not None else sigma
        return clean, sigma


# ---------------------------------------------------------------------------------------------------------------------
# JPEG and kernels


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress an (H, W, C) uint8 image, C 1 or 3, as JPEG and decode it."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(image.shape)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter each image (B, C, H, W) by its own kernel (B, K, K), K odd, without padding: (B, C, H-K+1, W-K+1)."""
    batch, channels, _, _ = images.shape
    kernels = kernels.repeat_interleave(channels, dim=0)[:, None]
    blurred = F.conv2d(images.flatten(0, 1)[None], kernels, groups=batch * channels)[0]
    return blurred.unflatten(0, (batch, channels))


def turn(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates (B, H, W) of x and y, of (H, W) together, along and across the angle (B,) in radians."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * x + sin * y, cos * y - sin * x


def gaussian_kernels(along: Tensor, across: Tensor, angle: Tensor, radius: int) -> Tensor:
    """Return normalised Gaussian kernels (B, 2·radius+1, 2·radius+1); deviations (B,) in pixels, angle in radians."""
    grid = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    u, v = turn(x, y, angle)
    kernels = torch.exp(-0.5 * ((u / along[:, None, None]) ** 2 + (v / across[:, None, None]) ** 2))
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def motion_kernels(length: Tensor, angle: Tensor, bend: Tensor, radius: int, samples: int = 64) -> Tensor:
    """Return normalised kernels (B, 2·radius+1, 2·radius+1) of paths of `length` pixels that turn by `bend` radians.

    A path has `samples` points at equal distances and is centred on its centre of mass. Each point is spread over the
    four pixels around it.
    """
    time = torch.linspace(-0.5, 0.5, samples)
    direction = angle[:, None] + bend[:, None] * time
    step = length[:, None] / samples
    x, y = (direction.cos() * step).cumsum(1), (direction.sin() * step).cumsum(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    size = 2 * radius + 1
    kernels = torch.zeros(len(length), size * size)
    left, top = x.floor(), y.floor()
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - (x - left - dx).abs()) * (1 - (y - top - dy).abs())
            rows = (top + dy + radius).clamp(0, size - 1)
            columns = (left + dx + radius).clamp(0, size - 1)
            kernels.scatter_add_(1, (rows * size + columns).long(), weight)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    return kernels.unflatten(1, (size, size))
