"""The options of a VAE run: what `train_vae.py` trains by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import TrainingConfig, option


@dataclass(kw_only=True)
class VAEConfig(TrainingConfig):
    """A VAE run."""

    output_dir: str = option("runs/vae", "folder for checkpoints, logs and the result", free=True)

    data: str = option("data/emoji64", "folder of images, parquet, or Hub name", group="data")
    train_split: str = option("train", "split to train on", group="data")
    heldout_split: str | None = option("heldout", "split for the PSNR; none: heldout_fraction", group="data")
    heldout_fraction: float = option(0.02, "share of train_split kept for the PSNR", group="data")
    image_column: str | None = option(None, "none: found by itself", group="data")
    revision: str | None = option(None, "of a data set on the Hub", group="data")
    resolution: int | tuple[int, int] = option(64, "image size: one number, or height,width", group="data")
    random_flip: bool = option(True, "mirror half of the images", group="data")
    strict: bool = option(False, "fail at a corrupt image instead of leaving it out", group="data", free=True)

    latent_channels: int = option(4, "channels of the latents", group="model")
    block_out_channels: tuple[int, ...] = option((32, 32, 112), "width of each level, full size first", group="model")
    layers_per_block: int = option(1, "residual blocks a level (one more in the decoder)", group="model")
    norm_num_groups: int = option(8, "of group normalisation; divides every width", group="model")
    mid_block_attention: bool = option(False, "attention at the latents' size", group="model")

    l1_weight: float = option(1.0, "of the absolute error", group="objective")
    mse_weight: float = option(4.0, "of the squared error", group="objective")
    kl_weight: float = option(1e-4, "of the KL divergence (mean over the latents' elements)", group="objective")

    heldout_samples: int = option(
        128, "at most, for the PSNR while training; the last is over all", group="results", free=True
    )
    preview_images: int = option(
        12, "columns of the picture: originals over reconstructions", group="results", free=True
    )
    statistics_samples: int = option(4096, "training images for latents_mean and _std", group="results", free=True)
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", "of the result", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        self.require_positive("resolution", "latent_channels", "layers_per_block", "norm_num_groups")
        self.require_positive("heldout_samples", "preview_images", "statistics_samples")
        if not self.block_out_channels or any(c < 1 or c % self.norm_num_groups for c in self.block_out_channels):
            raise ConfigError(
                f"block_out_channels is {self.block_out_channels}; each must be a multiple of norm_num_groups "
                f"({self.norm_num_groups})"
            )
        if self.heldout_split is None and not 0 < self.heldout_fraction < 1:
            raise ConfigError(
                f"heldout_fraction is {self.heldout_fraction}; without heldout_split it must lie in (0, 1)"
            )
        if any(side % self.downscale for side in self.size):
            near = [max(1, round(side / self.downscale)) * self.downscale for side in self.size]
            raise ConfigError(
                f"resolution {self.size[0]}x{self.size[1]} is not a multiple of the VAE's {self.downscale}; "
                f"use {near[0]},{near[1]}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Image (height, width)."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)

    @property
    def downscale(self) -> int:
        """Side of an image over side of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)
