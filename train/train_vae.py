"""Train a small AutoencoderKL, the "latent" of latent diffusion, on any folder of images.

    accelerate launch train/train_vae.py --config configs/vae-emoji64.yaml

loss = l1_weight·|y − x| + mse_weight·(y − x)² + kl_weight·KL, each a mean over its elements (pixels, or latents for
the KL), x in [-1, 1]; y is decoded from a sample of the posterior. The result, output_dir/vae, loads with
`AutoencoderKL.from_pretrained`. Its config carries `latents_mean` and `latents_std`, the statistics of each latent
channel over the training images, by which `LatentCodec` brings latents to mean 0 and standard deviation 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from iptv2_diffusion.training.config import TrainingConfig, option, parse_config
from iptv2_diffusion.training.errors import ConfigError, run_main, user_errors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL
    from torch import Tensor, nn

    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.training.loop import Trainer

EXAMPLES = """
examples:
  the shipped VAE                accelerate launch train/train_vae.py --config configs/vae-emoji64.yaml
  two processes on a CPU         ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...
                                 (`--cpu` starts one, whatever --num_processes says)
  try every stage in seconds     ... --dry_run
  your own images, 8x down       ... --data my_photos --heldout_split none --resolution 128 \\
                                     --block_out_channels 32,64,96,128 --output_dir runs/my-vae
  measure a finished run         the same command again: it finds the run finished, evaluates and saves

The same command resumes from the newest checkpoint in output_dir. The down-sampling is 2^(levels - 1).
"""


@dataclass(kw_only=True)
class VAEConfig(TrainingConfig):
    """A VAE run."""

    output_dir: str = option("runs/vae", "folder for checkpoints, logs and the result", free=True)

    data: str = option("data/emoji64", "folder of images, parquet, or Hub name", group="data")
    train_split: str = option("train", "split to train on", group="data")
    heldout_split: str | None = option("heldout", "split for the PSNR; none: heldout_fraction", group="data")
    heldout_fraction: float = option(0.02, "share of train_split kept for the PSNR", group="data")
    image_column: str | None = option(None, "none: found by itself", group="data")
    revision: str | None = option(None, "of a data set on the Hub", group="data")
    resolution: int | tuple[int, int] = option(64, "image size: one number, or height,width", group="data")
    random_flip: bool = option(True, "mirror half of the images", group="data")
    strict: bool = option(False, "fail at a corrupt image instead of leaving it out", group="data", free=True)

    latent_channels: int = option(4, "channels of the latents", group="model")
    block_out_channels: tuple[int, ...] = option((32, 32, 112), "width of each level, full size first", group="model")
    layers_per_block: int = option(1, "residual blocks a level (one more in the decoder)", group="model")
    norm_num_groups: int = option(8, "of group normalisation; divides every width", group="model")
    mid_block_attention: bool = option(False, "attention at the latents' size", group="model")

    l1_weight: float = option(1.0, "of the absolute error", group="objective")
    mse_weight: float = option(4.0, "of the squared error", group="objective")
    kl_weight: float = option(1e-4, "of the KL divergence (mean over the latents' elements)", group="objective")

    heldout_samples: int = option(
        128, "at most, for the PSNR while training; the last is over all", group="results", free=True
    )
    preview_images: int = option(
        12, "columns of the picture: originals over reconstructions", group="results", free=True
    )
    statistics_samples: int = option(4096, "training images for latents_mean and _std", group="results", free=True)
    save_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", "of the result", group="results", free=True
    )

    def validate(self) -> None:
        super().validate()
        self.require_positive("resolution", "latent_channels", "layers_per_block", "norm_num_groups")
        self.require_positive("heldout_samples", "preview_images", "statistics_samples")
        if not self.block_out_channels or any(c < 1 or c % self.norm_num_groups for c in self.block_out_channels):
            raise ConfigError(
                f"block_out_channels is {self.block_out_channels}; each must be a multiple of norm_num_groups "
                f"({self.norm_num_groups})"
            )
        if self.heldout_split is None and not 0 < self.heldout_fraction < 1:
            raise ConfigError(
                f"heldout_fraction is {self.heldout_fraction}; without heldout_split it must lie in (0, 1)"
            )
        if any(side % self.downscale for side in self.size):
            near = [max(1, round(side / self.downscale)) * self.downscale for side in self.size]
            raise ConfigError(
                f"resolution {self.size[0]}x{self.size[1]} is not a multiple of the VAE's {self.downscale}; "
                f"use {near[0]},{near[1]}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Image (height, width)."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)

    @property
    def downscale(self) -> int:
        """Side of an image over side of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)


# --------------------------------------------------------------------------------------------------------------------
# What the run is made of


