"""PSNR, SSIM and LPIPS of restored images with an explicit protocol: colour or luma, border, clipping, rounding.

PSNR and SSIM are computed in float64; torchmetrics' PSNR rounds to float32. `tests/evaluation/` compares all three with
independent code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["LPIPS", "Protocol", "luma", "psnr", "ssim"]

LPIPS_NETWORKS = {
    "alex": "AlexNet_Weights",
    "vgg": "VGG16_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}


@dataclass(frozen=True)
class Protocol:
    """Preprocessing of two images before they are compared.

    Attributes:
        channels: "rgb" compares all channels, "y" compares the luma of ITU-R BT.601. Deraining papers report "y" with
            `round`, because MATLAB's rgb2ycbcr takes and returns 8 bits.
        crop: number of pixels excluded at each border.
        clip: whether to clip the images to [0, 1].
        round: whether to quantise both images to 8 bits.
    """

    channels: str = "rgb"
    crop: int = 0
    clip: bool = True
    round: bool = False

    def __post_init__(self) -> None:
        if self.channels not in ("rgb", "y"):
            raise ValueError(f"channels is {self.channels!r}; it must be 'rgb' or 'y'")
        if self.crop < 0:
            raise ValueError(f"crop is {self.crop}; it must not be negative")

    def prepare(self, image: Tensor) -> Tensor:
        """Preprocess images (B, C, H, W) in [0, 1] -> (B, C or 1, H - 2·crop, W - 2·crop) float64.

        Raises:
            ValueError: `crop` leaves no pixels.
        """
        image = image.double()
        if self.clip:
            image = image.clamp(0, 1)
        if self.round:
            image = (image * 255).round() / 255
        if self.channels == "y" and image.shape[1] == 3:
            image = luma(image)
            image = (image * 255).round() / 255 if self.round else image
        if 2 * self.crop >= min(image.shape[-2:]):
            raise ValueError(f"cropping {self.crop} pixels at each side leaves nothing of {tuple(image.shape[-2:])}")
        return image[..., self.crop : image.shape[-2] - self.crop, self.crop : image.shape[-1] - self.crop]

    def __str__(self) -> str:
        parts = [self.channels.upper(), f"border {self.crop}", "clipped" if self.clip else "not clipped"]
        return ", ".join([*parts, "rounded to 8 bits" if self.round else "not rounded", "float64"])


def psnr(restored: Tensor, clean: Tensor, protocol: Protocol = Protocol()) -> Tensor:
    """Peak signal-to-noise ratio of each image (B, C, H, W) in [0, 1], over all channels: (B,) float64 in dB.

    Equal images give infinity.
    """
    error = protocol.prepare(restored) - protocol.prepare(clean)
    return -10 * error.square().flatten(1).mean(dim=1).log10()


def ssim(restored: Tensor, clean: Tensor, protocol: Protocol = Protocol()) -> Tensor:
    """Structural similarity of each image (B, C, H, W) in [0, 1] (Wang et al. 2004, equation 13): (B,) float64.

    The window is Gaussian with 11 pixels and σ = 1.5. The result is the mean over the channels. As in the paper and in
    restoration papers, only windows inside the image count. torchmetrics gives the same numbers but convolves with the
    whole window. This takes 10 times as long in float64, longer than most restorers.

    Raises:
        ValueError: the images are smaller than the window.
    """
    a, b = protocol.prepare(restored), protocol.prepare(clean)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"images of {tuple(a.shape[-2:])} are smaller than SSIM's window of 11 pixels")
    mean_a, mean_b = window_mean(a), window_mean(b)
    var_a, var_b = window_mean(a * a) - mean_a**2, window_mean(b * b) - mean_b**2
    covariance = window_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2  # K₁ and K₂ of the paper, for values in [0, 1]
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(dim=1)


def window_mean(image: Tensor) -> Tensor:
    """Mean over SSIM's Gaussian window, rows then columns: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    weights = torch.exp(-0.5 * ((torch.arange(11, dtype=image.dtype) - 5) / 1.5) ** 2)
    weights = (weights / weights.sum()).tolist()
    height, width = image.shape[-2] - 10, image.shape[-1] - 10
    image = sum(weight * image[..., i : i + height, :] for i, weight in enumerate(weights))
    return sum(weight * image[..., i : i + width] for i, weight in enumerate(weights))


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018): (B, 3, H, W) pairs -> (B,), 0 for equal images.

    torchmetrics contains the weights of the linear layers. The weights of the feature network must be in the cache of
    torch.hub. This class downloads nothing.

    Args:
        network: feature network: "alex" (which papers report), "vgg" or "squeeze".

    Raises:
        FileNotFoundError: the weights are not in the cache. The message names the file and its URL.
    """

    def __init__(self, network: Literal["alex", "vgg", "squeeze"] = "alex") -> None:
        super().__init__()
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
        from torchvision.models import get_weight

        url = get_weight(f"{LPIPS_NETWORKS[network]}.DEFAULT").url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if not path.is_file():
            raise FileNotFoundError(f"LPIPS needs {path}; download it from {url}")
        torch.load(path, map_location="cpu", weights_only=True)  # torchvision would unpickle any file
        self.metric = LearnedPerceptualImagePatchSimilarity(network, normalize=True)

    def forward(self, restored: Tensor, clean: Tensor, protocol: Protocol = Protocol()) -> Tensor:
        """Compare restored and clean images (B, 3, H, W) in [0, 1] -> (B,).

        The protocol must compare RGB. Images are always clipped.
        """
        pairs = zip(protocol.prepare(restored).clamp(0, 1).float(), protocol.prepare(clean).float(), strict=True)
        return torch.stack([self.metric(a[None], b[None]) for a, b in pairs])


def luma(image: Tensor) -> Tensor:
    """Luma (ITU-R BT.601, as MATLAB's rgb2ycbcr): RGB (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in [16/255, 235/255]."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=image.dtype, device=image.device) / 255
    return (image * weights[:, None, None]).sum(dim=1, keepdim=True) + 16 / 255
