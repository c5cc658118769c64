"""Encode the images of a latent-diffusion run once, on any number of processes, before it trains.

    accelerate launch train/cache_latents.py --config configs/imagenet256.yaml --cache_dir /shared/latents

The command takes the options of `train_ldm.py` and writes the caches that the training would write. The training
command with the same `--data`, `--vae` and `--cache_dir` uses them. After an interruption, run the same command again:
complete shards are kept. The files are the same for any number of processes. With several machines, `cache_dir` must
be on a shared disk.
"""

from __future__ import annotations

from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.errors import run_main
from iptv2_diffusion.training.parsing import parse_config

EXAMPLES = """
examples:
  one GPU or CPU           accelerate launch train/cache_latents.py --config configs/emoji64.yaml
  8 GPUs, bfloat16         accelerate launch --multi_gpu --num_processes 8 train/cache_latents.py --config ... \\
                             --encode_precision bfloat16 --encode_batch_size 128 --num_workers 8
  4 processes on a CPU     ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 4 ...
  several crops, no flips  ... --crops 4 --random_flip false
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the options, then run."""
    config = parse_config(LDMConfig, argv, description=__doc__, examples=EXAMPLES)
    from iptv2_diffusion.recipes.latent_diffusion.data import make_caches  # late: torch takes seconds to import

    return make_caches(config)


def run() -> None:
    """Run the console script."""
    run_main(main)


if __name__ == "__main__":
    run()
