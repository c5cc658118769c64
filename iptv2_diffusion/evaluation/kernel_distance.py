"""KID of the exponential moving average during training, with sampling and encoding shared by all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from iptv2_diffusion.data.draws import DataOrder, derive_seed
from iptv2_diffusion.data.images import ImageTensors
from iptv2_diffusion.evaluation.feature_extractors import FeatureExtractor
from iptv2_diffusion.evaluation.generation_metrics import (
    half_sample_error,
    kid,
    mean_kernel,
)
from iptv2_diffusion.non_finite import NonFiniteImageError
from iptv2_diffusion.training.signals import no_interruption

BATCH_SIZE = 32  # images that a process samples or encodes together


class KernelDistance:
    """KID (Bińkowski et al. 2018) between samples and held-out images, with its standard error over the samples.

    KID is unbiased, whereas a Fréchet distance of a few hundred images is mostly bias. Sample i has its own seed and
    the class of a held-out image, so that the class frequencies agree. The result depends on the number of processes
    only by rounding.

    Args:
        images: held-out images.
        extractor: encoder of `evaluation/feature_extractors.py`.
        accelerator: accelerator of the training.
        count: number of samples, at least 4.
        seed: seed of the labels and the noise.
        labelled: whether the model is class-conditional.
    """

    def __init__(
        self,
        images: ImageTensors,
        extractor: FeatureExtractor,
        accelerator: Accelerator,
        *,
        count: int,
        seed: int,
        labelled: bool,
    ) -> None:
        self.extractor, self.accelerator, self.count, self.seed = extractor, accelerator, count, seed
        self._images, self._indices = images, images.valid_indices()
        items = DataOrder(len(self._indices), seed).items(0, count).tolist()
        self._labels = [images.labels[self._indices[i]] for i in items] if labelled else None
        self._reference: tuple[Tensor, float] | None = None

    def __call__(
        self, pipeline: Any, interrupt: Callable[[], None] = no_interruption, **sampling: Any
    ) -> dict[str, float]:
        """Sample from `pipeline` and return {"kid": …, "kid_error": …}, equal on every process.

        Args:
            pipeline: pipeline of the model to evaluate.
            interrupt: function that is called before every batch, equally often on each process.
            **sampling: arguments of the pipeline's call.
        """
        if self._reference is None:
            indices = self._indices
            features = self._gather(
                len(indices), lambda items: self._images.pixels([indices[i] for i in items]), interrupt
            )
            self._reference = features, mean_kernel(features)

        def draw(items: list[int]) -> Tensor:
            seeds = [torch.Generator().manual_seed(derive_seed(self.seed, "kid", i)) for i in items]
            given = {"num_images_per_label": len(items)}
            if self._labels is not None:
                given = {"class_labels": [self._labels[i] for i in items]}
            try:
                images = pipeline(**given, generator=seeds, output_type="pt", **sampling).images
            except NonFiniteImageError as error:  # broken images are gray and count
                print(f"KID: {error}", flush=True)
                images = error.images
            return images.mul(255).round().to(torch.uint8)

        pipeline.set_progress_bar_config(disable=True)
        samples, (reference, within) = self._gather(self.count, draw, interrupt), self._reference
        error = half_sample_error(lambda features: kid(features, reference, within), samples)
        return {"kid": kid(samples, reference, within), "kid_error": error}

    def _gather(self, count: int, images: Callable[[list[int]], Tensor], interrupt: Callable[[], None]) -> Tensor:
        """Encode `images(items)` for all items, distributed over the processes: (count, D) on every process.

        A sharded model requires that all processes call `images` equally often. Processes without a batch of their own
        repeat one, and its result is dropped.
        """
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        batches = [range(start, min(start + BATCH_SIZE, count)) for start in range(0, count, BATCH_SIZE)]
        own = []
        for start in range(0, len(batches), processes):
            interrupt()
            number = start + process
            features = self.extractor(images(list(batches[number % len(batches)])))
            if number < len(batches):
                own.append((number, features))
        gathered = gather_object(own) if processes > 1 else own
        return torch.cat([features for _, features in sorted(gathered, key=lambda item: item[0])])
