"""Input and output of the restoration pipeline: files, PIL images, arrays and tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits, from_pillow, read_image_file
from iptv2_diffusion.messages import one_line

__all__ = ["Picture", "from_array", "read_pictures", "to_output", "to_pil"]


@dataclass
class Picture:
    """An image in the pipeline's form: pixels (C, H, W) and alpha (1, H, W) or None, float32 in [0, 1]."""

    pixels: Tensor
    alpha: Tensor | None = None


def read_pictures(image: Any, limits: Limits = DEFAULT_LIMITS) -> Iterator[Picture]:
    """Convert the images that `__call__` accepts to `Picture`s."""
    if isinstance(image, (list, tuple)):
        for item in image:
            yield from read_pictures(item, limits)
    elif isinstance(image, (str, Path)):
        yield read_file_picture(Path(image), limits)
    elif isinstance(image, Image.Image):
        yield from from_array(from_pillow(image).pixels)
    elif isinstance(image, (np.ndarray, Tensor)):
        yield from from_array(image)
    else:
        raise ValueError(
            f"{type(image).__name__} is not an image; give a path, PIL image, array, tensor or a list of them"
        )


def read_file_picture(path: Path, limits: Limits) -> Picture:
    """Read an image file. Images of more than 8 bits per channel or of floats keep their depth."""
    try:
        return next(from_array(read_image_file(path, limits).pixels))
    except (OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def check_values(values: np.ndarray) -> None:
    """Raise a ValueError unless floats are in the range of a noisy image in [0, 1]."""
    if not np.isfinite(values).all():
        raise ValueError("the image holds NaN or infinite values")
    if np.abs(values).max() > 16:
        raise ValueError(f"the image has floats up to {values.max():g}; give floats in [0, 1], or uint8 or uint16")


def from_array(image: np.ndarray | Tensor) -> Iterator[Picture]:
    """Convert an array (channels last) or a tensor (channels first)."""
    last = isinstance(image, np.ndarray)
    if image.ndim == 2:
        image = image[..., None] if last else image[None]
    if image.ndim == 4:
        for item in image:
            yield from from_array(item)
        return
    shape = tuple(image.shape)
    if image.ndim != 3 or not min(shape):
        raise ValueError(f"an image of shape {shape} cannot be restored; give (H, W, C) arrays or (C, H, W) tensors")
    if isinstance(image, np.ndarray):
        array = np.asarray(image)
    else:
        image = image.detach().float() if image.is_floating_point() else image.detach()  # NumPy has no bfloat16
        array = image.cpu().permute(1, 2, 0).numpy()
    channels = array.shape[2]
    if channels not in (1, 2, 3, 4):
        order = "(H, W, C)" if last else "(C, H, W)"
        raise ValueError(f"an image of shape {shape} has {channels} channels; {order} with 1 to 4 is expected")
    if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"an image of {array.dtype} is ambiguous; give uint8, uint16, or floats in [0, 1]")
    peak = float(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else 1.0
    values = array.astype(np.float32) / np.float32(peak)
    check_values(values)
    colours = 1 if channels < 3 else 3
    planes = torch.from_numpy(values).permute(2, 0, 1)
    alpha = planes[-1:].clamp(0, 1) if channels in (2, 4) else None
    yield Picture(planes[:colours].contiguous(), alpha)


def to_output(pictures: list[Picture], output_type: str) -> Any:
    """Convert to PIL images with their alpha, or to arrays or tensors with alpha, if any, as the last channel."""
    if output_type == "pil":
        return [to_pil(picture) for picture in pictures]
    tensors = [p.pixels if p.alpha is None else torch.cat((p.pixels, p.alpha)) for p in pictures]
    if output_type == "np":
        arrays = [tensor.permute(1, 2, 0).numpy() for tensor in tensors]
        return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


def to_pil(picture: Picture) -> Image.Image:
    """Convert to 8 bits per channel."""
    parts = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha]
    arrays = [(part.clamp(0, 1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for part in parts]
    images = [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]
    if picture.alpha is not None:
        images[0].putalpha(images[1])
    return images[0]
