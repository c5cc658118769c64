"""The shipped restorers do what their cards say, on an image that they have not seen."""

import hashlib
from pathlib import Path

import pytest
import torch

from iptv2_diffusion import IPTV2RestorationPipeline
from iptv2_diffusion.data.degradations import GaussianNoise, MotionBlur, RainStreaks
from iptv2_diffusion.evaluation.restoration_metrics import psnr

ASSETS = Path(__file__).parents[2] / "assets"
# restorer -> degradation and the least gain in dB
SHIPPED = {
    "iptv2-denoise-color": (GaussianNoise(25, 25), 6.0),
    "iptv2-derain-color": (RainStreaks(0.006, 0.006), 3.0),
    "iptv2-deblur-color": (MotionBlur(6, 6), 1.5),
}


def picture(side=152):
    """Shaded discs before a gradient, (1, 3, side, side) in [0, 1], nearly as sharp as a photograph."""
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float32)] * 2, indexing="ij")
    image = torch.stack([0.2 + 0.3 * x / side, 0.4 + 0.1 * y / side, 0.5 - 0.3 * x / side])
    for top, left, radius, colour in ((40, 50, 30, (0.8, 0.2, 0.1)), (100, 90, 40, (0.1, 0.5, 0.3))):
        distance = ((y - top) ** 2 + (x - left) ** 2).sqrt()
        inside = (radius + 0.5 - distance).clamp(0, 1)
        shade = torch.tensor(colour)[:, None, None] * (0.7 + 0.3 * torch.cos(distance / 9))
        image = image * (1 - inside) + shade * inside
    return image[None]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_restorer_brings_an_image_nearer_to_the_truth(name):
    degradation, gain = SHIPPED[name]
    clean, margin = picture(), degradation.margin
    degraded, sigma = degradation(clean, torch.Generator().manual_seed(0))
    clean = clean[..., margin : clean.shape[-2] - margin, margin : clean.shape[-1] - margin]
    pipe = IPTV2RestorationPipeline.from_pretrained(ASSETS / name)
    pipe.set_progress_bar_config(disable=True)
    restored = pipe(degraded[0], sigma=None if sigma is None else float(sigma), output_type="pt").images
    assert psnr(restored, clean).item() > psnr(degraded, clean).item() + gain


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_names_the_weights(name):
    (weights,) = (ASSETS / name / "model").glob("*.safetensors")
    assert weights.stat().st_size < 3e6
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in (ASSETS / name / "README.md").read_text(encoding="utf-8")
