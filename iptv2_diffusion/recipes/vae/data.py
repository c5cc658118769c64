"""Data of a VAE run: images, mirrored or not."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from iptv2_diffusion.data.image_files import Limits
from iptv2_diffusion.data.images import ImageTensors
from iptv2_diffusion.recipes.vae.config import VAEConfig
from iptv2_diffusion.training.errors import ConfigError, user_errors
from iptv2_diffusion.training.image_splits import load_splits


def load_images(config: VAEConfig, accelerator: Accelerator) -> tuple[ImageTensors, ImageTensors]:
    """Return training and held-out images."""
    train, heldout = load_splits(config, accelerator, source=config.data, label_column="ignore")
    if heldout is None:
        raise ConfigError(f"{config.data} has {len(train)} image; at least two are needed, one of them held out")
    if config.dry_run:
        train, heldout = (d.select(range(min(len(d), 4 * config.batch_size))) for d in (train, heldout))
    with user_errors(OSError, ValueError):
        limits = Limits(config.max_pixels)
        images = [ImageTensors(d, size=config.size, strict=config.strict, limits=limits) for d in (train, heldout)]
        for part in images:
            part.valid_indices()
    return images[0], images[1]


class FlippedImages:
    """Pixels of readable images by (item, flip), mirrored if flip is true."""

    def __init__(self, images: ImageTensors) -> None:
        self.images, self.readable = images, images.valid_indices()

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        return self.images.get(self.readable[key[0]], flip=key[1])["pixel_values"]
