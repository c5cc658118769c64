"""Image grids: rows of images with names, and crops of several versions of one image side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iptv2_diffusion.files import printable

LONGEST_NAME = 60  # characters


def picture_sheet(rows: Sequence[Sequence[Image.Image]], names: Sequence[str] = (), *, gap: int = 2) -> Image.Image:
    """Arrange rows of equally large images on white, with optional names of the rows at the left.

    Small images are enlarged by an integer factor without smoothing.

    Args:
        rows: rows of images.
        names: names of the rows, or of the first rows.
        gap: pixels between images.
    """
    names = [printable(name)[:LONGEST_NAME] for name in names]  # Pillow cannot centre a name of several lines
    width, height = rows[0][0].size
    factor = max(1, 64 // max(width, height))
    cell_w, cell_h = width * factor + gap, height * factor + gap
    font = ImageFont.load_default(size=max(10, min(18, cell_h // 5)))
    margin = int(max((font.getlength(name) for name in names), default=-12)) + 12
    sheet = Image.new("RGB", (margin + cell_w * max(map(len, rows)) + gap, cell_h * len(rows) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        if y < len(names):
            draw.text((6, y * cell_h + cell_h // 2), names[y], fill="black", font=font, anchor="lm")
        for x, picture in enumerate(row):
            enlarged = picture.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + gap + x * cell_w, gap + y * cell_h))
    return sheet


def side_by_side(shown: dict[str, np.ndarray], size: int = 192) -> Image.Image:
    """Arrange crops from the middle of (H, W, C) arrays in 0–255 in a row, enlarged twice, with a name above each.

    Args:
        shown: name -> array.
        size: side of a crop in pixels.
    """
    sheet = Image.new("RGB", (len(shown) * (2 * size + 4), 2 * size + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, image) in enumerate(shown.items()):
        top, left = (max(0, (side - size) // 2) for side in image.shape[:2])
        crop = image[top : top + size, left : left + size].clip(0, 255).round().astype(np.uint8)
        crop = np.broadcast_to(crop, (*crop.shape[:2], 3))
        enlarged = Image.fromarray(crop).resize((2 * crop.shape[1], 2 * crop.shape[0]), Image.NEAREST)
        sheet.paste(enlarged, (index * (2 * size + 4), 20))
        draw.text((index * (2 * size + 4) + 4, 3), name, fill="black")
    return sheet
