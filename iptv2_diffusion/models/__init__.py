"""The networks: layers, attention and feed-forward → FG block → backbone → denoiser and restorer."""
