"""The options of a restoration run, for `train_restoration.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from iptv2_diffusion.data.pairs import LAYOUTS
from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import TrainingConfig, lora_rank_option, option

PHOTOGRAPHS = "~/.cache/iptv2-diffusion/photographs"  # where data/photographs/fetch.py puts them
LOSSES = ("l1", "mse", "charbonnier", "psnr", "sobel")  # defined in `task.py`
DEGRADATIONS = ("noise", "camera_noise", "gaussian_blur", "motion_blur", "rain", "layered_rain", "jpeg")


@dataclass(frozen=True, kw_only=True)
class RestorationConfig(TrainingConfig):
    """A restoration run."""

    output_dir: str = option("runs/restoration", "folder for checkpoints, logs and the result", free=True)
    lr_schedule: Literal["constant", "cosine", "cosine_with_restarts", "linear"] = option(
        "cosine", "learning-rate schedule after the warm-up", group="optimiser"
    )

    data: str = option(f"{PHOTOGRAPHS}/train", "folder of images, or of a data set in its layout", group="data")
    layout: str = option(
        "clean",
        f"content of the data folder: clean (images to be degraded in training), or pairs: {', '.join(LAYOUTS)}",
        group="data",
    )
    heldout: str | None = option(
        "auto",
        "folder for the held-out PSNR, in the same layout as data; none: no PSNR; auto: the held-out photographs if "
        "data is the default, else none",
        group="data",
    )
    cache_dir: str = option("~/.cache/iptv2-diffusion/decoded", "folder of decoded images", group="data", free=True)
    scales: tuple[float, ...] = option(
        (1.0,),
        "scales of each clean image, at most 1; a smaller scale shrinks the image and gives more detail per pixel; "
        "patches come from each scale in proportion to its area",
        group="data",
        above=0,
        at_most=1,
        nonempty=True,
    )
    prefer_texture: bool = option(True, "draw textured places more often than flat ones", group="data")
    channels: Literal[1, 3] = option(3, "number of image channels: 1: gray, 3: colour", group="data")

    degradations: tuple[str, ...] = option(
        ("noise",), f"degradations in the order to apply them, from {', '.join(DEGRADATIONS)}", group="degradation"
    )
    noise: tuple[float, float] = option(
        (5.0, 55.0), "range of the noise level sigma on the 0-255 scale", group="degradation", within=(0, 255)
    )
    camera_noise: tuple[float, float] = option(
        (1e-4, 1.2e-2), "range of a sensor's shot noise in linear light", group="degradation", above=0, at_most=1
    )
    gaussian_blur: tuple[float, float] = option(
        (0.5, 2.5), "range of the blur's standard deviation in pixels", group="degradation", within=(0.1, 100)
    )
    motion_blur: tuple[float, float] = option(
        (3.0, 17.0), "range of the motion path's length in pixels", group="degradation", at_least=0
    )
    rain: tuple[float, float] = option(
        (0.002, 0.012), "range of the fraction of pixels where a streak starts", group="degradation", at_least=0
    )
    layered_rain: tuple[float, float] = option(
        (1.0, 4.0), "range of the number of layers of streaks, near and far", group="degradation", within=(1, 16)
    )
    jpeg: tuple[float, float] = option((30.0, 95.0), "range of the JPEG quality", group="degradation", within=(1, 100))
    apply_probability: float = option(
        1.0,
        "probability of each degradation for each sample; below 1 some samples stay clean, as a blind model needs",
        group="degradation",
        above=0,
        at_most=1,
    )
    tasks: tuple[str, ...] = option(
        (),
        "tasks of an all-in-one model, each a list of degradations joined by +, such as noise,rain+jpeg",
        group="degradation",
    )

    patch_sizes: tuple[int, ...] = option(
        (64,), "side of the patches in pixels, one per stage", group="patches", at_least=1, nonempty=True
    )
    patch_steps: tuple[int, ...] = option((), "first step of each stage after the first", group="patches")
    patch_batch_sizes: tuple[int, ...] = option(
        (), "batch size of each stage; empty: batch_size in all stages", group="patches", at_least=1
    )
    rgb_shuffle: bool = option(False, "permute the colour channels at random", group="patches")
    mixup: float = option(0.0, "fraction of samples that are mixed with another one", group="patches", within=(0, 1))

    model: str = option(
        "restoration-nano", "preset (restoration-xs ...), config.json, or folder of a saved model", group="model"
    )
    model_overrides: dict = option(  # noqa: RUF009
        {}, 'arguments of the model to change, as JSON, such as {"channels": 64}', group="model"
    )
    lora_rank: int | None = lora_rank_option()
    backbone_from: str | None = option(
        None, "saved denoiser or restorer that gives the initial backbone weights; none: random weights", group="model"
    )

    losses: dict = option(  # noqa: RUF009
        {"charbonnier": 1.0}, f"weights of the losses, as JSON; the losses are {', '.join(LOSSES)}", group="objective"
    )

    heldout_images: int = option(
        8, "largest number of images for the held-out PSNR", group="results", free=True, at_least=1
    )
    heldout_size: int = option(256, "side of the held-out crops in pixels", group="results", free=True, at_least=1)
    heldout_sigmas: tuple[float, ...] = option(
        (15.0, 25.0, 50.0), "noise levels for the held-out PSNR of a denoiser", group="results", free=True
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", "precision of the fused model in the saved pipeline", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        if self.layout not in ("clean", *LAYOUTS):
            raise ConfigError(f"layout is {self.layout!r}; choose one of clean, {', '.join(LAYOUTS)}")
        self._check_degradations()
        self._check_stages()
        self._check_losses()
        if self.lora_rank and self.backbone_from is not None:
            raise ConfigError(
                f"lora_rank {self.lora_rank} changes the saved restorer that model names, and backbone_from replaces "
                "its backbone; leave one out"
            )

    def resolve(self) -> RestorationConfig:
        """Replace the default `heldout`: the held-out photographs belong to the default data only."""
        if self.heldout != "auto":
            return self
        return replace(self, heldout=f"{PHOTOGRAPHS}/heldout" if self.data == f"{PHOTOGRAPHS}/train" else None)

    def _check_degradations(self) -> None:
        """Raise `ConfigError` unless degradations are known, for clean images, and have rising ranges."""
        for option_name, value in (("scales", self.scales != (1.0,)), ("tasks", self.tasks)):
            if value and self.layout != "clean":
                raise ConfigError(
                    f"{option_name} is for clean images, but layout {self.layout} has pairs; leave one out"
                )
        if self.layout == "clean" and not (self.tasks or self.degradations):
            raise ConfigError("degradations and tasks are both empty; name at least one degradation")
        for name in (*self.degradations, *(name for task in self.tasks for name in task.split("+"))):
            if name not in DEGRADATIONS:
                raise ConfigError(f"{name!r} is not a degradation; choose from {', '.join(DEGRADATIONS)}")
        for name in DEGRADATIONS:
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(f"{name} is {low:g},{high:g}; a range must rise: use {high:g},{low:g}")

    def _check_stages(self) -> None:
        """Raise `ConfigError` unless every stage has a patch size, a first step and a batch size."""
        stages, smallest = len(self.patch_sizes), min(self.patch_batch_sizes or (self.batch_size,))
        if len(self.patch_steps) != stages - 1 or list(self.patch_steps) != sorted(self.patch_steps):
            raise ConfigError(
                f"patch_steps is {','.join(map(str, self.patch_steps)) or 'empty'}; give {stages - 1} in increasing "
                f"order for {stages} patch_sizes"
            )
        if self.patch_batch_sizes and len(self.patch_batch_sizes) != stages:
            raise ConfigError(
                f"patch_batch_sizes has {len(self.patch_batch_sizes)} numbers for {stages} patch_sizes; give {stages}"
            )
        if self.mixup and smallest < 2:
            raise ConfigError(f"mixup mixes the samples of a batch, but a batch has {smallest}; use 2 or more")

    def _check_losses(self) -> None:
        """Raise `ConfigError` for unknown losses, negative weights, or patches that are too small for a loss."""
        if unknown := sorted(set(self.losses) - set(LOSSES)):
            raise ConfigError(f"unknown losses {', '.join(unknown)}; choose from {', '.join(LOSSES)}")
        weights = list(self.losses.values())
        if not all(isinstance(w, (int, float)) and w >= 0 for w in weights) or not any(weights):
            raise ConfigError(f"losses is {self.losses}; give weights of at least 0, one of them above 0")
        if "sobel" in self.losses and min(self.patch_sizes) < 3:
            raise ConfigError(f"sobel needs patches of at least 3 pixels; patch_sizes has {min(self.patch_sizes)}")
