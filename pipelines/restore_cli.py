"""iptv2-restore: restore photographs and folders of them from the command line.

    iptv2-restore photo.jpg                                           (denoises to the folder "restored")
    iptv2-restore photo.jpg -o clean.png --model assets/iptv2-deblur-color
    iptv2-restore photo.jpg holiday/ -o out --sigma 25

Every image is written to OUT under its own name, and folders keep their structure. For a single image, OUT can also be
the name of a file. OUT keeps a record of the written images. After an interruption, run the same command again to
restore the rest. Other files in OUT are not changed, and an input is never overwritten. EXIF data, ICC profiles,
16 bits per channel (PNG, TIFF) and floats (TIFF) are kept. Images are written upright.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iptv2_diffusion.completion import complete
from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, ImageFile, Limits, read_image_file
from iptv2_diffusion.data.image_folders import image_files
from iptv2_diffusion.data.own_folder import ForeignFolderError, OwnFolder
from iptv2_diffusion.files import DISK_ERRORS, atomic, printable, shipped, user_path
from iptv2_diffusion.messages import one_line

from .command_line import CommandError, run_command
from .devices import find_device

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
DEEP_SUFFIXES = {".png", ".tif", ".tiff"}
FLOAT_SUFFIXES = {".tif", ".tiff"}
DEFAULT_MODEL = "assets/iptv2-denoise-color"
KIND = "restored pictures"
JPEG_OPTIONS = {"quality": 95, "subsampling": 0}
SAVE_OPTIONS: dict[str, dict[str, Any]] = {".jpg": JPEG_OPTIONS, ".jpeg": JPEG_OPTIONS, ".webp": {"lossless": True}}


def run() -> None:
    """The console script."""
    run_command(main, "stopped; all written images are complete; run the same command to continue")


def main(argv: Sequence[str]) -> int:
    """Restore all inputs; returns 0, or 1 if an image failed."""
    arguments = parse(argv)
    if is_picture_name(arguments):
        return restore_to_file(arguments)
    try:
        jobs = plan(arguments.inputs, arguments.output)
    except OSError as error:
        raise CommandError(f"cannot list the inputs: {one_line(error, 240)}") from error
    folder = claim(arguments.output)
    todo = [(source, name) for source, name in jobs if not is_done(folder, name)]
    if len(todo) < len(jobs):
        there = f"{len(jobs) - len(todo)} of {len(jobs)} are in {printable(arguments.output)} already"
        where = sys.stderr if arguments.json else sys.stdout
        print(f"{there}; delete them, or choose another --output, to restore them again", file=where)
    if not todo:
        return 0
    pipeline = load(arguments)
    failed = 0
    for number, (source, name) in enumerate(todo, start=1):
        what = f"[{number}/{len(todo)}] {printable(source)}"
        try:
            sigma = restore(pipeline, source, name, folder.writing, arguments)
            report(arguments, what, source, arguments.output / name, sigma)
        except (ValueError, RuntimeError, MemoryError, OSError) as error:  # for one image, such as out of memory
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # affects all further images
                written = f"{number - 1 - failed} of {len(todo)} images are complete"
                raise CommandError(
                    f"cannot write to {printable(arguments.output)}: {error.strerror}; {written}: make room and run "
                    "the same command to continue"
                ) from error
            failed += 1
            reason = one_line(error, 240, "out of memory")
            print(f"{what} failed: {printable(reason)}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(todo)} failed", file=sys.stderr)
    return 1 if failed else 0


def is_picture_name(arguments: argparse.Namespace) -> bool:
    """Return whether a single image is restored to a named file rather than to a folder."""
    single, output = len(arguments.inputs) == 1 and arguments.inputs[0].is_file(), arguments.output
    return single and output.suffix.lower() in SUFFIXES and not output.is_dir()


def restore_to_file(arguments: argparse.Namespace) -> int:
    """Restore a single image to a named file; returns 0 or 1."""
    ((source, _),), output = list(pictures(arguments.inputs[0], arguments.output)), arguments.output
    if output.exists():
        raise CommandError(f"{printable(output)} exists already; delete it, or choose another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sigma = restore(load(arguments), source, output.name, lambda name: atomic(output.parent / name), arguments)
    except OSError as error:
        raise CommandError(f"cannot write to {printable(output)}: {error.strerror or error}") from error
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = one_line(error, 240, "out of memory")
        raise CommandError(printable(reason)) from error
    report(arguments, printable(source), source, output, sigma)
    return 0


def report(arguments: argparse.Namespace, what: str, source: Path, output: Path, sigma: float | None) -> None:
    """Print what was written; with --json one object per line, whose sigma is null for a model without noise level."""
    row = {"input": str(source), "output": str(output), "sigma": sigma}
    print(json.dumps(row) if arguments.json else f"{what} -> {printable(output)}", flush=True)


def claim(output: Path) -> OwnFolder:
    """Open the output folder with its record. A folder with other files is refused."""
    try:
        folder = OwnFolder.claim(output, KIND)
        with tempfile.TemporaryFile(dir=output):
            return folder
    except ForeignFolderError as error:
        raise CommandError(str(error).replace("another folder", "another --output")) from error
    except OSError as error:
        raise CommandError(f"cannot write to {printable(output)}: {error.strerror}") from error


def is_done(folder: OwnFolder, name: str) -> bool:
    """Return whether an image was restored already. A changed file counts as restored unless it is damaged."""
    if folder.holds(name):
        return True
    if name not in folder.files or not (folder.folder / name).is_file():
        return False
    try:
        read_image_file(folder.folder / name)
    except (OSError, ValueError):
        return False
    return True


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "iptv2-restore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=user_path, metavar="IN", help="images and folders of images")
    parser.add_argument(
        "-o",
        "--output",
        default="restored",
        type=user_path,
        metavar="OUT",
        help="folder for the restored images, or a file name for a single image [restored]",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        type=model_name,
        help=f"folder or Hub name of a restoration pipeline [{DEFAULT_MODEL}, a denoiser]",
    )
    parser.add_argument("--sigma", type=float, help="noise level on the 0-255 scale [estimated for each image]")
    parser.add_argument("--task", type=int, help="number of the task, for a model that has several")
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="weight of the restored image in the result: 0: the input, 1: fully restored [1]",
    )
    parser.add_argument("--tile", default="auto", help="side of the tiles in pixels, auto, or none [auto]")
    parser.add_argument(
        "--overlap", type=int, help="number of pixels that neighbouring tiles share [an eighth of the tile]"
    )
    parser.add_argument(
        "--memory", type=float, default=0.5, help="memory in GB for the activations of a tile, with --tile auto [0.5]"
    )
    parser.add_argument(
        "--self-ensemble", action="store_true", help="use the mean over 8 flips and rotations; 8 x slower"
    )
    parser.add_argument(
        "--bits", type=int, choices=(8, 16), help="bits per channel; 16 for PNG and TIFF only [those of the input]"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=DEFAULT_LIMITS.pixels,
        help=f"largest number of pixels of an image; larger ones are refused before decoding [{DEFAULT_LIMITS.pixels}]",
    )
    parser.add_argument(
        "--device", default="auto", help="device to run on: cpu, cuda, mps, or auto for the GPU if there is one [auto]"
    )
    parser.add_argument("--json", action="store_true", help="print each result as a JSON object on a line of its own")
    complete(parser)
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.strength <= 1:
        parser.error(f"--strength is {arguments.strength:g}; it must be in [0, 1]")
    if arguments.max_pixels < 1:
        parser.error(f"--max-pixels is {arguments.max_pixels}; it must be at least 1")
    if arguments.tile not in ("auto", "none"):
        if not arguments.tile.isdigit():
            parser.error(f"--tile is {arguments.tile!r}; give a number of pixels, auto, or none")
        arguments.tile = int(arguments.tile)
    arguments.tile = None if arguments.tile == "none" else arguments.tile
    return arguments


def model_name(text: str) -> str:
    """Resolve a model: a folder here or next to the code, or a name on the Hub."""
    path = shipped(text)
    return str(path) if path.exists() else os.path.expanduser(text)


def plan(inputs: Sequence[Path], output: Path) -> list[tuple[Path, str]]:
    """Return (image, its name in `output`) of all inputs. Raises an error rather than overwrite one."""
    jobs = [job for source in inputs for job in pictures(source, output)]
    sources = {os.path.realpath(source) for source, _ in jobs}
    taken: dict[str, Path] = {}
    for source, name in jobs:
        target = output / name
        resolved = os.path.realpath(target)
        if resolved in sources:
            raise CommandError(
                f"{printable(target)} would overwrite an input; choose an --output other than {printable(output)}"
            )
        if taken.setdefault(resolved, source) != source:
            both = f"{printable(taken[resolved])} and {printable(source)}"
            raise CommandError(f"{both} would both become {printable(target)}; restore them separately")
    return jobs


def pictures(source: Path, output: Path) -> Iterator[tuple[Path, str]]:
    """Return an image, or all images of a folder, with their names in `output`."""
    if source.is_dir():
        found = list(image_files(source, SUFFIXES))
        if not found:
            raise CommandError(f"{printable(source)} contains no images ({' '.join(sorted(SUFFIXES))})")
        inner = Path(os.path.realpath(output))
        within = Path(os.path.realpath(source)) in inner.parents  # an output folder inside the input has no inputs
        for path in found:
            if not (within and Path(os.path.realpath(path)).is_relative_to(inner)):
                yield path, path.relative_to(source).as_posix()
    elif source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise CommandError(f"{printable(source)} is not an image ({' '.join(sorted(SUFFIXES))})")
        yield source, source.name
    elif os.path.lexists(source):
        raise CommandError(f"{printable(source)} is neither a file nor a folder, or is a broken link")
    else:
        raise CommandError(f"{printable(source)} does not exist")


def load(arguments: argparse.Namespace):
    """Load the pipeline. The imports are here, because they take seconds."""
    from iptv2_diffusion.memory import keep_freed_memory
    from iptv2_diffusion.pipelines.pipeline_iptv2_restoration import IPTV2RestorationPipeline

    arguments.device = find_device(arguments.device)
    if arguments.device == "cpu":
        keep_freed_memory()  # about twice as fast: docs/performance.md
    kind = pipeline_class(Path(arguments.model))
    if kind not in (None, IPTV2RestorationPipeline.__name__):
        raise CommandError(f"{arguments.model} holds a {kind}, not an {IPTV2RestorationPipeline.__name__}")
    try:
        pipeline = IPTV2RestorationPipeline.from_pretrained(arguments.model)
    except Exception as error:  # diffusers and its libraries raise various types
        local = "" if Path(arguments.model).exists() else "no such folder, and from the Hub: "
        raise CommandError(f"cannot load {arguments.model}: {local}{one_line(error, 500)}") from error
    try:
        pipeline.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {arguments.device}: {str(error).splitlines()[0][:160]}") from error
    try:  # an error of the options affects all images
        pipeline.plan_tiles((3, 4096, 4096), arguments.tile, arguments.overlap, arguments.memory)
        if arguments.sigma is not None:
            pipeline.noise_levels(arguments.sigma, [None])
    except ValueError as error:
        raise CommandError(str(error)) from error
    return pipeline


def pipeline_class(folder: Path) -> str | None:
    """Return the class that a pipeline's folder names; None for another folder."""
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError):
        return None


