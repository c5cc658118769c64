"""A latent-diffusion run from its options to a pipeline folder: build, train, save.

`LatentCodec` encodes images to latents, once (cached) or in every step. `DiffusionObjective` defines the training
target. `Trainer` runs the loop, resumes exactly and saves checkpoints. This file connects them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from iptv2_diffusion import IPTV2Pipeline
from iptv2_diffusion.data.feature_folder import FeatureFolder
from iptv2_diffusion.data.images import ImageTensors
from iptv2_diffusion.evaluation.feature_extractors import make_extractor
from iptv2_diffusion.evaluation.kernel_distance import KernelDistance
from iptv2_diffusion.evaluation.results import cast, replaced, trained_model
from iptv2_diffusion.latents import LatentCodec
from iptv2_diffusion.models.adaptation import adapt_denoiser, match_classes
from iptv2_diffusion.models.fusion import trainable
from iptv2_diffusion.models.presets import create_model, find_weights
from iptv2_diffusion.models.saved import SavedModel
from iptv2_diffusion.objectives import DiffusionObjective, null_label
from iptv2_diffusion.recipes.latent_diffusion.alignment import (
    TargetFeatures,
    attach_alignment,
    load_target,
    without_alignment,
)
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.recipes.latent_diffusion.data import (
    Images,
    check_latents,
    latents_from_cache,
    latents_on_the_fly,
    load_codec,
    load_images,
    open_caches,
)
from iptv2_diffusion.recipes.latent_diffusion.denoiser_card import adapter_card, denoiser_card
from iptv2_diffusion.recipes.latent_diffusion.origin import classes_of_base, noise_schedule
from iptv2_diffusion.recipes.latent_diffusion.plan import show_plan
from iptv2_diffusion.recipes.latent_diffusion.task import LatentDiffusionTask
from iptv2_diffusion.training.accelerator import make_accelerator, resolve_sharding
from iptv2_diffusion.training.adapters import add_lora, size_of
from iptv2_diffusion.training.errors import ConfigError, user_errors
from iptv2_diffusion.training.logging import log_picture
from iptv2_diffusion.training.loop import Outcome, Trainer
from iptv2_diffusion.training.model_card import write_card
from iptv2_diffusion.training.publishing import create_repository, upload
from iptv2_diffusion.training.run_folder import command_to_train_longer, prepare_dry_run, this_command


def run(config: LDMConfig) -> int:
    """Build, train, save; returns the exit code."""
    repository = create_repository(config)
    if config.dry_run:
        sheet = {"preview_classes": 2, "preview_per_class": 2, "sample_steps": 2}
        scores = {"heldout_samples": 16, "kid_samples": min(config.kid_samples, 8), "kid_every": 1}
        config = prepare_dry_run(config, **sheet, **scores)
    config = resolve_sharding(config)
    accelerator = make_accelerator(config)
    train, heldout, names = load_images(config, accelerator)
    codec = load_codec(config, accelerator.device)
    num_classes, label_ids = count_classes(config, names, train.labels), None
    if isinstance(train, FeatureFolder):
        check_latents(config, codec, train)
    if config.lora_rank:
        num_classes, names, label_ids = classes_of_base(config, names)
    if config.plan:
        fresh_model = partial(make_model, config, codec, num_classes, names)
        show_plan(config, accelerator, codec, make_objective(config), fresh_model)
        return 0
    model = make_model(config, codec, num_classes, names)
    target = align(config, codec, model)
    accelerator.print(f"{config.model}: {size_of(model)} on {accelerator.device}")
    trainer = Trainer(config, accelerator, model, result=without_alignment)
    trainer.resume()
    task = make_task(config, trainer, codec, (train, heldout, names), target, label_ids)
    if trainer.fit(task) is Outcome.STOPPED:
        trainer.finish()
        return 0
    if config.dry_run:
        trainer.check_resume()
    weights = trainer.state.averaged_state_dict()  # on all processes, which gather a sharded model together
    if accelerator.is_main_process:
        save_results(config, trainer, task, weights, repository)
    trainer.finish()
    if accelerator.is_main_process:
        print("dry run: every stage ran" if config.dry_run else next_steps(config, trainer, task))
        upload(trainer.output_dir / ("lora" if config.lora_rank else "pipeline"), repository, step=trainer.step)
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Components of the run


def make_model(config: LDMConfig, codec: LatentCodec, num_classes: int | None, names: Sequence[str] = ()) -> nn.Module:
    """Return the denoiser for these latents and classes: the saved one of `config.model`, or one from the seed."""
    height, width = codec.latent_size(*config.size)
    sample_size = height if height == width else (height, width)
    set_seed(config.seed)
    with user_errors(OSError, ValueError):
        saved = find_weights(config.model)
        if saved is not None:
            model = trainable(create_model(config.model, **config.model_overrides))
            model = fine_tuned(model, saved, sample_size=sample_size, num_classes=num_classes, names=names)
        else:
            channels = codec.latent_channels
            overrides = {
                "sample_size": sample_size,
                "in_channels": channels,
                "out_channels": 2 * channels if config.learned_variance else channels,
                "num_class_embeds": num_classes,
                **config.model_overrides,
            }
            model = create_model(config.model, **overrides)
    check_model(config, codec, num_classes, model)
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    return model


def fine_tuned(
    model: nn.Module,
    saved: SavedModel,
    *,
    sample_size: int | tuple[int, int],
    num_classes: int | None,
    names: Sequence[str],
) -> nn.Module:
    """Adapt a saved denoiser to the data's classes and size. The main process prints the classes that it knows."""
    if "sample_size" not in model.config or "sigma_conditioning" in model.config:
        raise ConfigError(f"{saved.folder} is a {type(model).__name__}, not a denoiser; train_restoration.py trains it")
    kept = match_classes(names, saved.id2label, null_label(model))
    if num_classes is not None and os.environ.get("RANK", "0") == "0":
        known = f" ({', '.join(names[number] for number in list(kept)[:5])}{', …' if len(kept) > 5 else ''})"
        print(
            f"{len(kept)} of {num_classes} classes start from their rows in {saved.folder}{known if kept else ''}, "
            f"{num_classes - len(kept)} from the row without a label"
        )
    return adapt_denoiser(model, sample_size=sample_size, num_classes=num_classes, kept=kept)


