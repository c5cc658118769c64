"""The options of the trainings whose data are images or latents of images: latent diffusion and the VAE."""

from __future__ import annotations

from dataclasses import dataclass

from iptv2_diffusion.training.options import TrainingConfig, option


@dataclass(frozen=True, kw_only=True)
class ImageConfig(TrainingConfig):
    """A training on the images of a folder, of archives or of a data set on the Hub."""

    data: str = option("data/emoji64", "folder of images, parquet shards, or a name on the Hub", group="data")
    train_split: str = option("train", "split to train on", group="data")
    heldout_split: str | None = option(
        None, "split for the held-out metrics; none: heldout_fraction of train_split", group="data"
    )
    heldout_fraction: float = option(
        0.02, "fraction of train_split that is kept for the held-out metrics", group="data", at_least=0, below=1
    )
    image_column: str | None = option(None, "column with the images; none: find it", group="data")
    revision: str | None = option(None, "revision of a data set on the Hub: a branch, tag or commit", group="data")
    resolution: int | tuple[int, int] = option(
        64, "image size in pixels: one number, or height,width", group="data", at_least=1
    )
    random_flip: bool = option(True, "mirror half of the images", group="data")
    strict: bool = option(False, "stop at a corrupt image instead of skipping it", group="data", free=True)

    @property
    def size(self) -> tuple[int, int]:
        """Image (height, width)."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)
