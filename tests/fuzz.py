"""Fuzz readers, archives, pipeline folders, records and configurations: a seeded loop that mutates sound files.

    python tests/fuzz.py --minutes 30 --seed 0 --output runs/fuzz

Whatever comes out must be what the callee promises: a result, or an error of one line of the kinds that the command
lines print. Anything else, a hang of over a minute, or a process that grows beyond its memory, is a finding: it is
printed once for each place in our code, and its input is kept in the output folder.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from hostile_images import ODD_TAGS, encoded, garbage_exif, tiff

WEIGHTED = ("read", "read", "read", "restore", "archive", "folder", "weights", "options", "record")
SECONDS = 60  # of CPU time, for one input: other processes may have the machine
MEMORY = 6 << 30  # of address space above what is used at the start


class HangError(Exception):
    """An input took longer than `SECONDS`."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few cuts, flips, overwritten and repeated pieces, and numbers that are extreme."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not content:
            break
        # Most of what matters lies at the front, or at the end of tars and zips
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
    """The same for YAML and JSON, where a changed word says more than a changed bit."""
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
# Sound inputs


def sound_images(rng: random.Random) -> bytes:
    """A picture of some format, mode, size and metadata."""
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
    buffer = io.BytesIO()
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
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Targets: each takes a random generator and a scratch folder, and may raise what its callers print in one line


