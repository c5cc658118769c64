"""Image files of 16 bits a channel, which Pillow reads and writes only in gray: PNG and TIFF.

PNG is read by torchvision and written by pypng, TIFF goes through tifffile both ways (compressions other than deflate
need the package imagecodecs).
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import tifffile

__all__ = ["count_tiff_images", "is_16_bit", "read_16_bit", "read_tiff_metadata", "write_16_bit"]

_PNG = b"\x89PNG"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ASCII, _ORIENTATION, _ICC_PROFILE = 2, 274, 34675  # a type and two tags of TIFF


def is_16_bit(path: str | Path) -> bool:
    """Whether a file is a PNG or TIFF of unsigned 16 bits a channel.

    Raises:
        OSError, ValueError: it cannot be opened, or is a damaged TIFF.
    """
    with Path(path).open("rb") as file:
        header = file.read(25)
    if header[:4] in _TIFF:
        with _tiff_page(path) as page:
            return page.dtype == np.uint16
    return header[:4] == _PNG and header[24:] == b"\x10"


def read_16_bit(path: str | Path) -> np.ndarray:
    """(H, W, C) of uint16, C from 1 to 4: gray or RGB, perhaps with alpha; upright, as EXIF's orientation says.

    Raises:
        OSError, ValueError, RuntimeError: the file is damaged, or a TIFF of another layout or compression.
    """
    with Path(path).open("rb") as file:
        is_png = file.read(4) == _PNG
    if is_png:
        from torchvision.io import ImageReadMode, decode_png, read_file

        image = decode_png(read_file(str(path)), mode=ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
        with Image.open(path) as file:
            return turned(image, file.getexif().get(_ORIENTATION, 1))
    with _tiff_page(path) as page:
        if page.photometric.name not in ("MINISBLACK", "RGB"):
            raise ValueError(f"its pixels are {page.photometric.name}, not gray or RGB")
        image, planes = page.asarray(), page.planarconfig == 2
        orientation = int(page.tags.valueof(_ORIENTATION, 1))
    if image.ndim == 2:
        image = image[..., None]
    return turned(np.moveaxis(image, 0, -1) if planes else image, orientation)


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) stored with an orientation of EXIF, 1 to 8, as it is to be seen."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)  # 5
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def read_tiff_metadata(path: str | Path) -> dict[str, bytes]:
    """`icc_profile` and, with orientation and texts, `exif` of a TIFF of any depth, as `write_16_bit` takes them.

    No profile where the pixels are neither gray nor RGB: it would not hold after their conversion.
    """
    with _tiff_page(path) as page:
        converted = page.photometric.name in ("SEPARATED", "CIELAB", "ICCLAB", "ITULAB")
        tags = {tag.code: tag.value for tag in page.tags if tag.dtype == _ASCII or tag.code == _ORIENTATION}
        profile = [bytes(tag.value) for tag in page.tags if tag.code == _ICC_PROFILE and not converted]
    exif = Image.Exif()
    exif.update({code: value if isinstance(value, str) else int(value) for code, value in tags.items()})
    return {"exif": exif.tobytes(), **({"icc_profile": profile[0]} if profile else {})}


def count_tiff_images(path: str | Path) -> int:
    """Images of a TIFF, without their smaller copies."""
    with _tiff_file(path) as file:
        return sum(not page.is_reduced for page in file.pages)


@contextlib.contextmanager
def _tiff_page(path: str | Path) -> Iterator[tifffile.TiffPage]:
    """The first page of a TIFF."""
    with _tiff_file(path) as file:
        yield file.pages[0]


@contextlib.contextmanager
def _tiff_file(path: str | Path) -> Iterator[tifffile.TiffFile]:
    """A damaged TIFF raises a ValueError."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            yield file
    except (tifffile.TiffFileError, struct.error, zlib.error, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"a damaged TIFF: {error}") from error


def write_16_bit(image: np.ndarray, path: str | Path, icc_profile: bytes | None = None, exif: bytes = b"") -> None:
    """Write (H, W, C) of uint16 as PNG or TIFF, whichever the path's suffix says.

    Args:
        image: C from 1 to 4: gray or RGB, perhaps with alpha.
        path: ends in .png, .tif or .tiff.
        icc_profile: colour profile to keep.
        exif: as `Image.Exif.tobytes()` gives it. PNG keeps all of it, TIFF its orientation and texts.

    Raises:
        ValueError: another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        _write_png(image, Path(path), icc_profile, exif)
    elif suffix in (".tif", ".tiff"):
        _write_tiff(image, Path(path), icc_profile, exif)
    else:
        raise ValueError(f"{suffix} files have no 16 bits a channel; write .png or .tif")


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


def _write_tiff(image: np.ndarray, path: Path, icc_profile: bytes | None, exif: bytes) -> None:
    import tifffile

    tags = Image.Exif()
    tags.load(exif)
    extra = [(tag, "s", 0, value, True) for tag, value in tags.items() if isinstance(value, str)]
    if _ORIENTATION in tags:
        extra.append((_ORIENTATION, "H", 1, tags[_ORIENTATION], True))
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
