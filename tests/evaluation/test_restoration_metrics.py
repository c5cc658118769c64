"""PSNR, SSIM and LPIPS against independent code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from torchmetrics.functional.image import peak_signal_noise_ratio

from iptv2_diffusion.evaluation.restoration_metrics import LPIPS, Protocol, luma, psnr, ssim


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
    as_matlab = (luma(slightly.double().mul(255).round() / 255) * 255).round() / 255  # rgb2ycbcr of 8 bits gives 8 bits
    torch.testing.assert_close(Protocol(channels="y", round=True).prepare(slightly), as_matlab, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="leaves nothing"):
        psnr(restored, clean, Protocol(crop=12))
    with pytest.raises(ValueError, match="smaller than SSIM's window"):
        ssim(restored[..., :8], clean[..., :8])


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS


@pytest.fixture
def squeezenet(tmp_path, monkeypatch):
    """A SqueezeNet with random weights at the path where torchvision looks for the trained one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path / "hub/checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return network.features.eval()


@torch.no_grad()
def test_lpips_is_the_weighted_distance_of_normalised_features(squeezenet):
    clean = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    restored = (clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    lins = Path(torchmetrics.functional.image.lpips.__file__).parent / "lpips_models/squeeze.pth"
    weights = torch.load(lins, map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((2 * i - 1 - shift[:, None, None]) / scale[:, None, None] for i in (restored, clean))
    expected, last = torch.zeros(2), (1, 4, 7, 9, 10, 11, 12)
    for index, layer in enumerate(squeezenet):
        a, b = layer(a), layer(b)
        if index in last:
            weight = weights[f"lin{last.index(index)}.model.1.weight"][0]
            difference = a / (a**2).sum(1, keepdim=True).sqrt() - b / (b**2).sum(1, keepdim=True).sqrt()
            expected += (difference**2 * weight).sum(1).mean((1, 2))
    measured = LPIPS("squeeze")(restored, clean)
    assert measured.min() > 1e-4
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(LPIPS("squeeze")(clean, clean), torch.zeros(2))


def test_lpips_without_its_weights_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"LPIPS needs .*alexnet-owt-7be5be79.pth; download it from https://"):
        LPIPS()
