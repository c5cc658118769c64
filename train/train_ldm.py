"""Train a latent-diffusion denoiser, IPT-V2 or DiT, on any folder of images: `iptv2-train` as a script.

accelerate launch train/train_ldm.py --config configs/emoji64.yaml
"""

from iptv2_diffusion.commands.train import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