def restore(
    pipeline,
    source: Path,
    name: str,
    writing: Callable[[str], AbstractContextManager[Path]],
    arguments: argparse.Namespace,
) -> float | None:
    """Restore an image and write it through `writing`, which gives it its final name at once; return its σ."""
    options = {
        option: getattr(arguments, option)
        for option in ("sigma", "task", "strength", "tile", "overlap", "memory", "self_ensemble")
    }
    picture = read(source, Limits(arguments.max_pixels))
    suffix = Path(name).suffix.lower()
    kind = {8: "uint8", 16: "uint16"}.get(arguments.bits, picture.pixels.dtype.name)
    if kind == "uint16" and suffix not in DEEP_SUFFIXES:
        raise ValueError(f"{name} cannot have 16 bits per channel; only {' '.join(sorted(DEEP_SUFFIXES))} can")
    if kind == "float32" and suffix not in FLOAT_SUFFIXES:
        raise ValueError(f"{name} cannot hold floats; only {' '.join(sorted(FLOAT_SUFFIXES))} can, or add --bits 8")
    output_type = "pil" if kind == "uint8" else "np"
    result = pipeline(picture.pixels, output_type=output_type, clip=kind != "float32", **options)
    with writing(name) as temporary:
        write(result.images[0], kind, temporary, picture)
    for note in picture.metadata.notes:
        warnings.warn(f"{printable(source)}: {note}", stacklevel=1)
    return result.sigmas[0] if result.sigmas else None


