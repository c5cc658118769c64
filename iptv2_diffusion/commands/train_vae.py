"""Train a small AutoencoderKL, the VAE of latent diffusion, on any folder of images.

    accelerate launch train/train_vae.py --config configs/vae-emoji64.yaml

loss = l1_weight·|y − x| + mse_weight·(y − x)² + kl_weight·KL, each a mean over its elements (pixels, or latents for
the KL). x is in [-1, 1], and y is decoded from a sample of the posterior. The result, output_dir/vae, loads with
`AutoencoderKL.from_pretrained`. Its config has `latents_mean` and `latents_std`, the statistics of each latent channel
over the training images. `LatentCodec` uses them to scale latents to mean 0 and standard deviation 1.
"""

from __future__ import annotations

from iptv2_diffusion.recipes.vae.config import VAEConfig
from iptv2_diffusion.training.errors import run_main
from iptv2_diffusion.training.parsing import parse_config

EXAMPLES = """
examples:
  the shipped VAE                accelerate launch train/train_vae.py --config configs/vae-emoji64.yaml
  two processes on a CPU         ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...
                                 (`--cpu` always starts one process)
  try every stage in seconds     ... --dry_run
  your own images, 8x down       ... --data my_photos --heldout_split none --resolution 128 \\
                                     --block_out_channels 32,64,96,128 --output_dir runs/my-vae
  measure a finished run         the same command again: it only evaluates and saves

The same command resumes from the newest checkpoint in output_dir. The down-sampling is 2^(levels - 1).
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the options, then run."""
    config = parse_config(VAEConfig, argv, description=__doc__, examples=EXAMPLES)
    from iptv2_diffusion.recipes.vae.run import run  # late: torch takes seconds to import

    return run(config)


def run() -> None:
    """Run the console script."""
    run_main(main)


if __name__ == "__main__":
    run()
