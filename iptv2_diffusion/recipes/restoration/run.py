"""A restoration run from its options to a pipeline folder: build, train, save."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import set_seed
from torch import nn

from iptv2_diffusion import IPTV2RestorationPipeline
from iptv2_diffusion.evaluation.results import cast, replaced, trained_model
from iptv2_diffusion.models.exchange import load_backbone
from iptv2_diffusion.models.fusion import trainable
from iptv2_diffusion.models.presets import create_model, find_weights
from iptv2_diffusion.recipes.restoration.config import RestorationConfig
from iptv2_diffusion.recipes.restoration.data import make_heldout, make_sources
from iptv2_diffusion.recipes.restoration.task import RestorationTask
from iptv2_diffusion.training.accelerator import check_batch_size, make_accelerator, resolve_sharding
from iptv2_diffusion.training.adapters import add_lora, needs_weights, size_of
from iptv2_diffusion.training.errors import ConfigError, user_errors
from iptv2_diffusion.training.logging import log_picture
from iptv2_diffusion.training.loop import Outcome, Trainer
from iptv2_diffusion.training.model_card import CardContents, last_metrics, of_adapter, write_card
from iptv2_diffusion.training.publishing import create_repository, upload
from iptv2_diffusion.training.run_folder import command_to_train_longer, prepare_dry_run, this_command


def run(config: RestorationConfig) -> int:
    """Build, train, save; returns the exit code."""
    repository = create_repository(config)
    if config.dry_run:
        config = prepare_dry_run(config, heldout_images=1, heldout_size=64)
    config = resolve_sharding(config)
    accelerator = make_accelerator(config)
    for stage, size in enumerate(config.patch_batch_sizes, start=1):
        check_batch_size(f"patch_batch_sizes, stage {stage}:", size, accelerator, config.gradient_accumulation_steps)
    model = make_model(config, accelerator.print)
    accelerator.print(f"{config.model}: {size_of(model)} on {accelerator.device}")
    trainer = Trainer(config, accelerator, model, curves=("psnr", *(f"psnr_sigma{s:g}" for s in config.heldout_sigmas)))
    task = make_task(config, trainer)
    trainer.resume()
    if trainer.fit(task) is Outcome.STOPPED:
        trainer.finish()
        return 0
    if config.dry_run:
        trainer.check_resume()
    if accelerator.is_main_process:
        save_pipeline(config, trainer, task, repository)
    trainer.finish()
    if accelerator.is_main_process:
        print("dry run: every stage ran" if config.dry_run else next_steps(config, trainer))
        upload(trainer.output_dir / ("lora" if config.lora_rank else "pipeline"), repository, step=trainer.step)
    return 0


def make_model(config: RestorationConfig, say: Callable[[str], None] = print) -> nn.Module:
    """Return the restorer, initialised from the seed, or its backbone from `config.backbone_from`."""
    overrides = {"in_channels": config.channels, **config.model_overrides}
    if config.tasks:
        overrides["num_tasks"] = len(config.tasks)
    set_seed(config.seed)
    with user_errors(OSError, ValueError):
        if config.lora_rank:
            needs_weights(find_weights(config.model))
        model = trainable(create_model(config.model, **overrides))
        if config.backbone_from is not None:
            say(load_backbone(model, create_model(config.backbone_from)))
    if not hasattr(model.config, "sigma_conditioning"):
        raise ConfigError(f"{config.model} is a {type(model).__name__}, not a restorer; see --help for --model")
    kinds = [task.split("+") for task in config.tasks] or [config.degradations]  # tasks replace degradations
    noisy = config.layout == "clean" and any("noise" in names for names in kinds)
    if model.config.sigma_conditioning is not None and not noisy:
        raise ConfigError(
            "this model takes a noise level, but the data has none; add --model_overrides "
            "'{\"sigma_conditioning\": null}'"
        )
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    return model


def make_task(config: RestorationConfig, trainer: Trainer) -> RestorationTask:
    """Return the task, with its sources and held-out crops."""
    accelerator = trainer.accelerator
    sources = make_sources(config, config.data, "train", accelerator)
    heldout = make_heldout(config, accelerator)
    images = len(set(sources[0].sampler.clean.files))
    largest = max(config.patch_sizes) + 2 * max(source.margin for source in sources)
    if small := sources[0].sampler.smaller_than(largest):
        scaled = " (counted at each scale)" if len(config.scales) > 1 else ""
        note = (
            f"{len(small)} images{scaled}, such as {small[0]}, are smaller than {largest} pixels: padded by reflection"
        )
        accelerator.print(note)
    accelerator.print(f"{images} images to train on, {sum(len(b.clean) for b in heldout.values())} held-out crops")
    return RestorationTask(config, accelerator, model=trainer.state.module, sources=sources, heldout=heldout)


def save_pipeline(
    config: RestorationConfig, trainer: Trainer, task: RestorationTask, repository: str | None = None
) -> None:
    """Write the fused restorer with the EMA weights, the configuration and a model card to output_dir/pipeline."""
    folder, lora = trainer.output_dir / "pipeline", trainer.output_dir / "lora"
    model = trained_model(
        trainer.state.module,
        trainer.state.averaged_state_dict(),
        lora_rank=config.lora_rank,
        lora_folder=lora,
        save_lora_weights=IPTV2RestorationPipeline.save_lora_weights,
    )
    model = cast(model.fuse(), config.save_dtype)
    sigma_range = None if model.config.sigma_conditioning is None else config.noise
    with user_errors(OSError), replaced(folder) as temporary:
        IPTV2RestorationPipeline(model, sigma_range).save_pretrained(temporary)
        shutil.copy(trainer.output_dir / "config.yaml", temporary / "training_config.yaml")
    with trainer.state.averaged() as averaged:
        picture = task.picture(averaged, trainer.output_dir / "restored.png")
    log_picture(trainer.accelerator, "restored", picture, trainer.step)
    finished = {"step": trainer.step, "seconds": trainer.seconds}
    card = restorer_card(config, folder, picture, None if config.lora_rank else repository)
    write_card(folder, config, card, **finished)
    if config.lora_rank:
        adapted = restorer_card(config, lora, picture, repository)
        load = usage(config.model, f"pipe.load_lora_weights({str(repository or lora)!r})")
        write_card(lora, config, of_adapter(adapted, config.lora_rank, config.model, load), **finished)


def restorer_card(
    config: RestorationConfig, folder: Path, picture: Path | None, repository: str | None
) -> CardContents:
    """Return the contents of the model card."""
    kinds = config.tasks or (", ".join(config.degradations),)
    removed = "pairs of degraded and clean images" if config.layout != "clean" else " or ".join(kinds)
    return CardContents(
        repository=repository,
        summary=f"A restorer of {'colour' if config.channels == 3 else 'gray'} images of any size. It was trained on "
        f"{removed}. The saved model is fused, in {config.save_dtype}.",
        task="image-to-image",
        tags=("image-restoration",),
        usage=usage(str(repository or folder)),
        metrics=last_metrics(folder.parent, "psnr.*"),
        picture=picture,
        caption="Held-out images: degraded, restored, clean.",
        base_model=config.model,
    )


def usage(name: str, *load: str) -> str:
    """Return Python code that restores an image with the pipeline of this name; `load` has further lines."""
    pipeline = f"pipe = IPTV2RestorationPipeline.from_pretrained({name!r})"
    restore = 'image = pipe("photo.png").images[0]'
    return "\n".join(["from iptv2_diffusion import IPTV2RestorationPipeline", "", pipeline, *load, restore])


def next_steps(config: RestorationConfig, trainer: Trainer) -> str:
    """Return a summary of the results, and commands to copy."""
    folder, quoted = trainer.output_dir, shlex.quote(str(trainer.output_dir / "pipeline"))
    return f"""
trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {folder}/:
  loss_curve.png  metrics.jsonl  config.yaml  previews/  checkpoint-*/  pipeline/{"  lora/" if config.lora_rank else ""}

What to try next
  restore images:    iptv2-restore photo.png -o restored --model {quoted}
  measure it:        python eval/restoration_benchmark.py --models {quoted}
  train longer:      {command_to_train_longer(config, trainer.step)}
  all options:       {this_command()} --help"""
