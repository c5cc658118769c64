"""The reader of image files: every mode and depth, metadata, limits, and files that hypothesis generates."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile_images import ODD_TAGS, encoded, garbage_exif, tiff

from iptv2_diffusion.data.image_files import (
    ImageFileError,
    Limits,
    as_8_bits,
    as_rgb,
    from_pillow,
    read_image_file,
)
from iptv2_diffusion.data.image_metadata import orientation_of
from iptv2_diffusion.data.images import decode_image
from iptv2_diffusion.data.patches import ImageStore, read_image
from iptv2_diffusion.data.sixteen_bit import write_16_bit, write_float_tiff

RNG = np.random.default_rng(0)
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def ramp(dtype, shape=(6, 8)):
    top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    return (np.linspace(0, top, shape[0] * shape[1]).reshape(shape)).astype(dtype)


class TestModes:
    """Half of white is half of white in every format, or the format is refused by name."""

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr"])
    def test_pillows_modes_of_8_bits(self, mode):
        white = mode == "1"
        image = Image.new("RGBA", (5, 4), (255, 255, 255, 255) if white else (128, 128, 128, 255))
        through = {"PA": "LA", "La": "LA", "1": "L"}.get(mode, "RGBA" if mode == "RGBa" else "RGB")
        palette = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
        picture = from_pillow(image.convert(through).convert(mode, **palette))
        assert picture.pixels.dtype == np.uint8
        assert picture.pixels.shape[:2] == (4, 5)
        assert np.abs(picture.pixels[0, 0, 0].astype(int) - (255 if white else 128)) <= 1
        assert picture.pixels.shape[2] in ((2, 4) if "A" in mode or "a" in mode else (1, 3))

    @pytest.mark.parametrize("mode", ["LAB", "HSV"])
    def test_other_colour_spaces(self, mode):
        if mode == "HSV":
            assert from_pillow(Image.new("RGB", (3, 3), "red").convert("HSV")).pixels[0, 0].tolist() == [255, 0, 0]
        else:
            with pytest.raises(ImageFileError, match="LAB, not gray or RGB; convert"):
                from_pillow(Image.new("LAB", (3, 3)))

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
    def test_pillows_modes_of_16_bits(self, mode):
        values = ramp(np.uint16)
        if mode == "I":
            image = Image.fromarray(values.astype(np.int32))
        else:
            data = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
            image = Image.frombytes(mode, (8, 6), data)
        assert np.array_equal(from_pillow(image).pixels[..., 0], values)

    def test_integers_of_32_bits_have_no_known_range(self, tmp_path):
        with pytest.raises(ImageFileError, match=r"32 bits, -5 to -5: their range is not known"):
            from_pillow(Image.fromarray(np.full((3, 3), -5, np.int32)))
        for dtype in (np.int8, np.int16, np.int32, np.uint32, np.int64, np.uint64, np.complex64):
            with pytest.raises(ImageFileError, match=rf"{np.dtype(dtype)} pixels, whose range is not known"):
                read_image_file(tiff(np.ones((4, 4), dtype)))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_floats_are_on_0_to_1(self, dtype, channels):
        values = np.full((4, 5, channels), 0.5, dtype)
        options = {"photometric": "minisblack" if channels == 1 else "rgb"}
        picture = read_image_file(tiff(values[..., 0] if channels == 1 else values, **options))
        assert picture.pixels.dtype == np.float32
        assert picture.pixels.shape == (4, 5, channels)
        assert np.all(picture.pixels == 0.5)
        assert as_rgb(picture.pixels).getpixel((0, 0)) in ((128, 128, 128), (191, 191, 191))  # half on white

    @pytest.mark.parametrize("values", [[0, 5.5], [-3, 0.5], [0, 255], [np.nan, 0], [np.inf, 0]])
    def test_floats_of_another_range_are_refused(self, values):
        with pytest.raises(ImageFileError, match=r"floats from .* in \[0, 1\]|NaN or infinite"):
            read_image_file(tiff(np.array([values], np.float32)))

    def test_noise_beyond_the_range_is_kept_and_not_silently_cut_to_8_bits(self):
        picture = read_image_file(tiff(np.array([[-0.2, 1.3]], np.float32)))
        assert picture.pixels.min() == np.float32(-0.2)
        with pytest.raises(ImageFileError, match=r"floats from -0\.2 to 1\.3, which 8 bits would cut"):
            as_8_bits(picture.pixels)

    @pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_gray_from_either_end(self, photometric, dtype):
        values = ramp(dtype)
        stored = np.iinfo(dtype).max - values if photometric == "miniswhite" else values
        pixels = read_image_file(tiff(stored, photometric=photometric)).pixels
        assert np.array_equal(pixels[..., 0], values)

    def test_12_bits_are_brought_to_16(self):
        values = ramp(np.uint16) >> 4
        packed = bytearray()
        for first, second in values.reshape(-1, 2).tolist():
            packed += bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
        tags = [(256, 4, 8), (257, 4, 6), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
        tags += [(278, 4, 6), (279, 4, len(packed))]
        ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags) + b"\0" * 4
        pixels = read_image_file(b"II*\0" + struct.pack("<I", 8 + len(packed)) + bytes(packed) + ifd).pixels
        assert pixels.dtype == np.uint16
        assert np.abs(pixels[..., 0].astype(int) - ramp(np.uint16)).max() <= 16
        assert (pixels.min(), pixels.max()) == (0, 65535)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    @pytest.mark.parametrize("greyscale", [True, False])
    def test_png_of_every_depth(self, tmp_path, bits, greyscale):
        import png

        if not greyscale and bits < 8:
            pytest.skip("PNG has no such colours")
        top = 2**bits - 1
        rows = [[0, top, top // 2] * (1 if greyscale else 3)] * 2
        with (tmp_path / "a.png").open("wb") as file:
            png.Writer(3, 2, greyscale=greyscale, bitdepth=bits).write(file, rows)
        picture = read_image_file(tmp_path / "a.png")
        assert picture.pixels.min() == 0
        assert picture.pixels.max() == picture.peak == (65535 if bits == 16 else 255)
        assert picture.pixels.shape == (2, 3, 1 if greyscale else 3)

    @pytest.mark.parametrize("top", [255, 1023, 65535])
    def test_pnm_of_every_depth(self, top):
        values = np.array([[0, top // 2, top]])
        body = values.astype(">u2" if top > 255 else np.uint8).tobytes()
        picture = read_image_file(f"P5 3 1 {top}\n".encode() + body)
        assert picture.pixels[0, -1, 0] == picture.peak
        assert abs(picture.pixels[0, 1, 0] / picture.peak - 0.5) < 0.01

    def test_the_same_image_in_every_depth_trains_the_same(self, tmp_path):
        """This test detects images that become black, white or clipped."""
        rgb = RNG.integers(0, 256, (12, 10, 3), np.uint8)
        Image.fromarray(rgb).save(tmp_path / "a.png")
        write_16_bit(rgb.astype(np.uint16) * 257, tmp_path / "b.png")
        write_16_bit(rgb.astype(np.uint16) * 257, tmp_path / "c.tif")
        write_float_tiff(rgb / 255, tmp_path / "d.tif")
        tifffile.imwrite(tmp_path / "e.tif", (rgb / 255).astype(np.float64), photometric="rgb")
        for path in sorted(tmp_path.iterdir()):
            decoded = decode_image({"bytes": None, "path": str(path)}, path.name)
            assert np.array_equal(np.asarray(decoded), rgb), path.name
            image = read_image(path)
            peak = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max
            np.testing.assert_allclose(image / peak, rgb / 255, atol=1e-6)
        store = ImageStore([tmp_path / "d.tif", tmp_path / "e.tif"], tmp_path / "cache", say=lambda _: None)
        assert store.peak == 1
        np.testing.assert_allclose(store.crop(0, 0, 0, 12, 10).permute(1, 2, 0), rgb / 255, atol=1e-6)


class TestMetadata:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("odd", [None, *ODD_TAGS])
    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
    def test_turned_by_the_orientation_alone(self, orientation, odd, form):
        image = Image.fromarray(np.kron(RNG.integers(0, 2, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8) * 255)
        exif = garbage_exif(orientation, ODD_TAGS.get(odd))
        options = {"lossless": True} if form == "WEBP" else {}
        picture = read_image_file(encoded(image, form, exif=exif, **options))
        plain = read_image_file(encoded(image, form, **options)).pixels
        assert picture.metadata.orientation == orientation
        expected = Image.fromarray(plain)
        expected.getexif()[0x0112] = orientation
        from PIL import ImageOps

        assert np.array_equal(picture.pixels, np.asarray(ImageOps.exif_transpose(expected)))
        rewritten = Image.new("RGB", (4, 4))
        rewritten.save(io.BytesIO(), "JPEG", **picture.metadata.saved())  # the kept metadata can be written
        if picture.metadata.exif:
            again = Image.Exif()
            again.load(picture.metadata.exif)
            assert again.get(0x0112, 1) == 1

    @pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage", b"\xff" * 40, b"Exif\0\0II*\0\xff\xff\xff\xff"])
    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
    def test_garbage_costs_the_metadata_but_not_the_image(self, exif, form):
        try:
            data = encoded(Image.new("RGB", (6, 4), "red"), form, exif=exif)
        except Exception:
            pytest.skip("this writer refuses it")
        assert read_image_file(data).pixels.shape == (4, 6, 3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.float32])
    @pytest.mark.parametrize("odd", [None, (282, "s", 0, "seventy-two", True), (34665, "I", 1, 1 << 30, True)])
    def test_tiffs_are_turned_too(self, orientation, depth, odd):
        values = ramp(depth, (4, 6))
        tags = [(274, "H", 1, orientation, True), *([odd] if odd else [])]
        picture = read_image_file(tiff(values, photometric="minisblack", extratags=tags, software=False, metadata=None))
        from iptv2_diffusion.data.image_metadata import turned

        assert np.array_equal(picture.pixels, turned(values[..., None], orientation))

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(6, 6), ((6,), 6), ((6, 1), 6), (b"\x06", 6), ("6", 6), (b"6\0", 6), (6.0, 6), (0, 1), (9, 1), ("x", 1)],
    )
    def test_orientations_of_any_type(self, value, expected):
        assert orientation_of(value) == expected
        assert (
            orientation_of(None) == orientation_of([]) == orientation_of(object()) == orientation_of(float("nan")) == 1
        )


class TestLimits:
    def test_a_small_file_of_a_huge_picture_is_refused_before_it_is_decoded(self):
        """1.5 GB in a file of kilobytes: decoding it would take more memory than this process may have."""
        import resource

        black = zlib.compress(bytes(1 << 20), 9)
        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

        def chunk(kind, body):
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        bomb_png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", black) + chunk(b"IEND", b"")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ImageFileError, match=r"Image size \(3600000000 pixels\) exceeds limit of 178956970"):
            read_image_file(bomb_png)
        tags = [(256, 4, 16_000), (257, 4, 16_000), (258, 3, 16), (259, 3, 8), (262, 3, 2), (273, 4, 8), (277, 3, 3)]
        tags += [(278, 4, 16_000), (279, 4, len(black))]
        ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags) + bytes(4)
        with pytest.raises(ImageFileError, match=r"Image size \(256000000 pixels\) exceeds limit"):
            read_image_file(b"II*\0" + struct.pack("<I", 8 + len(black)) + black + ifd)
        with pytest.raises(ImageFileError, match=r"exceeds limit"):
            read_image_file(b"P6 20000 20000 65535\n")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

    def test_a_tiff_strip_that_decodes_to_more_than_the_picture(self):
        data = tiff(np.zeros((64, 64), np.uint16), compression="zlib", metadata=None)
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            count = file.pages[0].databytecounts[0]
            offset = file.pages[0].tags["StripByteCounts"].valueoffset
            width = file.pages[0].tags["StripByteCounts"].dtype
            starts = file.pages[0].tags["StripOffsets"].valueoffset
        bomb = zlib.compress(bytes(64 << 20), 9)
        form = {3: "<H", 4: "<I", 16: "<Q"}[int(width)]
        if len(bomb) >= 1 << 16:
            form = "<I"
        changed = bytearray(data + bomb)
        struct.pack_into("<I", changed, starts, len(data))
        struct.pack_into(form, changed, offset, min(len(bomb), 65535 if form == "<H" else len(bomb)))
        with pytest.raises(ImageFileError):
            read_image_file(bytes(changed))
        assert count

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
    def test_the_limit_is_an_option_and_holds_for_every_format(self, form, tmp_path):
        data = encoded(Image.new("RGB", (40, 30)), form)
        with pytest.raises(ImageFileError, match=r"1200 pixels\) exceeds limit of 1199 pixels; raise max_pixels"):
            read_image_file(data, Limits(1199))
        assert read_image_file(data, Limits(1200)).pixels.shape[:2] == (30, 40)
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError, match=r"exceeds limit of 5 pixels|above the limit of 30"):
            read_image(tmp_path / "a", limits=Limits(5))
        with pytest.raises(ValueError, match=r"exceeds limit of 5 pixels|above the limit of 30"):
            decode_image({"bytes": data, "path": None}, "a", Limits(5))

    def test_pillows_own_limit_is_not_touched(self):
        before = Image.MAX_IMAGE_PIXELS
        read_image_file(encoded(Image.new("RGB", (4, 3)), "PNG"))
        assert before == Image.MAX_IMAGE_PIXELS

    def test_files_that_are_not_images(self, tmp_path):
        for data in (
            b"",
            b"x",
            b"GIF89a",
            b"II*\0",
            b"MM\0*" + b"\xff" * 30,
            b"\x89PNG\r\n\x1a\n",
            b"%!PS-Adobe-3.0 EPSF",
        ):
            with pytest.raises(ImageFileError):
                read_image_file(data)
        with pytest.raises(ImageFileError, match="not a regular file"):
            read_image_file(tmp_path)
        with pytest.raises(FileNotFoundError):
            read_image_file(tmp_path / "absent")

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"", "it is empty"),
            (bytes(4096), "begins with zeros"),
            (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC or a video; convert it to JPEG or PNG"),
            (b"\xff\x0a" + b"x" * 40, "JPEG XL"),
            (b"8BPS\0\1" + bytes(40), "Photoshop"),
            (b"v/1\x01\x02" + bytes(60), "OpenEXR"),
            (b"#?RADIANCE\n", "Radiance HDR"),
            (b"%PDF-1.7\n", "PDF"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "pointer of Git LFS; .*git lfs pull",
            ),
            (b"\xef\xbb\xbf\n<!DOCTYPE html>", "HTML or SVG text; download the image again"),
            (b"\x93NUMPY\1\0", "a NumPy array"),
        ],
    )
    def test_what_it_seems_to_be_instead(self, data, told):
        with pytest.raises(ImageFileError, match=f"cannot identify image file: .*{told}"):
            read_image_file(data)

    def test_pipes_and_circles_of_links_do_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "circle.png").symlink_to("circle.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        for name in ("pipe.png", "zero.png"):
            with pytest.raises(ImageFileError, match="not a regular file"):
                read_image_file(tmp_path / name)
        with pytest.raises(OSError, match="symbolic links"):
            read_image_file(tmp_path / "circle.png")


class TestExtraChannels:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    @pytest.mark.parametrize(("channels", "extra"), [(4, (0,)), (5, (0, 0)), (5, (2, 0)), (5, (2, 2))])
    def test_channels_of_unknown_meaning_are_refused(self, dtype, channels, extra):
        data = tiff(np.zeros((6, 7, channels), dtype), photometric="rgb", planarconfig="contig", extrasamples=extra)
        with pytest.raises(ImageFileError, match=f"it has {channels - 3} channels besides its colours"):
            read_image_file(data)

    @pytest.mark.parametrize("dtype", [np.uint16, np.float32])
    def test_colours_that_were_multiplied_by_alpha_are_divided_by_it(self, dtype):
        white = 65535 if dtype == np.uint16 else 1
        alpha = np.linspace(0, 1, 20).reshape(4, 5, 1) ** 2
        colours = np.random.default_rng(0).random((4, 5, 3))
        stored = np.concatenate((colours * alpha, alpha), -1) * white
        stored = stored.round() if white > 1 else stored
        data = tiff(stored.astype(dtype), photometric="rgb", extrasamples=("assocalpha",))
        pixels = read_image_file(data).pixels
        np.testing.assert_array_equal(pixels[..., 3], stored[..., 3].astype(dtype))
        solid = alpha[..., 0] > 0.2
        np.testing.assert_allclose(pixels[solid][:, :3] / white, colours[solid], atol=1e-4)
        assert (pixels[0, 0] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Properties

CONTAINERS = {
    "PNG": (["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], {}),
    "JPEG": (["L", "RGB", "CMYK"], {"quality": 95}),
    "WEBP": (["RGB", "RGBA"], {"lossless": True}),
    "BMP": (["1", "L", "P", "RGB"], {}),
    "GIF": (["L", "P", "RGB"], {}),
    "PPM": (["1", "L", "RGB", "I;16"], {}),
    "TIFF": (["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"], {}),
}


@st.composite
def files(draw):
    """(bytes, container, mode, width, height, orientation) of an image with arbitrary metadata."""
    container = draw(st.sampled_from(sorted(CONTAINERS)))
    modes, options = CONTAINERS[container]
    mode = draw(st.sampled_from(modes))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    elif mode == "I":
        image = Image.fromarray(rng.integers(0, 2**31 - 1, (height, width), dtype=np.int32))
    elif mode == "F":
        image = Image.fromarray(rng.random((height, width), dtype=np.float32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
        image = image.convert("LA" if mode == "LA" else "RGBA" if mode == "RGBA" else "RGB").convert(mode)
    orientation = 1
    if container in ("PNG", "JPEG", "WEBP"):
        orientation = draw(st.integers(1, 8))
        odd = draw(st.sampled_from([None, *ODD_TAGS]))
        options = {**options, "exif": garbage_exif(orientation, ODD_TAGS.get(odd))}
        if draw(st.booleans()):
            options["icc_profile"] = draw(st.binary(max_size=200))
    return encoded(image, container, **options), container, mode, width, height, orientation


@quick
@given(files())
def test_a_whole_file_gives_its_picture_or_is_refused_by_name(drawn):
    data, _container, mode, width, height, orientation = drawn
    if mode == "I":
        with pytest.raises(ImageFileError, match="whose range is not known"):
            read_image_file(data)
        return
    picture = read_image_file(data)
    assert picture.pixels.shape[:2] == ((width, height) if orientation >= 5 else (height, width))
    assert picture.pixels.shape[2] in (1, 2, 3, 4)
    assert picture.pixels.dtype == {"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)
    assert as_rgb(picture.pixels).mode == "RGB"
    if picture.pixels.shape[2] in (1, 3):
        again = encoded(Image.fromarray(as_8_bits(picture.pixels).squeeze()), "PNG") if min(width, height) > 1 else data
        assert read_image_file(again).pixels.dtype.kind in "uf"


@quick
@given(files(), st.data())
def test_a_damaged_file_is_read_or_refused_and_never_more(drawn, data):
    """A file that is truncated, overwritten or has flipped bits gives a ValueError or an image, nothing else."""
    content = bytearray(drawn[0])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["cut", "flip", "zero", "random"]))
        if how == "cut":
            content = content[: place + 1]
        elif how == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "zero":
            content[place : place + 8] = bytes(len(content[place : place + 8]))
        else:
            content[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
    told = None
    try:
        assert read_image_file(bytes(content), Limits(1_000_000)).pixels.ndim == 3
    except ValueError as error:
        told = str(error)
    assert told != ""
    assert "\n" not in (told or "")
