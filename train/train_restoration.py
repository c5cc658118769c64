"""Train an image restorer on photographs or on pairs of images: `iptv2-train-restoration` as a script.

accelerate launch train/train_restoration.py --config configs/restoration/denoise-color-nano.yaml
"""

from iptv2_diffusion.commands.train_restoration import main, run

__all__ = ["main"]

if __name__ == "__main__":
    run()
