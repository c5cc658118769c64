"""Photographs for restoration: images in a memory map, decoded once, and patches at random positions.

All random numbers of a batch are drawn for the whole global batch from one generator of (seed, step), as in
`data/draws.py`. A run therefore resumes exactly and does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits, read_image_file
from iptv2_diffusion.files import atomic, write_text
from iptv2_diffusion.messages import one_line

__all__ = ["ImageStore", "PatchSampler", "read_image", "transform"]

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's conversion to gray
READER = 2  # version of cached pixels; it increases when the same files give other pixels
DTYPES = ("uint8", "uint16", "float32")  # of decoded pixels
CELL = 32  # side in pixels of the squares whose texture is measured
TEXTURE_FLOOR = 0.1  # weight of a perfectly flat square; a square of at least TEXTURE_FULL has weight 1
TEXTURE_FULL = 12.0  # standard deviation of luminance, 0–255 scale


def read_image(path: str | Path, channels: int = 3, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Decode an image to (H, W, channels): uint8, uint16 for more than 8 bits, or float32 in [0, 1] for floats.

    The result is upright, gray or RGB, without alpha. See `image_files.py` for the supported files.

    Raises a ValueError that names the file if it cannot be decoded, is empty or too large.
    """
    try:
        image = read_image_file(path, limits).pixels
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ValueError(f"{path} cannot be read as an image: {reason[:200] or type(error).__name__}") from error
    image = image[..., : 1 if image.shape[2] < 3 else 3]
    if channels == 1 and image.shape[2] == 3:
        if image.dtype == np.uint8:
            return np.asarray(Image.fromarray(image).convert("L"))[..., None]
        gray = image @ LUMA
        return (gray if image.dtype == np.float32 else gray.round()).astype(image.dtype)[..., None]
    return np.repeat(image, channels, axis=2) if image.shape[2] < channels else image


class ImageStore:
    """Images of a list of files, decoded once into a memory-mapped file that later runs reuse.

    Args:
        files: image files, all of 8 bits, all of 16 bits or all of floats.
        cache_dir: folder of the decoded file, whose name is a hash of the names, sizes and times of the files.
        channels: 1 or 3.
        scales: sizes of each image: 1 is the original, smaller numbers are Lanczos reductions (8 bits only).
        say: function that is called with one line before a long decoding.
        limits: largest size of an image.

    Attributes:
        files: the file of each image.
        images: arrays (H, W, channels) of uint8, uint16 or float32, views of the memory map.
        peak: value of white: 255, 65535 or 1.
    """

    def __init__(
        self,
        files: Sequence[Path],
        cache_dir: str | Path,
        channels: int = 3,
        scales: Sequence[float] = (1.0,),
        say: Callable[[str], None] = print,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.files = [file for file in files for _ in scales]
        description = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        scaled = [list(scales)] if tuple(scales) != (1.0,) else []
        identity = json.dumps([READER, channels, *scaled, description], ensure_ascii=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:24]
        data, index = (Path(cache_dir).expanduser() / f"images-{key}{suffix}" for suffix in (".raw", ".json"))
        described = read_index(index, data, channels)
        if described is None:
            say(f"decoding {len(files)} images into {data}")
            decode_into(files, data, index, channels, scales, limits)
            described = json.loads(index.read_text(encoding="utf-8"))
        flat = np.memmap(data, dtype=described["dtype"], mode="r")
        self.peak = 1.0 if flat.dtype.kind == "f" else float(np.iinfo(flat.dtype).max)
        self.images, start = [], 0
        for height, width in described["sizes"]:
            count = height * width * channels
            self.images.append(flat[start : start + count].reshape(height, width, channels))
            start += count

    def __len__(self) -> int:
        return len(self.images)

    def crop(self, item: int, top: int, left: int, height: int, width: int) -> Tensor:
        """Return a part of an image, (channels, height, width) float32 in [0, 1], continued by reflection."""
        part = self.images[item][top : top + height, left : left + width]
        if part.shape[:2] != (height, width):
            part = np.pad(part, ((0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0)), "reflect")
        return torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1) / self.peak


def read_index(index: Path, data: Path, channels: int) -> dict[str, Any] | None:
    """Read an index if the file of pixels has the stated size; otherwise None, and the images are decoded again."""
    try:
        described, found = json.loads(index.read_text(encoding="utf-8")), data.stat().st_size
    except (OSError, ValueError):
        return None
    if not isinstance(described, dict) or described.get("dtype") not in DTYPES:
        return None
    sizes = np.asarray(described.get("sizes"), dtype=object)
    if sizes.shape[1:] != (2,) or not all(isinstance(side, int) for side in sizes.flat):
        return None
    expected = int((sizes[:, 0] * sizes[:, 1]).sum()) * channels * np.dtype(described["dtype"]).itemsize
    return described if found == expected else None


