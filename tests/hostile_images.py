"""Image files of every mode, and with metadata that crash careless readers."""

import io
import struct

import numpy as np
import tifffile
from PIL import Image


def garbage_exif(orientation: int = 6, tags: dict | None = None) -> bytes:
    """EXIF data of (type, value bytes) by tag, written without any check."""
    entries = {0x0112: (3, struct.pack("<H", orientation)), **(tags or {})}
    body = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    sizes, data = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 9: 4, 10: 8}, b""
    offset = 8 + 2 + 12 * len(entries) + 4
    for tag, (kind, value) in sorted(entries.items()):
        count = len(value) // sizes.get(kind, 1)
        if len(value) <= 4:
            body += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        else:
            body += struct.pack("<HHII", tag, kind, count, offset + len(data))
            data += value
    return b"Exif\0\0" + body + struct.pack("<I", 0) + data


# Each makes `ImageOps.exif_transpose` or `Exif.tobytes` fail in a reader that trusts its input
ODD_TAGS = {
    "XResolution as text": {0x011A: (2, b"seventy-two\0")},
    "YResolution over zero": {0x011B: (5, struct.pack("<II", 72, 0))},
    "Software as a number": {0x0131: (3, struct.pack("<H", 7))},
    "a sub-folder that points to nowhere": {0x8769: (4, struct.pack("<I", 1 << 30))},
    "a sub-folder that points to itself": {0x8769: (4, struct.pack("<I", 8))},
    "a type that does not exist": {0x010F: (77, b"abcd")},
    "a count of a gigabyte": {0x010E: (2, b"x" * 5)},
    "signed rationals": {0x011A: (10, struct.pack("<ii", -1, -1))},
    "width as bytes": {0x0100: (7, b"\xff\xfe\xfd\xfc\xfb")},
}


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()
