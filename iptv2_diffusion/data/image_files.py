"""Reader of image files for `iptv2-restore`, the trainings and the benchmark.

    picture = read_image_file("photo.tif")
    picture.pixels     (H, W, C), upright; C is 1 to 4: gray or RGB, with or without alpha

The dtype of the pixels follows from the file:

    8 bits or less per channel   uint8 on 0–255; palettes, CMYK, YCbCr and HSV become RGB, 1-bit images become gray
    9 to 16 bits, unsigned       uint16 on 0–65535 (12 bits are scaled, and so is PNM of up to 65,535 levels)
    float16, float32, float64    float32 as stored, with 1 as white; noise may exceed [0, 1], but not [-1, 2]
    everything else              an error that names it: integers of 32 or 64 bits or with a sign, complex, CIELAB ...

Sizes are checked before decoding (`Limits`). The orientation is applied. Metadata are kept as far as they can be
written again (`image_metadata.py`). Every failure is an `ImageFileError`, a ValueError of one line.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from iptv2_diffusion.data.file_signatures import resemblance
from iptv2_diffusion.data.image_metadata import (
    ORIENTATION,
    Metadata,
    orientation_of,
    read_metadata,
    read_tiff_tags,
    turned,
)
from iptv2_diffusion.messages import one_line

__all__ = [
    "DEFAULT_LIMITS",
    "ImageFile",
    "ImageFileError",
    "Limits",
    "as_8_bits",
    "as_rgb",
    "from_pillow",
    "read_image_file",
]

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FLOAT_RANGE = (-1.0, 2.0)  # range of floats in files: [0, 1] and a margin for noise
_DEFLATE = (8, 32946, 50013)  # compressions of TIFF
_PILLOW_LIMIT = threading.Lock()  # guards changes of Pillow's global limit


class ImageFileError(ValueError):
    """Raised for a file that is not an image, damaged, too large, or of an unsupported kind. The message says which."""


@dataclass(frozen=True)
class Limits:
    """Largest size of an image, checked before decoding.

    Attributes:
        pixels: height times width, by default Pillow's own limit, about 179 million. Decoded pixels may take six bytes
            each (RGB of 16 bits), and so may the file.
    """

    pixels: int = 178_956_970

    @property
    def bytes(self) -> int:
        """Largest number of bytes of the file and of the decoded pixels."""
        return 6 * self.pixels

    def check(self, width: int, height: int, bytes_a_pixel: int = 1) -> None:
        """Raise an `ImageFileError` if an image of this size is too large or empty."""
        if width < 1 or height < 1:
            raise ImageFileError(f"it is {width}x{height} pixels: empty")
        if width * height > self.pixels:
            raise ImageFileError(
                f"Image size ({width * height} pixels) exceeds limit of {self.pixels} pixels; raise max_pixels to read"
            )
        if width * height * bytes_a_pixel > self.bytes:
            raise ImageFileError(
                f"its {width}x{height} pixels take {width * height * bytes_a_pixel / 1e9:.2g} GB, above the limit of "
                f"{self.bytes / 1e9:.2g} GB; raise max_pixels (now {self.pixels}) to read it"
            )

    def check_bytes(self, count: int) -> None:
        """Raise an `ImageFileError` if a file of this many bytes is too large."""
        if count > self.bytes:
            raise ImageFileError(f"it has {count} bytes, above the limit of {self.bytes}; raise max_pixels to read it")


DEFAULT_LIMITS = Limits()


@dataclass
class ImageFile:
    """A decoded image.

    Attributes:
        pixels: (H, W, C) uint8, uint16 or float32, upright. C is 1 to 4: gray or RGB, with or without alpha.
        metadata: metadata to write with the pixels.
        frames: number of images in the file. Only the first one is read.
    """

    pixels: np.ndarray
    metadata: Metadata
    frames: int = 1

    @property
    def peak(self) -> float:
        """Value of white: 255, 65535 or 1."""
        return 1.0 if self.pixels.dtype.kind == "f" else float(np.iinfo(self.pixels.dtype).max)


def read_image_file(source: str | os.PathLike | bytes, limits: Limits = DEFAULT_LIMITS) -> ImageFile:
    """Decode a file, or the bytes of one.

    Raises:
        ImageFileError: the file is damaged, too large or of an unsupported kind. The message does not name the path.
        OSError: the file does not exist, or permission is denied.
    """
    if isinstance(source, bytes):
        limits.check_bytes(len(source))
        return _read(io.BytesIO(source), limits)
    path = Path(source)
    if path.exists() and not path.is_file():
        raise ImageFileError("it is not a regular file")
    with path.open("rb") as file:
        limits.check_bytes(os.fstat(file.fileno()).st_size)
        return _read(file, limits)


def _read(file: BinaryIO, limits: Limits) -> ImageFile:
    signature = file.read(4)
    file.seek(0)
    try:
        return _read_tiff(file, limits) if signature in TIFF_SIGNATURES else _read_by_pillow(file, limits)
    except ImageFileError:
        raise
    except MemoryError as error:
        raise ImageFileError("there is not enough memory to decode it") from error
    except UnidentifiedImageError as error:  # Pillow's own message contains a memory address
        raise ImageFileError(f"cannot identify image file{resemblance(file)}") from error
        # Pillow raises OSError for most damage, but also ValueError, SyntaxError (PNG), struct and zlib errors.
        # tifffile and torchvision raise other types. Any error of these calls means that the file is at fault.
    except Exception as error:
        reason = one_line(error, 160)
        raise ImageFileError(reason or type(error).__name__) from error


# ---------------------------------------------------------------------------------------------------------------------
# Pillow


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Replace Pillow's limit by ours. Pillow's is global, so only one thread at a time can do this."""
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _load(image: Image.Image) -> None:
    """Decode. Only images above Pillow's limit wait for each other."""
    large = image.width * image.height > 80_000_000
    with _without_pillows_limit() if large else contextlib.nullcontext():
        image.load()


