"""Rain with depth: several layers of near and far streaks and, optionally, haze.

Rain100L and Rain100H (Yang et al., "Deep Joint Rain Detection and Removal from a Single Image", CVPR 2017) have one
and five layers of streaks of different directions over a photograph, the latter with the veil of accumulated rain.
Rain12 (Li et al., CVPR 2016) has streaks rendered with the light of the scene. `LayeredRain` draws from a family that
covers all of these. It uses none of their images [ours].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iptv2_diffusion.data.degradations import Degradation, turn, uniform

__all__ = ["LayeredRain"]

LENGTHS = (5.0, 70.0)  # range of a streak's length in pixels
WIDTHS = (0.35, 1.5)  # standard deviation across a streak, pixels
COVERAGE = (0.005, 0.25)  # share of the pixels that the streaks of a layer touch
STRENGTHS = (0.06, 0.75)  # how much a streak adds at its middle, in [0, 1]


@dataclass(frozen=True)
class LayeredRain(Degradation):
    """One to `high` layers of streaks, added to the image or screened over it, perhaps with haze.

    Args:
        low, high: range of the number of layers, whole numbers of at least 1, drawn uniformly.
        haze: probability of a veil. The colours behind a veil are ambiguous: a small model trained with 0.35 removed
            streaks, but shifted the tones of clear photographs.
    """

    low: float
    high: float
    haze: float = 0.0
    margin: int = 0

    def __call__(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        """Degrade images (B, C, H, W) in [0, 1] to the same shape, clipped to [0, 1]. σ is unknown."""
        count, _, height, width = clean.shape
        low, high = int(self.low), int(self.high)
        layers = torch.randint(low, high + 1, (count,), generator=generator)
        # Rain falls within 0.9 rad of vertical. In a third of the samples the layers cross each other.
        fall = math.pi / 2 + (0.35 * torch.randn(count, generator=generator)).clamp(-0.9, 0.9)
        crossing = 0.45 * (torch.rand(count, generator=generator) < 0.33) + 0.04

        rain = torch.zeros(count, 1, height, width)
        for layer in range(high):
            angle = fall + crossing * torch.randn(count, generator=generator)
            streaks = draw_streaks(height, width, angle, generator)
            rain += streaks * (layer < layers)[:, None, None, None]
        rain = rain.clamp(max=1)

        screened = (torch.rand(count, generator=generator) < 0.5)[:, None, None, None]
        colour = uniform(count, 0.8, 1, generator)[:, None, None, None]  # rain is as bright as the sky at most
        hazy = self._veil(clean, generator)
        rainy = torch.where(screened, hazy + rain * (colour - hazy).clamp(min=0), hazy + rain * colour)
        return rainy.clamp(0, 1), None

    def _veil(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Mix the image with the light of the sky, with a weight that varies over the image."""
        count, _, height, width = clean.shape
        strength = uniform(count, 0.02, 0.4, generator) * (torch.rand(count, generator=generator) < self.haze)
        sky = uniform(count, 0.55, 1, generator)[:, None, None, None]
        waves = torch.rand(count, 1, 3, 3, generator=generator)
        waves = F.interpolate(waves, size=(height, width), mode="bilinear", align_corners=True)
        share = strength[:, None, None, None] * (0.5 + waves)
        return clean * (1 - share) + sky * share


def draw_streaks(height: int, width: int, angle: Tensor, generator: torch.Generator) -> Tensor:
    """One layer of streaks of a common direction `angle` (B,), in radians: (B, 1, H, W) in [0, 1].

    Near rain has few streaks that are long, wide and bright. Far rain has many that are short and faint. The drops are
    points of random strength, and a product in the frequency domain draws them out. The product is periodic, so the
    border has as many streaks as the middle.
    """
    count = len(angle)
    near = torch.rand(count, generator=generator)
    length = between(LENGTHS, 0.6 * near + 0.4 * torch.rand(count, generator=generator))
    across = between(WIDTHS, 0.5 * near + 0.5 * torch.rand(count, generator=generator))
    strength = between(STRENGTHS, 0.4 * near + 0.6 * torch.rand(count, generator=generator))
    coverage = between(COVERAGE, torch.rand(count, generator=generator))

    density = coverage / (length * across * 2.5)
    drops = (torch.rand(count, height, width, generator=generator) < density[:, None, None]).float()
    drops = drops * (0.3 + 0.7 * torch.rand(count, height, width, generator=generator))
    shape = streak_shapes(height, width, length, across, angle)
    drawn = torch.fft.irfft2(torch.fft.rfft2(drops) * torch.fft.rfft2(shape), s=(height, width))
    return (drawn.clamp(0, 1) * strength[:, None, None])[:, None]


def streak_shapes(height: int, width: int, length: Tensor, across: Tensor, angle: Tensor) -> Tensor:
    """Return a streak around position (0, 0), 1 at its middle, Gaussian across and with soft ends: (B, H, W)."""
    y = torch.fft.fftfreq(height)[:, None] * height  # 0, 1, …, -2, -1: distances on the wrapped map
    x = torch.fft.fftfreq(width)[None] * width
    along, sideways = turn(x, y, angle)
    half, across = length[:, None, None] / 2, across[:, None, None]
    return torch.sigmoid((half - along.abs()) / (0.1 * half + 0.5)) * torch.exp(-0.5 * (sideways / across) ** 2)


def between(limits: tuple[float, float], share: Tensor) -> Tensor:
    """Interpolate between two limits by `share` in [0, 1] on a logarithmic scale."""
    low, high = limits
    return low * (high / low) ** share
