"""Train an image restorer on any folder of photographs, or on pairs of degraded and clean images.

    accelerate launch train/train_restoration.py --config configs/restoration/denoise-color-nano.yaml

Patches are degraded on the fly (noise, blur, rain, JPEG) or come in pairs from a data set's own folders; `Trainer` runs
the loop, resumes exactly and saves. The result, output_dir/pipeline, loads with
`IPTV2RestorationPipeline.from_pretrained`.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from iptv2_diffusion.training.config import TrainingConfig, option, parse_config
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from iptv2_diffusion.training.loop import Trainer
    from iptv2_diffusion.training.restoration import Batch, RestorationTask, Source

EXAMPLES = """
examples, where ... is accelerate launch train/train_restoration.py, and * needs python data/photographs/fetch.py first:
  a small denoiser, 24 minutes * ... --config configs/restoration/denoise-color-nano.yaml
  the shipped denoiser, a GPU *  ... --config configs/restoration/denoise-color-xs.yaml
  your photographs, blurred      ... --data my_photos --degradations motion_blur,noise --noise 0,5
  your pairs                     ... --layout folders --data my_pairs --model_overrides '{"sigma_conditioning": null}'
                                 (my_pairs/input/*, my_pairs/target/*)
  GoPro                          ... --config configs/restoration/pairs-b.yaml --data GoPro
  start from shipped weights *   ... --model assets/iptv2-denoise-color/model --output_dir runs/more
  start from a generator *       ... --config configs/restoration/denoise-color-emoji64.yaml
  held-out PSNR of your data     ... --data my_photos --heldout my_heldout_photos
  try every stage in seconds     any of these with --dry_run

The same command resumes: it continues from the newest checkpoint in output_dir, bit for bit.
"""

PHOTOGRAPHS = "~/.cache/iptv2-diffusion/photographs"  # where data/photographs/fetch.py puts them


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
        from iptv2_diffusion.data.restoration_sets import LAYOUTS
        from iptv2_diffusion.training.restoration import LOSSES

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


# --------------------------------------------------------------------------------------------------------------------
# What the run is made of


def make_degradation(config: RestorationConfig, names: tuple[str, ...]):
    """The degradation of a list of names, with the ranges of the configuration."""
    from iptv2_diffusion.data import degradations as d

    kinds = {
        "noise": d.GaussianNoise,
        "gaussian_blur": d.GaussianBlur,
        "motion_blur": d.MotionBlur,
        "rain": d.RainStreaks,
        "jpeg": d.JPEGCompression,
    }
    for name in names:
        if name not in kinds:
            raise ConfigError(f"degradation {name!r} is none of {', '.join(kinds)}")
        low, high = getattr(config, name)
        least, most = {"noise": (0, 255), "gaussian_blur": (0.1, 100), "jpeg": (1, 100)}.get(name, (0, math.inf))
        if not least <= low <= high <= most:
            raise ConfigError(f"{name} is {low:g},{high:g}; a range LOW,HIGH must rise within {least:g} to {most:g}")
    steps = [kinds[name](*getattr(config, name)) for name in names]
    return steps[0] if len(steps) == 1 else d.Sequential(*steps)


def make_sources(config: RestorationConfig, data: str, split: str, accelerator: Accelerator) -> list[Source]:
    """Patches of each task of the run, from `data`."""
    from iptv2_diffusion.data.restoration import ImageStore, PatchSampler, find_images
    from iptv2_diffusion.data.restoration_sets import find_pairs
    from iptv2_diffusion.training.restoration import Source

    if not Path(data).expanduser().is_dir():
        fetch = ", or fetch the photographs: python data/photographs/fetch.py" if data.startswith(PHOTOGRAPHS) else ""
        raise ConfigError(f"{data} is not a folder; name yours by --data{fetch}")

    def store(files, scales=(1.0,)):
        return ImageStore(files, config.cache_dir, config.channels, scales, say=accelerator.print)

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


def make_model(config: RestorationConfig) -> nn.Module:
    """The restorer, initialised from the seed, its backbone from another model if one is named."""
    from accelerate.utils import set_seed

    from iptv2_diffusion.models.exchange import load_backbone
    from iptv2_diffusion.models.fusion import trainable
    from iptv2_diffusion.models.presets import create_model

    overrides = {"in_channels": config.channels, **config.model_overrides}
    if config.tasks:
        overrides["num_tasks"] = len(config.tasks)
    set_seed(config.seed)
    with user_errors(OSError, ValueError, TypeError):
        model = trainable(create_model(config.model, **overrides))
        if config.backbone_from is not None:
            print(load_backbone(model, create_model(config.backbone_from)))
    if not hasattr(model.config, "sigma_conditioning"):
        raise ConfigError(f"{config.model} is a {type(model).__name__}, not a restorer; see --help for --model")
    noisy = config.layout == "clean" and any("noise" in names for names in (config.degradations, *config.tasks))
    if model.config.sigma_conditioning is not None and not noisy:
        raise ConfigError(
            "this model takes a noise level and the data has none; add --model_overrides "
            "'{\"sigma_conditioning\": null}'"
        )
    return model


def make_task(config: RestorationConfig, trainer: Trainer) -> RestorationTask:
    """Sources and held-out crops."""
    from iptv2_diffusion.training.restoration import RestorationTask

    accelerator = trainer.accelerator
    sources = make_sources(config, config.data, "train", accelerator)
    heldout = make_heldout(config, accelerator)
    images = len(set(sources[0].sampler.clean.files))
    largest = max(config.patch_sizes) + 2 * max(source.margin for source in sources)
    if small := sources[0].sampler.smaller_than(largest):
        scaled = " (counted at each of the scales)" if len(config.scales) > 1 else ""
        told = f"{len(small)} images{scaled}, as {small[0]}, are smaller than {largest} pixels: reflected beyond"
        accelerator.print(told)
    accelerator.print(f"{images} images to train on, {sum(len(b.clean) for b in heldout.values())} held-out crops")
    return RestorationTask(config, accelerator, model=trainer.state.module, sources=sources, heldout=heldout)


def make_heldout(config: RestorationConfig, accelerator: Accelerator) -> dict[str, Batch]:
    """Held-out crops by kind, none if there is no held-out data."""
    from dataclasses import replace

    import torch

    from iptv2_diffusion.training.restoration import heldout_batches

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


# --------------------------------------------------------------------------------------------------------------------
# Running


def main(argv: list[str] | None = None) -> int:
    """Parse, build, train, save."""
    config = parse_config(RestorationConfig, argv, description=__doc__, examples=EXAMPLES)

    from iptv2_diffusion.training.loop import Trainer, check_batch_size, make_accelerator, prepare_dry_run

    if config.dry_run:
        prepare_dry_run(config)
        config.heldout_images, config.heldout_size = 1, 64
    accelerator = make_accelerator(config)
    for stage, size in enumerate(config.patch_batch_sizes, start=1):
        check_batch_size(f"patch_batch_sizes, stage {stage}:", size, accelerator, config.gradient_accumulation_steps)
    model = make_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(f"{config.model}: {parameters / 1e6:.3f} M parameters on {accelerator.device}")
    trainer = Trainer(config, accelerator, model, curves=("psnr", *(f"psnr_sigma{s:g}" for s in config.heldout_sigmas)))
    task = make_task(config, trainer)
    trainer.resume()
    if trainer.fit(task):
        trainer.finish()
        return 0
    if config.dry_run:
        trainer.check_resume()
    if accelerator.is_main_process:
        save_pipeline(config, trainer)
    trainer.finish()
    if accelerator.is_main_process:
        print("dry run: every stage ran" if config.dry_run else next_steps(config, trainer))
    return 0


def save_pipeline(config: RestorationConfig, trainer: Trainer) -> None:
    """output_dir/pipeline: the fused restorer with the averaged weights, and the run's configuration beside it."""
    from iptv2_diffusion import IPTV2RestorationPipeline
    from iptv2_diffusion.training.results import cast, replaced

    module = trainer.state.module
    model = type(module).from_config(module.config)
    model.load_state_dict(trainer.state.averaged_state_dict())
    model = cast(model.fuse(), config.save_dtype)
    sigma_range = None if model.config.sigma_conditioning is None else config.noise
    with user_errors(OSError), replaced(trainer.output_dir / "pipeline") as temporary:
        IPTV2RestorationPipeline(model, sigma_range).save_pretrained(temporary)
        shutil.copy(trainer.output_dir / "config.yaml", temporary / "training_config.yaml")


def next_steps(config: RestorationConfig, trainer: Trainer) -> str:
    """What was made, and commands to copy."""
    folder = trainer.output_dir
    return f"""
trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {folder}/:
  loss_curve.png  metrics.jsonl  config.yaml  previews/  checkpoint-*/  pipeline/

What to try next
  restore pictures:  iptv2-restore photo.png -o restored --model {folder}/pipeline
  measure it:        python eval/restoration_benchmark.py --models {folder}/pipeline
  train longer:      {trainer.command_to_train_longer}
  all options:       python train/train_restoration.py --help"""


if __name__ == "__main__":
    run_main(main)
