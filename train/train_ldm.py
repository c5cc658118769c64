"""Train a latent-diffusion denoiser, IPT-V2 or DiT, on any folder of images.

    accelerate launch train/train_ldm.py --config configs/emoji64.yaml

Latents come from a VAE through `LatentCodec`, cached once or on the fly; `DiffusionObjective` says what is predicted;
`Trainer` runs the loop, resumes exactly and saves. This file joins them.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from iptv2_diffusion.training.config import TrainingConfig, option, parse_config
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.latents import LatentCodec
    from iptv2_diffusion.objectives import DiffusionObjective
    from iptv2_diffusion.training.latent_diffusion import LatentDiffusionTask
    from iptv2_diffusion.training.loop import Trainer

EXAMPLES = """
examples:
  the demo (10 minutes on two cores)   accelerate launch train/train_ldm.py --config configs/emoji64.yaml
  try every stage in a minute          ... --dry_run
  your own photographs, no labels      ... --data my_photos --heldout_split none --resolution 64 --output_dir runs/mine
  labelled: one sub-folder a class     ... --data my_photos (the folders' names become the classes)
  another VAE from the Hub             ... --vae stabilityai/sd-vae-ft-ema --resolution 256 --model iptv2-s
  a DiT under the same recipe          ... --model dit-s-2 --output_dir runs/dit
  8 GPUs in bfloat16                   accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 ...
  15 % faster, CPU and glibc           MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 ...

The same command resumes: it continues from the newest checkpoint in output_dir, bit for bit.
`accelerate launch --quiet` leaves its own traceback out when a run ends with an error.
A YAML file names only what differs from the defaults shown here; the command line overrides it.
"""


@dataclass(kw_only=True)
class LDMConfig(TrainingConfig):
    """A latent-diffusion run."""

    data: str = option("data/emoji64", "folder of images (sub-folders = classes), parquet, or Hub name", group="data")
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
    strict: bool = option(False, "fail at a corrupt image instead of leaving it out", group="data", free=True)

    vae: str = option("assets/vae-emoji64", "folder or Hub name of any diffusers VAE", group="latents")
    vae_subfolder: str | None = option(None, "such as `vae` inside a pipeline", group="latents")
    cache_latents: bool = option(True, "encode once into cache_dir; false: on the fly", group="latents")
    cache_dir: str = option("~/.cache/iptv2-diffusion/latents", "folder of caches", group="latents", free=True)
    cache_dtype: Literal["float16", "float32"] = option("float16", "of cached latents", group="latents")
    encode_precision: Literal["float32", "bfloat16"] = option("float32", "the VAE's, in encoding", group="latents")

    model: str = option("emoji64", "preset (iptv2-s, dit-b-2 ...), config.json, or saved model folder", group="model")
    model_overrides: dict = option({}, 'JSON, such as {"channels": 64}', group="model")  # noqa: RUF009
    num_classes: int | None = option(None, "none: from the data; more leaves room", group="model")

    objective: Literal["epsilon", "v_prediction", "flow"] = option("epsilon", "what is predicted", group="objective")
    learned_variance: bool = option(False, "learned-range variance, as ADM and DiT", group="objective")
    timestep_sampling: Literal["uniform", "logit_normal"] = option("uniform", "of training", group="objective")
    logit_mean: float = option(0.0, "of logit_normal", group="objective")
    logit_std: float = option(1.0, "of logit_normal", group="objective")
    stratified_timesteps: bool = option(True, "spread a batch's timesteps evenly", group="objective")
    flow_shift: float = option(1.0, "of the flow's noise levels, towards noise if above 1", group="objective")
    min_snr_gamma: float | None = option(None, "min-SNR weighting, 5 is usual; none: off", group="objective")
    label_dropout: float = option(0.1, "share of samples without label, for guidance", group="objective")

    heldout_samples: int = option(512, "at most, for the held-out loss", group="results", free=True)
    preview_classes: int = option(10, "rows of a sheet, at most", group="results", free=True)
    preview_per_class: int = option(8, "pictures in a row", group="results", free=True)
    sample_steps: int = option(30, "sampling steps of sheets", group="results", free=True)
    guidance_scale: float = option(3.0, "classifier-free guidance of sheets; 1: none", group="results", free=True)
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "of the denoiser in the saved pipeline", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.label_dropout < 1:
            raise ConfigError(f"label_dropout is {self.label_dropout}; it must lie in [0, 1)")
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(f"heldout_fraction is {self.heldout_fraction}; it must lie in [0, 1)")
        self.require_positive("resolution", "heldout_samples", "preview_classes", "preview_per_class", "sample_steps")
        if self.learned_variance and self.objective == "flow":
            raise ConfigError("learned_variance goes with epsilon or v_prediction; set objective or leave it out")

    @property
    def size(self) -> tuple[int, int]:
        """Image (height, width)."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)


# --------------------------------------------------------------------------------------------------------------------
# What the run is made of


def load_images(config: LDMConfig, accelerator: Accelerator) -> tuple[ImageTensors, ImageTensors | None, list[str]]:
    """Training images, held-out images (None if none are wanted) and class names ([] without labels)."""
    from iptv2_diffusion.data.images import ImageTensors, class_names, load_train_and_heldout

    # One process prepares what `datasets` caches on the disk; the others then find it there.
    with user_errors(OSError, ValueError, KeyError), accelerator.local_main_process_first():
        train, heldout = load_train_and_heldout(
            config.data,
            train_split=config.train_split,
            heldout_split=config.heldout_split,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            image_column=config.image_column,
            label_column=config.label_column,
            revision=config.revision,
        )
    if config.dry_run:
        train = train.select(range(min(len(train), 2 * config.batch_size)))
        heldout = heldout.select(range(min(len(heldout), 16))) if heldout is not None else None

    def tensors(dataset: Any) -> ImageTensors:
        return ImageTensors(dataset, size=config.size, strict=config.strict)

    with user_errors(ValueError):
        return tensors(train), None if heldout is None else tensors(heldout), class_names(train) or []


def load_codec(config: LDMConfig, device: torch.device) -> LatentCodec:
    """The VAE's codec, frozen, on the device."""
    import diffusers
    import torch
    from safetensors import SafetensorError

    from iptv2_diffusion.latents import LatentCodec

    with user_errors(OSError, ValueError, TypeError, SafetensorError):
        options = {} if config.vae_subfolder is None else {"subfolder": config.vae_subfolder}
        description = diffusers.AutoencoderKL.load_config(config.vae, **options)
        vae_class = getattr(diffusers, description.get("_class_name", "AutoencoderKL"), None)
        if vae_class is None:
            raise ConfigError(f"{config.vae} is a {description['_class_name']}, which diffusers does not have")
        vae = vae_class.from_pretrained(config.vae, **options).requires_grad_(False).eval()
        vae.to(device, memory_format=torch.channels_last)
        codec = LatentCodec(vae)
        codec.latent_size(*config.size)  # raises if the image size does not fit
    return codec


def make_model(config: LDMConfig, codec: LatentCodec, num_classes: int | None) -> nn.Module:
    """The denoiser for these latents and classes, initialised from the seed."""
    from accelerate.utils import set_seed

    from iptv2_diffusion.models.presets import create_model

    channels = codec.latent_channels
    height, width = codec.latent_size(*config.size)
    overrides = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": 2 * channels if config.learned_variance else channels,
        "num_class_embeds": num_classes,
        **config.model_overrides,
    }
    set_seed(config.seed)
    with user_errors(OSError, ValueError, TypeError):
        model = create_model(config.model, **overrides)
    if model.config.in_channels != channels:
        raise ConfigError(
            f"the model takes {model.config.in_channels} channels, the VAE {config.vae} gives {channels}; choose "
            "another VAE or leave in_channels out of model_overrides"
        )
    patch = model.config.patch_size
    if "num_embeds_ada_norm" in model.config and (height % patch or width % patch):
        raise ConfigError(
            f"latents of {height} x {width} do not divide into this DiT's patches of {patch}; choose a resolution in "
            f"multiples of {patch * codec.compression}"
        )
    return model


