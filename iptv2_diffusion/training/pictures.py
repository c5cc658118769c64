"""Sheets of small pictures: rows with a name at the left."""

from __future__ import annotations

from collections.abc import Sequence

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
