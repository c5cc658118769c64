"""Files of 16 bits, compared with what other libraries write and read."""

import numpy as np
import png
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image, read_file

from iptv2_diffusion.data.patches import read_image
from iptv2_diffusion.data.sixteen_bit import is_16_bit, read_16_bit, turned, write_16_bit


def picture(channels, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, (13, 17, channels), np.uint16)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_other_readers_see_what_was_written(tmp_path, suffix, channels):
    image, path = picture(channels), tmp_path / f"a{suffix}"
    write_16_bit(image, path)
    assert is_16_bit(path)
    if suffix == ".png":
        width, height, rows, info = png.Reader(filename=str(path)).read()
        assert (info["bitdepth"], info["planes"]) == (16, channels)
        other = np.vstack([np.frombuffer(row, np.uint16) for row in rows]).reshape(height, width, channels)
    else:
        other = tifffile.imread(path).reshape(image.shape)
    assert np.array_equal(other, image)
    assert np.array_equal(read_16_bit(path), image)


def test_gray_files_agree_with_pillow(tmp_path):
    for suffix in (".png", ".tif"):
        write_16_bit(picture(1), tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as file:
            assert np.array_equal(np.asarray(file), picture(1)[..., 0])


def test_planes_and_big_endian(tmp_path):
    image = picture(3)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(image, -1, 0), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "b.tif", image, photometric="rgb", byteorder=">")
    for name in ("a.tif", "b.tif"):
        assert is_16_bit(tmp_path / name)
        assert np.array_equal(read_16_bit(tmp_path / name), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_pillow_turns(orientation):
    image = np.arange(24, dtype=np.uint8).reshape(4, 6)
    picture = Image.fromarray(image)
    picture.getexif()[0x0112] = orientation
    assert np.array_equal(turned(image[..., None], orientation)[..., 0], np.asarray(ImageOps.exif_transpose(picture)))


def test_files_of_8_bits_and_floats_are_distinguished(tmp_path):
    Image.fromarray(picture(3).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(picture(3).astype(np.uint8)).save(tmp_path / "a.tif")
    Image.fromarray(picture(1)[..., 0].astype(np.float32)).save(tmp_path / "b.tif")
    assert not any(is_16_bit(tmp_path / name) for name in ("a.png", "a.tif", "b.tif"))
    with pytest.raises(ValueError, match=r"\.jpg files cannot have 16 bits"):
        write_16_bit(picture(3), tmp_path / "a.jpg")


def test_training_reads_gray_and_colour(tmp_path):
    write_16_bit(picture(4), tmp_path / "a.tif")
    write_16_bit(picture(4), tmp_path / "a.png")
    write_16_bit(picture(1), tmp_path / "gray.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif"), picture(4)[..., :3])
    assert np.array_equal(read_image(tmp_path / "gray.tif"), picture(1).repeat(3, axis=2))
    gray = read_image(tmp_path / "a.png", channels=1)
    reference = decode_image(read_file(str(tmp_path / "a.png")), ImageReadMode.GRAY)
    assert gray.shape == (13, 17, 1)
    assert (
        np.abs(gray[..., 0].astype(int) - reference[0].to(torch.int32).numpy()).max() <= 16
    )  # its weights have 15 bits


def test_a_truncated_file_is_named(tmp_path):
    for suffix in (".png", ".tif"):
        path = tmp_path / f"a{suffix}"
        write_16_bit(picture(3), path)
        path.write_bytes(path.read_bytes()[:400])
        with pytest.raises(ValueError, match=rf"a\{suffix} cannot be read"):
            read_image(path)
