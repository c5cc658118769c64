"""Valid inputs of the fuzzer, and mutations of them."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile_images import ODD_TAGS, encoded, garbage_exif, tiff
from PIL import Image


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Apply a few cuts, flips, overwritten and repeated pieces, and extreme numbers."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not content:
            break
        # Most structure is at the front, or at the end of tars and zips
        place = rng.choice((rng.randrange(len(content)), rng.randrange(min(len(content), 200)), len(content) - 1))
        how = rng.randrange(8)
        if how == 0:
            content = content[: place + rng.randrange(2)]
        elif how == 1:
            content[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            content[place] = rng.randrange(256)
        elif how == 3:
            extreme = rng.choice((0, 1, 0xFF, 0x7F, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000))
            content[place : place + 4] = extreme.to_bytes(4, rng.choice(("little", "big")))
        elif how == 4:
            length = rng.randrange(1, 64)
            content[place:place] = content[place : place + length]
        elif how == 5:
            del content[place : place + rng.randrange(1, 64)]
        elif how == 6:
            content[place : place + 8] = bytes(min(8, len(content) - place))
        else:
            content[place : place + 16] = rng.randbytes(16)
    return bytes(content)


def mutate_text(text: str, rng: random.Random) -> str:
    """Do the same for YAML and JSON, where a changed word has more effect than a changed bit."""
    words = [
        "NaN",
        "1e999",
        "-1",
        "010",
        "null",
        "[]",
        "{}",
        "true",
        "''",
        "1:30",
        "*x",
        "&x",
        "!!python/none",
        "<<:",
        "? ",
    ]
    if rng.random() < 0.3:
        return mutate(text.encode(), rng).decode("utf-8", "replace")
    lines = text.splitlines() or [""]
    for _ in range(rng.choice((1, 1, 2, 3))):
        index = rng.randrange(len(lines))
        head, colon, _ = lines[index].partition(":")
        choice = rng.randrange(5)
        if choice == 0 and colon:
            value = rng.choice(
                [*words, str(rng.randrange(-(10**18), 10**18)), str(rng.random() * 10 ** rng.randrange(-9, 9))]
            )
            comma = "," if lines[index].rstrip().endswith(",") else ""
            lines[index] = f"{head}: {value}{comma}"
        elif choice == 1:
            lines.insert(index, lines[rng.randrange(len(lines))])
        elif choice == 2:
            del lines[index]
            lines = lines or [""]
        elif choice == 3:
            lines[index] = lines[index].replace(":", rng.choice((" ", "::", ": -", ":\n ")), 1)
        else:
            lines[index] = rng.choice((" ", "\t", "")) + lines[index] + rng.choice(("", " #", ",", "]", "}"))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Valid inputs


def sound_images(rng: random.Random) -> bytes:
    """Return an image of random format, mode, size and metadata."""
    generator = np.random.default_rng(rng.randrange(1 << 30))
    height, width = rng.randrange(1, 60), rng.randrange(1, 60)
    if rng.random() < 0.4:
        dtype = rng.choice((np.uint8, np.uint16, np.float32, np.float16, np.float64, np.int32, np.uint32))
        channels = rng.choice((1, 2, 3, 4, 5))
        shape = (height, width) if channels == 1 else (height, width, channels)
        values = generator.random(shape) * (1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max)
        options = {"compression": rng.choice((None, "zlib"))}
        options |= {"photometric": rng.choice(("minisblack", "miniswhite", "rgb"))} if channels in (1, 3, 4) else {}
        options |= {"tile": (16, 16)} if rng.random() < 0.3 else {}
        try:
            return tiff(values.astype(dtype), **options)
        except ValueError:
            return tiff(values.astype(dtype))
    image = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8))
    form, modes = rng.choice(
        [
            ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
            ("JPEG", ("L", "RGB", "CMYK")),
            ("WEBP", ("RGB", "RGBA")),
            ("BMP", ("1", "L", "P", "RGB")),
            ("GIF", ("L", "P", "RGB")),
            ("PPM", ("1", "L", "RGB")),
            ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")),
            ("JPEG2000", ("L", "RGB", "RGBA")),
            ("ICO", ("RGBA",)),
            ("TGA", ("L", "RGB", "RGBA")),
        ]
    )
    mode, options = rng.choice(modes), {}
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 65536, (height, width), dtype=np.uint16))
    elif mode == "LAB":
        image = Image.new("LAB", (width, height))
    else:
        image = image.convert("LA" if mode == "LA" else "RGBA" if mode == "RGBA" else "RGB").convert(mode)
    if form in ("PNG", "JPEG", "WEBP") and rng.random() < 0.7:
        options["exif"] = garbage_exif(rng.randrange(12), ODD_TAGS[rng.choice(sorted(ODD_TAGS))])
        options["icc_profile"] = generator.bytes(rng.randrange(1, 3000))
    if form == "TIFF":
        options["compression"] = rng.choice((None, "tiff_lzw", "tiff_adobe_deflate", "packbits"))
        if mode in ("LAB", "YCbCr"):
            options = {}
    return encoded(image, form, **options)


def sound_tar(rng: random.Random, kind: str) -> bytes:
    """A tar of class folders, of tars, or of samples."""
    picture = encoded(Image.new("RGB", (8, 8), "red"), "PNG")
    contents = {}
    for index in range(rng.randrange(1, 5)):
        name = "cat" if index % 2 else "dog"
        if kind == "folders":
            contents[f"{name}/{index}.png"] = picture
        elif kind == "samples":
            contents |= {f"{index:03d}.png": picture, f"{index:03d}.cls": str(index).encode()}
        else:
            contents[f"{name}{index}.tar"] = sound_tar(rng, "samples")
    return tar_of(contents, rng)


def tar_of(contents: dict[str, bytes], rng: random.Random) -> bytes:
    """A tar of these files, in one of its two formats."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sound_array(rng: random.Random, kind: str) -> bytes:
    """Return a .npy file of a latent, of a label, or of neither."""
    values = {
        "latent": np.zeros((1, 4, 2, 2), rng.choice((np.float32, np.float16))),
        "label": np.array([rng.randrange(3)]),
        "odd": rng.choice((np.array([{}], object), np.array(["a"]), np.array([2**63], np.uint64), np.zeros((0, 4)))),
    }
    buffer = io.BytesIO()
    np.save(buffer, values[kind], allow_pickle=True)
    return buffer.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON header as text and correct its length, or change any byte of the file."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().replace("},", "},\n").replace(',"', ',\n"')
    header = mutate_text(text, rng).encode("utf-8", "replace")
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


