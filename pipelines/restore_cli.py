"""iptv2-restore: restore photographs and folders of them from the command line.

    iptv2-restore photo.jpg                                           (denoised, to the folder restored)
    iptv2-restore photo.jpg -o clean.png --model assets/iptv2-deblur-color
    iptv2-restore photo.jpg holiday/ -o out --sigma 25

Every picture is written under OUT by its own name (folders keep their structure). OUT keeps a record of what was
written, so the same command goes on after an interruption; what lies there otherwise is neither counted nor touched,
and an input is never overwritten. For a single picture OUT may also be the name of a picture. EXIF and ICC profiles are
kept, and so are the 16 bits a channel of PNG and TIFF files and the floats of TIFF files. Pictures are written upright.
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

import numpy as np
from PIL import Image

from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, ImageFile, Limits, read_image_file
from iptv2_diffusion.data.image_folders import image_files
from iptv2_diffusion.data.own_folder import ForeignFolderError, OwnFolder
from iptv2_diffusion.files import DISK_ERRORS, atomic, printable, shipped, user_path

from .command_line import CommandError, run_command
from .devices import find_device

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
DEEP_SUFFIXES = {".png", ".tif", ".tiff"}
FLOAT_SUFFIXES = {".tif", ".tiff"}
DEFAULT_MODEL = "assets/iptv2-denoise-color"
KIND = "restored pictures"
JPEG_OPTIONS = {"quality": 95, "subsampling": 0}
SAVE_OPTIONS = {".jpg": JPEG_OPTIONS, ".jpeg": JPEG_OPTIONS, ".webp": {"lossless": True}}


def run() -> None:
    """The console script."""
    run_command(main, "stopped; what is written is whole, and the same command goes on from here")


def main(argv: Sequence[str]) -> int:
    """Restore everything that is named; 0 if all went well, 1 if a picture failed."""
    arguments = parse(argv)
    if is_picture_name(arguments):
        return restore_to_file(arguments)
    jobs = plan(arguments.inputs, arguments.output)
    folder = claim(arguments.output)
    todo = [(source, name) for source, name in jobs if not is_done(folder, name)]
    if len(todo) < len(jobs):
        there = f"{len(jobs) - len(todo)} of {len(jobs)} are in {printable(arguments.output)} already"
        print(f"{there}; delete them, or choose another --output, to restore them again")
    if not todo:
        return 0
    pipeline = load(arguments)
    failed = 0
    for number, (source, name) in enumerate(todo, start=1):
        what = f"[{number}/{len(todo)}] {printable(source)}"
        try:
            restore(pipeline, source, name, folder.writing, arguments)
            print(f"{what} -> {printable(arguments.output / name)}")
        except (ValueError, RuntimeError, MemoryError, OSError) as error:  # one picture (out of memory, say)
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # is so for all that follow
                written = f"{number - 1 - failed} of {len(todo)} are written, whole"
                raise CommandError(
                    f"cannot write to {printable(arguments.output)}: {error.strerror}; {written}: make room, and the "
                    "same command goes on from here"
                ) from error
            failed += 1
            reason = " ".join(str(error).split())[:240] or "out of memory"
            print(f"{what} failed: {printable(reason)}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(todo)} failed", file=sys.stderr)
    return 1 if failed else 0


def is_picture_name(arguments: argparse.Namespace) -> bool:
    """Whether a single picture is restored to a file of another name, rather than into a folder."""
    single, output = len(arguments.inputs) == 1 and arguments.inputs[0].is_file(), arguments.output
    return single and output.suffix.lower() in SUFFIXES and not output.is_dir()


def restore_to_file(arguments: argparse.Namespace) -> int:
    """Restore the picture that is named to the file that is named; 0 if all went well."""
    ((source, _),), output = list(pictures(arguments.inputs[0], arguments.output)), arguments.output
    if output.exists():
        raise CommandError(f"{printable(output)} exists already; delete it, or choose another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        restore(load(arguments), source, output.name, lambda name: atomic(output.parent / name), arguments)
    except OSError as error:
        raise CommandError(f"cannot write to {printable(output)}: {error.strerror or error}") from error
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:240] or "out of memory"
        raise CommandError(printable(reason)) from error
    print(f"{printable(source)} -> {printable(output)}")
    return 0


def claim(output: Path) -> OwnFolder:
    """The output folder with the record of what was restored into it; refuses a folder of something else."""
    try:
        folder = OwnFolder.claim(output, KIND)
        with tempfile.TemporaryFile(dir=output):
            return folder
    except ForeignFolderError as error:
        raise CommandError(str(error).replace("another folder", "another --output")) from error
    except OSError as error:
        raise CommandError(f"cannot write to {printable(output)}: {error.strerror}") from error


def is_done(folder: OwnFolder, name: str) -> bool:
    """Whether a picture was restored. One that was changed since is left alone, unless it is damaged."""
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
    parser.add_argument("inputs", nargs="+", type=user_path, metavar="IN", help="pictures, and folders of pictures")
    parser.add_argument(
        "-o",
        "--output",
        default="restored",
        type=user_path,
        metavar="OUT",
        help="folder for the restored pictures, or a file's name for a single picture [restored]",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        type=model_name,
        help=f"folder or Hub name of a restoration pipeline [{DEFAULT_MODEL}, a denoiser]",
    )
    parser.add_argument("--sigma", type=float, help="noise level on the 0-255 scale [estimated for each picture]")
    parser.add_argument("--task", type=int, help="number of the task, for a model that has several")
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="share of the restored picture in the result: 0: the input, 1: fully restored [1]",
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
        help=f"largest number of pixels of a picture; larger ones are refused unread [{DEFAULT_LIMITS.pixels}]",
    )
    parser.add_argument(
        "--device", default="auto", help="device to run on: cpu, cuda, mps, or auto for the GPU if there is one [auto]"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.strength <= 1:
        parser.error(f"--strength is {arguments.strength:g}; it must lie in [0, 1]")
    if arguments.max_pixels < 1:
        parser.error(f"--max-pixels is {arguments.max_pixels}; it must be at least 1")
    if arguments.tile not in ("auto", "none"):
        if not arguments.tile.isdigit():
            parser.error(f"--tile is {arguments.tile!r}; give a number of pixels, auto, or none")
        arguments.tile = int(arguments.tile)
    arguments.tile = None if arguments.tile == "none" else arguments.tile
    return arguments


def model_name(text: str) -> str:
    """A model as a user gives it: a folder here or where the code is, else a name on the Hub."""
    path = shipped(text)
    return str(path) if path.exists() else os.path.expanduser(text)


def plan(inputs: Sequence[Path], output: Path) -> list[tuple[Path, str]]:
    """(picture, its name under `output`) for all that is named; raises rather than overwrite an input or a namesake."""
    jobs = [job for source in inputs for job in pictures(source, output)]
    sources = {source.resolve() for source, _ in jobs}
    taken: dict[Path, Path] = {}
    for source, name in jobs:
        target = output / name
        resolved = target.resolve()
        if resolved in sources:
            raise CommandError(
                f"{printable(target)} would overwrite an input; choose another --output than {printable(output)}"
            )
        if taken.setdefault(resolved, source) != source:
            both = f"{printable(taken[resolved])} and {printable(source)}"
            raise CommandError(f"{both} would both become {printable(target)}; restore them apart")
    return jobs


def pictures(source: Path, output: Path) -> Iterator[tuple[Path, str]]:
    """A picture, or all pictures under a folder, with their names under `output`."""
    if source.is_dir():
        found = list(image_files(source, SUFFIXES))
        if not found:
            raise CommandError(f"{printable(source)} holds no pictures ({' '.join(sorted(SUFFIXES))})")
        within = source.resolve() in output.resolve().parents  # what an output inside the input holds is no input
        for path in found:
            if not (within and path.resolve().is_relative_to(output.resolve())):
                yield path, path.relative_to(source).as_posix()
    elif source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise CommandError(f"{printable(source)} is no picture ({' '.join(sorted(SUFFIXES))})")
        yield source, source.name
    else:
        raise CommandError(f"{printable(source)} does not exist")


def load(arguments: argparse.Namespace):
    """The pipeline; late, since this takes seconds."""
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
    except Exception as error:  # of diffusers and its libraries, about whatever the folder holds
        local = "" if Path(arguments.model).exists() else "no such folder, and from the Hub: "
        raise CommandError(f"cannot load {arguments.model}: {local}{' '.join(str(error).split())[:500]}") from error
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


def restore(
    pipeline,
    source: Path,
    name: str,
    writing: Callable[[str], AbstractContextManager[Path]],
    arguments: argparse.Namespace,
) -> None:
    """One picture: restored, then written under its final name at once, by `writing`."""
    options = {
        option: getattr(arguments, option)
        for option in ("sigma", "task", "strength", "tile", "overlap", "memory", "self_ensemble")
    }
    picture = read(source, Limits(arguments.max_pixels))
    suffix = Path(name).suffix.lower()
    kind = {8: "uint8", 16: "uint16"}.get(arguments.bits, picture.pixels.dtype.name)
    if kind == "uint16" and suffix not in DEEP_SUFFIXES:
        raise ValueError(f"{name} cannot have 16 bits a channel; only {' '.join(sorted(DEEP_SUFFIXES))} can")
    if kind == "float32" and suffix not in FLOAT_SUFFIXES:
        raise ValueError(f"{name} cannot hold floats; only {' '.join(sorted(FLOAT_SUFFIXES))} can, or add --bits 8")
    output_type = "pil" if kind == "uint8" else "np"
    result = pipeline(picture.pixels, output_type=output_type, clip=kind != "float32", **options).images[0]
    with writing(name) as temporary:
        write(result, kind, temporary, picture)
    for note in picture.metadata.notes:
        warnings.warn(f"{printable(source)}: {note}", stacklevel=1)


def read(source: Path, limits: Limits) -> ImageFile:
    """A picture with its metadata; refuses files of several frames, which would be cut to one."""
    try:
        picture = read_image_file(source, limits)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].replace("max_pixels", "--max-pixels")
        raise ValueError(f"{source} cannot be read as an image: {reason}") from error
    if picture.frames > 1:
        raise ValueError(f"it holds {picture.frames} frames; save each as a picture of its own")
    return picture


def write(result: Image.Image | np.ndarray, kind: str, path: Path, picture: ImageFile) -> None:
    """Write with the metadata; those that the format or the library cannot take are dropped, with a note."""
    metadata = picture.metadata.saved()
    for dropped in ((), ("exif",), ("exif", "icc_profile")):
        kept = {key: value for key, value in metadata.items() if key not in dropped}
        try:
            write_as(result, kind, path, kept)
        except OSError as error:
            if error.errno is not None or not kept:  # the system's, not the library's
                raise
        except Exception:  # of Pillow, pypng or tifffile, about metadata
            if not kept:
                raise
        else:
            lost = [key for key in dropped if key in metadata]
            if lost:
                picture.metadata.notes.append(f"its {' and '.join(lost)} cannot be written and is dropped")
            return


def write_as(result: Image.Image | np.ndarray, kind: str, path: Path, metadata: dict[str, bytes]) -> None:
    """8 bits a channel by Pillow, 16 bits and floats of (H, W, C) on [0, 1] by `sixteen_bit.py`."""
    from iptv2_diffusion.data.sixteen_bit import write_16_bit, write_float_tiff

    if kind == "float32":
        write_float_tiff(result, path, **metadata)
    elif kind == "uint16":
        write_16_bit((result.astype("float64") * 65535).round().astype("uint16"), path, **metadata)
    else:
        write_pil(result, path, metadata)


def write_pil(image: Image.Image, path: Path, metadata: dict[str, bytes]) -> None:
    """8 bits a channel, by Pillow."""
    suffix = path.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".bmp", ".ppm") and image.mode in ("RGBA", "LA"):
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    encoded = io.BytesIO()  # so that what fails later is the disk, with its reason, and not Pillow
    image.save(encoded, format=Image.registered_extensions()[suffix], **SAVE_OPTIONS.get(suffix, {}), **metadata)
    path.write_bytes(encoded.getbuffer())


if __name__ == "__main__":
    run()
