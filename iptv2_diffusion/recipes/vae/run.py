"""A VAE run from its options to a VAE folder: build, train, save."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from iptv2_diffusion.evaluation.results import cast, replaced
from iptv2_diffusion.recipes.vae.config import VAEConfig
from iptv2_diffusion.recipes.vae.data import load_images
from iptv2_diffusion.recipes.vae.task import VAELoss, VAETask
from iptv2_diffusion.training.accelerator import make_accelerator, resolve_sharding
from iptv2_diffusion.training.adapters import size_of
from iptv2_diffusion.training.errors import user_errors
from iptv2_diffusion.training.logging import log_picture
from iptv2_diffusion.training.loop import Outcome, Trainer
from iptv2_diffusion.training.model_card import CardContents, write_card
from iptv2_diffusion.training.publishing import create_repository, upload
from iptv2_diffusion.training.run_folder import prepare_dry_run


def run(config: VAEConfig) -> int:
    """Build, train, save; returns the exit code."""
    repository = create_repository(config)
    if config.dry_run:
        config = prepare_dry_run(config, heldout_samples=16, statistics_samples=16)
    config = resolve_sharding(config)
    accelerator = make_accelerator(config)
    train, heldout = load_images(config, accelerator)
    model = VAELoss(make_vae(config), config)
    accelerator.print(f"AutoencoderKL: {size_of(model)} on {accelerator.device}, {len(train):,} images")
    trainer = Trainer(config, accelerator, model, curves=("loss",))
    trainer.resume()
    task = VAETask(config, accelerator, train, heldout, trainer.step)
    if trainer.fit(task) is Outcome.STOPPED:
        trainer.finish()
        return 0
    if config.dry_run:
        trainer.check_resume()
    save_results(trainer, task, accelerator, repository)
    trainer.finish()
    if accelerator.is_main_process:
        upload(trainer.output_dir / "vae", repository, step=trainer.step)
    return 0


def make_vae(config: VAEConfig) -> AutoencoderKL:
    """Return the untrained VAE, initialised from the seed."""
    set_seed(config.seed)
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        block_out_channels=config.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
        sample_size=config.size[0] if config.size[0] == config.size[1] else config.size,
        scaling_factor=1.0,
    )


def save_results(trainer: Trainer, task: VAETask, accelerator: Accelerator, repository: str | None = None) -> None:
    """Write output_dir/vae with EMA weights, latent statistics and a card, and print its PSNR over held-out images."""
    config, folder = task.config, trainer.output_dir / "vae"
    with trainer.state.averaged() as model:
        mean, std = task.statistics(model.vae)
        vae = AutoencoderKL.from_config(model.vae.config, latents_mean=mean, latents_std=std)
        vae.load_state_dict(model.vae.state_dict())
    if accelerator.is_main_process:
        with user_errors(OSError), replaced(folder) as temporary:
            cast(vae, config.save_dtype).save_pretrained(temporary)
    accelerator.wait_for_everyone()
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().to(accelerator.device)
    heldout = task.heldout.valid_indices()
    psnr = task.psnr(vae, heldout)
    if accelerator.is_main_process:
        picture = task.picture(vae, trainer.output_dir / "reconstructions.png")
        log_picture(accelerator, "reconstructions", picture, trainer.step)
        contents = vae_card(config, folder, psnr, picture, repository)
        write_card(folder, config, contents, step=trainer.step, seconds=trainer.seconds)
        print(f"held-out PSNR {psnr:.2f} dB over {len(heldout)} images, weights in {config.save_dtype}")
        print(f"latents_mean {[round(m, 4) for m in mean]}, latents_std {[round(s, 4) for s in std]}")
        print("dry run: every stage ran" if config.dry_run else f"the VAE is in {folder}, an example in {picture}")


def vae_card(config: VAEConfig, folder: Path, psnr: float, picture: Path, repository: str | None) -> CardContents:
    """Return the contents of the model card."""
    height, width = config.size
    return CardContents(
        repository=repository,
        summary=f"An `AutoencoderKL` that maps images of {height}×{width} pixels to latents of "
        f"{config.latent_channels} channels, {config.downscale} times smaller on each side, and back. Its config has "
        "the mean and the standard deviation of each latent channel.",
        task="image-to-image",
        tags=("autoencoder", "vae"),
        usage=f"""from diffusers import AutoencoderKL
from iptv2_diffusion import LatentCodec

codec = LatentCodec(AutoencoderKL.from_pretrained({str(repository or folder)!r}))
latents = codec.encode(images)  # images (B, 3, H, W) in [-1, 1]
images = codec.decode(latents)""",
        metrics={"heldout_psnr": psnr},
        picture=picture,
        caption="Held-out images above their reconstructions.",
        is_pipeline=False,
    )