NASTY = (
    *("", "-1", "0", "1", "2", "1e999", "nan", "-inf", "0x10", "1_0", "٣", "none", "true", "1,2", "[]", "a" * 300),
    *("~", "~nobody/x", "/dev/null", ".", "..", "a\nb", "\udcff", "--", "-", "*", "[x]", "%s", "%(prog)s", "{}", "🦊"),
    *("1:30", "010", "'", '"', "!!x", "a: b", "999999999999999999999", "-9223372036854775809", "0.5", "1e-320", "\0"),
)


def nasty_line(rng: random.Random, options: list[str], words: tuple[str, ...]) -> list[str]:
    """Return a command line of known options with senseless values."""
    line = [rng.choice((*words, *NASTY)) for _ in range(rng.randrange(0, 3))]
    for _ in range(rng.randrange(0, 5)):
        name, value = rng.choice(options), rng.choice((*words, *NASTY))
        line += rng.choice(([name, value], [f"{name}={value}"], [name], [value]))
    return line


def mutate_file(path: Path, rng: random.Random, binary: Callable[[bytes, random.Random], bytes] = mutate) -> bytes:
    """Mutate a file in place, JSON as text and others by `binary`; return its new content."""
    content = path.read_bytes()
    is_text = path.suffix == ".json"
    changed = mutate_text(content.decode(), rng).encode("utf-8", "replace") if is_text else binary(content, rng)
    path.write_bytes(changed)
    return changed