class Targets:
    """What is fuzzed."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.input = b""  # of the target that runs, to be kept if it is a finding

    @functools.cached_property
    def folders(self) -> dict[str, Path]:
        """Sound pipeline folders by kind; late, since torch and diffusers take seconds to import."""
        from iptv2_diffusion import IPTV2RestorationPipeline, create_model

        sys.path.insert(0, str(Path(__file__).parent / "eval"))
        from tiny_pipelines import save_pipeline

        folders = {kind: Path(save_pipeline(self.scratch / kind, kind)) for kind in ("iptv2", "dit")}
        restorer = create_model("restoration-tiny", sigma_conditioning="map")
        IPTV2RestorationPipeline(restorer.fuse()).save_pretrained(self.scratch / "restorer")
        return {**folders, "restorer": self.scratch / "restorer"}

    @functools.cached_property
    def pipeline(self):
        """A restorer, without its bar."""
        from iptv2_diffusion import IPTV2RestorationPipeline

        pipeline = IPTV2RestorationPipeline.from_pretrained(self.folders["restorer"])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @functools.cached_property
    def yaml(self) -> str:
        """A sound configuration."""
        from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
        from iptv2_diffusion.training.options import save_config

        save_config(LDMConfig(), self.scratch / "config.yaml")
        return (self.scratch / "config.yaml").read_text(encoding="utf-8")

    def prepare(self, names: list[str]) -> None:
        """Make what these targets need, so that no input is charged with it."""
        if {"restore", "weights"} & set(names):
            assert self.pipeline
        if "options" in names:
            assert self.yaml
            import iptv2_diffusion.models.presets
        if {"archive", "folder"} & set(names):
            import datasets

            import iptv2_diffusion.data.images

            datasets.disable_progress_bars()
        if "record" in names:
            import iptv2_diffusion.evaluation.sample_folder  # noqa: F401

    def read(self, rng: random.Random, scratch: Path) -> None:
        """The reader, its conversions and the metadata that it keeps."""
        from iptv2_diffusion.data.image_files import Limits, as_rgb, read_image_file

        self.input = sound_images(rng) if rng.random() < 0.1 else mutate(sound_images(rng), rng)
        picture = read_image_file(self.input, Limits(4_000_000))
        assert picture.pixels.dtype in (np.uint8, np.uint16, np.float32)
        assert picture.pixels.ndim == 3
        assert 1 <= picture.pixels.shape[2] <= 4
        assert picture.pixels.size
        as_rgb(picture.pixels)

    def restore(self, rng: random.Random, scratch: Path) -> None:
        """The command line's one picture: read, restored with strength 0, written with its metadata."""
        from iptv2_diffusion.data.own_folder import OwnFolder
        from iptv2_diffusion.pipelines.restore_cli import parse, restore

        suffix = rng.choice((".png", ".jpg", ".webp", ".bmp", ".tif", ".ppm"))
        self.input = mutate(sound_images(rng), rng) if rng.random() < 0.7 else sound_images(rng)
        source = scratch / f"a{suffix}"
        source.write_bytes(self.input)
        words = [str(source), "-o", str(scratch / "out"), "--model", "m", "--sigma", "5", "--strength", "0"]
        words += ["--max-pixels", "40000", *rng.choice(([], ["--bits", "8"], ["--bits", "16"]))]
        folder = OwnFolder.claim(scratch / "out", "restored pictures")
        restore(self.pipeline, source, folder, source.name, parse(words))
        assert folder.holds(source.name)

    def archive(self, rng: random.Random, scratch: Path) -> None:
        """Tars of every kind, read in place or as a stream, every image decoded."""
        from iptv2_diffusion.data.images import ImageTensors, load_image_dataset

        self.input = mutate(sound_tar(rng, rng.choice(("folders", "tars", "samples"))), rng)
        (scratch / "x.tar").write_bytes(self.input)
        streaming = rng.random() < 0.3
        data = load_image_dataset(scratch / "x.tar", cache_dir=scratch / "cache", streaming=streaming)
        if not streaming:
            ImageTensors(data, size=8).valid_indices()

    def folder(self, rng: random.Random, scratch: Path) -> None:
        """Folders of strange names, splits and metadata files."""
        from iptv2_diffusion.data.images import ImageTensors, load_train_and_heldout

        names = ["cat", "Train", "test", ".hidden", "__MACOSX", "val", "dog [1]", "a b", "é", "train", "x" * 200]
        root = scratch / "data"
        for index in range(rng.randrange(0, 6)):
            inner = root.joinpath(*rng.choices(names, k=rng.randrange(0, 3)))
            inner.mkdir(parents=True, exist_ok=True)
            suffix = rng.choice((".png", ".jpg", ".PNG", ".heic", ".txt", ""))
            content = encoded(Image.new("RGB", (8, 8)), "PNG")
            (inner / f"{index}{suffix}").write_bytes(content if rng.random() < 0.8 else mutate(content, rng))
        root.mkdir(exist_ok=True)
        if rng.random() < 0.4:
            text = rng.choice(('{"file_name": "0.png", "label": 1}\n', "file_name,label\n0.png,cat\n1.png,dog\n"))
            self.input = mutate_text(text, rng).encode("utf-8", "replace")
            (root / rng.choice(("metadata.jsonl", "metadata.csv", "metadata.parquet"))).write_bytes(self.input)
        splits = ("train", "test", "train[:50%]", "train[1:1]", "val", "x", "train[", "train[0:2]+train[1:]", "")
        train, _ = load_train_and_heldout(
            root, train_split=rng.choice(splits), heldout_split=rng.choice((None, *splits)), heldout_fraction=0.3
        )
        ImageTensors(train, size=8).valid_indices()

    def weights(self, rng: random.Random, scratch: Path) -> None:
        """A pipeline folder with one file mutated, loaded as the command lines load it."""
        from diffusers import DiffusionPipeline

        from iptv2_diffusion.models.presets import create_model
        from iptv2_diffusion.training.errors import loading

        kind = rng.choice(sorted(self.folders))
        shutil.copytree(self.folders[kind], scratch / "p")
        path = rng.choice(sorted(p for p in (scratch / "p").rglob("*") if p.is_file()))
        content = path.read_bytes()
        if path.suffix == ".json":
            self.input = mutate_text(content.decode(), rng).encode("utf-8", "replace")
        else:
            self.input = mutate(content, rng)
        path.write_bytes(self.input)
        self.input = str(path.relative_to(scratch)).encode() + b"\n" + self.input
        with loading(str(scratch / "p")):
            pipeline = DiffusionPipeline.from_pretrained(scratch / "p")
            if path.parent.name in ("transformer", "model"):
                create_model(str(path.parent))
        parameters = [
            p for part in pipeline.components.values() if hasattr(part, "parameters") for p in part.parameters()
        ]
        assert not any(p.device.type == "meta" for p in parameters)

    def options(self, rng: random.Random, scratch: Path) -> None:
        """Configurations, and models made of what they say."""
        from iptv2_diffusion.models.presets import create_model
        from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
        from iptv2_diffusion.training.parsing import parse_config

        self.input = mutate_text(self.yaml, rng).encode("utf-8", "replace")
        (scratch / "c.yaml").write_bytes(self.input)
        parse_config(LDMConfig, ["--config", str(scratch / "c.yaml")])
        values = {"channels": 8, "layers_per_stage": [1, 1, 1], "num_attention_heads": 1, "window_size": 4}
        values |= {"grid_stride": [2, 1], "conditioning_dim": 16, "sample_size": 8, "ffn_ratio": 2.0}
        self.input = mutate_text(json.dumps(values, indent=1), rng).encode("utf-8", "replace")
        (scratch / "model.json").write_bytes(self.input)
        create_model(str(scratch / "model.json"))

    def record(self, rng: random.Random, scratch: Path) -> None:
        """Records of folders, checkpoints' manifests and recipes of samples."""
        from iptv2_diffusion.data.own_folder import RECORD, OwnFolder
        from iptv2_diffusion.evaluation.sample_folder import SampleFolder
        from iptv2_diffusion.training.checkpoint import DamagedCheckpointError, is_ours, verify

        text = (
            '{"kind": "generated images"}\n{"file": "images/000000.png", "bytes": 3}\n{"file": "../x", "bytes": null}\n'
        )
        self.input = mutate_text(text, rng).encode("utf-8", "replace")
        (scratch / RECORD).write_bytes(self.input)
        outside = scratch.parent / "x"
        outside.write_bytes(b"mine")
        OwnFolder(scratch, "generated images").delete()
        assert outside.read_bytes() == b"mine"
        manifest = '{"step": 1, "files": {"a": {"bytes": 1, "sha256": "x"}},\n"config": {},\n"progress": {}}'
        (scratch / "manifest.json").write_text(mutate_text(manifest, rng), encoding="utf-8")
        is_ours(scratch)
        with contextlib.suppress(DamagedCheckpointError):
            verify(scratch)
        recipe = '{"recipe": {"seed": 1},\n"pipeline": "x",\n"versions": {}}'
        (scratch / "generation.json").write_text(mutate_text(recipe, rng), encoding="utf-8")
        SampleFolder(scratch).check({"seed": 1})


