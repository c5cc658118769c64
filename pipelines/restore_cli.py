"""iptv2-restore: restore photographs and folders of them from the command line.

    iptv2-restore photo.jpg holiday/ -o restored --model assets/iptv2-denoise-color --sigma 25

Every picture is written under OUT by its own name (folders keep their structure). What is there already is left alone,
so the same command goes on after an interruption; an input is never overwritten. EXIF and ICC profiles are kept, and
so are the 16 bits a channel of PNG and TIFF files. Pictures are written upright.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
DEEP_SUFFIXES = {".png", ".tif", ".tiff"}
JPEG_OPTIONS = {"quality": 95, "subsampling": 0}
SAVE_OPTIONS = {".jpg": JPEG_OPTIONS, ".jpeg": JPEG_OPTIONS, ".webp": {"lossless": True}}


class CommandError(Exception):
    """What the user can mend, in one line."""


def run() -> None:
    """The console script."""
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        code = main(sys.argv[1:])
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        code = 130
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Restore everything that is named; 0 if all went well, 1 if a picture failed."""
    arguments = parse(argv)
    jobs = plan(arguments.inputs, arguments.output)
    todo = [(source, target) for source, target in jobs if not target.exists()]
    if len(todo) < len(jobs):
        there = f"{len(jobs) - len(todo)} of {len(jobs)} are in {arguments.output} already"
        print(f"{there}; delete them, or choose another --output, to restore them again")
    if not todo:
        return 0
    pipeline = load(arguments)
    failed = 0
    for number, (source, target) in enumerate(todo, start=1):
        try:
            restore(pipeline, source, target, arguments)
            print(f"[{number}/{len(todo)}] {source} -> {target}")
        except (ValueError, RuntimeError, MemoryError) as error:  # one picture (out of memory, say): the others go on
            failed += 1
            reason = " ".join(str(error).split())[:200] or "out of memory"
            print(f"[{number}/{len(todo)}] {source} failed: {reason}", file=sys.stderr)
        except OSError as error:
            raise CommandError(f"cannot write {target}: {error.strerror or error}") from error
    if failed:
        print(f"{failed} of {len(todo)} failed", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "iptv2-restore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="pictures and folders of pictures")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--model", required=True, help="pipeline folder, or its name on the Hub")
    parser.add_argument("--sigma", type=float, help="noise level, 0-255 [estimated for each picture]")
    parser.add_argument("--task", type=int, help="for a model of several tasks")
    parser.add_argument("--strength", type=float, default=1.0, help="0: the input, 1: fully restored [1]")
    parser.add_argument("--tile", default="auto", help="side of tiles in pixels, auto, or none [auto]")
    parser.add_argument("--overlap", type=int, help="pixels that tiles share [an eighth of the tile]")
    parser.add_argument(
        "--memory", type=float, default=0.5, help="GB for the activations of a tile with --tile auto [0.5]"
    )
    parser.add_argument("--self-ensemble", action="store_true", help="mean over 8 flips and rotations; 8 x slower")
    parser.add_argument("--bits", type=int, choices=(8, 16), help="a channel, 16 for PNG and TIFF only [the input's]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps [cpu]")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.strength <= 1:
        parser.error(f"--strength is {arguments.strength:g}; it must lie in 0 to 1")
    if arguments.tile not in ("auto", "none"):
        if not arguments.tile.isdigit():
            parser.error(f"--tile is {arguments.tile!r}; give a number of pixels, auto, or none")
        arguments.tile = int(arguments.tile)
    arguments.tile = None if arguments.tile == "none" else arguments.tile
    return arguments


def plan(inputs: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """(picture, where it goes) for all that is named; raises rather than overwrite an input or a namesake."""
    jobs = [job for source in inputs for job in pictures(source, output)]
    sources = {source.resolve() for source, _ in jobs}
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        resolved = target.resolve()
        if resolved in sources:
            raise CommandError(f"{target} would overwrite an input; choose another --output than {output}")
        if taken.setdefault(resolved, source) != source:
            raise CommandError(f"{taken[resolved]} and {source} would both become {target}; restore them apart")
    return jobs


def pictures(source: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """A picture, or all pictures under a folder, with their places under `output`."""
    if source.is_dir():
        found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts)]
        if not found:
            raise CommandError(f"{source} holds no pictures ({' '.join(sorted(SUFFIXES))})")
        inside = source.resolve() in output.resolve().parents  # what an output inside the input holds is no input
        for path in found:
            if not (inside and path.resolve().is_relative_to(output.resolve())):
                yield path, output / path.relative_to(source)
    elif source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise CommandError(f"{source} is no picture ({' '.join(sorted(SUFFIXES))})")
        yield source, output / source.name
    else:
        raise CommandError(f"{source} does not exist")


