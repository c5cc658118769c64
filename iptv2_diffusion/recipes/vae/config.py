"""The options of a VAE run, for `train_vae.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.image_options import ImageConfig
from iptv2_diffusion.training.options import option


@dataclass(frozen=True, kw_only=True)
class VAEConfig(ImageConfig):
    """A VAE run."""

    output_dir: str = option("runs/vae", "folder for checkpoints, logs and the result", free=True)

    heldout_split: str | None = option(
        "heldout", "split for the held-out PSNR; none: heldout_fraction of train_split", group="data"
    )

    latent_channels: int = option(4, "number of channels of the latents", group="model", at_least=1)
    block_out_channels: tuple[int, ...] = option(
        (32, 32, 112), "channels of each resolution level, full size first", group="model", at_least=1, nonempty=True
    )
    layers_per_block: int = option(
        1, "number of residual blocks per level (the decoder has one more)", group="model", at_least=1
    )
    norm_num_groups: int = option(
        8, "number of groups of the normalisation; it divides the channels of every level", group="model", at_least=1
    )
    mid_block_attention: bool = option(False, "add attention at the resolution of the latents", group="model")

    l1_weight: float = option(1.0, "weight of the absolute error", group="objective")
    mse_weight: float = option(4.0, "weight of the squared error", group="objective")
    kl_weight: float = option(
        1e-4, "weight of the KL divergence (its mean over the elements of the latents)", group="objective"
    )

    heldout_samples: int = option(
        128,
        "largest number of images for the held-out PSNR during training; the final PSNR uses all images",
        group="results",
        free=True,
        at_least=1,
    )
    preview_images: int = option(
        12, "number of images in a preview (originals above reconstructions)", group="results", free=True, at_least=1
    )
    statistics_samples: int = option(
        4096, "number of training images for latents_mean and latents_std", group="results", free=True, at_least=1
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", "precision of the saved VAE", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ConfigError(
                f"block_out_channels is {','.join(map(str, self.block_out_channels))}; each must be a multiple of "
                f"norm_num_groups {self.norm_num_groups}"
            )
        if self.heldout_split is None and self.heldout_fraction == 0:
            raise ConfigError(
                "heldout_fraction is 0 and heldout_split is none; set one, because the PSNR needs held-out images"
            )
        if any(side % self.downscale for side in self.size):
            near = [max(1, round(side / self.downscale)) * self.downscale for side in self.size]
            raise ConfigError(
                f"resolution {self.size[0]}x{self.size[1]} is not a multiple of the VAE's factor {self.downscale}; "
                f"use {near[0]},{near[1]}"
            )

    @property
    def downscale(self) -> int:
        """Ratio of an image's side to its latents' side."""
        return 2 ** (len(self.block_out_channels) - 1)