@contextlib.contextmanager
def _opened(file: BinaryIO, limits: Limits, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Read the header of a file and check the size by our limits instead of Pillow's."""
    with _without_pillows_limit():
        Image.init()
        image = Image.open(file, formats=[name for name in formats if name in Image.OPEN])
    with image:
        limits.check(image.width, image.height, max(1, len(image.getbands())))
        yield image


def _read_by_pillow(file: BinaryIO, limits: Limits) -> ImageFile:
    with _opened(file, limits) as image:
        deep_png = image.format == "PNG" and _png_depth(file) == 16 and image.mode != "I;16"
        if deep_png:
            limits.check(image.width, image.height, 2 * len(image.getbands()))
        # The extra views of a phone's file (MPO) do not count as frames.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        _load(image)
        metadata = read_metadata(image)
        pixels = _deep_png_pixels(file) if deep_png else _pixels(image)
    return ImageFile(turned(pixels, metadata.orientation), metadata, frames)


def from_pillow(image: Image.Image) -> ImageFile:
    """Convert a Pillow image in memory, as if it were read from its file."""
    if not image.width or not image.height:
        raise ImageFileError(f"the image is {image.width}x{image.height} pixels; it is empty")
    image.load()
    metadata = read_metadata(image)
    pixels = _pixels(image, check_floats=False)
    return ImageFile(turned(pixels, metadata.orientation), metadata)


def _pixels(image: Image.Image, check_floats: bool = True) -> np.ndarray:
    """Return the pixels (H, W, C) of a loaded Pillow image of any mode."""
    image = image.convert("LA") if image.mode == "La" else image  # Pillow cannot convert these
    mode = image.mode
    if mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None]
    if mode == "I":  # PNM and, with older Pillow, 16-bit PNG; in other files, 32 bits of an unknown range
        values = np.asarray(image)
        if image.format not in (None, "PPM", "PNG") or values.min() < 0 or values.max() > 65535:
            raise ImageFileError(
                f"its pixels are integers of 32 bits, {values.min()} to {values.max()}: their range is not known; save "
                "it with 8 or 16 bits per channel, or as floats in [0, 1]"
            )
        return values.astype(np.uint16)[..., None]
    if mode == "F":
        return _floats(np.asarray(image, dtype=np.float32)[..., None], check_floats)
    if mode in ("1", "L") and not image.has_transparency_data:
        return np.asarray(image.convert("L"))[..., None]
    if mode == "LA" or (mode in ("1", "L") and image.has_transparency_data):
        return np.asarray(image.convert("RGBA"))[..., [0, 3]]
    if mode == "RGBa" or image.has_transparency_data:
        return np.asarray(image.convert("RGBA"))
    if mode in ("RGB", "RGBX", "P", "CMYK", "YCbCr", "HSV"):
        return np.asarray(image.convert("RGB"))
    raise ImageFileError(f"its pixels are {mode}, not gray or RGB; convert it to RGB")


