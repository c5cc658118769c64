"""Encode the images of a latent-diffusion run once, on any number of processes, before it trains.

    accelerate launch train/cache_latents.py --config configs/imagenet256.yaml --cache_dir /shared/latents

It takes the very options of `train_ldm.py` and makes the caches that this would make by itself; the training command
with the same `--data`, `--vae` and `--cache_dir` finds them. Start it again after a kill: whole shards are kept. The
files are the same for any number of processes; over several machines `cache_dir` must lie on a disk that all see.
"""

from __future__ import annotations

from iptv2_diffusion.training.config import parse_config
from iptv2_diffusion.training.errors import ConfigError, run_main
from iptv2_diffusion.training.ldm_config import LDMConfig

EXAMPLES = """
examples:
  one GPU or CPU           accelerate launch train/cache_latents.py --config configs/emoji64.yaml
  8 GPUs, bfloat16         accelerate launch --multi_gpu --num_processes 8 train/cache_latents.py --config ... \\
                             --encode_precision bfloat16 --encode_batch_size 128 --num_workers 8
  4 processes on a CPU     ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 4 ...
  several crops, no flips  ... --crops 4 --random_flip false
"""


def main(argv: list[str] | None = None) -> int:
    """Parse, load, encode what is missing."""
    config = parse_config(LDMConfig, argv, description=__doc__, examples=EXAMPLES)

    from iptv2_diffusion.training.ldm_data import load_codec, load_images, open_caches
    from iptv2_diffusion.training.loop import start_accelerator

    if config.streaming:
        raise ConfigError("a stream is not cached, but encoded as it comes: leave --streaming out to cache its images")
    accelerator = start_accelerator(config)
    train, heldout, _ = load_images(config, accelerator)
    codec = load_codec(config, accelerator.device)
    for what, cache in zip(
        ("training", "held-out"),
        open_caches(config, accelerator, codec, train, heldout, whole_run=True),
        strict=True,
    ):
        if cache is not None:
            accelerator.print(f"{len(cache)} {what} images with latents {cache.latent_shape} in {cache.folder}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_main(main)
