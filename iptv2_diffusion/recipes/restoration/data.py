"""Data of a restoration run: patches, degraded during training or from pairs, and fixed held-out crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from iptv2_diffusion.data import degradations
from iptv2_diffusion.data.camera import CameraNoise
from iptv2_diffusion.data.draws import generator_for
from iptv2_diffusion.data.image_files import Limits
from iptv2_diffusion.data.pairs import find_images, find_pairs
from iptv2_diffusion.data.patches import ImageStore, PatchSampler, transform
from iptv2_diffusion.data.rain import LayeredRain
from iptv2_diffusion.recipes.restoration.config import PHOTOGRAPHS, RestorationConfig
from iptv2_diffusion.training.errors import ConfigError, user_errors


@dataclass(frozen=True)
class Batch:
    """Degraded and clean patches (B, C, P, P) in [0, 1], σ (B,) on the 0–255 scale or None, task (B,) or None."""

    degraded: Tensor
    clean: Tensor
    sigma: Tensor | None
    task: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch with `function` applied to each tensor."""
        return Batch(*(None if value is None else function(value) for value in vars(self).values()))


@dataclass(frozen=True)
class Source:
    """Patches of one task: pairs on the disk, or clean images and their degradation."""

    sampler: PatchSampler
    degradation: degradations.Degradation | None

    @property
    def margin(self) -> int:
        """Number of pixels around a patch that its degradation needs."""
        return 0 if self.degradation is None else self.degradation.margin

    def draw(self, count: int, size: int, generator: torch.Generator) -> Batch:
        """Draw `count` patches of size×size."""
        margin = self.margin
        places = self.sampler.places(torch.rand(count, 3, generator=generator), size + 2 * margin)
        clean, degraded = self.sampler.patches(places, size + 2 * margin)
        codes = torch.randint(8, (count,), generator=generator)
        clean = transform(clean, codes)
        if self.degradation is None:
            return Batch(transform(degraded, codes), clean, None)
        degraded, sigma = self.degradation(clean, generator)
        return Batch(degraded, clean[..., margin : margin + size, margin : margin + size], sigma)


def make_degradation(config: RestorationConfig, names: tuple[str, ...]):
    """Return the degradation for a list of names, with the ranges of the configuration."""
    kinds = {
        "noise": degradations.GaussianNoise,
        "camera_noise": CameraNoise,
        "gaussian_blur": degradations.GaussianBlur,
        "motion_blur": degradations.MotionBlur,
        "rain": degradations.RainStreaks,
        "layered_rain": LayeredRain,
        "jpeg": degradations.JPEGCompression,
    }
    steps = [kinds[name](*getattr(config, name)) for name in names]
    if config.apply_probability < 1:
        steps = [degradations.Sometimes(step, config.apply_probability) for step in steps]
    return steps[0] if len(steps) == 1 else degradations.Sequential(*steps)


def make_sources(config: RestorationConfig, data: str, split: str, accelerator: Accelerator) -> list[Source]:
    """Return the patches of each task of the run, from `data`."""
    if not Path(data).expanduser().is_dir():
        fetch = ", or fetch the photographs: python data/photographs/fetch.py" if data.startswith(PHOTOGRAPHS) else ""
        raise ConfigError(f"{data} is not a folder; set --data to your folder{fetch}")

    def store(files, scales=(1.0,)):
        return ImageStore(
            files, config.cache_dir, config.channels, scales, accelerator.print, Limits(config.max_pixels)
        )

    with user_errors(OSError, ValueError), accelerator.local_main_process_first():
        if config.layout != "clean":
            pairs = find_pairs(config.layout, data, split)
            sampler = PatchSampler(
                store([pair.clean for pair in pairs]), store([pair.degraded for pair in pairs]), config.prefer_texture
            )
            return [Source(sampler, None)]
        scales = config.scales if split == "train" else (1.0,)
        sampler = PatchSampler(store(find_images(data), scales), None, config.prefer_texture)
        tasks = [tuple(task.split("+")) for task in config.tasks] or [config.degradations]
        return [Source(sampler, make_degradation(config, names)) for names in tasks]


def make_heldout(config: RestorationConfig, accelerator: Accelerator) -> dict[str, Batch]:
    """Return held-out crops by kind; empty without held-out data."""
    batches: dict[str, Batch] = {}
    if config.heldout is None:
        return batches
    for index, source in enumerate(make_sources(config, config.heldout, "test", accelerator)):
        found = heldout_batches(source, config.heldout_images, config.heldout_size, config.heldout_sigmas, config.seed)
        for name, batch in found.items():
            count = len(batch.clean)
            if config.tasks:
                sigma = torch.zeros(count) if batch.sigma is None else batch.sigma
                batch = replace(batch, task=torch.full((count,), index), sigma=sigma)
            batches[f"{config.tasks[index]}_{name}" if config.tasks else name] = batch
    if not batches:
        raise ConfigError(
            f"no image of {config.heldout} is large enough for held-out crops of {config.heldout_size}; choose a "
            "smaller heldout_size, or heldout none"
        )
    return batches


@torch.no_grad()
def heldout_batches(source: Source, count: int, size: int, sigmas: Sequence[float], seed: int) -> dict[str, Batch]:
    """Return centre crops of the first `count` held-out images, degraded once, or once per σ if it is noise."""
    sampler, degradation, margin = source.sampler, source.degradation, source.margin
    whole = size + 2 * margin
    places = []
    for item, image in enumerate(sampler.clean.images[:count]):
        if min(image.shape[:2]) >= whole:
            places.append((item, (image.shape[0] - whole) // 2, (image.shape[1] - whole) // 2))
    if not places:
        return {}
    clean, degraded = sampler.patches(places, whole)
    if degradation is None:
        return {"pairs": Batch(degraded, clean, None)}
    kinds = None
    if isinstance(degradation, degradations.GaussianNoise):
        kinds = {f"sigma{s:g}": degradations.GaussianNoise(s, s) for s in sigmas}
    batches = {}
    for name, kind in (kinds or {type(degradation).__name__.lower(): degradation}).items():
        noisy, sigma = kind(clean, generator_for(seed, "heldout", name))
        batches[name] = Batch(noisy, clean[..., margin : whole - margin, margin : whole - margin], sigma)
    return batches
