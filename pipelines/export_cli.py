"""iptv2-export: write a model as ONNX, or a restorer as one file for chaiNNer and ComfyUI.

    iptv2-export assets/iptv2-emoji64 denoiser.onnx --check
    iptv2-export assets/iptv2-emoji64 decoder.onnx --part vae-decoder --check
    iptv2-export assets/iptv2-denoise-color denoise.onnx --check
    iptv2-export assets/iptv2-denoise-color denoise.safetensors --format spandrel

MODEL is a folder of a pipeline or of a model. The ONNX graph takes every batch size, height and width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iptv2_diffusion.completion import complete
from iptv2_diffusion.files import printable, shipped, user_path
from iptv2_diffusion.messages import one_line

from .command_line import CommandError, run_command

if TYPE_CHECKING:
    from torch import nn

    from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel

# Class of a pipeline -> part -> subfolder
PARTS = {
    "IPTV2Pipeline": {"denoiser": "transformer", "vae-decoder": "vae"},
    "IPTV2RestorationPipeline": {"restorer": "model"},
}
SUFFIXES = {"onnx": ".onnx", "spandrel": ".safetensors"}


def run() -> None:
    """The console script."""
    run_command(main, "stopped; nothing was written")


def main(argv: Sequence[str]) -> int:
    """Export a model; returns 0, or 1 if the check finds a difference."""
    arguments = parse(argv)
    folder = model_folder(arguments.model, arguments.part)
    shown, start = printable(arguments.output), time.monotonic()
    if arguments.output.is_dir() or not arguments.output.parent.is_dir():
        raise CommandError(f"{shown} is a folder, or its folder does not exist; give the name of a file")
    model = load(folder)
    if arguments.format == "spandrel":
        write_spandrel(model, arguments)
    else:
        write_onnx(model, arguments)
    print(f"{shown}: {arguments.output.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "iptv2-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=shipped, metavar="MODEL", help="folder of a pipeline or of a model")
    parser.add_argument("output", type=user_path, metavar="OUT", help="file to write")
    parser.add_argument(
        "--part",
        choices=sorted({part for parts in PARTS.values() for part in parts}),
        help="part of a pipeline [denoiser, or restorer]",
    )
    parser.add_argument("--format", choices=sorted(SUFFIXES), help="format of the file [by the suffix of OUT]")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the ONNX file with the model at seven sizes; fail above a difference of 1e-4",
    )
    parser.add_argument(
        "--sigma", type=float, help="with spandrel: noise level, 0-255 scale [estimated for each image or tile]"
    )
    parser.add_argument("--task", type=int, help="with spandrel: number of the task, for a model that has several")
    complete(parser)
    arguments = parser.parse_args(argv)
    if arguments.format is None:
        formats = [name for name, suffix in SUFFIXES.items() if arguments.output.suffix == suffix]
        if not formats:
            parser.error(f"OUT is {printable(arguments.output)}; end it in .onnx or .safetensors, or give --format")
        arguments.format = formats[0]
    elif arguments.output.suffix != SUFFIXES[arguments.format]:
        parser.error(
            f"OUT is {printable(arguments.output)}; {arguments.format} files end in {SUFFIXES[arguments.format]}"
        )
    if arguments.format == "onnx" and (arguments.sigma is not None or arguments.task is not None):
        parser.error("--sigma and --task are stored in spandrel files; they are inputs of an ONNX graph")
    if arguments.format == "spandrel" and arguments.check:
        parser.error("--check compares ONNX files; leave it out")
    return arguments


def model_folder(folder: Path, part: str | None) -> Path:
    """Return the folder of the model, which may be a part of a pipeline."""
    if not (folder / "model_index.json").is_file():
        if part is not None:
            raise CommandError(f"{printable(folder)} is not a pipeline, so it has no part {part}; leave --part out")
        return folder
    parts = PARTS.get(class_of(folder, "model_index.json") or "")
    if parts is None:
        raise CommandError(f"{printable(folder)} is not a pipeline of IPT-V2")
    if part is not None and part not in parts:
        raise CommandError(f"{printable(folder)} has no {part}; choose --part {' or '.join(parts)}")
    return folder / (parts[part] if part else next(iter(parts.values())))


def class_of(folder: Path, name: str) -> str | None:
    """Return the class that a folder's configuration names."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        reason = f"cannot be read as JSON: {one_line(error, 160)}"
        if not (folder / name).is_file():
            reason = f"has no {name}; give the folder of a pipeline or of a model"
        raise CommandError(f"{printable(folder)} {reason}") from error


def load(folder: Path) -> Any:
    """Load the model of a folder."""
    name = class_of(folder, "config.json")
    from iptv2_diffusion.models.loading import load_vae  # late: torch and diffusers take seconds
    from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
    from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel

    ours = {kind.__name__: kind for kind in (IPTV2Transformer2DModel, IPTV2RestorationModel)}
    if name not in ours and not str(name).startswith("Autoencoder"):
        raise CommandError(f"{printable(folder)} holds a {name}; the command exports denoisers, VAEs and restorers")
    try:
        return ours[name].from_pretrained(folder) if name in ours else load_vae(str(folder), None)
    except Exception as error:  # from diffusers and its libraries, for any content of the folder
        raise CommandError(f"cannot load {printable(folder)}: {one_line(error, 500)}") from error


def write_onnx(model: nn.Module, arguments: argparse.Namespace) -> None:
    """Write the ONNX file; with --check, only if it agrees with the model."""
    from iptv2_diffusion.files import atomic

    from .onnx_export import CHECKED_SIZES, TOLERANCE, check_onnx, export_onnx, graph_of, require

    try:
        if arguments.check:
            require("onnxruntime")
        graph = graph_of(model)
        with atomic(arguments.output) as temporary:
            export_onnx(graph, temporary)
            if arguments.check:
                differences = check_onnx(graph, temporary)
                for (batch, height, width), difference in zip(CHECKED_SIZES, differences, strict=True):
                    print(f"{batch} x {height} x {width}: largest difference {difference:.1e}")
                if not max(differences) <= TOLERANCE:
                    raise CommandError(
                        f"the graph differs from the model by {max(differences):.1e}, more than {TOLERANCE:g}; "
                        f"{printable(arguments.output)} is not written"
                    )
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot write to {printable(arguments.output)}: {error.strerror or error}") from error


def write_spandrel(model: IPTV2RestorationModel, arguments: argparse.Namespace) -> None:
    """Write a restorer as one safetensors file."""
    from .single_file import save_single_file

    try:
        save_single_file(model, arguments.output, arguments.sigma, arguments.task)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot write to {printable(arguments.output)}: {error.strerror or error}") from error


if __name__ == "__main__":
    run()
