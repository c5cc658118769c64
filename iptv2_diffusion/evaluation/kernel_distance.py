"""KID of the averaged weights during training, drawn and encoded by all processes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from iptv2_diffusion.data.draws import DataOrder, derive_seed
from iptv2_diffusion.data.images import ImageTensors
from iptv2_diffusion.evaluation.generation_metrics import FeatureExtractor, half_sample_error, kid, mean_kernel
from iptv2_diffusion.training.signals import no_interruption

BATCH_SIZE = 32  # images that a process draws or encodes together


class KernelDistance:
    """KID (Bińkowski et al. 2018) of samples to held-out images, with its standard error over the samples.

    Sample i has its own seed and the class of a held-out image, so that classes are as frequent as among those; the
    figures depend on the number of processes by rounding alone. KID, since it is unbiased: a Fréchet distance of some
    hundred images is mostly bias.

    Args:
        images: held-out images, to which the distance is.
        extractor: an encoder of `evaluation/generation_metrics.py`.
        count: how many samples, at least 4.
        seed: of labels and noise.
        labelled: whether samples have classes.
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
        """{"kid": …, "kid_error": …} of samples of `pipeline`, the same on every process; `sampling` goes to it.

        `interrupt` is called before every batch, equally often on each process.
        """
        if self._reference is None:
            indices = self._indices
            features = self._gather(
                len(indices), lambda items: self._images.pixels([indices[i] for i in items]), interrupt
            )
            self._reference = features, mean_kernel(features)

        def draw(items: list[int]) -> Tensor:
            seeds = [torch.Generator().manual_seed(derive_seed(self.seed, "kid", i)) for i in items]
            if self._labels is None:
                images = pipeline(num_images_per_label=len(items), generator=seeds, output_type="pt", **sampling).images
            else:
                labels = [self._labels[i] for i in items]
                images = pipeline(labels, generator=seeds, output_type="pt", **sampling).images
            return images.mul(255).round().to(torch.uint8)

        pipeline.set_progress_bar_config(disable=True)
        samples, (reference, within) = self._gather(self.count, draw, interrupt), self._reference
        error = half_sample_error(lambda features: kid(features, reference, within), samples)
        return {"kid": kid(samples, reference, within), "kid_error": error}

    def _gather(self, count: int, images: Callable[[list[int]], Tensor], interrupt: Callable[[], None]) -> Tensor:
        """Features (count, D) of `images(items)`, shared by the processes.

        All call `images` equally often, as a sharded model needs: what lies beyond the end repeats and is dropped.
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
