"""Probable type of a file that is not an image, from its first bytes."""

from typing import BinaryIO

__all__ = ["resemblance"]

# Offset, bytes that a file has there, and the type that they indicate
_OTHER_FILES = (
    (4, b"ftypavif", "AVIF, which this Pillow cannot decode; convert it to PNG"),
    (4, b"ftyp", "HEIC or a video; convert it to JPEG or PNG"),
    (0, b"\xff\x0a", "JPEG XL; convert it to PNG"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL; convert it to PNG"),
    (0, b"8BPS", "Photoshop; convert it to TIFF or PNG"),
    (0, b"v/1\x01", "OpenEXR; convert it to a TIFF of floats in [0, 1]"),
    (0, b"#?RADIANCE", "Radiance HDR; convert it to a TIFF of floats in [0, 1]"),
    (0, b"%PDF", "PDF; convert its pages to PNG"),
    (0, b"\x93NUMPY", "a NumPy array; save it as PNG or TIFF"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file by `git lfs pull`"),
    (0, b"<", "HTML or SVG text; download the image again, or convert it to PNG"),
)


def resemblance(file: BinaryIO) -> str:
    """Return the end of an error message about an unknown file: its probable type, and the remedy."""
    file.seek(0)
    start = file.read(64)
    if not start.strip(b"\0"):
        return ": it is empty" if not start else ": it begins with zeros, as after a download that was cut short"
    found = (what for place, sign, what in _OTHER_FILES if start[place:].lstrip(b"\xef\xbb\xbf\r\n ").startswith(sign))
    return f": it seems to be {what}" if (what := next(found, None)) else ""
