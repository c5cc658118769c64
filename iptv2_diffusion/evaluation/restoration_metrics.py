"""PSNR, SSIM and LPIPS of restored images, with the protocol stated: colour or luma, border, clipping, rounding.

PSNR and SSIM in float64 (torchmetrics' own PSNR rounds to float32); `tests/evaluation/` holds all to independent code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

__all__ = ["LPIPS", "Protocol", "luma", "psnr", "ssim"]

LPIPS_NETWORKS = {
    "alex": "AlexNet_Weights",
    "vgg": "VGG16_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}


@dataclass(frozen=True)
class Protocol:
    """How two images are made ready to be compared.

    Attributes:
        channels: "rgb" compares all channels, "y" the luma of ITU-R BT.601. Deraining papers' figures are "y" with
            `round`: MATLAB's rgb2ycbcr takes and gives 8 bits.
        crop: pixels left out at each border.
        clip: clip the restored image to [0, 1].
        round: quantise both to 8 bits.
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
        """(B, C, H, W) on [0, 1] -> what is compared, float64."""
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
    """PSNR of each image (B, C, H, W) on [0, 1] in dB, over all channels together: (B,) of float64; inf if equal."""
    error = protocol.prepare(restored) - protocol.prepare(clean)
    return -10 * error.square().flatten(1).mean(dim=1).log10()


def ssim(restored: Tensor, clean: Tensor, protocol: Protocol = Protocol()) -> Tensor:
    """SSIM of each image (Wang et al. 2004): Gaussian window of 11 pixels, σ 1.5; mean over the channels: (B,).

    Only windows inside the image count, as in the original and in restoration papers; torchmetrics alone would count
    those over its mirrored border too.
    """
    a, b = protocol.prepare(restored), protocol.prepare(clean)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"images of {tuple(a.shape[-2:])} are smaller than SSIM's window of 11 pixels")
    _, similarity = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    return similarity[..., 5:-5, 5:-5].flatten(1).mean(dim=1)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018) of restored and clean images (B, 3, H, W): (B,), 0 if equal.

    torchmetrics brings the weights that compare features; those of the network that makes them must lie where
    torch.hub keeps its downloads. Nothing is downloaded here.

    Args:
        network: "alex", which papers report, "vgg" or "squeeze".

    Raises:
        FileNotFoundError: its weights are not there; the message names the file and where to get it.
    """

    def __init__(self, network: Literal["alex", "vgg", "squeeze"] = "alex") -> None:
        super().__init__()
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
        from torchvision.models import get_weight

        url = get_weight(f"{LPIPS_NETWORKS[network]}.DEFAULT").url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if not path.is_file():
            raise FileNotFoundError(f"LPIPS needs {path}, which can be had at {url}")
        torch.load(path, map_location="cpu", weights_only=True)  # torchvision would unpickle whatever lies there
        self.metric = LearnedPerceptualImagePatchSimilarity(network, normalize=True)

    def forward(self, restored: Tensor, clean: Tensor, protocol: Protocol = Protocol()) -> Tensor:
        """`protocol` crops and rounds; it must be in colour, and always clips."""
        pairs = zip(protocol.prepare(restored).clamp(0, 1).float(), protocol.prepare(clean).float(), strict=True)
        return torch.stack([self.metric(a[None], b[None]) for a, b in pairs])


def luma(image: Tensor) -> Tensor:
    """Luma of an RGB image (B, 3, H, W) on [0, 1] by rgb2ycbcr's weights: (B, 1, H, W) on [16/255, 235/255]."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=image.dtype, device=image.device) / 255
    return (image * weights[:, None, None]).sum(dim=1, keepdim=True) + 16 / 255
