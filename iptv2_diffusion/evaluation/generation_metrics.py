"""Metrics of generated images, with standard errors: Fréchet distances, KID, Inception Score, precision and recall.

    fake, real = (extract_features(extractor, batches)["pool"] for batches in (samples, reference))
    frechet_distance(fake, real)                                    # biased upwards if there are few samples
    frechet_distance_pca(fake, real, components=64), kid(fake, real)      # for few samples
    half_half_floor(real)                                           # distance between two halves of the real images

`feature_extractors.py` has the encoders. torch-fidelity provides the Inception Score, precision and recall. This module
has its own versions of the rest, for these reasons:

- torch-fidelity computes the mean of the Fréchet distance in float32, which is off by 3e-5.
- Its Fréchet distance computes the eigenvalues of a non-symmetric product. This is three times slower and gives complex
  values for singular covariances. Standard errors need many distances to one reference.
- Its KID draws random subsets of equal size.
- It has no sFID, no distance after PCA and no standard errors. torchmetrics does not have them either and does not
  return features.

`tests/evaluation/` compares each function with independent code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

__all__ = [
    "Statistics",
    "frechet_distance",
    "frechet_distance_pca",
    "half_half_floor",
    "half_sample_error",
    "inception_score",
    "kid",
    "mean_kernel",
    "nearest_neighbour_distance",
    "precision_recall",
    "principal_axes",
    "statistics",
]

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

    torch uses MKL's solver on Intel CPUs, with one thread here. With two, the covariance of few images takes 25 times
    as long (18 s against 0.7 s in 1,280 dimensions), and some covariances do not converge. NumPy's solver then replaces
    it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return tuple(torch.linalg.eigh(symmetric)) if vectors else (torch.linalg.eigvalsh(symmetric),)
    except torch.linalg.LinAlgError:
        return tuple(torch.from_numpy(part) for part in np.linalg.eigh(symmetric.numpy(force=True)))
    finally:
        torch.set_num_threads(threads)


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
        raise ValueError(f"KID needs at least 2 images, not {count}")
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
        raise ValueError(f"a standard error needs at least 2 repeats and 4 images, not {repeats} and {len(features)}")
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(features), generator=generator)[: len(features) // 2] for _ in range(repeats)]
    return float(np.std([metric(features[half]) for half in halves]))
