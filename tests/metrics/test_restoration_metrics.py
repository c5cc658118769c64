"""PSNR and SSIM against independent code."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from iptv2_diffusion.metrics.restoration import Protocol, luma, psnr, ssim


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, 24, 30, generator=generator)
    return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean


def test_psnr_by_the_definition(images):
    restored, clean = images
    for index, value in enumerate(psnr(restored, clean).tolist()):
        a, b = (np.asarray(i[index], np.float64) for i in (restored, clean))
        error = ((np.clip(a, 0, 1) * 255 - b * 255) ** 2).mean()
        assert value == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
        same = peak_signal_noise_ratio(restored[index].double().clamp(0, 1), clean[index].double(), data_range=1.0)
        assert value == pytest.approx(float(same), abs=1e-5)


def ssim_by_loops(a, b):
    """Wang et al. 2004 on one channel, every window that lies inside the image."""
    offsets = np.arange(11) - 5
    gauss = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(gauss, gauss) / gauss.sum() ** 2
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
            covariance = (window * p * q).sum() - mp * mq
            numerator = (2 * mp * mq + 0.01**2) * (2 * covariance + 0.03**2)
            values.append(numerator / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2)))
    return np.mean(values)


def test_ssim_by_the_definition(images):
    restored, clean = images
    for index, value in enumerate(ssim(restored, clean).tolist()):
        channels = [
            ssim_by_loops(np.clip(np.asarray(restored[index, c], np.float64), 0, 1), np.asarray(clean[index, c]))
            for c in range(3)
        ]
        assert value == pytest.approx(np.mean(channels), abs=1e-6)


def test_luma_of_white_black_and_green():
    colours = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double()[:, :, None, None]
    expected = torch.tensor([235.0, 16.0, 144.553]).double()
    torch.testing.assert_close(luma(colours).flatten() * 255, expected)


def test_the_protocol_matters(images):
    restored, clean = images
    border = clean.clone()
    border[..., :2, :] = 1 - border[..., :2, :]
    assert psnr(border, clean, Protocol(crop=2)).isinf().all()
    assert psnr(border, clean).isfinite().all()
    assert (psnr(restored, clean, Protocol(clip=False)) < psnr(restored, clean)).all()
    slightly = clean.mul(255).round().div(255)
    assert psnr(slightly + 0.3 / 255, slightly, Protocol(round=True, clip=False)).isinf().all()
    with pytest.raises(ValueError, match="leaves nothing"):
        psnr(restored, clean, Protocol(crop=12))
    with pytest.raises(ValueError, match="smaller than SSIM's window"):
        ssim(restored[..., :8], clean[..., :8])
