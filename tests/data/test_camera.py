"""Noise of a camera: an exact inverse, the stated variance, a mosaic that keeps what a sensor sees, no colour cast."""

import pytest
import torch

from iptv2_diffusion.data.camera import (
    CameraNoise,
    demosaic,
    draw_camera,
    draw_noise_levels,
    process,
    unprocess,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_processing_inverts_unprocessing_and_keeps_gray():
    camera = draw_camera(8, generator())
    gray = torch.linspace(0.02, 1, 16).expand(8, 3, 2, 16)
    assert torch.allclose(process(unprocess(gray, camera), camera), gray, atol=1e-5)
    soft = 0.5 + 0.1 * torch.rand(8, 3, 4, 4, generator=generator())  # colours that every matrix keeps in [0, 1]
    assert torch.allclose(process(unprocess(soft, camera), camera), soft, atol=1e-5)


def test_noise_levels_follow_the_paper():
    shot, read = draw_noise_levels(20_000, 1e-4, 1.2e-2, generator())
    assert shot.min() >= 1e-4
    assert shot.max() <= 1.2e-2
    residual = read.log() - 2.18 * shot.log() - 1.2
    assert residual.mean().abs() < 0.01
    assert abs(residual.std() - 0.26) < 0.01


def test_variance_grows_with_the_light_on_the_sensor():
    """Without a mosaic, back on the sensor: variance λ_read + λ_shot · y, with one λ_shot for all samples."""
    clean = torch.full((64, 3, 64, 64), 0.5)
    noisy, sigma = CameraNoise(1e-3, 1e-3, mosaic=0)(clean, generator(3))
    assert sigma is None
    same = generator(3)
    camera = draw_camera(64, same)
    shot, read = draw_noise_levels(64, 1e-3, 1e-3, same)
    light, seen = unprocess(clean, camera), unprocess(noisy, camera)
    green = light[:, 1, 0, 0]
    expected = read + shot * green
    measured = (seen - light)[:, 1].flatten(1).var(dim=1)
    assert torch.allclose(measured / expected, torch.ones(64), atol=0.12)  # clipping at 1 removes little
    assert (shot == shot[0]).all()


@pytest.mark.parametrize("pattern", range(4))
def test_demosaicing_keeps_what_was_seen_and_is_exact_on_planes(pattern):
    y, x = torch.meshgrid(torch.arange(10.0), torch.arange(12.0), indexing="ij")
    plane = torch.stack([0.1 + 0.02 * x + 0.01 * y] * 3)  # gray planes have equal gradients in all colours
    assert torch.allclose(demosaic(plane, pattern)[:, 2:-2, 2:-2], plane[:, 2:-2, 2:-2], atol=1e-6)
    noise = torch.rand(3, 10, 12, generator=generator())
    kept = (demosaic(noise, pattern) == noise).sum(dim=0)
    assert (kept == 1).all()  # one colour per pixel
    greens = (demosaic(noise, pattern)[1] == noise[1]).sum()
    assert greens == 60


def test_mosaic_gives_the_noise_a_grain():
    clean = torch.full((32, 3, 32, 32), 0.5)
    correlation = []
    for mosaic in (0.0, 1.0):
        noise = CameraNoise(4e-3, 4e-3, mosaic=mosaic)(clean, generator())[0] - clean
        noise = noise - noise.mean(dim=(2, 3), keepdim=True)
        correlation.append(((noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()).item())
    assert abs(correlation[0]) < 0.03
    assert correlation[1] > 0.1


def test_shapes_range_and_repeatability():
    for channels in (1, 3):
        clean = torch.rand(3, channels, 17, 9, generator=generator())
        a, b = (CameraNoise(1e-4, 1e-2)(clean, generator(1))[0] for _ in range(2))
        assert a.shape == clean.shape
        assert torch.equal(a, b)
        assert a.min() >= 0
        assert a.max() <= 1