def load_images(config: VAEConfig, accelerator: Accelerator) -> tuple[ImageTensors, ImageTensors]:
    """Training and held-out images."""
    from iptv2_diffusion.data.images import ImageTensors, load_train_and_heldout

    # One process prepares what `datasets` caches on the disk; the others then find it there.
    with user_errors(OSError, ValueError, KeyError), accelerator.local_main_process_first():
        train, heldout = load_train_and_heldout(
            config.data,
            train_split=config.train_split,
            heldout_split=config.heldout_split,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            image_column=config.image_column,
            label_column="ignore",
            revision=config.revision,
        )
    if heldout is None:
        raise ConfigError(f"{config.data} has {len(train)} image; two are needed, one of them held out")
    if config.dry_run:
        train, heldout = (d.select(range(min(len(d), 4 * config.batch_size))) for d in (train, heldout))
    with user_errors(OSError, ValueError):
        images = [ImageTensors(d, size=config.size, strict=config.strict) for d in (train, heldout)]
        for part in images:
            part.valid_indices()
    return images[0], images[1]


def make_vae(config: VAEConfig) -> AutoencoderKL:
    """The untrained VAE, initialised from the seed."""
    from accelerate.utils import set_seed
    from diffusers import AutoencoderKL

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


def make_training_module(config: VAEConfig) -> nn.Module:
    """A module whose forward is the loss: data-parallel training synchronises through `forward` only."""
    from torch import nn

    class VAELoss(nn.Module):
        """(pixels (B, 3, H, W) in [-1, 1], noise (B, c, h, w)) → scalar loss."""

        def __init__(self) -> None:
            super().__init__()
            self.vae = make_vae(config)
            self.enable_gradient_checkpointing = self.vae.enable_gradient_checkpointing

        def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
            posterior = self.vae.encode(pixels).latent_dist
            decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
            error = decoded.float() - pixels
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
            return (
                config.l1_weight * error.abs().mean()
                + config.mse_weight * error.square().mean()
                + config.kl_weight * kl
            )

    return VAELoss()


# --------------------------------------------------------------------------------------------------------------------
# The task


