"""Image restoration: `train/train_restoration.py`."""