def check_model(config: LDMConfig, codec: LatentCodec, num_classes: int | None, model: nn.Module) -> None:
    """Raise `ConfigError` for a model that does not fit the latents or the classes."""
    channels = codec.latent_channels
    out_channels = 2 * channels if config.learned_variance else channels
    if model.config.in_channels != channels:
        raise ConfigError(
            f"the model takes {model.config.in_channels} channels, but the VAE {config.vae} gives {channels}; choose "
            "another VAE or leave in_channels out of model_overrides"
        )
    if (model.config.out_channels or channels) != out_channels:
        raise ConfigError(
            f"the model returns {model.config.out_channels} channels for latents of {channels}; with learned_variance "
            f"{config.learned_variance} it must return {out_channels}: leave out_channels out of model_overrides"
        )
    if num_classes is not None and null_label(model) != num_classes:
        raise ConfigError(
            f"the model has {null_label(model)} classes, but the data has {num_classes}; set --num_classes and leave "
            "num_class_embeds out of model_overrides"
        )
    height, width = codec.latent_size(*config.size)
    patch = model.config.patch_size
    if "num_embeds_ada_norm" in model.config and (height % patch or width % patch):
        raise ConfigError(
            f"latents of {height} x {width} do not divide into this DiT's patches of {patch}; choose a resolution that "
            f"is a multiple of {patch * codec.compression}"
        )


def count_classes(config: LDMConfig, names: list[str], labels: list[int]) -> int | None:
    """Return the number of classes; None for unlabelled data. `labels` are those of all images, if known in advance."""
    found = max(len(names), max(labels, default=-1) + 1) if names else 0
    if names and min(labels, default=0) < 0:
        raise ConfigError(
            f"the data has the label {min(labels)}; labels are 0 to {found - 1}: fix or remove the others"
        )
    if config.num_classes and not names:
        raise ConfigError(
            f"num_classes is {config.num_classes}, but no labels were found in {config.data}; set "
            "--label_column, put every class into its own sub-folder, or leave num_classes out"
        )
    if config.num_classes is not None and config.num_classes < found:
        raise ConfigError(
            f"num_classes is {config.num_classes}, but the data has labels up to {found - 1}; use {found} or more"
        )
    return config.num_classes or found or None


def make_objective(config: LDMConfig) -> DiffusionObjective:
    """Return the training objective with its scheduler."""
    options = noise_schedule(config)
    if config.objective == "flow":
        options["shift"] = config.flow_shift
    scheduler = DiffusionObjective.make_scheduler(config.objective, learned_variance=config.learned_variance, **options)
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
    """Add the alignment's projection to the model and return the target features; None without alignment."""
    if config.align_target is None:
        return None
    target = load_target(config.align_target, codec)
    attach_alignment(model, config.align_stage, target.dim, config.align_hidden)
    return target


def make_distance(
    config: LDMConfig, accelerator: Accelerator, heldout: ImageTensors | None, labelled: bool
) -> KernelDistance | None:
    """Return the metric of samples during training; None without KID."""
    if not config.kid_samples:
        return None
    if heldout is None:
        raise ConfigError("kid_samples needs held-out images: set heldout_split or heldout_fraction, or kid_samples 0")
    if len(heldout) < 2:
        raise ConfigError(f"kid_samples needs 2 held-out images or more, not {len(heldout)}; raise heldout_fraction")
    with user_errors(OSError, ValueError, ModuleNotFoundError):
        extractor = make_extractor(config.kid_extractor, config.inception_weights).to(accelerator.device)
        return KernelDistance(
            heldout, extractor, accelerator, count=config.kid_samples, seed=config.seed, labelled=labelled
        )