def _floats(values: np.ndarray, check: bool = True) -> np.ndarray:
    """Convert floats of any width to float32. Floats of a file must be in [0, 1], up to noise."""
    if not np.isfinite(values).all():
        raise ImageFileError("the image holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if check and not FLOAT_RANGE[0] <= low <= high <= FLOAT_RANGE[1]:
        raise ImageFileError(
            f"it holds floats from {low:g} to {high:g}; floats must be in [0, 1], with 1 as white: scale them"
        )
    return values.astype(np.float32)


def _png_depth(file: BinaryIO) -> int:
    file.seek(24)
    return file.read(1)[0]


def _deep_png_pixels(file: BinaryIO) -> np.ndarray:
    """Return whether a file has 16 bits per channel in colour or with alpha, of which Pillow would keep the upper 8."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    file.seek(0)
    encoded = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    return decode_png(encoded, mode=ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# TIFF


def _read_tiff(file: BinaryIO, limits: Limits) -> ImageFile:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        unknown = [kind for kind in page.extrasamples if kind not in (1, 2)]  # neither kind of alpha
        if unknown or len(page.extrasamples) > 1:
            raise ImageFileError(
                f"it has {len(page.extrasamples)} channels besides its colours, whose meaning is unknown; save "
                "it as gray or RGB, with or without alpha"
            )
        depth, count = np.max(page.bitspersample), page.samplesperpixel
        limits.check(page.imagewidth, page.imagelength, max(1, int(depth) // 8) * count)
        metadata, kind = read_tiff_tags(page), page.dtype
        frames = sum(not part.is_reduced for part in tiff.pages)
        if kind is None or kind.kind not in "buf" or (kind.kind == "u" and depth > 16):
            name = "pixels of differing or unknown depths" if kind is None else f"{kind} pixels"
            raise ImageFileError(
                f"it holds {name}, whose range is not known; save it with 8 or 16 bits per channel or floats in [0, 1]"
            )
        if kind.kind == "f" or depth == 16:
            return ImageFile(turned(_deep_tiff_pixels(page, file, limits), metadata.orientation), metadata, frames)
    file.seek(0)
    if depth > 8:
        return _narrow_tiff(file, int(depth), count, limits, metadata, frames)
    with _opened(file, limits, ("TIFF",)) as image:
        pixels = turned(_pixels(_loaded_unturned(image)), metadata.orientation)
    return ImageFile(pixels, metadata, frames)


def _loaded_unturned(image: Any) -> Image.Image:
    """Read a TIFF's pixels as stored. Pillow would rotate them, and would fail at a tag that it cannot write again."""
    exif = image.getexif()
    for tag in list(exif):
        del exif[tag]
    if orientation_of(image.tag_v2.get(ORIENTATION)) in (5, 6, 7, 8):
        image._size = image._tile_size  # as stored, because Pillow finds no orientation
    _load(image)
    return image


def _deep_tiff_pixels(page, file: BinaryIO, limits: Limits) -> np.ndarray:
    """Return the pixels (H, W, C) as stored, uint16 or float32."""
    photometric = page.photometric.name
    if photometric not in ("MINISBLACK", "MINISWHITE", "RGB"):
        raise ImageFileError(f"its pixels are {photometric}, not gray or RGB")
    _check_segments(page, file)
    image = page.asarray()
    if image.ndim == 2:
        image = image[..., None]
    elif page.planarconfig == 2:
        image = np.moveaxis(image, 0, -1)
    if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4):
        raise ImageFileError(f"it holds an array of {image.shape}, not (H, W) or (H, W, 1 to 4)")
    if image.dtype.kind == "f":
        if photometric == "MINISWHITE":
            raise ImageFileError("its floats count from white to black; invert them")
        image = _floats(image)
    else:
        image = image.astype(np.uint16)
        if photometric == "MINISWHITE":
            image[..., 0] = 65535 - image[..., 0]
    return _straight(image) if page.extrasamples == (1,) else image


