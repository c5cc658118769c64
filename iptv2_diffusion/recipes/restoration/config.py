"""The options of a restoration run: what `train_restoration.py` trains by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iptv2_diffusion.data.pairs import LAYOUTS
from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import TrainingConfig, option

PHOTOGRAPHS = "~/.cache/iptv2-diffusion/photographs"  # where data/photographs/fetch.py puts them
LOSSES = ("l1", "mse", "charbonnier", "psnr", "sobel")  # `task.py` says what they are


@dataclass(kw_only=True)
class RestorationConfig(TrainingConfig):
    """A restoration run."""

    output_dir: str = option("runs/restoration", "folder for checkpoints, logs and the result", free=True)
    lr_schedule: Literal["constant", "cosine", "cosine_with_restarts", "linear"] = option(
        "cosine", "after warm-up", group="optimiser"
    )

    data: str = option(f"{PHOTOGRAPHS}/train", "folder of images, or of a data set's layout", group="data")
    layout: str = option(
        "clean", "clean: degrade its images; else the pairs of: folders, sidd, gopro, realblur_j ...", group="data"
    )
    heldout: str | None = option(
        "auto", "as data, for the PSNR; none: no PSNR; auto: the photographs' beside theirs, else none", group="data"
    )
    cache_dir: str = option("~/.cache/iptv2-diffusion/decoded", "folder of decoded images", group="data", free=True)
    scales: tuple[float, ...] = option(
        (1.0,),
        "sizes at which to train on each clean image: below 1 it is shrunk, for more detail a pixel; patches come from "
        "each in proportion to its area",
        group="data",
    )
    prefer_texture: bool = option(True, "draw textured places more often than flat ones", group="data")
    channels: Literal[1, 3] = option(3, "1: gray, 3: colour", group="data")

    degradations: tuple[str, ...] = option(
        ("noise",), "in order, of: noise, gaussian_blur, motion_blur, rain, jpeg", group="degradation"
    )
    noise: tuple[float, float] = option((5.0, 55.0), "range of sigma on the 0-255 scale", group="degradation")
    gaussian_blur: tuple[float, float] = option((0.5, 2.5), "standard deviations in pixels", group="degradation")
    motion_blur: tuple[float, float] = option((3.0, 17.0), "length of the path in pixels", group="degradation")
    rain: tuple[float, float] = option((0.002, 0.012), "share of pixels where a streak starts", group="degradation")
    jpeg: tuple[float, float] = option((30.0, 95.0), "quality", group="degradation")
    tasks: tuple[str, ...] = option(
        (), "one model for several tasks: each a +-joined list of degradations, such as noise,rain", group="degradation"
    )

    patch_sizes: tuple[int, ...] = option((64,), "side of patches, one per stage", group="patches")
    patch_steps: tuple[int, ...] = option((), "step at which each further stage begins", group="patches")
    patch_batch_sizes: tuple[int, ...] = option((), "batch size of each stage; none: batch_size", group="patches")
    rgb_shuffle: bool = option(False, "permute the colour channels", group="patches")
    mixup: float = option(0.0, "share of samples that are mixed with another", group="patches")

    model: str = option("restoration-nano", "preset, config.json, or saved model folder", group="model")
    model_overrides: dict = option({}, 'JSON, such as {"channels": 64}', group="model")  # noqa: RUF009
    backbone_from: str | None = option(None, "saved denoiser or restorer whose backbone to start from", group="model")

    losses: dict = option({"charbonnier": 1.0}, "weights of l1, mse, charbonnier, psnr, sobel", group="objective")  # noqa: RUF009

    heldout_images: int = option(8, "at most", group="results", free=True)
    heldout_size: int = option(256, "side of the held-out crops", group="results", free=True)
    heldout_sigmas: tuple[float, ...] = option((15.0, 25.0, 50.0), "for noise", group="results", free=True)
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", "of the fused model in the saved pipeline", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        if self.layout not in ("clean", *LAYOUTS):
            raise ConfigError(f"layout {self.layout!r} is none of clean, {', '.join(LAYOUTS)}")
        if self.heldout == "auto":
            self.heldout = f"{PHOTOGRAPHS}/heldout" if self.data == f"{PHOTOGRAPHS}/train" else None
        self.require_positive("patch_sizes", "heldout_images", "heldout_size")
        if self.patch_batch_sizes:
            self.require_positive("patch_batch_sizes")
        stages = len(self.patch_sizes)
        if len(self.patch_steps) != stages - 1 or list(self.patch_steps) != sorted(self.patch_steps):
            raise ConfigError(
                f"{stages} patch_sizes {self.patch_sizes} need {stages - 1} increasing patch_steps, not "
                f"{self.patch_steps}"
            )
        if self.patch_batch_sizes and len(self.patch_batch_sizes) != stages:
            raise ConfigError(
                f"patch_batch_sizes has {len(self.patch_batch_sizes)} numbers for {stages} patch_sizes; give as many"
            )
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ConfigError(f"scales is {self.scales}; give numbers above 0 and at most 1")
        if self.scales != (1.0,) and self.layout != "clean":
            raise ConfigError(f"scales shrinks clean images, but layout {self.layout} has its own pairs; leave one out")
        if self.layout == "clean" and not (self.tasks or self.degradations):
            raise ConfigError("degradations is empty, and so is tasks; name at least one")
        if self.tasks and self.layout != "clean":
            raise ConfigError(f"tasks degrade clean images, but layout {self.layout} has its own pairs; leave one out")
        unknown = set(self.losses) - set(LOSSES)
        if unknown or not self.losses:
            raise ConfigError(f"losses names {', '.join(sorted(unknown)) or 'nothing'}; choose of {', '.join(LOSSES)}")
        weights = list(self.losses.values())
        if not all(isinstance(w, (int, float)) and w >= 0 for w in weights) or not any(weights):
            raise ConfigError(f"losses is {self.losses}; weights are numbers, not negative, not all 0")
        if "sobel" in self.losses and min(self.patch_sizes) < 3:
            raise ConfigError(f"sobel needs patches of 3 pixels or more, not {min(self.patch_sizes)}")
        if not 0 <= self.mixup <= 1:
            raise ConfigError(f"mixup is {self.mixup}; it must lie in [0, 1]")
        smallest = min(self.patch_batch_sizes or (self.batch_size,))
        if self.mixup and smallest < 2:
            raise ConfigError(f"mixup mixes the samples of a batch, and one of yours has {smallest}; use 2 or more")