def make_task(
    config: LDMConfig,
    trainer: Trainer,
    codec: LatentCodec,
    images: tuple[Images, Images | None, list[str]],
    target_features: TargetFeatures | None,
    label_ids: list[int] | None = None,
) -> LatentDiffusionTask:
    """Return the task, with latents cached or encoded in every step, ready to continue from the trainer's step."""
    accelerator, model = trainer.accelerator, trainer.state.module
    train, heldout, names = images
    # Checks that can fail come before the encoding of images, which can take hours.
    objective = make_objective(config)
    distance = make_distance(config, accelerator, heldout, labelled=null_label(model) is not None)
    if isinstance(train, FeatureFolder):
        cache, heldout_cache = train, heldout
    else:
        cached = train if config.cache_latents else None
        cache, heldout_cache = open_caches(config, accelerator, codec, cached, heldout)
        note = check_latents(config, codec, cache) if cache is not None else None
        if note is not None:
            accelerator.print(note)
    if cache is not None:
        source = latents_from_cache(config, accelerator, codec, cache)
    else:
        where = {"position": trainer.position, "num_classes": null_label(model)}
        source = latents_on_the_fly(config, accelerator, codec, train, trainer.step, **where)
    count = "a stream of" if source.images is None else source.images
    accelerator.print(f"{count} images to train on, {f'{len(names)} classes' if names else 'without labels'}")
    return LatentDiffusionTask(
        config,
        accelerator,
        codec=codec,
        model=model,
        objective=objective,
        source=source,
        heldout=heldout_cache,
        names=names,
        label_ids=label_ids,
        distance=distance,
        target_features=target_features,
    )


# --------------------------------------------------------------------------------------------------------------------
# Results


def save_results(
    config: LDMConfig,
    trainer: Trainer,
    task: LatentDiffusionTask,
    weights: dict[str, Tensor],
    repository: str | None = None,
) -> None:
    """Write the pipeline folder with the EMA weights, load it, draw samples.png with it, and write the model cards."""
    folder, lora = trainer.output_dir / "pipeline", trainer.output_dir / "lora"
    model = trained_model(
        trainer.state.module,
        without_alignment(weights),
        lora_rank=config.lora_rank,
        lora_folder=lora,
        save_lora_weights=IPTV2Pipeline.save_lora_weights,
    )
    with user_errors(OSError):
        with replaced(folder) as temporary:
            task.pipeline(cast(model.eval(), config.save_dtype)).save_pretrained(temporary)
        pipeline = IPTV2Pipeline.from_pretrained(folder).to(trainer.accelerator.device)
        sheet = task.sheet(pipeline, trainer.output_dir / "samples.png", show_progress=True)
    log_picture(trainer.accelerator, "samples", sheet, trainer.step)
    finished = {"step": trainer.step, "seconds": trainer.seconds}
    pushed = None if config.lora_rank else repository
    write_card(folder, config, denoiser_card(config, folder, pipeline, pushed), **finished)
    if config.lora_rank:
        write_card(lora, config, adapter_card(config, lora, pipeline, repository), **finished)


def next_steps(config: LDMConfig, trainer: Trainer, task: LatentDiffusionTask) -> str:
    """Return a summary of the results, and commands to copy."""
    folder, quoted = trainer.output_dir, shlex.quote(str(trainer.output_dir))
    label = repr(task.id2label[0]) + ", " if task.id2label else ""
    label_word = shlex.quote(task.id2label[0]) + " " if task.id2label else ""
    lora = "  lora/" if config.lora_rank else ""
    others = "--heldout_split none --output_dir runs/mine"
    return f"""
trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {folder}/:
  samples.png  loss_curve.png  metrics.jsonl  config.yaml  previews/  checkpoint-*/  pipeline/{lora}

What to try next
  more images:       iptv2-generate {label_word}-n 8 --pipeline {quoted}/pipeline --grid sheet.png
  the same in Python:
    from iptv2_diffusion import IPTV2Pipeline
    pipe = IPTV2Pipeline.from_pretrained({str(folder / "pipeline")!r})
    pipe({label}num_images_per_label=4, guidance_scale={config.guidance_scale:g}).images[0].show()
  curves:            tensorboard --logdir {quoted}
  train longer:      {command_to_train_longer(config, trainer.step)}
  your own images:   {this_command()} --config {quoted}/config.yaml --data MY_FOLDER {others}
  all options:       {this_command()} --help"""
