"""Layered rain: brighter only, in the stated directions, the requested number of layers, the same for the same seed."""

import math

import pytest
import torch

from iptv2_diffusion.data.rain import LayeredRain, draw_streaks, streak_shapes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rain_only_brightens_a_dark_image_and_stays_in_range():
    clean = torch.full((16, 3, 48, 40), 0.2)
    rainy, sigma = LayeredRain(1, 4, haze=0.0)(clean, generator())
    assert sigma is None
    assert rainy.shape == clean.shape
    assert (rainy >= clean - 1e-6).all()
    assert rainy.max() <= 1
    wet = (rainy - clean).flatten(1).amax(dim=1) > 0.02
    assert wet.sum() >= 13  # light rain may miss a small patch
    assert torch.equal(rainy, LayeredRain(1, 4, haze=0.0)(clean, generator())[0])


def test_haze_lowers_the_contrast():
    clean = torch.rand(32, 3, 32, 32, generator=generator())
    contrast = [LayeredRain(1, 1, haze=haze)(clean, generator())[0].std(dim=(1, 2, 3)).mean() for haze in (0.0, 1.0)]
    assert contrast[1] < 0.95 * contrast[0]


def test_more_layers_give_more_rain():
    clean = torch.full((64, 1, 48, 48), 0.2)
    few, many = (LayeredRain(n, n, haze=0.0)(clean, generator())[0].mean() - 0.2 for n in (1, 5))
    assert many > 2 * few


@pytest.mark.parametrize("angle", [0.3, math.pi / 2, 2.4])
def test_streaks_lie_along_their_angle(angle):
    shape = streak_shapes(65, 65, torch.tensor([31.0]), torch.tensor([1.0]), torch.tensor([angle]))[0]
    y, x = torch.meshgrid(torch.fft.fftfreq(65) * 65, torch.fft.fftfreq(65) * 65, indexing="ij")
    xx, yy, xy = ((shape * a * b).sum() for a, b in ((x, x), (y, y), (x, y)))
    direction = 0.5 * torch.atan2(2 * xy, xx - yy) % math.pi
    assert abs(direction.item() - angle % math.pi) < 0.03
    assert shape[0, 0] > 0.95  # 1 at its middle
    assert 25 < (shape.sum() / (1.0 * math.sqrt(2 * math.pi))).item() < 37  # about 31 pixels long


def test_a_drop_becomes_one_streak_of_its_strength():
    streaks = draw_streaks(64, 64, torch.full((200,), 1.5), generator())
    assert streaks.shape == (200, 1, 64, 64)
    assert streaks.min() >= 0
    assert streaks.max() <= 0.75
    covered = (streaks > 0.02).float().mean()
    assert 0.01 < covered < 0.3
