"""Orientation, EXIF data and colour profile of image files. An invalid tag never makes an image unreadable.

Only the orientation tag rotates an image. All other tags are kept if they can be written again. Otherwise they are
dropped, and a note reports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsInt

import numpy as np
from PIL import ExifTags, Image

if TYPE_CHECKING:
    import tifffile

__all__ = ["ORIENTATION", "Metadata", "orientation_of", "read_metadata", "read_tiff_tags", "turned"]

ORIENTATION = int(ExifTags.Base.Orientation)  # 1 is upright
_SUB_FOLDERS = (int(ExifTags.IFD.Exif), int(ExifTags.IFD.GPSInfo), int(ExifTags.IFD.Interop))
_ICC_PROFILE, _ASCII = 34675, 2  # a TIFF tag and its type
# Colour spaces whose profile is invalid after the conversion to RGB
_CONVERTED_MODES = ("CMYK", "LAB", "HSV", "YCbCr")
_CONVERTED_TIFFS = ("SEPARATED", "CIELAB", "ICCLAB", "ITULAB")


@dataclass
class Metadata:
    """Metadata to keep with the pixels.

    Attributes:
        orientation: EXIF orientation, 1 to 8. Any other value counts as 1.
        exif: EXIF data to write with the upright pixels (its orientation is 1), or None.
        icc_profile: colour profile, or None.
        notes: messages about dropped metadata and the reason.
    """

    orientation: int = 1
    exif: bytes | None = None
    icc_profile: bytes | None = None
    notes: list[str] = field(default_factory=list)

    def saved(self) -> dict[str, bytes]:
        """Return `exif` and `icc_profile`, if present, as arguments of Pillow's `save`."""
        pairs = {"exif": self.exif, "icc_profile": self.icc_profile}
        return {name: value for name, value in pairs.items() if value}


def orientation_of(value: Any) -> int:
    """Read 1 to 8 from a tag of any type (a number, its text, a byte, a sequence that begins with one); otherwise 1."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, bytes):
        text = value.rstrip(b"\0")
        value = text.decode("ascii", "replace") if text.isdigit() else text[0] if len(text) == 1 else 1
    if not isinstance(value, (str, SupportsInt)):
        return 1
    try:
        number = int(value)
    except (ValueError, OverflowError, ZeroDivisionError):  # also of Pillow's fractions
        return 1
    return number if 1 <= number <= 8 else 1


def read_metadata(image: Image.Image) -> Metadata:
    """Read the metadata of a loaded Pillow image. Broken EXIF data do not raise."""
    result = Metadata()
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and profile and image.mode not in _CONVERTED_MODES:
        result.icc_profile = profile
    raw = image.info.get("exif")
    try:
        exif = image.getexif()
        tags = list(exif)
    except Exception as error:  # Pillow's parser raises SyntaxError, struct.error, KeyError ...
        result.notes.append(f"its EXIF cannot be read and is dropped ({type(error).__name__})")
        return result
    result.orientation = orientation_of(_value(exif, ORIENTATION))
    if not tags:
        if raw:
            result.notes.append("its EXIF holds nothing that can be read and is dropped")
        return result
    result.exif, dropped = _rewritten(exif)
    if dropped:
        shown = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
        result.notes.append(f"{len(dropped)} of its EXIF tags cannot be rewritten and are dropped ({shown})")
    elif result.orientation == 1 and isinstance(raw, bytes) and raw:
        result.exif = raw  # unchanged, with data that Pillow does not write, such as makers' notes
    return result


def read_tiff_tags(page: tifffile.TiffPage) -> Metadata:
    """Read the orientation, the text tags and the profile of the first page of a TIFF."""
    result, texts, dropped = Metadata(), Image.Exif(), []
    for tag in page.tags:
        try:
            value = tag.value
        except Exception:  # error of tifffile's parser; the pixels may still be valid
            dropped.append(str(tag.code))
            continue
        if tag.code == ORIENTATION:
            result.orientation = orientation_of(value)
        elif tag.code == _ICC_PROFILE and getattr(page.photometric, "name", "") not in _CONVERTED_TIFFS:
            result.icc_profile = bytes(value) if isinstance(value, bytes) else None
        elif tag.dtype == _ASCII and isinstance(value, str):
            texts[tag.code] = value
    texts[ORIENTATION] = 1
    result.exif, unwritten = _rewritten(texts)
    if dropped or unwritten:
        result.notes.append(f"tags {', '.join([*dropped, *unwritten][:5])} cannot be rewritten and are dropped")
    return result


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image (H, W, C), stored with an EXIF orientation 1 to 8, upright."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)  # 5
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _value(exif: Image.Exif, tag: int) -> Any:
    try:
        return exif.get(tag)
    except Exception:  # of Pillow's parser
        return None


def _rewritten(exif: Image.Exif) -> tuple[bytes | None, list[str]]:
    """Return EXIF data with the writable tags and orientation 1 (if it has one), and the names of the other tags."""
    kept, dropped = Image.Exif(), []
    for tag in list(exif):
        try:
            value = exif.get_ifd(tag) if tag in _SUB_FOLDERS else exif[tag]
        except Exception:  # of Pillow's parser
            dropped.append(_name(tag))
            continue
        if tag == ORIENTATION:
            value = 1
        elif isinstance(value, Mapping):
            bad = list(_unwritable(value))
            dropped += [_name(key) for key in bad]
            value = {key: item for key, item in value.items() if key not in bad}
        if _writes({tag: value}):
            kept[tag] = value
        else:
            dropped.append(_name(tag))
    if not len(kept):
        return None, dropped
    try:
        return kept.tobytes(), dropped
    except Exception:  # error of Pillow's writer for a combination of tags
        return None, [*dropped, *(_name(tag) for tag in kept)]


def _unwritable(folder: Mapping[int, Any]) -> Iterator[int]:
    for key, value in folder.items():
        if not isinstance(value, Mapping) and not _writes({key: value}):
            yield key


def _writes(tags: Mapping[int, Any]) -> bool:
    """Return whether Pillow can write these tags."""
    exif = Image.Exif()
    try:
        exif.update(tags)
        exif.tobytes()
    except Exception:  # Pillow's writer raises struct.error, TypeError, AttributeError ...
        return False
    return True


def _name(tag: int) -> str:
    return ExifTags.TAGS.get(tag, str(tag))
