"""Images as tensors: EXIF orientation → composite on white → ADM's centre crop → float32 (3, H, W) in [-1, 1].

Nothing here is random. The training chooses the order and the flips, so that a run can be repeated and resumed.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from iptv2_diffusion.data.archives import FetchError, read_bytes
from iptv2_diffusion.data.draws import generator_for
from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits, as_rgb, read_image_file
from iptv2_diffusion.messages import first_line

__all__ = ["ImageTensors", "center_crop", "decode_image", "path_of", "random_crop", "to_tensor", "view_of"]

MIN_CROP = 0.8  # smallest fraction of the side that a random crop keeps, as in ADM


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Apply ADM's centre crop, for any (height, width).

    A box filter halves the image while it is at least twice the target. A bicubic resize then covers the target, and
    the centre is cropped. For square sizes this is the protocol of the ImageNet FIDs of ADM, DiT and SiT.
    """
    height, width = size
    image = _cover(image, size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(image: Image.Image, size: tuple[int, int], generator: torch.Generator) -> Image.Image:
    """Apply ADM's random crop, for any (height, width): at least 80 % of the side that the centre crop would keep."""
    height, width = size
    enlarged, down, right = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    factor = 1 + enlarged * (1 / MIN_CROP - 1)
    image = _cover(image, (round(height * factor), round(width * factor)))
    left, top = int(right * (image.width - width + 1)), int(down * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Reduce an image to the smallest size that covers (height, width): halved by a box filter, then bicubic."""
    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if scale == 1:
        return image
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image.resize(covering, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to float32 (3, H, W) in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def path_of(record: Mapping[str, Any] | None) -> str | None:
    """Return the path of an undecoded {"bytes", "path"}, if its row has an image and a path."""
    return None if record is None else record["path"]


def decode_image(record: Mapping[str, Any] | None, name: str, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decode {"bytes", "path"} to an 8-bit RGB image of its own size.

    Raises:
        ValueError: the image cannot be read. The message has `name`.
        FetchError: the image could not be fetched. The image itself may be valid.
    """
    if not isinstance(record, Mapping) or (record.get("bytes") is None and record.get("path") is None):
        raise ValueError(f"{name}: the row has no image")
    try:
        return as_rgb(read_image_file(record["bytes"] or read_bytes(record["path"], limits.bytes), limits).pixels)
    except FetchError:
        raise
    except (OSError, ValueError, ImportError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: cannot be read as an image ({first_line(error)})") from error


def view_of(image: Image.Image, size: tuple[int, int], index: int, flip: bool = False, crop: int = 0) -> torch.Tensor:
    """Crop an image to float32 (3, H, W) in [-1, 1], mirrored if `flip`. Crop 0 is the centre, the others are random.

    A crop is a function of (index, crop) only and is the same in every process.
    """
    if crop == 0:
        image = center_crop(image, size)
    else:
        image = random_crop(image, size, generator_for(0, "crop", index, crop))
    pixels = to_tensor(image)
    return pixels.flip(-1).contiguous() if flip else pixels


class ImageTensors(torch.utils.data.Dataset):
    """The images of `load_image_dataset` as tensors.

    `dataset[i]` is {"pixel_values": float32 (3, H, W) in [-1, 1], "class_labels": int (0 without labels), "index": i}.
    `get` returns its mirror image and other crops.

    A corrupt image raises a ValueError with its name. With `strict=False`, call `valid_indices()` first. It finds the
    corrupt images, warns once with their number and names, and returns the indices of the others. `limits` sets the
    largest size of an image.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        size: int | tuple[int, int],
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"size is {size}; use one positive number or (height, width)")
        self.size = (sides[0], sides[1])
        self.dataset, self.strict, self.limits = dataset, strict, limits
        self._valid: list[int] | None = None
        # Labels are read once, because a row access would also read the image's bytes.
        self.labels: list[int] = list(dataset["label"]) if "label" in dataset.column_names else [0] * len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        return self.get(index % len(self))

    def get(self, index: int, flip: bool = False, crop: int = 0) -> dict[str, Any]:
        """Return item `index` of the data set in one of its views (see `view_of`), the same in every epoch."""
        pixels = view_of(self._decode(index), self.size, index, flip, crop)
        return {"pixel_values": pixels, "class_labels": self.labels[index], "index": index}

    def pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """Return these items as 8-bit RGB, (N, 3, H, W) uint8."""
        return (torch.stack([self[i]["pixel_values"] for i in indices]) * 127.5 + 127.5).round().byte()

    def name(self, index: int) -> str:
        """Return the name of an image for messages: its file, or its row."""
        return path_of(self.dataset[index]["image"]) or f"image {index}"

    def valid_indices(self) -> list[int]:
        """Return the indices of the images that can be decoded, in order. The first call decodes each image once."""
        if self._valid is None:
            self._valid, reasons = [], []
            for index in range(len(self.dataset)):
                try:
                    self._decode(index)
                    self._valid.append(index)
                except ValueError as error:
                    if self.strict:
                        raise
                    reasons.append(str(error))
            if not self._valid:
                raise ValueError(f"none of the {len(self.dataset)} images can be read; the first: {reasons[0]}")
            if reasons:
                shown = "; ".join(reasons[:5]) + (" …" if len(reasons) > 5 else "")
                warnings.warn(f"skipping {len(reasons)} of {len(self.dataset)} images: {shown}", stacklevel=2)
        return self._valid

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self.dataset[index]["image"], self.name(index), self.limits)
