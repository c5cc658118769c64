"""PNG and TIFF files with 16 bits or floats per channel, which Pillow can write only in gray.

`data/image_files.py` reads these files. pypng writes PNG, and tifffile writes TIFF.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from iptv2_diffusion.data.image_files import TIFF_SIGNATURES, ImageFileError, read_image_file
from iptv2_diffusion.data.image_metadata import ORIENTATION, turned

__all__ = ["is_16_bit", "read_16_bit", "turned", "write_16_bit", "write_float_tiff"]

_PNG = b"\x89PNG"


def is_16_bit(path: str | Path) -> bool:
    """Return whether a file is a PNG or TIFF with unsigned 16 bits per channel.

    Raises:
        OSError, ValueError: the file cannot be opened or is a damaged TIFF.
    """
    with Path(path).open("rb") as file:
        header = file.read(25)
    if header[:4] in TIFF_SIGNATURES:
        return _tiff_dtype(path) == np.uint16
    return header[:4] == _PNG and header[24:] == b"\x10"


def _tiff_dtype(path: str | Path) -> np.dtype | None:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return file.pages[0].dtype
    except Exception as error:  # of tifffile's parser
        raise ImageFileError(f"a damaged TIFF: {error}") from error


def read_16_bit(path: str | Path) -> np.ndarray:
    """Read an image (H, W, C) uint16, turned upright by its EXIF orientation.

    C is 1 to 4: gray or RGB, with or without alpha.

    Raises:
        OSError, ValueError: the file is damaged, has another depth, or is a TIFF of an unsupported layout or
            compression.
    """
    pixels = read_image_file(path).pixels
    if pixels.dtype != np.uint16:
        raise ImageFileError(f"{path} holds {pixels.dtype}, not 16 bits per channel")
    return pixels


def write_16_bit(image: np.ndarray, path: str | Path, icc_profile: bytes | None = None, exif: bytes = b"") -> None:
    """Write an image as PNG or TIFF with 16 bits per channel.

    Args:
        image: (H, W, C) uint16. C is 1 to 4: gray or RGB, with or without alpha.
        path: path that ends in .png, .tif or .tiff, which selects the format.
        icc_profile: colour profile to embed.
        exif: metadata from `Image.Exif.tobytes()`. PNG stores all of it, TIFF only the orientation and the texts.

    Raises:
        ValueError: the suffix is another one.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        _write_png(image, Path(path), icc_profile, exif)
    elif suffix in (".tif", ".tiff"):
        _write_tiff(image, Path(path), icc_profile, exif)
    else:
        raise ValueError(f"{suffix} files cannot have 16 bits per channel; write .png or .tif")


def _write_png(image: np.ndarray, path: Path, icc_profile: bytes | None, exif: bytes) -> None:
    import png

    height, width, channels = image.shape
    writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16, compression=1)
    encoded = io.BytesIO()
    writer.write_packed(encoded, (row.astype(">u2").tobytes() for row in image))
    header, *rest = png.Reader(bytes=encoded.getvalue()).chunks()
    extra = []
    if icc_profile:
        extra.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile)))
    if exif:
        extra.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    with path.open("wb") as file:
        png.write_chunks(file, [header, *extra, *rest])


def write_float_tiff(image: np.ndarray, path: str | Path, icc_profile: bytes | None = None, exif: bytes = b"") -> None:
    """Write an image (H, W, C) of floats as a float32 TIFF, without scaling. See `write_16_bit` for the arguments."""
    if Path(path).suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"{Path(path).suffix} files cannot store floats; write .tif")
    _write_tiff(image.astype(np.float32), Path(path), icc_profile, exif)


def _write_tiff(image: np.ndarray, path: Path, icc_profile: bytes | None, exif: bytes) -> None:
    import tifffile

    tags = Image.Exif()
    tags.load(exif)
    extra = [(tag, "s", 0, value, True) for tag, value in tags.items() if isinstance(value, str)]
    if ORIENTATION in tags:
        extra.append((ORIENTATION, "H", 1, tags[ORIENTATION], True))
    channels = image.shape[2]
    tifffile.imwrite(
        path,
        image[..., 0] if channels == 1 else image,
        photometric="rgb" if channels >= 3 else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        compression="zlib",
        iccprofile=icc_profile,
        extratags=extra,
        software=False,
        metadata=None,
    )
