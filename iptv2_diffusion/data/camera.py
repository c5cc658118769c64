"""Camera noise: unprocess a photograph to raw sensor data, add shot and read noise, and process it again.

The noise of a photograph is not white Gaussian noise. Sensor noise grows with the light. Demosaicing, white balance,
colour correction and the tone curve then colour it and give it a grain of several pixels. The steps and the
distributions of noise levels and gains are those of Brooks et al., "Unprocessing Images for Learned Raw Denoising",
CVPR 2019 (arXiv 1811.11127), §3. The colour matrices are ours: the paper draws them from those of four cameras.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iptv2_diffusion.data.degradations import Degradation

__all__ = ["CameraNoise"]

BRIGHTNESS = 1e-8  # smallest linear value whose power is computed
READ_SLOPE, READ_OFFSET, READ_SPREAD = 2.18, 1.20, 0.26  # log(read) ~ N(slope · log(shot) + offset, spread), §3.1


@dataclass(frozen=True)
class CameraNoise(Degradation):
    """Shot and read noise of a sensor, after a camera's processing, in an sRGB photograph.

    Args:
        low, high: range of the shot noise λ_shot, drawn log-uniformly; 0.0001 to 0.012 in the paper. The variance of a
            linear value y in [0, 1] is λ_read + λ_shot · y.
        mosaic: probability that a sample passes through a Bayer mosaic. The noise of the others is independent from
            pixel to pixel before colour correction, as in a photograph that was reduced.
    """

    low: float
    high: float
    mosaic: float = 0.6
    margin: int = 0

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        """Degrade sRGB images, (B, 3, H, W) or (B, 1, H, W) in [0, 1], to the same shape, clipped. σ is unknown."""
        count = len(clean)
        camera = draw_camera(count, generator)
        shot, read = draw_noise_levels(count, self.low, self.high, generator)
        mosaicked = torch.rand(count, generator=generator) < self.mosaic
        pattern = torch.randint(4, (count,), generator=generator)

        raw = unprocess(clean.expand(-1, 3, -1, -1).clamp(0, 1), camera)  # linear light on the sensor
        noise = torch.randn(raw.shape, generator=generator)
        noisy = raw + noise * (read[:, None, None, None] + shot[:, None, None, None] * raw).sqrt()
        demosaicked = torch.stack([demosaic(image, int(code)) for image, code in zip(noisy, pattern, strict=True)])
        noisy = torch.where(mosaicked[:, None, None, None], demosaicked, noisy)
        degraded = process(noisy.clamp(0, 1), camera)
        if clean.shape[1] == 1:
            degraded = degraded.mean(dim=1, keepdim=True)
        return degraded, None


@dataclass(frozen=True)
class Camera:
    """Parameters of a camera's processing: gains of white balance and exposure (B, 3), colour matrices (B, 3, 3)."""

    gains: Tensor
    matrix: Tensor


def draw_camera(count: int, generator: torch.Generator) -> Camera:
    """Draw gains as in §3.4 of the paper, and matrices that subtract 10 to 35 % of the other colours [ours].

    The rows of a matrix add up to 1, so gray stays gray.
    """
    exposure = 1 / (0.8 + 0.1 * torch.randn(count, generator=generator)).clamp(0.5, 1.2)
    red = 1.9 + 0.5 * torch.rand(count, generator=generator)
    blue = 1.5 + 0.4 * torch.rand(count, generator=generator)
    gains = exposure[:, None] * torch.stack([red, torch.ones(count), blue], dim=1)
    mixing = 0.10 + 0.25 * torch.rand(count, 3, 3, generator=generator)
    mixing = mixing * (1 - torch.eye(3))
    matrix = torch.eye(3) + torch.diag_embed(mixing.sum(dim=2)) - mixing
    return Camera(gains, matrix)


def draw_noise_levels(count: int, low: float, high: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw λ_shot and λ_read, each (B,), by equation 3 of the paper."""
    log_shot = math.log(low) + (math.log(high) - math.log(low)) * torch.rand(count, generator=generator)
    spread = READ_SPREAD * torch.randn(count, generator=generator)
    return log_shot.exp(), (READ_SLOPE * log_shot + READ_OFFSET + spread).exp()


def unprocess(images: Tensor, camera: Camera) -> Tensor:
    """Convert sRGB (B, 3, H, W) in [0, 1] to the linear light on the sensor, in [0, 1]. `process` is the inverse."""
    linear = images.clamp(min=BRIGHTNESS).pow(2.2)
    linear = torch.einsum("bij,bjhw->bihw", torch.linalg.inv(camera.matrix), linear)
    return (linear / camera.gains[:, :, None, None]).clamp(0, 1)


def process(raw: Tensor, camera: Camera) -> Tensor:
    """Convert linear light on the sensor (B, 3, H, W) to sRGB in [0, 1]: white balance, colour correction, gamma."""
    balanced = (raw * camera.gains[:, :, None, None]).clamp(0, 1)
    corrected = torch.einsum("bij,bjhw->bihw", camera.matrix, balanced)
    return corrected.clamp(BRIGHTNESS, 1).pow(1 / 2.2)


def demosaic(image: Tensor, pattern: int) -> Tensor:
    """Keep the colour of each pixel that a Bayer sensor sees and interpolate the others: (3, H, W), H and W at least 3.

    The interpolation is the gradient-corrected linear one of Malvar, He and Cutler, "High-quality linear interpolation
    for demosaicing of Bayer-patterned color images", ICASSP 2004, figure 2.

    `pattern` is 0 to 3: the shift of the 2×2 cell R G / G B by rows (bit 0) and columns (bit 1).
    """
    _, height, width = image.shape
    even_rows = ((torch.arange(height) + (pattern & 1)) % 2 == 0)[:, None]  # rows with R and G
    even_columns = ((torch.arange(width) + (pattern >> 1)) % 2 == 0)[None]
    is_red, is_blue = even_rows & even_columns, ~even_rows & ~even_columns  # (H, W); the others are green
    seen = torch.where(is_red, image[0], torch.where(is_blue, image[2], image[1]))
    # Reflection without repeating the border pixel keeps the pattern.
    padded = F.pad(seen[None, None], (2, 2, 2, 2), mode="reflect")
    cross, along, across, corner = F.conv2d(padded, KERNELS.to(image.dtype))[0]
    green = torch.where(is_red | is_blue, cross, seen)
    red = torch.where(is_red, seen, torch.where(is_blue, corner, torch.where(even_rows, along, across)))
    blue = torch.where(is_blue, seen, torch.where(is_red, corner, torch.where(even_rows, across, along)))
    return torch.stack([red, green, blue])


# Green at red and blue; red and blue at green, from the row and from the column; red at blue and blue at red.
_CROSS = [[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]]
_ALONG = [[0, 0, 0.5, 0, 0], [0, -1, 0, -1, 0], [-1, 4, 5, 4, -1], [0, -1, 0, -1, 0], [0, 0, 0.5, 0, 0]]
_CORNER = [[0, 0, -1.5, 0, 0], [0, 2, 0, 2, 0], [-1.5, 0, 6, 0, -1.5], [0, 2, 0, 2, 0], [0, 0, -1.5, 0, 0]]
KERNELS = torch.tensor([_CROSS, _ALONG, [list(row) for row in zip(*_ALONG, strict=True)], _CORNER])[:, None] / 8
