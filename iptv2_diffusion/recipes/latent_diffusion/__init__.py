"""Latent diffusion: `train/train_ldm.py` and `train/cache_latents.py`."""