def _straight(image: np.ndarray) -> np.ndarray:
    """Divide the colours of pixels (H, W, C) by their alpha, to undo the multiplication by alpha."""
    white = 65535.0 if image.dtype == np.uint16 else 1.0
    colours, alpha = image[..., :-1].astype(np.float64), image[..., -1:].astype(np.float64)
    colours = np.divide(colours * white, alpha, out=np.zeros_like(colours), where=alpha > 0).clip(None, white)
    colours = colours.round() if white > 1 else colours
    return np.concatenate((colours.astype(image.dtype), image[..., -1:]), axis=-1)


def _check_segments(page, file: BinaryIO) -> None:
    """Check that strips and tiles are inside the file and decode to no more than their part of the image."""
    end, expected = file.seek(0, io.SEEK_END), int(page.nbytes)
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset + count > end:
            raise ImageFileError("image file is truncated")
        if int(page.compression) in _DEFLATE:
            file.seek(offset)
            decoder = zlib.decompressobj()
            most = max(expected, 1 << 20) + 1
            if count * 1032 > most and len(decoder.decompress(file.read(count), most)) == most:
                raise ImageFileError(
                    "a strip of it decodes to more bytes than the picture has: it is a decompression bomb"
                )


def _narrow_tiff(file: BinaryIO, depth: int, count: int, limits: Limits, metadata: Metadata, frames: int) -> ImageFile:
    """Read 9 to 15 bits per channel: Pillow unpacks 12 bits of gray, which are scaled to 0–65535."""
    if depth != 12 or count != 1:
        raise ImageFileError(f"it has {depth} bits per channel, {count} channels; save it with 8 or 16 bits")
    with _opened(file, limits, ("TIFF",)) as image:
        values = np.asarray(_loaded_unturned(image)).astype(np.uint32)
    pixels = (values << 4 | values >> 8).astype(np.uint16)[..., None]
    return ImageFile(turned(pixels, metadata.orientation), metadata, frames)


# ---------------------------------------------------------------------------------------------------------------------
# Other kinds of pixels


def as_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Convert to uint8 on 0–255, rounded. Raises an `ImageFileError` for floats outside [0, 1], which would clip."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1 / 510 or high > 1 + 1 / 510:
        raise ImageFileError(f"it holds floats from {low:g} to {high:g}, which 8 bits would cut; scale them to [0, 1]")
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def as_rgb(pixels: np.ndarray) -> Image.Image:
    """Convert to an 8-bit RGB image. Transparency is composited on white."""
    pixels = as_8_bits(pixels)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[2]]
    image = Image.frombuffer(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).tobytes())
    if mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        flat = Image.new("RGBA", image.size, "white")
        flat.alpha_composite(image)
        return flat.convert("RGB")
    return image.convert("RGB")