def count_classes(config: LDMConfig, names: list[str], labels: list[int]) -> int | None:
    """Number of classes; None for unlabelled data."""
    found = max(len(names), max(labels) + 1) if names else 0
    if names and min(labels) < 0:
        raise ConfigError(f"the data has the label {min(labels)}; labels are 0 to {found - 1}: mend or remove those")
    if config.num_classes and not names:
        raise ConfigError(
            f"num_classes is {config.num_classes}, but no labels were found in {config.data}; name them by "
            "--label_column, give every class its own sub-folder, or leave num_classes out"
        )
    if config.num_classes is not None and config.num_classes < found:
        raise ConfigError(
            f"num_classes is {config.num_classes}, but the data has labels up to {found - 1}; use {found} or more"
        )
    return config.num_classes or found or None


def make_objective(config: LDMConfig) -> DiffusionObjective:
    """The training loss with its scheduler."""
    from iptv2_diffusion.objectives import DiffusionObjective

    with user_errors(ValueError):
        options: dict[str, Any] = {"shift": config.flow_shift} if config.objective == "flow" else {}
        scheduler = DiffusionObjective.make_scheduler(
            config.objective, learned_variance=config.learned_variance, **options
        )
        return DiffusionObjective(
            scheduler,
            learned_variance=config.learned_variance,
            timestep_sampling=config.timestep_sampling,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            min_snr_gamma=config.min_snr_gamma,
        )


