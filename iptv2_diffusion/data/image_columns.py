"""Conversion of a data set's columns to "image" (undecoded) and, if there are labels, "label" (a ClassLabel)."""

from __future__ import annotations

from typing import Any

import datasets

__all__ = ["IMAGE_COLUMNS", "LABEL_COLUMNS", "standard_columns"]

IMAGE_COLUMNS = ("image", "img", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "category", "cls")
MOST_CLASSES = 100_000  # larger numbers are not class numbers


def standard_columns(
    data: datasets.Dataset | datasets.IterableDataset, source: str, image_column: str | None, label_column: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """Keep only the image and the label column, under these names and with these feature types."""
    if isinstance(data, datasets.Dataset) and len(data) == 0:
        raise ValueError(f"{source}: the split is empty")
    image = _find_column(data, source, image_column, IMAGE_COLUMNS, "image")
    if image is None:
        kinds = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if not kinds:
            raise ValueError(
                f"{source}: no image column among {', '.join(data.column_names)}; choose it with image_column"
            )
        image = kinds[0]
    label = None if label_column == "ignore" else _find_column(data, source, label_column, LABEL_COLUMNS, "label")
    _require_images(data.features[image], source, image)
    # This comes first, because a stream decodes a column that it renames and would fail at a corrupt image.
    if data.features[image] != datasets.Image(decode=False):
        data = data.cast_column(image, datasets.Image(decode=False))
    data = data.select_columns([image] if label is None else [image, label])
    data = data.rename_columns(
        {old: new for old, new in ((image, "image"), (label, "label")) if old not in (None, new)}
    )
    if label is not None and not isinstance(data.features["label"], datasets.ClassLabel):
        if isinstance(data, datasets.IterableDataset):  # its labels cannot be checked in advance
            _require_numbers(data, source, label)
        else:
            data = _number_labels(data, source, label)
    return data


def _require_images(feature: Any, source: str, column: str) -> None:
    """Return whether a column has one image per row: an Image, the bytes of a file or its path."""
    plain = getattr(feature, "dtype", None)
    record = isinstance(feature, dict) and {"bytes", "path"} >= set(feature)
    if not (isinstance(feature, datasets.Image) or record or plain in ("binary", "large_binary", "string")):
        kind = plain or type(feature).__name__
        raise ValueError(
            f'{source}: column "{column}" holds {kind}, not one image per row; choose another column with image_column'
        )


def _require_numbers(data: datasets.IterableDataset, source: str, column: str) -> None:
    dtype = data.features["label"].dtype
    if "int" not in dtype:
        raise ValueError(
            f'{source}: column "{column}" holds {dtype}; a stream needs class numbers (or a ClassLabel); label_column '
            '"ignore" leaves it out'
        )


def _find_column(
    data: datasets.Dataset, source: str, wanted: str | None, usual: tuple[str, ...], what: str
) -> str | None:
    if wanted is not None:
        if wanted not in data.column_names:
            raise ValueError(f'{source}: no {what} column "{wanted}"; the columns are: {", ".join(data.column_names)}')
        return wanted
    return next((name for name in usual if name in data.column_names), None)


def _number_labels(data: datasets.Dataset, source: str, column: str) -> datasets.Dataset:
    """Convert integers or strings to a ClassLabel: strings in sorted order, integers unchanged (0 … max)."""
    leave = 'label_column "ignore" leaves it out'
    feature = data.features["label"]
    if not isinstance(feature, datasets.Value) or "float" in feature.dtype or feature.dtype in ("binary", "bool"):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(f'{source}: column "{column}" holds {kind}, neither class numbers nor names; {leave}')
    values = data.unique("label")
    if any(value is None for value in values):
        raise ValueError(f'{source}: column "{column}" has rows without a label; {leave}')
    if all(isinstance(v, int) for v in values):
        if min(values) < 0:
            raise ValueError(f'{source}: column "{column}" has the label {min(values)}; labels start at 0')
        if max(values) >= MOST_CLASSES:
            raise ValueError(
                f'{source}: column "{column}" goes up to {max(values)} with {len(values)} values: are these numbers of '
                f"images? Number the classes from 0, or {leave}"
            )
        return data.cast_column("label", datasets.ClassLabel(names=[str(i) for i in range(max(values) + 1)]))
    if all(isinstance(v, str) for v in values):
        return data.cast_column("label", datasets.ClassLabel(names=sorted(values)))
    raise ValueError(f'{source}: column "{column}" holds neither class numbers nor names; {leave}')
