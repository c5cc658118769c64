"""Command lines, for console scripts, `python -m`, `accelerate launch -m`, and the scripts of `train/` and `eval/`."""
