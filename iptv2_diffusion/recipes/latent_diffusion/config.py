"""The options of a latent-diffusion run: what `train_ldm.py` trains by and `cache_latents.py` encodes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import TrainingConfig, option


@dataclass(kw_only=True)
class LDMConfig(TrainingConfig):
    """A latent-diffusion run."""

    plan: bool = option(
        False, "tell what the run needs (memory, speed, time) after three steps on noise, and stop", free=True
    )
    data: str = option(
        "data/emoji64",
        "folder of images (sub-folders = classes), parquet or tar shards; or Hub name",
        group="data",
    )
    train_split: str = option("train", "split to train on", group="data")
    heldout_split: str | None = option(None, "split for the held-out loss; none: heldout_fraction", group="data")
    heldout_fraction: float = option(0.02, "share of train_split kept for the held-out loss", group="data")
    image_column: str | None = option(None, "none: found by itself", group="data")
    label_column: str | None = option(
        None, "none: found by itself, if there is one; ignore: train without labels", group="data"
    )
    revision: str | None = option(None, "of a data set on the Hub", group="data")
    resolution: int | tuple[int, int] = option(64, "image size: one number, or height,width", group="data")
    random_flip: bool = option(True, "mirror half of the images", group="data")
    class_balance: float = option(
        0.0, "0: classes as often as the data has them; 1: all equally often; between: by n^(1 - balance)", group="data"
    )
    crops: int = option(1, "views of an image: 1: the centre crop; more: random crops beside it", group="data")
    streaming: bool = option(
        False, "read images from the Hub or from shards as they are needed, without copying them", group="data"
    )
    shuffle_block: int = option(4096, "of streaming: images held in memory to be shuffled", group="data")
    strict: bool = option(False, "fail at a corrupt image instead of leaving it out", group="data", free=True)

    vae: str = option("assets/vae-emoji64", "folder or Hub name of any diffusers VAE", group="latents")
    vae_subfolder: str | None = option(None, "such as `vae` inside a pipeline", group="latents")
    cache_latents: bool = option(True, "encode once into cache_dir; false: on the fly", group="latents")
    cache_dir: str = option("~/.cache/iptv2-diffusion/latents", "folder of caches", group="latents", free=True)
    cache_dtype: Literal["float16", "float32"] = option("float16", "of cached latents", group="latents")
    encode_precision: Literal["float32", "bfloat16", "auto"] = option(
        "float32", "the VAE's, in encoding; auto: the faster on this machine", group="latents"
    )
    encode_batch_size: int = option(64, "images (times their views) encoded at a time", group="latents", free=True)
    cache_shard_images: int = option(
        2048, "images a file of the cache: what a kill costs, and what processes share out", group="latents", free=True
    )

    model: str = option("emoji64", "preset (iptv2-s, dit-b-2 ...), config.json, or saved model folder", group="model")
    model_overrides: dict = option({}, 'JSON, such as {"channels": 64}', group="model")  # noqa: RUF009
    num_classes: int | None = option(None, "none: from the data; more leaves room", group="model")

    objective: Literal["epsilon", "v_prediction", "flow"] = option("epsilon", "what is predicted", group="objective")
    learned_variance: bool = option(False, "learned-range variance, as ADM and DiT", group="objective")
    timestep_sampling: Literal["uniform", "logit_normal"] = option("uniform", "of training", group="objective")
    logit_mean: float = option(0.0, "of logit_normal", group="objective")
    logit_std: float = option(1.0, "of logit_normal", group="objective")
    stratified_timesteps: bool = option(True, "spread a batch's timesteps evenly", group="objective")
    flow_shift: float = option(
        1.0, "of the flow's noise levels in training and sampling, towards noise if above 1", group="objective"
    )
    timestep_shift: float = option(
        1.0, "in training alone, any objective: sqrt(pixels / pixels that the recipe was made for)", group="objective"
    )
    min_snr_gamma: float | None = option(None, "min-SNR weighting, 5 is usual; none: off", group="objective")
    label_dropout: float = option(0.1, "share of samples without label, for guidance", group="objective")

    align_target: str | None = option(
        None, "module:function that makes the features to align with (REPA); none: off", group="alignment"
    )
    align_stage: int = option(1, "stage whose tokens are aligned, from 0; 2 is the bottleneck of 5", group="alignment")
    align_weight: float = option(0.5, "of the alignment in the loss", group="alignment")
    align_hidden: int = option(2048, "width of the projection", group="alignment")

    heldout_samples: int = option(512, "at most, for the held-out loss", group="results", free=True)
    preview_classes: int = option(10, "rows of a sheet, at most", group="results", free=True)
    preview_per_class: int = option(8, "pictures in a row", group="results", free=True)
    sample_steps: int = option(30, "sampling steps of sheets and KID", group="results", free=True)
    guidance_scale: float = option(
        3.0, "classifier-free guidance of sheets and KID; 1: none", group="results", free=True
    )
    kid_samples: int = option(0, "samples for KID against the held-out images; 0: none", group="results", free=True)
    kid_every: int = option(
        5000,
        "steps between KIDs, a multiple of eval_every (whose 0: no KID); also after the last",
        group="results",
        free=True,
    )
    kid_extractor: str = option(
        "efficientnet-lite0", "its encoder; or inception, efficientnet-lite0@64, dinov2", group="results", free=True
    )
    inception_weights: str | None = option(
        None, "local copy of Inception's weights; none: downloaded", group="results", free=True
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "of the denoiser in the saved pipeline", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.label_dropout < 1:
            raise ConfigError(f"label_dropout is {self.label_dropout}; it must lie in [0, 1)")
        if not 0 <= self.class_balance <= 1:
            raise ConfigError(f"class_balance is {self.class_balance}; it must lie in [0, 1]")
        if self.class_balance and self.streaming:
            raise ConfigError("class_balance needs the labels of all images beforehand: leave out streaming")
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(f"heldout_fraction is {self.heldout_fraction}; it must lie in [0, 1)")
        self.require_positive("align_hidden", "cache_shard_images", "crops", "encode_batch_size", "shuffle_block")
        if self.streaming:
            self.cache_latents = False
        self.require_positive("resolution", "heldout_samples", "preview_classes", "preview_per_class", "sample_steps")
        if not self.align_weight > 0:
            raise ConfigError(f"align_weight is {self.align_weight}; it must be positive (align_target none: off)")
        if self.kid_samples:
            self.require_positive("kid_every")
            if self.kid_samples < 4 or (self.eval_every and self.kid_every % self.eval_every):
                raise ConfigError(
                    f"kid_samples is {self.kid_samples}, kid_every {self.kid_every}, eval_every {self.eval_every}: "
                    "give at least 4 samples and a kid_every that is a multiple of eval_every; kid_samples 0: none"
                )
        if self.learned_variance and self.objective == "flow":
            raise ConfigError("learned_variance goes with epsilon or v_prediction; set objective or leave it out")

    @property
    def size(self) -> tuple[int, int]:
        """Image (height, width)."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)
