"""The VAE of latent diffusion: `train/train_vae.py`."""
