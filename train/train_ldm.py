"""Train a latent-diffusion denoiser, IPT-V2 or DiT, on any folder of images.

    accelerate launch train/train_ldm.py --config configs/emoji64.yaml

Latents come from a VAE through `LatentCodec`, cached once or on the fly; `DiffusionObjective` says what is predicted;
`Trainer` runs the loop, resumes exactly and saves. This file joins them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iptv2_diffusion.training.config import parse_config
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors
from iptv2_diffusion.training.ldm_config import LDMConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.latents import LatentCodec
    from iptv2_diffusion.objectives import DiffusionObjective
    from iptv2_diffusion.training.alignment import TargetFeatures
    from iptv2_diffusion.training.latent_diffusion import LatentDiffusionTask
    from iptv2_diffusion.training.loop import Trainer
    from iptv2_diffusion.training.sample_quality import KernelDistance

EXAMPLES = """
examples:
  the demo (10 minutes on two cores)   accelerate launch train/train_ldm.py --config configs/emoji64.yaml
  try every stage in a minute          ... --dry_run
  memory, speed and time beforehand    ... --plan
  your own photographs, no labels      ... --data my_photos --heldout_split none --resolution 64 --output_dir runs/mine
  labelled: one sub-folder a class     ... --data my_photos (the folders' names become the classes)
  another VAE from the Hub             ... --vae stabilityai/sd-vae-ft-ema --resolution 256 --model iptv2-s
  a DiT under the same recipe          ... --model dit-s-2 --output_dir runs/dit
  larger than the disk                 ... --data imagenet-1k --streaming --heldout_split validation
  8 GPUs in bfloat16                   accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 ...

The same command resumes: it continues from the newest checkpoint in output_dir, bit for bit.
`accelerate launch --quiet` leaves its own traceback out when a run ends with an error.
A YAML file names only what differs from the defaults shown here; the command line overrides it.
"""


# --------------------------------------------------------------------------------------------------------------------
# What the run is made of


def make_model(config: LDMConfig, codec: LatentCodec, num_classes: int | None) -> nn.Module:
    """The denoiser for these latents and classes, initialised from the seed."""
    from accelerate.utils import set_seed

    from iptv2_diffusion.models.fusion import trainable
    from iptv2_diffusion.models.presets import create_model
    from iptv2_diffusion.training.latent_diffusion import null_label

    channels = codec.latent_channels
    height, width = codec.latent_size(*config.size)
    out_channels = 2 * channels if config.learned_variance else channels
    overrides = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": out_channels,
        "num_class_embeds": num_classes,
        **config.model_overrides,
    }
    set_seed(config.seed)
    with user_errors(OSError, ValueError, TypeError):
        model = trainable(create_model(config.model, **overrides))
    if model.config.in_channels != channels:
        raise ConfigError(
            f"the model takes {model.config.in_channels} channels, the VAE {config.vae} gives {channels}; choose "
            "another VAE or leave in_channels out of model_overrides"
        )
    if model.config.out_channels not in (None, out_channels):
        raise ConfigError(
            f"the model gives {model.config.out_channels} channels for latents of {channels}; with learned_variance "
            f"{config.learned_variance} it must give {out_channels}: leave out_channels out of model_overrides"
        )
    if num_classes is not None and null_label(model) != num_classes:
        raise ConfigError(
            f"the model has {null_label(model)} classes, the data {num_classes}; set --num_classes and leave "
            "num_class_embeds out of model_overrides"
        )
    patch = model.config.patch_size
    if "num_embeds_ada_norm" in model.config and (height % patch or width % patch):
        raise ConfigError(
            f"latents of {height} x {width} do not divide into this DiT's patches of {patch}; choose a resolution in "
            f"multiples of {patch * codec.compression}"
        )
    return model


def count_classes(config: LDMConfig, names: list[str], labels: list[int]) -> int | None:
    """Number of classes; None for unlabelled data. `labels` are those of all images, if they are known beforehand."""
    found = max(len(names), max(labels, default=-1) + 1) if names else 0
    if names and min(labels, default=0) < 0:
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
            timestep_shift=config.timestep_shift,
            min_snr_gamma=config.min_snr_gamma,
        )


def align(config: LDMConfig, codec: LatentCodec, model: nn.Module) -> TargetFeatures | None:
    """The features that the model is to be aligned with, and the projection in the model; None if it is not."""
    if config.align_target is None:
        return None
    from iptv2_diffusion.training.alignment import attach_alignment, load_target

    target = load_target(config.align_target, codec)
    attach_alignment(model, config.align_stage, target.dim, config.align_hidden)
    return target


def make_distance(
    config: LDMConfig, accelerator: Accelerator, heldout: ImageTensors | None, labelled: bool
) -> KernelDistance | None:
    """What measures samples in training; None if nothing does."""
    if not config.kid_samples:
        return None
    if heldout is None:
        raise ConfigError("kid_samples needs held-out images: set heldout_split or heldout_fraction, or kid_samples 0")
    if len(heldout) < 2:
        raise ConfigError(f"kid_samples needs 2 held-out images or more, not {len(heldout)}; raise heldout_fraction")
    from iptv2_diffusion.metrics.generation import make_extractor
    from iptv2_diffusion.training.sample_quality import KernelDistance

    with user_errors(OSError, ValueError, ModuleNotFoundError):
        extractor = make_extractor(config.kid_extractor, config.inception_weights).to(accelerator.device)
        return KernelDistance(
            heldout, extractor, accelerator, count=config.kid_samples, seed=config.seed, labelled=labelled
        )


def make_task(
    config: LDMConfig,
    trainer: Trainer,
    codec: LatentCodec,
    images: Any,
    step: int,
    target_features: TargetFeatures | None,
) -> LatentDiffusionTask:
    """Latents (cached or on the fly) and all that a step needs, ready to go on from `step`."""
    from iptv2_diffusion.data.sampling import DataOrder, class_balanced_weights, own_slices
    from iptv2_diffusion.training.latent_diffusion import LatentDiffusionTask, null_label
    from iptv2_diffusion.training.ldm_data import encode_on_the_fly, open_caches

    accelerator = trainer.accelerator
    train, heldout, names = images
    slices = own_slices(
        config.batch_size, accelerator.num_processes, accelerator.process_index, config.gradient_accumulation_steps
    )
    # What may be refused comes before the images are encoded, which can take hours.
    objective = make_objective(config)
    distance = make_distance(config, accelerator, heldout, labelled=null_label(trainer.state.module) is not None)
    cached = train if config.cache_latents else None
    latents, heldout_latents = open_caches(config, accelerator, codec, cached, heldout)
    if latents is not None:
        weights = class_balanced_weights(latents.class_labels, config.class_balance)
        source, order = latents, DataOrder(len(latents), config.seed, weights)
    else:
        known = null_label(trainer.state.module)
        source, order = encode_on_the_fly(
            config, codec, train, slices, step, position=trainer.position, num_classes=known
        )
    count = "a stream of" if config.streaming else len(source)
    accelerator.print(f"{count} images to train on, {f'{len(names)} classes' if names else 'without labels'}")
    return LatentDiffusionTask(
        config,
        accelerator,
        codec=codec,
        model=trainer.state.module,
        objective=objective,
        source=source,
        heldout=heldout_latents,
        order=order,
        slices=slices,
        latent_shape=(codec.latent_channels, *codec.latent_size(*config.size)),
        names=names,
        distance=distance,
        target_features=target_features,
    )


# --------------------------------------------------------------------------------------------------------------------
# Running


def main(argv: list[str] | None = None) -> int:
    """Parse, build, train, save."""
    config = parse_config(LDMConfig, argv, description=__doc__, examples=EXAMPLES)

    from iptv2_diffusion.training.ldm_data import load_codec, load_images
    from iptv2_diffusion.training.loop import Trainer, make_accelerator, prepare_dry_run

    if config.dry_run:
        prepare_dry_run(config)
        config.heldout_samples, config.preview_classes, config.preview_per_class, config.sample_steps = 16, 2, 2, 2
        config.kid_samples, config.kid_every = min(config.kid_samples, 8), 1
    accelerator = make_accelerator(config)
    images = load_images(config, accelerator)
    codec = load_codec(config, accelerator.device)
    num_classes = count_classes(config, images[2], getattr(images[0], "labels", []))
    if config.plan:
        show_plan(config, accelerator, codec, num_classes)
        return 0
    model = make_model(config, codec, num_classes)
    target = align(config, codec, model)
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(f"{config.model}: {parameters / 1e6:.2f} M parameters on {accelerator.device}")
    trainer = Trainer(config, accelerator, model)
    task = make_task(config, trainer, codec, images, trainer.resume(), target)
    if trainer.fit(task):
        trainer.finish()
        return 0
    if config.dry_run:
        trainer.check_resume()
    weights = trainer.state.averaged_state_dict()  # by all: those of a sharded model are gathered
    if accelerator.is_main_process:
        save_results(config, trainer, task, weights)
    trainer.finish()
    if accelerator.is_main_process:
        print("dry run: every stage ran" if config.dry_run else next_steps(config, trainer, task))
    return 0


def show_plan(config: LDMConfig, accelerator: Accelerator, codec: LatentCodec, num_classes: int | None) -> None:
    """Print parameters, GMACs, memory without and with checkpointing, and the speed and time of the run."""
    import tempfile
    from dataclasses import replace

    import torch

    from iptv2_diffusion.data.sampling import DataOrder, own_slices
    from iptv2_diffusion.models.presets import count_macs, count_parameters
    from iptv2_diffusion.training.latent_diffusion import LatentDiffusionTask, null_label
    from iptv2_diffusion.training.loop import Trainer
    from iptv2_diffusion.training.planning import SyntheticLatents, estimate_memory, measure, plan_text

    processes, objective = accelerator.num_processes, make_objective(config)
    slices = own_slices(config.batch_size, processes, accelerator.process_index, config.gradient_accumulation_steps)
    sample = (slices[0].stop - slices[0].start, codec.latent_channels, *codec.latent_size(*config.size))

    def fresh_model() -> nn.Module:
        return make_model(config, codec, num_classes)

    def loss(model: nn.Module, latents: Tensor) -> Tensor:
        timesteps = torch.zeros(len(latents), dtype=torch.long)
        labels = None if null_label(model) is None else timesteps
        return objective.loss(model, latents, torch.empty_like(latents), timesteps, labels)

    def make_trainer() -> tuple[Trainer, LatentDiffusionTask]:
        trainer = Trainer(replace(config, output_dir=scratch), accelerator, fresh_model())
        task = LatentDiffusionTask(
            config,
            accelerator,
            codec=codec,
            model=trainer.state.module,
            objective=objective,
            source=SyntheticLatents(),
            heldout=None,
            order=DataOrder(1 << 20, config.seed),
            slices=slices,
            latent_shape=sample[1:],
            names=[],
        )
        return trainer, task

    with tempfile.TemporaryDirectory() as scratch:
        speed = measure(make_trainer)
    options: dict[str, Any] = {"processes": processes, "precision": accelerator.mixed_precision}
    memory = {
        name: estimate_memory(fresh_model, loss, sample, config, checkpointing=checkpointing, **options)
        for name, checkpointing in (("no checkpointing", False), ("gradient_checkpointing", True))
    }
    model = fresh_model()
    accelerator.print(
        plan_text(memory, speed, config, count_macs(model, batch_size=sample[0]), count_parameters(model))
    )


def save_results(config: LDMConfig, trainer: Trainer, task: LatentDiffusionTask, weights: dict[str, Tensor]) -> None:
    """The pipeline folder with the averaged weights, then samples.png from that folder, read back."""
    from iptv2_diffusion import IPTV2Pipeline
    from iptv2_diffusion.training.alignment import without_alignment
    from iptv2_diffusion.training.results import cast, replaced

    folder = trainer.output_dir / "pipeline"
    module = trainer.state.module
    model = type(module).from_config(module.config)
    model.load_state_dict(without_alignment(weights))
    with user_errors(OSError):
        with replaced(folder) as temporary:
            task.pipeline(cast(model.eval(), config.save_dtype)).save_pretrained(temporary)
        pipeline = IPTV2Pipeline.from_pretrained(folder).to(trainer.accelerator.device)
        task.sheet(pipeline, trainer.output_dir / "samples.png")


def next_steps(config: LDMConfig, trainer: Trainer, task: LatentDiffusionTask) -> str:
    """What was made, and commands to copy."""
    folder = trainer.output_dir
    label = repr(task.id2label[0]) + ", " if task.id2label else ""
    others = "--heldout_split none --output_dir runs/mine"
    return f"""
trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {folder}/:
  samples.png  loss_curve.png  metrics.jsonl  config.yaml  previews/  checkpoint-*/  pipeline/

What to try next
  more images, in Python:
    from iptv2_diffusion import IPTV2Pipeline
    pipe = IPTV2Pipeline.from_pretrained("{folder}/pipeline")
    pipe({label}num_images_per_label=4, guidance_scale={config.guidance_scale:g}).images[0].show()
  curves:            tensorboard --logdir {folder}
  train longer:      {trainer.command_to_train_longer}
  your own images:   accelerate launch train/train_ldm.py --config {folder}/config.yaml --data MY_FOLDER {others}
  all options:       python train/train_ldm.py --help"""


if __name__ == "__main__":
    run_main(main)
