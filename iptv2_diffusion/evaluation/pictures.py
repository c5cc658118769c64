"""Sheets of pictures: rows with a name at the left; crops of one picture side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def picture_sheet(rows: Sequence[Sequence[Image.Image]], names: Sequence[str] = (), *, gap: int = 2) -> Image.Image:
    """Rows of equally large pictures on white, each row's name (if given) in a column at the left.

    Small pictures are enlarged by a whole factor, without smoothing, so that the sheet stays readable.
    """
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
    """Crops from the middle of (H, W, C) arrays on 0–255, twice enlarged, a name above each."""
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