def decode_into(
    files: Sequence[Path],
    data: Path,
    index: Path,
    channels: int,
    scales: Sequence[float],
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Write the pixels of all files in order. The index is written last and makes the store valid."""
    data.parent.mkdir(parents=True, exist_ok=True)
    sizes, dtype = [], None
    with atomic(data) as temporary, temporary.open("wb") as file:
        for path in files:
            image = read_image(path, channels, limits)
            if dtype not in (None, image.dtype):
                raise ValueError(f"{path} is {image.dtype}, but earlier images are {dtype}; do not mix bit depths")
            dtype = image.dtype
            for scale in scales:
                scaled = image if scale == 1 else shrink(image, scale, path)
                sizes.append(scaled.shape[:2])
                file.write(np.ascontiguousarray(scaled).tobytes())
    write_text(index, json.dumps({"dtype": str(dtype), "sizes": sizes}))


def shrink(image: np.ndarray, scale: float, path: Path) -> np.ndarray:
    """Resize an 8-bit image (H, W, channels)."""
    if image.dtype != np.uint8:
        kind = "16 bits" if image.dtype == np.uint16 else "floats"
        raise ValueError(f"{path} has {kind}, but scales works with 8 bits only; leave out scales")
    size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
    small = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(small).reshape(size[1], size[0], -1)


class PatchSampler:
    """Patches at random positions of the images, with a preference for texture.

    A square of 32 pixels is drawn with a probability that grows with the standard deviation of its luminance, up to a
    limit, because sky and blur teach little. The position is then shifted at random.

    Args:
        clean: target images.
        degraded: the same images degraded, or None if the degradation is synthetic.
        prefer_texture: whether to prefer texture; False draws all positions equally.
    """

    def __init__(self, clean: ImageStore, degraded: ImageStore | None = None, prefer_texture: bool = True) -> None:
        if degraded is not None:
            check_pairs(clean, degraded)
        self.clean, self.degraded = clean, degraded
        cells, weights = [], []
        for item, image in enumerate(clean.images):
            rows, columns = max(1, image.shape[0] // CELL), max(1, image.shape[1] // CELL)
            grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2) * CELL
            cells.append(np.concatenate([np.full((len(grid), 1), item), grid], axis=1))
            weights.append(cell_texture(image, clean.peak).reshape(-1) if prefer_texture else np.ones(len(grid)))
        self.cells = np.concatenate(cells)  # (cells, 3): image, top, left
        self.cumulative = np.cumsum(np.concatenate(weights))

    def places(self, uniforms: Tensor, size: int) -> list[tuple[int, int, int]]:
        """Map uniform numbers (B, 3) in [0, 1), for square and shifts, to (image, top, left) of patches."""
        places = []
        chosen = np.searchsorted(self.cumulative, uniforms[:, 0].double().numpy() * self.cumulative[-1], side="right")
        for (item, top, left), (_, down, right) in zip(
            self.cells[np.minimum(chosen, len(self.cells) - 1)].tolist(), uniforms.tolist(), strict=True
        ):
            height, width, _ = self.clean.images[item].shape
            # The centre of the square is at a random point of the patch's middle part.
            top = top + CELL // 2 - size // 2 + round((down - 0.5) * CELL)
            left = left + CELL // 2 - size // 2 + round((right - 0.5) * CELL)
            places.append((item, max(0, min(top, height - size)), max(0, min(left, width - size))))
        return places

    def smaller_than(self, size: int) -> list[Path]:
        """Return the images that are smaller than a patch of `size`. They are continued by reflection."""
        pairs = zip(self.clean.files, self.clean.images, strict=True)
        return [file for file, image in pairs if min(image.shape[:2]) < size]

    def patches(self, places: Sequence[tuple[int, int, int]], size: int) -> tuple[Tensor, Tensor | None]:
        """Return clean patches (B, channels, size, size) in [0, 1], and degraded ones (None without such images)."""
        clean = torch.stack([self.clean.crop(*place, size, size) for place in places])
        if self.degraded is None:
            return clean, None
        return clean, torch.stack([self.degraded.crop(*place, size, size) for place in places])


def check_pairs(clean: ImageStore, degraded: ImageStore) -> None:
    """Raise a ValueError unless the two stores have the same number of images with the same sizes."""
    if len(clean) != len(degraded):
        raise ValueError(f"{len(degraded)} degraded images but {len(clean)} clean ones; they must be pairs")
    for ours, theirs, a, b in zip(clean.images, degraded.images, clean.files, degraded.files, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{b} is {theirs.shape[0]}x{theirs.shape[1]} pixels but its clean partner {a} is "
                f"{ours.shape[0]}x{ours.shape[1]}; a pair must have one size"
            )


def cell_texture(image: np.ndarray, peak: float) -> np.ndarray:
    """Return the weight in [TEXTURE_FLOOR, 1] of each 32×32 square of an image (H, W, channels): (H // 32, W // 32)."""
    rows, columns = max(1, image.shape[0] // CELL), max(1, image.shape[1] // CELL)
    luminance = image[: rows * CELL, : columns * CELL].mean(axis=2, dtype=np.float32) * (255 / peak)
    height, width = luminance.shape
    squares = luminance.reshape(rows, height // rows, columns, width // columns)
    return np.clip(squares.std(axis=(1, 3)) / TEXTURE_FULL, TEXTURE_FLOOR, 1.0)


def transform(images: Tensor, codes: Tensor) -> Tensor:
    """Apply one of the eight flips and rotations to each square patch (B, C, P, P); codes (B,) int in [0, 8)."""
    turned = []
    for image, code in zip(images, codes.tolist(), strict=True):
        image = torch.rot90(image, code % 4, dims=(-2, -1))
        turned.append(image.flip(-1) if code >= 4 else image)
    return torch.stack(turned)
