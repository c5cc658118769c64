"""The options that determine generated images, for `eval/generate_samples.py` and `iptv2-fid`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import Config, option

CPU_GROUP_SIZE = 8
MOST_COUNTED = 10_000_000  # images whose labels are spread in a list
LABEL_WORDS = ("balanced", "random", "none")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """Options that determine the generated images."""

    pipeline: str = option(
        "assets/iptv2-emoji64", "folder or Hub name of an IPT-V2 or DiT pipeline", group="images", free=True
    )
    num_samples: int = option(50_000, "number of images to draw", group="images", free=True, at_least=1)
    labels: str = option(
        "balanced",
        "how labels are chosen: balanced: image i has class i mod K; random; none: the null label; or a list of class "
        "names or numbers, separated by commas, to use in turn",
        group="images",
    )
    class_counts: list[int] | None = option(  # noqa: RUF009
        None,
        "number of images of each class among every sum(class_counts) images, with balanced labels; none: equal shares",
        group="images",
        at_least=1,
        nonempty=True,
    )
    seed: int = option(0, "seed; image i depends only on (seed, i)", group="images")
    num_inference_steps: int = option(250, "number of denoising steps", group="sampler", at_least=1)
    guidance_scale: float = option(1.0, "classifier-free guidance scale; 1: no guidance", group="sampler")
    guidance_model: str | None = option(
        None,
        "folder or Hub name of a weaker denoiser that replaces the null label in the guidance (AutoGuidance)",
        group="sampler",
        free=True,
    )
    guidance_interval: tuple[float, float] = option(
        (0.0, 1.0),
        "part of the sampling during which guidance acts, as two fractions of the steps",
        group="sampler",
        within=(0, 1),
    )
    scheduler: Literal[
        "saved", "ddpm", "ddim", "dpm++", "euler", "euler-ancestral", "heun", "flow-euler", "flow-heun"
    ] = option("saved", "sampler; saved: that of the pipeline", group="sampler")
    batch_size: int = option(
        32,
        "number of images in a batch of the networks on a GPU, unless group_size is given",
        group="machine",
        free=True,
        at_least=1,
    )
    group_size: int | None = option(
        None,
        "number of images in a batch of the networks; a different number changes the rounding, by one grey level in "
        f"about one value of 20,000; none: batch_size on a GPU and {CPU_GROUP_SIZE} on a CPU, where more is not faster "
        "and the bytes are then the same for any batch_size",
        group="machine",
        at_least=1,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "autocast precision of the denoiser", group="machine")
    num_threads: int = option(
        1,
        "number of CPU threads per process; a different number changes the rounding, so start more processes instead",
        group="machine",
        at_least=1,
    )
    overwrite: bool = option(False, "delete the images in output_dir and start again", group="results", free=True)

    def validate(self) -> None:
        """Raise a `ConfigError` that names the options if two of them contradict each other."""
        if self.class_counts is not None and self.labels != "balanced":
            raise ConfigError(f"class_counts needs balanced labels, but labels is {self.labels}; leave one out")
        if self.class_counts is not None and sum(self.class_counts) > MOST_COUNTED:
            raise ConfigError(
                f"class_counts adds up to {sum(self.class_counts)}, more than {MOST_COUNTED}; divide the numbers by a "
                "common factor"
            )
        start, stop = self.guidance_interval
        if start >= stop:
            raise ConfigError(f"guidance_interval is {start:g},{stop:g}; the first number must be the smaller one")