def expected() -> tuple[type[BaseException], ...]:
    """What the command lines print in one line."""
    from iptv2_diffusion.training.errors import UserError

    return (UserError, ValueError, OSError)


def place_of(error: BaseException) -> str:
    """Kind of an error and the innermost line of our code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "iptv2_diffusion" in f.filename or "/pipelines/" in f.filename] or frames[-1:]
    last = ours[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} in {last.name}"


def run_one(target: Callable[[random.Random, Path], None], rng: random.Random, scratch: Path) -> str | None:
    """None, or what was found."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target(rng, scratch)
    except expected() as error:
        text = str(error)
        if "\n" in text.strip():
            return f"an error of several lines, {place_of(error)}: {text[:200]!r}"
        if not text.strip():
            return f"an error without words, {place_of(error)}"
        if isinstance(error, UnicodeError) and not isinstance(error, UnicodeDecodeError):
            return f"{place_of(error)}: {text[:200]}"
    except HangError as error:
        return f"a hang of {SECONDS} s, {place_of(error)}"
    except MemoryError as error:
        return f"memory, {place_of(error)}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{place_of(error)}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--targets", nargs="*", default=[])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    options.output.mkdir(parents=True, exist_ok=True)

    def alarm(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGPROF, alarm)
    found: dict[str, int] = collections.Counter()
    counts: dict[str, int] = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        names = options.targets or list(WEIGHTED)
        targets = Targets(Path(scratch))
        targets.prepare(names)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
        end, number = time.monotonic() + 60 * options.minutes, 0
        while time.monotonic() < end:
            rng = random.Random(f"{options.seed} {number}")
            name, number = rng.choice(names), number + 1
            inner = Path(scratch) / "one" / "inner"
            inner.mkdir(parents=True)
            told = run_one(getattr(targets, name), rng, inner)
            shutil.rmtree(inner.parent)
            counts[name] += 1
            if told:
                key = f"{name}: {told.split(': ')[0]}"
                found[key] += 1
                if found[key] == 1:
                    kept = options.output / f"{name}-{number - 1}.bin"
                    kept.write_bytes(targets.input)
                    print(f"[{number - 1}] {name}: {told} ({kept})", flush=True)
    print(f"{number} inputs ({', '.join(f'{n} {c}' for n, c in sorted(counts.items()))}), {len(found)} findings")
    for key, count in found.items():
        print(f"  {count} x {key}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
