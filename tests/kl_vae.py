"""A VAE of diffusers with the widths that a test needs."""

from diffusers import AutoencoderKL


def make_kl_vae(*widths: int, norm_num_groups: int = 2, **config) -> AutoencoderKL:
    """Return an untrained `AutoencoderKL` with one level per width; its latents are 2^(levels - 1) times smaller."""
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=norm_num_groups,
        **config,
    ).eval()
