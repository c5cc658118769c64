"""Train a small AutoencoderKL, the "latent" of latent diffusion: `iptv2-train-vae` as a script.

accelerate launch train/train_vae.py --config configs/vae-emoji64.yaml
"""

from iptv2_diffusion.commands.train_vae import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