def make_task(config: LDMConfig, trainer: Trainer, codec: LatentCodec, images: Any, step: int) -> LatentDiffusionTask:
    """Latents (cached or on the fly) and all that a step needs, ready to go on from `step`."""
    from iptv2_diffusion.data.latent_cache import EncodedLatents, cached_latents
    from iptv2_diffusion.data.sampling import DataOrder, own_slices
    from iptv2_diffusion.training.latent_diffusion import LatentDiffusionTask

    accelerator = trainer.accelerator
    train, heldout, names = images
    slices = own_slices(
        config.batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        config.gradient_accumulation_steps,
    )
    encoding: dict[str, Any] = {"precision": config.encode_precision, "num_workers": config.num_workers}
    caching: dict[str, Any] = {
        "cache_dir": config.cache_dir,
        "dtype": config.cache_dtype,
        **encoding,
        "builder": accelerator.is_local_main_process,
        "say": accelerator.print,
    }
    with user_errors(OSError, ValueError):
        heldout_latents = None if heldout is None else cached_latents(heldout, codec, flips=False, **caching)
        if config.cache_latents:
            source: Any = cached_latents(train, codec, flips=config.random_flip, **caching)
            order = DataOrder(len(source), config.seed)
        else:
            order = DataOrder(len(train.valid_indices()), config.seed)
            source = EncodedLatents(
                train,
                codec,
                order=order,
                batch_size=config.batch_size,
                slices=slices,
                start=step,
                flips=config.random_flip,
                **encoding,
            )
    accelerator.print(f"{len(source)} images to train on, {f'{len(names)} classes' if names else 'without labels'}")
    return LatentDiffusionTask(
        config,
        accelerator,
        codec=codec,
        model=trainer.state.module,
        objective=make_objective(config),
        source=source,
        heldout=heldout_latents,
        order=order,
        slices=slices,
        latent_shape=(codec.latent_channels, *codec.latent_size(*config.size)),
        names=names,
    )


# --------------------------------------------------------------------------------------------------------------------
# Running


def main(argv: list[str] | None = None) -> int:
    """Parse, build, train, save."""
    config = parse_config(LDMConfig, argv, description=__doc__, examples=EXAMPLES)

    from iptv2_diffusion.training.loop import Trainer, make_accelerator, prepare_dry_run

    if config.dry_run:
        prepare_dry_run(config)
        config.heldout_samples, config.preview_classes, config.preview_per_class, config.sample_steps = 16, 2, 2, 2
    accelerator = make_accelerator(config)
    images = load_images(config, accelerator)
    codec = load_codec(config, accelerator.device)
    model = make_model(config, codec, count_classes(config, images[2], images[0].labels))
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(f"{config.model}: {parameters / 1e6:.2f} M parameters on {accelerator.device}")
    trainer = Trainer(config, accelerator, model)
    task = make_task(config, trainer, codec, images, trainer.resume())
    if trainer.fit(task):
        trainer.finish()
        return 0
    if config.dry_run:
        trainer.check_resume()
    if accelerator.is_main_process:
        save_results(config, trainer, task)
    trainer.finish()
    if accelerator.is_main_process:
        print("dry run: every stage ran" if config.dry_run else next_steps(config, trainer, task))
    return 0


def save_results(config: LDMConfig, trainer: Trainer, task: LatentDiffusionTask) -> None:
    """The pipeline folder with the averaged weights, then samples.png from that folder, read back."""
    from iptv2_diffusion import IPTV2Pipeline

    folder, temporary = trainer.output_dir / "pipeline", trainer.output_dir / ".tmp-pipeline"
    module = trainer.state.module
    model = type(module).from_config(module.config)
    model.load_state_dict(trainer.state.averaged_state_dict())
    with user_errors(OSError):
        shutil.rmtree(temporary, ignore_errors=True)
        task.pipeline(cast(model.eval(), config.save_dtype)).save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        pipeline = IPTV2Pipeline.from_pretrained(folder).to(trainer.accelerator.device)
        task.sheet(pipeline, trainer.output_dir / "samples.png")


def cast(model: nn.Module, dtype: str) -> nn.Module:
    """The model's parameters in another dtype, but for the parts that it wants in float32."""
    import torch

    kept = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def next_steps(config: LDMConfig, trainer: Trainer, task: LatentDiffusionTask) -> str:
    """What was made, and commands to copy."""
    folder = trainer.output_dir
    label = repr(task.id2label[0]) + ", " if task.id2label else ""
    others = "--heldout_split none --output_dir runs/mine"
    command = "accelerate launch " + " ".join(shlex.quote(word) for word in sys.argv)
    command += " --overwrite false" if config.overwrite else ""
    return f"""
trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {folder}/:
  samples.png  loss_curve.png  metrics.jsonl  config.yaml  previews/  checkpoint-*/  pipeline/

What to try next
  more images, in Python:
    from iptv2_diffusion import IPTV2Pipeline
    pipe = IPTV2Pipeline.from_pretrained("{folder}/pipeline")
    pipe({label}num_images_per_label=4, guidance_scale={config.guidance_scale:g}).images[0].show()
  curves:            tensorboard --logdir {folder}
  train longer:      {command} --max_train_steps {2 * trainer.step}{MORE_TIME if config.max_train_minutes else ""}
  your own images:   accelerate launch train/train_ldm.py --config {folder}/config.yaml --data MY_FOLDER {others}
  all options:       python train/train_ldm.py --help"""


MORE_TIME = " --max_train_minutes none"

if __name__ == "__main__":
    run_main(main)
