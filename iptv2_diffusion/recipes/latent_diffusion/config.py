"""The options of a latent-diffusion run, for `train_ldm.py` and `cache_latents.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.image_options import ImageConfig
from iptv2_diffusion.training.options import Range, lora_rank_option, option


@dataclass(frozen=True, kw_only=True)
class LDMConfig(ImageConfig):
    """A latent-diffusion run."""

    # Alignment reads tokens inside the model
    not_with_cuda_graphs: ClassVar[tuple[str, ...]] = (*ImageConfig.not_with_cuda_graphs, "align_target")

    plan: bool = option(
        False, "run three steps on noise, print the memory, speed and time that the run needs, and stop", free=True
    )
    data: str = option(
        "data/emoji64",
        "folder of images (sub-folders are classes), parquet or tar shards, published latents, or a name on the Hub",
        group="data",
    )
    label_column: str | None = option(
        None,
        "column with the class labels; none: detect it; ignore: train without labels",
        group="data",
    )
    class_balance: float = option(
        0.0,
        "exponent that favours rare classes: a class of n images is drawn in proportion to n^(1 - class_balance); "
        "0: as often as in the data; 1: all classes equally often",
        group="data",
        within=(0, 1),
    )
    crops: int = option(
        1,
        "number of crops of each image; 1: only the centre crop; more: the centre crop and random crops",
        group="data",
        at_least=1,
    )
    streaming: bool = option(
        False, "read images from the Hub or from shards as they are needed, without copying them", group="data"
    )
    shuffle_block: int = option(
        4096, "number of images of a stream that are kept in memory and shuffled", group="data", at_least=1
    )

    vae: str | None = option(
        None,
        "folder or Hub name of a diffusers VAE; none: that of the pipeline in model, else assets/vae-emoji64",
        group="latents",
    )
    vae_subfolder: str | None = option(None, "subfolder of the VAE, such as `vae` in a pipeline", group="latents")
    cache_latents: bool = option(
        True, "encode all images once, into cache_dir; false: encode them in every step", group="latents"
    )
    cache_dir: str = option("~/.cache/iptv2-diffusion/latents", "folder of latent caches", group="latents", free=True)
    cache_dtype: Literal["float16", "float32"] = option("float16", "precision of cached latents", group="latents")
    encode_precision: Literal["float32", "bfloat16", "auto"] = option(
        "float32", "precision of the VAE's encoder; auto: the faster one on this machine", group="latents"
    )
    encode_batch_size: int = option(
        64, "number of images encoded together (times their crops and flips)", group="latents", free=True, at_least=1
    )
    cache_shard_images: int = option(
        2048,
        "number of images in a shard of the cache; a killed run encodes one shard again, and processes share the work "
        "by shards",
        group="latents",
        free=True,
        at_least=1,
    )

    model: str = option(
        "emoji64",
        "preset (iptv2-s, dit-b-2 ...) or config.json for a new model; folder or Hub name of a saved model or of its "
        "pipeline to fine-tune",
        group="model",
    )
    model_overrides: dict = option(  # noqa: RUF009
        {}, 'arguments of the model to change, as JSON, such as {"channels": 64}', group="model"
    )
    lora_rank: int | None = lora_rank_option()
    num_classes: int | None = option(
        None,
        "number of classes; none: count them in the data; a larger number leaves room for more classes",
        group="model",
        at_least=0,
    )

    objective: Literal["epsilon", "v_prediction", "flow"] | None = option(
        None,
        "training target: noise, velocity, or flow matching; none: that of the pipeline in model, else epsilon",
        group="objective",
    )
    learned_variance: bool | None = option(
        None,
        "learn the variance within a range, as ADM and DiT do; none: that of the saved model in model, else false",
        group="objective",
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = option(
        "uniform", "how timesteps are drawn in training", group="objective"
    )
    logit_mean: float = option(0.0, "mean of logit_normal timesteps", group="objective")
    logit_std: float = option(1.0, "standard deviation of logit_normal timesteps", group="objective", above=0)
    stratified_timesteps: bool = option(True, "spread the timesteps of a batch evenly", group="objective")
    flow_shift: float | None = option(
        None,
        "shift of the flow's noise levels in training and sampling; above 1: towards noise; none: that of the pipeline "
        "in model, else 1",
        group="objective",
        above=0,
    )
    timestep_shift: float = option(
        1.0,
        "shift of the timesteps in training only, for any objective; for larger images use "
        "sqrt(pixels / pixels of the recipe's images)",
        group="objective",
        above=0,
    )
    min_snr_gamma: float | None = option(
        None, "gamma of min-SNR weighting (5 is usual); none: no weighting", group="objective", above=0
    )
    label_dropout: float = option(
        0.1,
        "fraction of samples that are trained without their label, for classifier-free guidance",
        group="objective",
        at_least=0,
        below=1,
    )

    align_target: str | None = option(
        None,
        "module:function that returns the features for representation alignment (REPA); none: no alignment",
        group="alignment",
    )
    align_stage: int = option(
        1,
        "stage whose tokens are aligned, counted from 0; with 5 stages, 2 is the bottleneck",
        group="alignment",
        at_least=0,
    )
    align_weight: float = option(0.5, "weight of the alignment loss", group="alignment", above=0)
    align_hidden: int = option(2048, "hidden width of the alignment's projection", group="alignment", at_least=1)

    heldout_samples: int = option(
        512, "largest number of images for the held-out loss", group="results", free=True, at_least=1
    )
    preview_classes: int = option(
        10, "largest number of rows in a sample grid, one per class", group="results", free=True, at_least=1
    )
    preview_per_class: int = option(
        8, "number of images in a row of a sample grid", group="results", free=True, at_least=1
    )
    sample_steps: int = option(
        30, "number of denoising steps for sample grids and KID", group="results", free=True, at_least=1
    )
    guidance_scale: float = option(
        3.0, "classifier-free guidance scale for sample grids and KID; 1: no guidance", group="results", free=True
    )
    kid_samples: int = option(
        0, "number of samples for KID against the held-out images; 0: no KID", group="results", free=True, at_least=0
    )
    kid_every: int = option(
        5000,
        "number of steps between KIDs, a multiple of eval_every; KID is also computed after the last step; no KID if "
        "eval_every is 0",
        group="results",
        free=True,
        at_least=0,
    )
    kid_extractor: str = option(
        "efficientnet-lite0",
        "encoder for KID: inception, efficientnet-lite0, efficientnet-lite0@64 or dinov2",
        group="results",
        free=True,
    )
    inception_weights: str | None = option(
        None, "local copy of Inception's weights; none: download them", group="results", free=True
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "precision of the denoiser in the saved pipeline", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        if self.class_balance and self.streaming:
            raise ConfigError(
                f"class_balance is {self.class_balance}, but the labels of a stream are not known in advance; leave "
                "out streaming or class_balance"
            )
        if self.kid_samples:
            Range(at_least=1).check("kid_every", self.kid_every)
        if 0 < self.kid_samples < 4:
            raise ConfigError(f"kid_samples is {self.kid_samples}; KID needs at least 4, and 0 turns it off")
        if self.kid_samples and self.eval_every and self.kid_every % self.eval_every:
            near = max(1, round(self.kid_every / self.eval_every)) * self.eval_every
            raise ConfigError(
                f"kid_every is {self.kid_every}, not a multiple of eval_every {self.eval_every}; use {near}"
            )
        for name, value in (("kid_samples", self.kid_samples), ("num_classes", self.num_classes)):
            if self.lora_rank and value:
                raise ConfigError(
                    f"{name} is {value}, but it does not work with lora_rank {self.lora_rank}; leave one out"
                )
        if self.learned_variance and self.objective == "flow":
            raise ConfigError(
                "learned_variance does not work with the objective flow; use epsilon or v_prediction, or leave it out"
            )

    def resolve(self) -> LDMConfig:
        """Take the training target and the VAE from the saved model that the run starts from; never cache a stream."""
        from iptv2_diffusion.recipes.latent_diffusion.origin import resolved_options  # late: torch takes seconds

        options = resolved_options(self)
        return replace(self, **options, cache_latents=self.cache_latents and not self.streaming)
