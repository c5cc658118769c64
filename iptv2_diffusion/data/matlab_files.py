"""Reader of numeric arrays in MATLAB files of version 5, the format of MATLAB 5 to 7.2.

    128 bytes of text, version and byte order; then elements: type (4 bytes), length (4 bytes), data, padded to 8 bytes
    an array is an element of elements: flags with the class, dimensions, name, values in column-major order
    it may be compressed: then the element holds the zlib stream of another element

Every length is checked against the file. `scipy.io.loadmat` ends the process at some damaged files (SciPy 1.15).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["read_mat"]

HEADER, ARRAY, COMPRESSED = 128, 14, 15
MOST_BYTES = 4 << 30  # of a decompressed array
# Element types and array classes, as dtypes without their byte order
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}


def read_mat(path: Path, name: str) -> np.ndarray:
    """Return the numeric array of this name.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or of another kind, or has no numeric array of this name. The message has no
            path.
    """
    content = memoryview(Path(path).read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:HEADER]))
    if order is None:
        raise ValueError("it is no MATLAB file of version 5")
    for kind, data in _elements(content[HEADER:], order):
        if kind == COMPRESSED:
            try:
                stream = zlib.decompressobj()
                data = memoryview(stream.decompress(data, MOST_BYTES))
            except zlib.error as error:
                raise ValueError(f"a compressed array is damaged ({error})") from error
            if not stream.eof:
                raise ValueError(f"a compressed array is cut short, or has more than {MOST_BYTES >> 30} GB")
            kind, data = next(_elements(data, order), (0, data))  # 0 is no type of an element
        if kind == ARRAY and (array := _array(data, order, name)) is not None:
            return array
    raise ValueError(f"it has no numeric array {name}")


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield type and data of each element."""
    place = 0
    while place + 8 <= len(content):
        kind, length = np.frombuffer(content, f"{order}u4", 2, place).tolist()
        start, end = place + 8, place + 8 + length
        place = end if kind == COMPRESSED else end + -length % 8
        if kind >> 16:  # a short element: 2 bytes of length, 2 bytes of type, and at most 4 bytes of data
            kind, length = kind & 0xFFFF, kind >> 16
            start, place = start - 4, start
            end = start + min(length, 4)
        if end > len(content):
            raise ValueError("it is cut short")
        yield kind, content[start:end]


def _array(content: memoryview, order: str, name: str) -> np.ndarray | None:
    """Return the array if it has this name. Raises a ValueError if it is damaged, or not of real numbers."""
    parts = _elements(content, order)
    flags, sizes, title, values = (next(parts, (0, content[:0])) for _ in range(4))
    if bytes(title[1]) != name.encode():
        return None
    dtype, stored = CLASSES.get(flags[1][0 if order == "<" else 3] if len(flags[1]) == 8 else 0), TYPES.get(values[0])
    if dtype is None or stored is None:
        raise ValueError(f"{name} is no array of real numbers")
    shape = np.frombuffer(sizes[1], f"{order}i4").tolist() if sizes[0] == 5 and len(sizes[1]) % 4 == 0 else []
    if not shape or min(shape) < 0 or math.prod(shape) * np.dtype(stored).itemsize != len(values[1]):
        raise ValueError(f"{name} has the dimensions {shape}, but {len(values[1])} bytes")
    return np.frombuffer(values[1], order + stored).reshape(shape, order="F").astype(dtype)