class VAETask:
    """What `Trainer` trains: images, flips and posterior noise of each step are a function of (seed, step)."""

    def __init__(
        self, config: VAEConfig, accelerator: Accelerator, train: ImageTensors, heldout: ImageTensors, start: int
    ) -> None:
        from torch.utils.data import DataLoader

        from iptv2_diffusion.data.sampling import DataOrder, StepBatches, leave_signals_to_parent, own_slices

        self.config, self.accelerator, self.train, self.heldout = config, accelerator, train, heldout
        self.latent_shape = (config.latent_channels, *(side // config.downscale for side in config.size))
        self.slices = own_slices(
            config.batch_size,
            accelerator.num_processes,
            accelerator.process_index,
            config.gradient_accumulation_steps,
        )
        self.order = DataOrder(len(train.valid_indices()), config.seed)
        sampler = StepBatches(self.order, config.batch_size, self.slices, start=start, flip=config.random_flip)
        workers = {"num_workers": config.num_workers, "worker_init_fn": leave_signals_to_parent}
        self._pixels = iter(DataLoader(_Flipped(train), batch_sampler=sampler, **workers))

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels, posterior noise) of each micro-batch of optimiser step `step`; steps must come in order."""
        from iptv2_diffusion.data.sampling import draw_step

        noise = draw_step(self.order, step, self.config.batch_size, self.latent_shape).posterior_noise
        device = self.accelerator.device
        for part in self.slices:
            yield next(self._pixels).to(device, non_blocking=True), noise[part].to(device, non_blocking=True)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss of a micro-batch."""
        return model(*batch)

    def evaluate(self, model: nn.Module, step: int, last: bool) -> Mapping[str, float]:
        """PSNR over the first `heldout_samples` of a fixed shuffle of the held-out images."""
        return {"heldout_psnr": self.psnr(model.vae, self._some(self.heldout, self.config.heldout_samples))}

    def psnr(self, vae: AutoencoderKL, indices: list[int]) -> float:
        """Mean over images of the PSNR [dB] of the posterior mean's reconstruction.

        Each over all RGB values, both sides rounded to 8 bits; float32; the same on every process.
        """
        import torch

        from iptv2_diffusion.latents import LatentCodec
        from iptv2_diffusion.training.precision import device_of_sums

        device = device_of_sums(self.accelerator)
        total = torch.zeros(2, dtype=torch.float64, device=device)
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        codec = LatentCodec(vae)
        for pixels in self._batches(self.heldout, mine):
            with torch.no_grad():
                decoded = codec.decode(codec.encode(pixels, sample_posterior=False))
            levels = [((x.clamp(-1, 1) + 1) * 127.5).round().to(device).double() for x in (pixels, decoded)]
            error = (levels[0] - levels[1]).square().mean((1, 2, 3))
            # A perfect reconstruction would be infinite: count it as half a level wrong in one value.
            error = error.clamp_min(0.25 / pixels[0].numel())
            total += torch.stack([(10 * torch.log10(255**2 / error)).sum(), torch.ones_like(error).sum()])
        total = self.accelerator.reduce(total, "sum")
        return (total[0] / total[1]).item()

    def preview(self, model: nn.Module, step: int) -> Path:
        """previews/step-*.png: held-out originals over their reconstructions."""
        return self.picture(model.vae, Path(self.config.output_dir) / "previews" / f"step-{step:08d}.png")

    def picture(self, vae: AutoencoderKL, path: Path) -> Path:
        """Two rows of held-out images: originals over reconstructions."""
        import torch
        from PIL import Image

        from iptv2_diffusion.latents import LatentCodec
        from iptv2_diffusion.training.pictures import picture_sheet

        codec = LatentCodec(vae)
        pixels = next(self._batches(self.heldout, self._some(self.heldout, self.config.preview_images), size=10**9))
        with torch.no_grad():
            decoded = codec.decode(codec.encode(pixels, sample_posterior=False))
        rows = []
        for images in (pixels, decoded):
            levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            rows.append([Image.fromarray(image) for image in levels])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_sheet(rows, ["original", "decoded"]).save(path)
        return path

    def statistics(self, vae: AutoencoderKL) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each latent channel over training images.

        Of the posterior's samples (variance of the means + mean of the variances): what the denoiser is trained on.
        """
        import torch

        from iptv2_diffusion.training.precision import device_of_sums

        device = device_of_sums(self.accelerator)
        sums = torch.zeros(3, self.config.latent_channels, dtype=torch.float64, device=device)
        count = 0
        with torch.no_grad():
            for pixels in self._batches(self.train, self._some(self.train, self.config.statistics_samples)):
                posterior = vae.encode(pixels).latent_dist
                mean, variance = posterior.mean.to(device).double(), posterior.var.to(device).double()
                sums += torch.stack([v.sum((0, 2, 3)) for v in (mean, mean.square(), variance)])
                count += mean.numel() // self.config.latent_channels
        first, second, variance = sums / count
        return first.tolist(), (second - first.square() + variance).sqrt().tolist()

    def _some(self, images: ImageTensors, count: int) -> list[int]:
        """The first `count` image numbers of a fixed shuffle."""
        import torch

        from iptv2_diffusion.data.sampling import generator_for

        valid = images.valid_indices()
        order = torch.randperm(len(valid), generator=generator_for(0, "some")).tolist()
        return [valid[i] for i in order[:count]]

    def _batches(self, images: ImageTensors, indices: list[int], size: int = 64) -> Iterator[Tensor]:
        """Pixels (≤ size, 3, H, W) of the images, on the device."""
        import torch

        for start in range(0, len(indices), size):
            pixels = [images.get(i)["pixel_values"] for i in indices[start : start + size]]
            yield torch.stack(pixels).to(self.accelerator.device)


class _Flipped:
    """Pixels of a readable image, mirrored or not, by (item, flip)."""

    def __init__(self, images: ImageTensors) -> None:
        self.images, self.readable = images, images.valid_indices()

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        return self.images.get(self.readable[key[0]], flip=key[1])["pixel_values"]


# --------------------------------------------------------------------------------------------------------------------
# The run


def main() -> int:
    """Parse, build, train, save."""
    config = parse_config(VAEConfig, description=__doc__, examples=EXAMPLES)

    from iptv2_diffusion.training.loop import Trainer, make_accelerator, prepare_dry_run

    if config.dry_run:
        prepare_dry_run(config)
        config.heldout_samples = config.statistics_samples = 16
    accelerator = make_accelerator(config)
    train, heldout = load_images(config, accelerator)
    model = make_training_module(config)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    accelerator.print(f"AutoencoderKL of {size:.2f} M parameters on {accelerator.device}, {len(train):,} images")
    trainer = Trainer(config, accelerator, model, curves=("loss",))
    task = VAETask(config, accelerator, train, heldout, trainer.resume())
    if trainer.fit(task):
        trainer.finish()
        return 0
    if config.dry_run:
        trainer.check_resume()
    save_results(trainer, task, accelerator)
    trainer.finish()
    return 0


def save_results(trainer: Trainer, task: VAETask, accelerator: Accelerator) -> None:
    """output_dir/vae with the averaged weights and latent statistics; its PSNR, read back, over all held-out images."""
    import torch
    from diffusers import AutoencoderKL

    from iptv2_diffusion.training.results import cast, replaced

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
        print(f"held-out PSNR {psnr:.2f} dB over {len(heldout)} images, weights in {config.save_dtype}")
        print(f"latents_mean {[round(m, 4) for m in mean]}, latents_std {[round(s, 4) for s in std]}")
        print("dry run: every stage ran" if config.dry_run else f"the VAE is in {folder}, a picture in {picture}")


if __name__ == "__main__":
    run_main(main)