def read(source: Path, limits: Limits) -> ImageFile:
    """Read an image with its metadata. Files of several frames are refused, because only one would be kept."""
    try:
        picture = read_image_file(source, limits)
    except (OSError, ValueError) as error:
        reason = one_line(error, 200).replace("max_pixels", "--max-pixels")
        raise ValueError(f"{source} cannot be read as an image: {reason}") from error
    if picture.frames > 1:
        raise ValueError(f"it has {picture.frames} frames; save each as a separate image")
    return picture


def write(result: Image.Image | np.ndarray, kind: str, path: Path, picture: ImageFile) -> None:
    """Write an image with its metadata. Metadata that cannot be written are dropped with a note."""
    metadata = picture.metadata.saved()
    for dropped in ((), ("exif",), ("exif", "icc_profile")):
        kept = {key: value for key, value in metadata.items() if key not in dropped}
        try:
            write_as(result, kind, path, kept)
        except OSError as error:
            if error.errno is not None or not kept:  # an error of the system, not of the library
                raise
        except Exception:  # error of Pillow, pypng or tifffile about metadata
            if not kept:
                raise
        else:
            lost = [key for key in dropped if key in metadata]
            if lost:
                picture.metadata.notes.append(f"its {' and '.join(lost)} cannot be written and is dropped")
            return


def write_as(result: Image.Image | np.ndarray, kind: str, path: Path, metadata: dict[str, bytes]) -> None:
    """Write (H, W, C) in [0, 1]: 8 bits per channel with Pillow, 16 bits and floats with `sixteen_bit.py`."""
    from iptv2_diffusion.data.sixteen_bit import write_16_bit, write_float_tiff

    if isinstance(result, Image.Image):
        write_pil(result, path, metadata)
    elif kind == "float32":
        write_float_tiff(result, path, **metadata)
    else:
        write_16_bit((result.astype("float64") * 65535).round().astype("uint16"), path, **metadata)


def write_pil(image: Image.Image, path: Path, metadata: dict[str, bytes]) -> None:
    """Write 8 bits per channel with Pillow."""
    suffix = path.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".bmp", ".ppm") and image.mode in ("RGBA", "LA"):
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    encoded = io.BytesIO()  # to memory first, so that an error of the disk is not hidden by Pillow
    image.save(encoded, format=Image.registered_extensions()[suffix], **SAVE_OPTIONS.get(suffix, {}), **metadata)
    path.write_bytes(encoded.getbuffer())


if __name__ == "__main__":
    run()
