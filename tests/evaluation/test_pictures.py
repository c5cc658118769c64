"""Sheets of pictures."""

from PIL import Image

from iptv2_diffusion.evaluation.pictures import picture_sheet


def test_a_sheet_has_a_row_a_class():
    rows = [[Image.new("RGB", (16, 32), "red")] * 3, [Image.new("L", (16, 32))] * 3]
    sheet = picture_sheet(rows, ["first", "second"])
    assert sheet.height == 2 * (64 + 2) + 2
    assert sheet.getpixel((sheet.width - 10, 10)) == (255, 0, 0)
    assert sheet.getpixel((sheet.width - 10, 80)) == (0, 0, 0)


def test_names_of_several_lines_and_of_any_length():
    sheet = picture_sheet([[Image.new("RGB", (16, 16))]] * 3, ["two\nlines", "x" * 5000, "\U0001f98a\udcff"])
    assert sheet.width < 2000