def load(arguments: argparse.Namespace):
    """The pipeline; late, since this takes seconds."""
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.output):
            pass
    except OSError as error:
        raise CommandError(f"cannot write to {arguments.output}: {error.strerror}") from error
    from iptv2_diffusion.memory import keep_freed_memory
    from iptv2_diffusion.pipelines.pipeline_iptv2_restoration import IPTV2RestorationPipeline

    if arguments.device == "cpu":
        keep_freed_memory()  # about twice as fast: docs/performance.md
    kind = pipeline_class(Path(arguments.model))
    if kind not in (None, IPTV2RestorationPipeline.__name__):
        raise CommandError(f"{arguments.model} holds a {kind}, not an {IPTV2RestorationPipeline.__name__}")
    try:
        pipeline = IPTV2RestorationPipeline.from_pretrained(arguments.model)
    except (OSError, ValueError, RuntimeError) as error:
        local = "" if Path(arguments.model).exists() else "no such folder, and from the Hub: "
        raise CommandError(f"cannot load {arguments.model}: {local}{' '.join(str(error).split())[:200]}") from error
    try:
        pipeline.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {arguments.device}: {str(error).splitlines()[0][:160]}") from error
    try:  # what is wrong for one picture is wrong for all
        pipeline.plan_tiles((3, 4096, 4096), arguments.tile, arguments.overlap, arguments.memory)
        if arguments.sigma is not None:
            pipeline.noise_levels(arguments.sigma, [None])
    except ValueError as error:
        raise CommandError(str(error)) from error
    return pipeline


def pipeline_class(folder: Path) -> str | None:
    """The class that a pipeline's folder names; None if it is no such folder."""
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError):
        return None


def restore(pipeline, source: Path, target: Path, arguments: argparse.Namespace) -> None:
    """One picture: restored, then written under its final name at once."""
    options = {
        name: getattr(arguments, name)
        for name in ("sigma", "task", "strength", "tile", "overlap", "memory", "self_ensemble")
    }
    metadata, deep = describe(source)
    deep = deep if arguments.bits is None else arguments.bits == 16
    if deep and target.suffix.lower() not in DEEP_SUFFIXES:
        raise ValueError(f"{target} cannot have 16 bits a channel; only {' '.join(sorted(DEEP_SUFFIXES))} can")
    result = pipeline(source, output_type="np" if deep else "pil", **options).images[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        if deep:
            write_deep(result, temporary, metadata)
        else:
            write_pil(result, temporary, metadata)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def describe(source: Path) -> tuple[dict[str, bytes], bool]:
    """EXIF and ICC profile of a picture as `save` takes them, and whether it has 16 bits a channel."""
    from iptv2_diffusion.sixteen_bit import count_tiff_images, is_16_bit, read_tiff_metadata

    try:
        deep = is_16_bit(source)
        if source.suffix.lower() in (".tif", ".tiff"):
            metadata, frames = read_tiff_metadata(source), count_tiff_images(source)
        else:
            with Image.open(source) as file:
                frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a phone's extra views
                kept = ("exif",) if file.mode == "CMYK" else ("exif", "icc_profile")  # as RGB its profile would lie
                metadata = {key: file.info[key] for key in kept if file.info.get(key)}
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{source} cannot be read as an image: {' '.join(str(error).split())[:160]}") from error
    if frames > 1:
        raise ValueError(f"it holds {frames} frames; save each as a picture of its own")
    exif = Image.Exif()
    exif.load(metadata.get("exif"))
    if exif.get(ORIENTATION, 1) != 1:  # the pixels are turned
        exif[ORIENTATION] = 1
        metadata["exif"] = exif.tobytes()
    return metadata, deep


def write_pil(image: Image.Image, path: Path, metadata: dict[str, bytes]) -> None:
    """8 bits a channel, by Pillow."""
    suffix = path.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".bmp", ".ppm") and image.mode in ("RGBA", "LA"):
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    image.save(path, format=Image.registered_extensions()[suffix], **SAVE_OPTIONS.get(suffix, {}), **metadata)


def write_deep(image: np.ndarray, path: Path, metadata: dict[str, bytes]) -> None:
    """16 bits a channel, of (H, W, C) on [0, 1]."""
    from iptv2_diffusion.sixteen_bit import write_16_bit

    write_16_bit((image.astype("float64") * 65535).round().astype("uint16"), path, **metadata)


if __name__ == "__main__":
    run()
