"""The networks: attention and feed-forward → FG block → backbone → denoiser. Floor 1: torch and diffusers only."""
