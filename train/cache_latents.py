"""Encode the images of a latent-diffusion run once, before it trains: `iptv2-cache` as a script.

accelerate launch train/cache_latents.py --config configs/imagenet256.yaml --cache_dir /shared/latents
"""

from iptv2_diffusion.commands.cache_latents import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
