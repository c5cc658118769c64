"""Images and masks as inputs of `IPTV2Img2ImgPipeline` and `IPTV2InpaintPipeline`, in diffusers' conventions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from iptv2_diffusion.latents import LatentCodec

__all__ = ["latent_mask", "read_images", "read_mask"]


def read_images(image: Any, codec: LatentCodec, height: int | None = None, width: int | None = None) -> Tensor:
    """Return images (N, 3, H, W) float32 in [-1, 1], or latents (N, C, h, w) as they are.

    Args:
        image: PIL image, array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], a list of these, or latents.
        codec: codec of the pipeline's VAE.
        height, width: size in pixels to which the images are resized; None for the size of the first one.

    Raises:
        ValueError: there is no image, it has another type, or its size is not a multiple of the VAE's factor.
    """
    if image is None or (isinstance(image, (list, tuple)) and not image):
        raise ValueError("image is missing; give a PIL image, an array, a tensor, or a list of these")
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    sizes = {one.size for one in images if isinstance(one, Image.Image)}
    if len(sizes) > 1 and (height is None or width is None):
        shown = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
        raise ValueError(f"the images have different sizes ({shown}); give height and width, to which they are resized")
    if sizes:
        own_width, own_height = next(iter(sizes))
        codec.latent_size(height or own_height, width or own_width)  # preprocess would round it down
    processor = VaeImageProcessor(
        vae_scale_factor=codec.compression, vae_latent_channels=codec.latent_channels, do_convert_rgb=True
    )
    pixels = processor.preprocess(images if sizes else image, height=height, width=width)
    if pixels.ndim != 4 or pixels.shape[1] not in (3, codec.latent_channels):
        raise ValueError(
            f"image has the shape {tuple(pixels.shape)}; give colour images (N, 3, H, W), or latents with "
            f"{codec.latent_channels} channels"
        )
    return pixels.float()


def read_mask(mask: Any, codec: LatentCodec, height: int, width: int) -> Tensor:
    """Return a mask (N, 1, H, W) of 0 (keep) and 1 (repaint): white pixels, at least 0.5, are repainted.

    Raises:
        ValueError: there is no mask, or it has another type.
    """
    if mask is None:
        raise ValueError("mask_image is missing; give an image that is white where the pipeline repaints")
    processor = VaeImageProcessor(
        vae_scale_factor=codec.compression,
        vae_latent_channels=-1,  # never treat a mask as latents
        do_normalize=False,
        do_binarize=True,
        do_convert_grayscale=True,
    )
    pixels = processor.preprocess(mask, height=height, width=width)
    if pixels.ndim != 4 or pixels.shape[1] != 1:
        raise ValueError(f"mask_image has shape {tuple(pixels.shape)}; give one channel: (N, 1, H, W) or (N, H, W)")
    return pixels.float()


def latent_mask(mask: Tensor, codec: LatentCodec) -> Tensor:
    """Return the mask of latents (N, 1, h, w): a position is repainted if one of its pixels (N, 1, H, W) is."""
    return F.max_pool2d(mask, codec.compression)
